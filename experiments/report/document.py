"""What every report is made of: the page around it, figures, tables, and intervals of rates.

A page is one file that loads nothing: plots are inline SVG, images inline PNG. It is read on a
phone (tables and wide figures scroll in boxes of their own), in the dark, on paper, and aloud.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase
from scipy import stats

from . import palette


def document(title: str, body: str) -> str:
    """The whole page around a body."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: certified robustness</title><style>{palette.css()}{css}</style>"
        f"</head><body><main>{body}</main></body></html>\n"
    )


def figure(
    title: str,
    draw: Callable[[FigureBase], None],
    caption: str,
    *,
    size: tuple[float, float],
    said: str = "",
    wide: bool = False,
) -> str:
    """A plot with its title and caption.

    Args:
        title: in plain text.
        draw: puts the plot on an empty figure.
        caption: HTML.
        size: in inches.
        said: what the plot shows, after its title, for those who do not see it.
        wide: it scrolls in a box of its own where the page is narrow.
    """
    plot = palette.svg(draw, size, f"{title}. {said}".strip())
    if wide:
        plot = scrolled(title, plot)
    kind = "panel wide" if wide else "panel"
    return (
        f'<figure class="{kind}"><h3>{escape(title)}</h3>{plot}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(
    name: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "", note: str = ""
) -> str:
    """A table in a box of its own, which scrolls where the page is narrow.

    Args:
        name: what it is, in plain text, for those who do not see it.
        head: HTML of the column heads; the first may be empty; none at all for two columns.
        rows: HTML of the cells, or a cell with its tag; the first of each row names it.
        kind: its class.
        note: its caption, in HTML.
    """
    heads = "".join(f"<th scope=col>{cell}</th>" if cell else "<td></td>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{first}</th>"
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    caption = f"<caption>{note}</caption>" if note else ""
    thead = f"<thead><tr>{heads}</tr></thead>" if head else ""
    of_kind = f' class="{kind}"' if kind else ""
    return scrolled(name, f"<table{of_kind}>{caption}{thead}<tbody>{body}</tbody></table>")


def scrolled(name: str, inner: str) -> str:
    """A box that scrolls by itself, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{inner}</div>'
    )


def cautions(found: Sequence[str]) -> str:
    """What a reader could take for more than it is, as a section; nothing where there is none.

    Args:
        found: HTML, an item each.
    """
    if not found:
        return ""
    items = "".join(f"<li>{item}</li>" for item in found)
    return (
        '<section class="caution" aria-label="Read with care"><h2>Read with care</h2>'
        f'<ul class="plain">{items}</ul></section>'
    )


def interval(rate: Any, count: Any) -> tuple[np.ndarray, np.ndarray]:
    """The 95% confidence interval of a rate that was counted (Clopper and Pearson's, exact).

    Args:
        rate: in [0, 1].
        count: what it is a rate of.

    >>> low, high = interval(1.0, 20)  # 20 of 20: no rate of errors under 1 in 6 is ruled out
    >>> float(low.round(3)), float(high)
    (0.832, 1.0)
    """
    count = np.maximum(np.asarray(count, float), 1)
    hits = np.round(np.asarray(rate, float) * count)
    with np.errstate(invalid="ignore"):  # at 0 and at all, where the ends are known
        low = np.where(hits > 0, stats.beta.ppf(0.025, hits, count - hits + 1), 0.0)
        high = np.where(hits < count, stats.beta.ppf(0.975, hits + 1, count - hits), 1.0)
    return low, high


def percent_interval(rate: float, count: int) -> str:
    """The interval in percent, as text: "91.2 to 95.6"."""
    low, high = interval(rate, count)
    return f"{100 * low:.1f} to {100 * high:.1f}"
