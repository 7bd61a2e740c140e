"""Results that `experiments.certify` and `experiments.attack` added to a run: their table."""

from collections.abc import Mapping
from html import escape
from typing import Any

from .document import percent_interval, table


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, by norm and radius, as a section of the page; nothing where there is no result."""
    if not results:
        return ""
    ordered = sorted(results.values(), key=lambda r: (r["norm"] != "inf", r["eps"], r["kind"]))
    rows = [
        (
            _radius(r),
            f"{r['num_images']:,}",
            _percent(r, "clean"),
            _percent(r, "attacked"),
            _percent(r, "certified"),
            f'<td class="how">{_how(r)}</td>',
            f"{r['seconds']:,.0f}",
        )
        for r in ordered
    ]
    found = table(
        "More certificates and attacks",
        ["ball", "images", "clean %", "attacked %", "certified %", "by", "seconds"],
        rows,
        note="Of the same predictor, computed after the run; below a rate, its 95% interval",
    )
    return (
        f"<section><h2>More certificates and attacks</h2>{found}"
        '<p class="note">Several bounds or attacks: each on the images that the ones before it '
        "left open, with the number it decided. Attacks and certificates of one ball were compared "
        "image by image.</p></section>"
    )


def _radius(record: Mapping[str, Any]) -> str:
    name = "&infin;" if record["norm"] == "inf" else escape(str(record["norm"]))
    return f'<span class="math">|x&prime; &minus; x|<sub>{name}</sub> &le; {record["eps"]:g}</span>'


def _how(record: Mapping[str, Any]) -> str:
    if record["kind"] == "certify":
        counts, more = record["certified_by"], ""
    else:
        counts = record["broken_by"]
        plural = "" if record["restarts"] == 1 else "s"
        more = f"; {record['steps']} steps, {record['restarts']} start{plural}"
    if len(counts) == 1:
        return escape(next(iter(counts))) + more
    return ", ".join(f"{escape(name)}&nbsp;{count:,}" for name, count in counts.items()) + more


def _percent(record: Mapping[str, Any], name: str) -> str:
    rate = record.get(f"{name}_accuracy")
    if rate is None:
        return "&ndash;"
    return f"{100 * rate:.1f}<small>{percent_interval(rate, record['num_images'])}</small>"
