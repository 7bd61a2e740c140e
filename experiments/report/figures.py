"""The plots of a report, drawn on Matplotlib's figure objects: no pyplot, no global state.

Every plot takes a figure (or a part of one) and numbers, so the page and the summary picture
share one drawing code. All colours come from the palette, which is how the page can swap them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from bnncert.metrics import Reliability

from ..pipeline.outcomes import OUTCOMES
from .document import interval
from .palette import LIGHT

SMALL = (4.6, 3.3)  # inches; small, so that 9 pt text stays readable on a phone
LOW = (4.6, 1.7)


def accuracy_over_eps(figure: FigureBase, results: Mapping[str, Any]) -> None:
    """Clean, attacked and certified accuracy over the radius; the robust one lies in the band."""
    axes = _axes(figure.subplots())
    curve = {name: np.asarray(results["curve"][name], float) for name in ("eps", *_CURVES)}
    eps, train_eps = float(results["eps"]), results.get("train_eps")
    axes.fill_between(
        curve["eps"],
        curve["certified"],
        curve["attacked"],
        color=LIGHT["undecided"],
        alpha=0.3,
        lw=0,
    )
    marks = "o" if len(curve["eps"]) < 25 else None
    for name, colour in _CURVES.items():
        axes.plot(
            curve["eps"], curve[name], color=colour, marker=marks, ms=3, lw=1.8, clip_on=False
        )
        rate = results[f"{name}_accuracy"]
        error = _around(rate, results["num_test"])
        axes.errorbar(eps, rate, error, color=colour, capsize=3, lw=1.2)
    right = max(curve["eps"].max(), eps, train_eps or 0.0, 1e-6)
    axes.set(xlim=(0, right), ylim=(0, 1.0), xlabel="radius ε (L∞, pixels in [0, 1])")
    _percent(axes)
    _label_ends(axes, [(curve[name][-1], name, colour) for name, colour in _CURVES.items()])
    marked = [(eps, f"test ε = {radius_text(eps)}", "-")]
    if train_eps and not np.isclose(train_eps, eps):
        marked = sorted([*marked, (train_eps, f"training ε = {radius_text(train_eps)}", ":")])
    for place, (radius, text, style) in enumerate(marked):
        axes.axvline(radius, color=LIGHT["soft"], lw=0.8, ls=style, alpha=0.7, zorder=0)
        before = radius > (0.25 if place == 0 else 0.7) * right
        axes.annotate(
            text,
            (radius, 0.03 + 0.07 * place),
            xytext=(-3 if before else 3, 0),
            textcoords="offset points",
            ha="right" if before else "left",
            bbox={"facecolor": LIGHT["card"], "edgecolor": "none", "pad": 0.5},
            color=LIGHT["soft"],
            fontsize=8,
        )


def reliability(figure: FigureBase, bins: Reliability, ece: float) -> None:
    """Accuracy against confidence, bin by bin, over a histogram of the confidences."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _axes(above)
    _axes(below)
    count = np.asarray(bins.count)
    filled = count > 0
    confidence, accuracy = np.asarray(bins.confidence)[filled], np.asarray(bins.accuracy)[filled]
    above.plot([0, 1], [0, 1], color=LIGHT["soft"], lw=1, ls=":")
    above.vlines(confidence, confidence, accuracy, color=LIGHT["broken"], lw=4, alpha=0.35)
    above.errorbar(
        confidence,
        accuracy,
        _around(accuracy, count[filled]),
        fmt="o",
        ms=4,
        lw=1,
        color=LIGHT["certified"],
    )
    for x, y, text in ((0.03, 0.92, "under-confident"), (0.97, 0.05, "over-confident")):
        side = "left" if x < 0.5 else "right"
        above.text(x, y, text, ha=side, color=LIGHT["soft"], fontsize=8, style="italic")
    ground = {"facecolor": LIGHT["card"], "edgecolor": "none", "pad": 1.0}
    said = above.text(0.03, 0.78, f"ECE {ece:.3f}", color=LIGHT["ink"], fontsize=9, weight="bold")
    said.set(bbox=ground, zorder=5)
    above.set(ylim=(0, 1.02), ylabel="accuracy")
    _percent(above)
    edges = np.linspace(0, 1, len(count) + 1)
    below.bar(edges[:-1], count, np.diff(edges) * 0.9, align="edge", color=LIGHT["soft"])
    below.set(xlim=(0, 1), xlabel="confidence of the prediction", ylabel="images")


def margins(
    figure: FigureBase,
    margin: Float[np.ndarray, "images"],
    outcome: Int[np.ndarray, "images"],
) -> None:
    """How far each image is from a proof: a histogram of the margin bounds, by outcome."""
    axes = _axes(figure.subplots())
    axes.hist(
        [np.clip(margin[outcome == number], -1, 1) for number in range(len(OUTCOMES))],
        bins=np.linspace(-1, 1, 41).tolist(),
        stacked=True,
        color=[LIGHT[kind.name] for kind in OUTCOMES],
    )
    axes.axvline(0, color=LIGHT["ink"], lw=1)
    for side, text, offset in (("left", "class proved to stay", 4), ("right", "no proof", -4)):
        axes.annotate(
            text,
            (0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(offset, -2),
            textcoords="offset points",
            ha=side,
            va="top",
            color=LIGHT["soft"],
            fontsize=8,
        )
    axes.set(xlim=(-1, 1), xlabel="certified lower bound on the margin", ylabel="images")


def objective(
    figure: FigureBase, epochs: Sequence[Mapping[str, Any]], unit: str = "nats per image"
) -> None:
    """Loss and negative log-likelihood over the epochs; below, the KL divergence, or -log prior."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    loss, fit = _column(epochs, "loss"), -_column(epochs, "log_likelihood")
    values = np.concatenate([loss, fit])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 20 * values.min():
        above.set_yscale("log")  # before the labels are put at the ends of lines
        above.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        above.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
    _over_epochs(above, epochs, [(loss, "loss", "ink"), (fit, "−log lik.", "broken")])
    known = any(epoch.get("kl") is not None for epoch in epochs)
    prior = _column(epochs, "kl") if known else -_column(epochs, "log_prior")
    _over_epochs(below, epochs, [(prior, "KL" if known else "−log prior", "certified")])
    above.set_ylabel(unit)
    below.set(ylabel=unit, xlabel="epoch")


def validation(figure: FigureBase, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Validation accuracies, where there are any, and the schedules of eps and lam below."""
    accuracies = [
        (_column(epochs, "val_clean_accuracy"), "clean", "ink"),
        (_column(epochs, "val_certified_accuracy"), "certified", "certified"),
    ]
    held_out = any(np.isfinite(values).any() for values, _, _ in accuracies)
    heights = (3, 1, 1) if held_out else (1, 1)
    *above, middle, below = np.ravel(
        figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    )
    for axes in above:
        axes.set_ylim(0, 1)
        _over_epochs(axes, epochs, accuracies)
        axes.set_ylabel("accuracy")
        _percent(axes)
    for axes, field, name, colour in (
        (middle, "eps", "ε", "broken"),
        (below, "lam", "λ", "misclassified"),
    ):
        values = _column(epochs, field)
        axes.set_ylim(0, 1.15 * np.nanmax(values, initial=0) or 1)
        _over_epochs(axes, epochs, [(values, name, colour)])
    below.set_xlabel("epoch")


def tiles(
    figure: FigureBase, pictures: Sequence[tuple[np.ndarray, str, str]], columns: int
) -> None:
    """A grid of images (H, W, C) in [0, 1], each with a caption and the palette's name for it."""
    rows = max(1, -(-len(pictures) // columns))
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid:
        axes.set_axis_off()
    for axes, (image, caption, colour) in zip(grid, pictures, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
        place = {"ha": "center", "va": "top", "transform": axes.transAxes}
        text = axes.text(0.5, -0.04, caption, fontsize=8, color=LIGHT[colour], **place)
        text.set_parse_math(False)  # a class may be called "$5"


def summary(
    results: Mapping[str, Any], pictures: Sequence[tuple[np.ndarray, str, str]], columns: int
) -> Figure:
    """The picture for a README: a few test images beside accuracy over the radius."""
    figure = Figure(figsize=(9.2, 3.1), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(1, 2)
    tiles(figure.add_subfigure(halves[0]), pictures, columns)
    accuracy_over_eps(figure.add_subfigure(halves[1]), results)
    return figure


def standard_error(rate: Any, count: Any) -> Any:
    """The binomial standard error of a rate over `count` images: sqrt(rate (1 - rate) / n)."""
    rate = np.asarray(rate, float)
    return np.sqrt(np.clip(rate * (1 - rate), 0, None) / np.maximum(count, 1))


def radius_text(eps: float) -> str:
    """0.1 as 0.1, and 0.00784... as 2/255: the way the radius was meant."""
    levels, short = round(eps * 255), f"{eps:.3g}"
    if levels and abs(float(short) - eps) > 1e-6 * eps and abs(levels - eps * 255) < 1e-4:
        return f"{levels}/255"
    return short


_CURVES = {"clean": LIGHT["ink"], "attacked": LIGHT["broken"], "certified": LIGHT["certified"]}


def _around(rate: Any, count: Any) -> np.ndarray:
    """The lengths of the bars of a rate's interval, below and above it."""
    rate = np.asarray(rate, float)
    return np.abs(np.stack(interval(rate, count)) - rate).reshape(2, -1)


def _axes(axes: Axes) -> Axes:
    """Two thin spines, quiet ticks, a light horizontal grid: the data is what stands out."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["line"])
    axes.tick_params(colors=LIGHT["soft"], labelsize=8, length=0)
    axes.grid(axis="y", color=LIGHT["line"], lw=0.7)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=LIGHT["soft"], fontsize=8.5)
    return axes


def _percent(axes: Axes) -> None:
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])


def _column(epochs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One quantity over the epochs; NaN where an epoch did not measure it."""
    values = [epoch.get(name) for epoch in epochs]
    return np.array([np.nan if value is None else value for value in values], float)


def _over_epochs(
    axes: Axes,
    epochs: Sequence[Mapping[str, Any]],
    lines: Sequence[tuple[np.ndarray, str, str]],
) -> None:
    """Lines over the epochs with labels at their ends; the eps ramp is shaded."""
    _axes(axes)
    number, eps = _column(epochs, "epoch"), _column(epochs, "eps")
    ends = []
    for values, name, colour in lines:
        measured = np.isfinite(values)
        marks = "o" if measured.sum() < 20 else None
        axes.plot(
            number[measured], values[measured], color=LIGHT[colour], marker=marks, ms=3, lw=1.6
        )
        if measured.any():
            ends.append((values[measured][-1], name, LIGHT[colour]))
    full = number[np.argmax(eps >= np.nanmax(eps, initial=0) * (1 - 1e-6))] if eps.size else 0
    if eps.size and full > number[0]:
        axes.axvspan(number[0], full, color=LIGHT["undecided"], alpha=0.16, lw=0, zorder=0)
    if number.size:
        alone = 0.5 * (number.size == 1)
        axes.set_xlim(number[0] - alone, number[-1] + alone)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right ends of lines, pushed apart where the lines end close together."""
    if not ends:
        return
    ends = sorted(reversed(ends), key=lambda end: end[0])  # of equal ones the first stays above
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = to_axes.transform([(axes.get_xlim()[1], y) for y, _, _ in ends])[:, 1]
    figure = axes.get_figure(root=True)
    height = figure.get_figheight() * axes.get_position().height if figure else 1.0
    gap = 13 / (72 * height)  # a line of 9 pt text
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], max(1.0, gap * (len(places) - 1)))
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - gap)
    for place, (_, text, colour) in zip(places, ends, strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )
