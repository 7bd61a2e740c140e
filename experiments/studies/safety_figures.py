"""What was proved of P_safe, as sentences, a table and a picture.

A row is what `experiments.studies.proved_and_drawn` found of one posterior at one radius.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.special import ndtri

from ..report.palette import LIGHT
from .proved_and_drawn import SAFE, UNSAFE, Row

OUTCOMES = {
    "safe": (LIGHT["certified"], "white", "P(safe) ≥ .99 proved"),
    "open": (LIGHT["undecided"], LIGHT["ink"], "open"),
    "unsafe": (LIGHT["broken"], "white", "P(safe) ≤ .01 proved"),
}
"""Colour, the colour of text on it, and what it is called."""


def picture(rows: Sequence[Row], delta: float) -> Figure:
    """Draws what is decided, by how much, and how many of the draws an attack leaves."""
    rows = list(rows)[::-1]
    figure = Figure((10.0, 1.35 + 0.36 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    bars, ratios, shares = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    for place, row in enumerate(rows):
        _bar(bars, place, row)
        _dots(ratios, place, row, np.asarray(row["each"]["ratio"]))
        if row["draws_each"]:
            _dots(shares, place, row, np.asarray(row["each"]["withstood"]) / row["draws_each"])
        else:
            shares.text(0.5, place, "nothing proved to try", ha="center", va="center",
                        fontsize=8, color=LIGHT["soft"])  # fmt: skip
    bars.set(xlim=(0, 1.006), ylim=(-0.6, len(rows) - 0.4))
    bars.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    bars.set_yticks(range(len(rows)), [_label(row) for row in rows])
    bars.set_xlabel("of the images that the mean network has right")
    needed = -float(ndtri((1 - SAFE - delta) / 9)) if delta < 1 - SAFE else np.inf
    ratios.set_xscale("symlog", linthresh=10, linscale=1)
    ratios.axvline(needed, color=LIGHT["soft"], lw=0.9, ls=":")
    ratios.set_xticks([-1e4, -1e2, 0, 1e2, 1e4])
    ratios.minorticks_off()
    widest = max(np.abs(row["each"]["ratio"]).max() for row in rows)
    ratios.set_xlim(-2 * max(widest, 100), 2 * max(widest, 100))
    ratios.set_xlabel("least E/L (dotted: enough for .99)")
    shares.set_xlim(-0.04, 1.04)
    shares.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    shares.set_xlabel("of the drawn networks withstand")
    titles = ("a  what is proved", "b  by how much", "c  tried against draws")
    for axes, title in zip((bars, ratios, shares), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=LIGHT["ink"])
        _axes(axes)
    bars.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=8.5)
    figure.legend(
        handles=_legend(), loc="outside upper center", ncols=4, frameon=False, fontsize=8.5
    )
    return figure


def _bar(axes: Axes, place: int, row: Row) -> None:
    """The shares of the outcomes with their counts, and where an attack puts the limit."""
    left = 0.0
    for outcome, (colour, ink, _) in OUTCOMES.items():
        share = row[outcome] / row["correct"]
        axes.barh(place, share, 0.62, left, color=colour, edgecolor="white", lw=0.6)
        if share > 0.035:
            axes.text(left + share / 2, place, f"{row[outcome]}", ha="center", va="center",
                      fontsize=8, color=ink)  # fmt: skip
        left += share
    axes.vlines(row["attack_leaves"] / row["correct"], place - 0.42, place + 0.42,
                color=LIGHT["ink"], lw=1.6, zorder=3)  # fmt: skip


def _dots(axes: Axes, place: int, row: Row, values: np.ndarray) -> None:
    """A dot for each image, in the colour of what was proved, those of an outcome in a lane."""
    lower, upper = np.asarray(row["each"]["lower"]), np.asarray(row["each"]["upper"])
    found = {"safe": lower >= SAFE, "unsafe": upper <= UNSAFE}
    found["open"] = ~found["safe"] & ~found["unsafe"]
    heights = place + np.random.default_rng(0).uniform(-0.1, 0.1, len(values))
    for lane, outcome in zip((0.22, 0, -0.22), OUTCOMES, strict=True):
        which = found[outcome]
        axes.plot(values[which], heights[which] + lane, "o", color=OUTCOMES[outcome][0],
                  ms=3.2 if len(values) < 200 else 2, mew=0, alpha=0.75)  # fmt: skip


def _label(row: Row) -> str:
    ours = "run " if row["kind"] == "run" else ""
    size = f"{row['weights'] / 1000:.3g}k, {row['method']}, {1000 * row['seconds_an_image']:.2g} ms"
    return f"{ours}{row['name']}, ε {row['eps']:g}\n{size}"


def _legend() -> list[Artist]:
    patches = [Patch(color=colour, label=text) for colour, _, text in OUTCOMES.values()]
    mark = Line2D([], [], color=LIGHT["ink"], lw=0, marker="|", ms=11, mew=1.6,
                  label="an attack on the mean network leaves")  # fmt: skip
    return [*patches, mark]


def _axes(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["line"])
    axes.tick_params(colors=LIGHT["soft"], labelsize=8, length=0)
    axes.grid(axis="x", color=LIGHT["line"], lw=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=LIGHT["soft"], fontsize=8.5)


def summary(row: Row) -> str:
    """A row in a sentence."""
    text = (
        f"{row['name']}, eps {row['eps']:g}, {row['method']}: of {row['correct']} right, "
        f"{row['safe']} safe, {row['unsafe']} unsafe, {row['open']} open; "
        f"{row['seconds_an_image']:.3g} s an image"
    )
    return text + ("; VACUOUS: nothing is proved of any image" if vacuous(row) else "")


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| posterior | weights | eps | bounds | images | right | attack leaves | P_safe >= .99 "
        "| <= .01 | open | median E/L | s an image | s to compile | attacked draws "
        "| fewest withstand, of the safe | most, of the unsafe |",
        "|---" * 16 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['weights']:,} | {row['eps']:g} | {row['method']} "
            f"| {row['images']:,} | {row['correct']} | {row['attack_leaves']} | {row['safe']} "
            f"| {row['unsafe']} | {row['open']} | {_three_digits(row['median_ratio'])} "
            f"| {row['seconds_an_image']:.2g} | {row['seconds_to_compile']:.1f} "
            f"| {row['pairs']:,} | {_of(row['fewest_where_safe'], row)} "
            f"| {_of(row['most_where_unsafe'], row)} |"
        )
    return "\n".join(lines)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _of(count: int | None, row: Row) -> str:
    return "-" if count is None or not row["draws_each"] else f"{count} of {row['draws_each']}"


def vacuous(row: Row) -> bool:
    """Says whether nothing is proved of any image, on either side."""
    return not any(row["each"]["lower"]) and min(row["each"]["upper"], default=1) == 1


def contradiction(row: Row) -> str:
    """Says of which image what is proved and what was drawn exclude one another."""
    places = [row["each"]["image"].index(i) for i in row["contradicted"]]
    image, lower, upper, withstood = (
        row["each"][name][places[0]] for name in ("image", "lower", "upper", "withstood")
    )
    return (
        f"{row['name']}, eps {row['eps']:g}: test image {image} has P_safe in [{lower:g}, "
        f"{upper:g}] by proof, but an attack left {withstood} of {row['draws_each']} draws "
        f"({len(places)} images so): a bound, the attack or the draws are wrong; please report "
        "this with the posterior"
    )
