"""Curves of what stays certified over spread, as a table and a picture.

A curve is what `experiments.studies.frontier` measured of one run, a row for each factor.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..report.palette import LIGHT

COLOURS = (
    LIGHT["certified"], LIGHT["broken"], LIGHT["undecided"], "#3f8f5f", "#8a4f9e", LIGHT["ink"],
)  # fmt: skip
"""One a run; from the seventh on they come again."""

LEAST = 1e-9
"""Nats: less is rounding, and is drawn here."""

TIMES = 100
"""The dotted line is at so many times the mutual information of the first run's own posterior."""


def picture(curves: Sequence[dict[str, Any]]) -> Figure:
    """Draws the images proved safe and those that draws certify, over mutual information."""
    figure = Figure((6.0, 3.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    handles = []
    for place, found in enumerate(curves):
        colour = COLOURS[place % len(COLOURS)]
        rows = until_nothing(found["rows"])
        information = [max(row["information"], LEAST) for row in rows]
        for name, style in (("safe", "-o"), ("certified", "--")):
            shares = [row[name] for row in rows]
            axes.plot(information, shares, style, ms=2.6, lw=1.5, color=colour)
        row = own(found)
        axes.plot(max(row["information"], LEAST), row["safe"], "D", ms=7, color=colour, mec="white",
                  mew=1.2, zorder=4)  # fmt: skip
        text = f"{found['name']}, ε {found['eps']:g}"
        handles.append(Line2D([], [], color=colour, lw=3, label=text))
    first = own(curves[0])["information"]
    if first > LEAST:
        axes.axvline(TIMES * first, color=LIGHT["soft"], lw=0.9, ls=":", zorder=0)
        text = f" {TIMES} × {curves[0]['name']} as trained"
        axes.annotate(text, (TIMES * first, 1.005), ha="left",
                      xycoords=("data", "axes fraction"), va="bottom", fontsize=7.5,
                      color=LIGHT["soft"])  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("mutual information of label and weights, nats")
    axes.set_ylabel("share of the test images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["line"])
    axes.tick_params(which="both", colors=LIGHT["soft"], labelsize=8, length=0)
    axes.grid(color=LIGHT["line"], lw=0.7)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=LIGHT["soft"], fontsize=8.5)
    ink = LIGHT["ink"]
    handles += [
        Line2D([], [], color=ink, lw=1.5, marker="o", ms=2.6, label="right, P(safe) ≥ .99 proved"),
        Line2D([], [], color=ink, lw=1.5, ls="--", label="certified, drawn networks, IBP"),
        Line2D([], [], color=ink, lw=0, marker="D", ms=6, label="factor 1: as trained"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=7.5)
    return figure


def own(found: dict[str, Any]) -> dict[str, Any]:
    """The row of the posterior as it was trained."""
    return next(row for row in found["rows"] if row["factor"] == 1)


def until_nothing(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The rows up to the first, from factor 1 on, of which nothing is left.

    >>> rows = [{"factor": c, "safe": 0.0, "certified": max(0, 1 - c)} for c in (0.5, 1, 2)]
    >>> [row["factor"] for row in until_nothing(rows)]
    [0.5, 1]
    """
    nothing = [row["factor"] >= 1 and row["safe"] == row["certified"] == 0 for row in rows]
    return rows[: nothing.index(True) + 1] if any(nothing) else rows


def table(curves: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| run | eps | bounds | times the trained deviations | mutual information, nats "
        "| right, P_safe >= .99 | certified, draws | accuracy | NLL | ECE |",
        "|---" * 10 + "|",
    ]
    for found in curves:
        for row in found["rows"]:
            lines.append(
                f"| {found['name']} | {found['eps']:g} | {found['method']} | {row['factor']:.3g} "
                f"| {row['information']:.2g} | {row['safe']:.1%} | {row['certified']:.1%} "
                f"| {row['accuracy']:.1%} | {row['nll']:.3f} | {row['ece']:.3f} |"
            )
    return "\n".join(lines)
