"""Results that `experiments.certify` and `experiments.attack` added to a run: their table."""

from collections.abc import Mapping
from html import escape
from typing import Any


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, by norm and radius, as a section of the page; nothing where there is no result."""
    if not results:
        return ""
    ordered = sorted(results.values(), key=lambda r: (r["norm"] != "inf", r["eps"], r["kind"]))
    rows = "".join(
        f"<tr><th scope=row>{_radius(r)}</th><td>{r['num_images']:,}</td>"
        f"<td>{_percent(r['clean_accuracy'])}</td>"
        f"<td>{_percent(r.get('attacked_accuracy'))}</td>"
        f"<td>{_percent(r.get('certified_accuracy'))}</td>"
        f'<td class="how">{_how(r)}</td><td>{r["seconds"]:,.0f}</td></tr>'
        for r in ordered
    )
    return (
        '<section><h2>More certificates and attacks</h2><div class="scroll"><table><thead><tr>'
        "<th scope=col>ball</th><th scope=col>images</th><th scope=col>clean %</th>"
        "<th scope=col>attacked %</th><th scope=col>certified %</th><th scope=col>by</th>"
        f"<th scope=col>seconds</th></tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Computed after the run, of the same predictor. Several bounds or attacks: '
        "each on the images that the ones before it left open, with the number it decided. Attacks "
        "and certificates of one ball were compared image by image.</p></section>"
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


def _percent(rate: float | None) -> str:
    return "&ndash;" if rate is None else f"{100 * rate:.1f}"
