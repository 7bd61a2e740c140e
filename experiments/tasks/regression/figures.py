"""The pictures of a regression: the sine with its bands, or each patient with what is proved.

Targets are drawn in their own units; radii stay in standard deviations of the features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...report.palette import LIGHT
from .data import Regression, Split
from .evaluation import WIDTH, Columns
from .settings import Settings

UNITS = {"diabetes": "score", "sine": "in units of y"}
"""Of the targets, in a word; those of a table are its own."""

GRID = 401
"""Points of the line that the sine is drawn along."""

_DASHES = (0, (4, 2))
_ORDER = ("plain", "robust")


def size(problem: Regression, found: Mapping[str, Any]) -> tuple[float, float]:
    """Of the picture, in inches: a panel for each training, and with several features one more."""
    if len(problem.features) == 1:
        return 4.0 * len(found) + 0.6, 4.4
    return 3.4 * (len(found) + 1) + 0.6, 3.9


def draw(
    figure: FigureBase,
    problem: Regression,
    found: Mapping[str, Mapping[str, Any]],
    data: Split,
    settings: Settings,
) -> None:
    """The picture of a problem: `curves` with one feature, `patients` with several.

    Args:
        figure: to draw on, of `size`.
        problem: what was learned.
        found: for each training "columns" at `data`, "curve" of errors, and "line", the columns at
            `line(problem)`.
        data: what was evaluated.
        settings: eps, noise_scale, evaluate.
    """
    known = {training: found[training] for training in _ORDER if training in found}
    if len(problem.features) == 1:
        curves(figure, problem, {n: each["line"] for n, each in known.items()}, settings)
    else:
        patients(figure, problem, known, data, settings)


def picture(
    problem: Regression,
    found: Mapping[str, Mapping[str, Any]],
    data: Split,
    settings: Settings,
) -> Figure:
    """`draw` on a figure of its own, to be saved."""
    figure = Figure(figsize=size(problem, found), layout="constrained", facecolor=LIGHT["card"])
    FigureCanvasAgg(figure)
    draw(figure, problem, found, data, settings)
    return figure


def line(problem: Regression) -> np.ndarray:
    """The points a problem of one feature is drawn at, standardised: (GRID, 1), float32."""
    x = problem.train.x[:, 0]
    margin = 0.1 * float(np.ptp(x))
    return np.linspace(x.min() - margin, x.max() + margin, GRID, dtype=np.float32)[:, None]


def curves(
    figure: FigureBase, problem: Regression, drawn: Mapping[str, Columns], settings: Settings
) -> None:
    """Along the one feature: predictive and certified bands, one panel a training.

    Args:
        figure: to draw on.
        problem: with its training data.
        drawn: for each training, the columns at `line(problem)`.
        settings: as for `draw`.
    """
    panels = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
    x, points = _feature(problem, line(problem)), _feature(problem, problem.train.x)
    y, sine = _target(problem, problem.train.y), problem.name == "sine"
    for axes, (training, columns) in zip(panels, drawn.items(), strict=True):
        _style(axes, f"{training} training")
        mean, lower, upper = (_target(problem, columns[n]) for n in ("mean", "lower", "upper"))
        sd, widest = (
            WIDTH * problem.target_sd * np.sqrt(columns[n] + settings.noise_scale**2)
            for n in ("variance", "most")
        )
        axes.fill_between(x, mean - sd, mean + sd, color=LIGHT["undecided"], alpha=0.35, lw=0)
        axes.fill_between(x, lower, upper, color=LIGHT["certified"], alpha=0.4, lw=0)
        for edge in (lower - widest, upper + widest):
            axes.plot(x, edge, color=LIGHT["certified"], lw=1, ls=_DASHES)
        if sine:
            axes.plot(x, np.sin(x), color=LIGHT["soft"], lw=1.2, ls=":")
        axes.plot(x, mean, color=LIGHT["ink"], lw=1.4)
        axes.plot(points, y, "o", ms=3.2, mec=LIGHT["card"], mew=0.4, color=LIGHT["broken"])
        axes.set_xlabel(problem.features[0])
    panels[0].set(xlim=(x[0], x[-1]), ylim=(-2.0, 2.3) if sine else None)
    panels[0].set_ylabel(problem.target)
    eps, own = settings.eps, settings.eps * float(problem.feature_sd[0])
    names = [
        Line2D([], [], ls="", marker="o", ms=4, color=LIGHT["broken"], label="training data"),
        *([Line2D([], [], color=LIGHT["soft"], lw=1.2, ls=":", label="sin x")] if sine else []),
        Line2D([], [], color=LIGHT["ink"], lw=1.4, label="predictive mean"),
        Patch(color=LIGHT["undecided"], alpha=0.35, lw=0, label="predictive mean ± 2 sd"),
        Patch(color=LIGHT["certified"], alpha=0.4, lw=0, label="certified: the mean at every x'"),
        Line2D([], [], color=LIGHT["certified"], lw=1, ls=_DASHES,
               label="certified: mean ± 2 sd at every x'"),
    ]  # fmt: skip
    _legend(
        figure, names, f"|x' - x| ≤ ε = {eps:g} sd of x = {own:.2g}{' radians' if sine else ''}"
    )


def patients(
    figure: FigureBase,
    problem: Regression,
    found: Mapping[str, Mapping[str, Any]],
    data: Split,
    settings: Settings,
) -> None:
    """Each datum's range of means, attacked and certified, and the errors over the radius.

    Args:
        figure: to draw on.
        problem: for its units.
        found: for each training "columns" and "curve".
        data: what was evaluated.
        settings: as for `draw`.
    """
    *panels, last = figure.subplots(1, len(found) + 1, squeeze=False)[0]
    y = _target(problem, data.y)
    ends = _ends(problem, y, found)
    for axes, (training, each) in zip(panels, found.items(), strict=True):
        _style(axes, f"{training} training")
        columns = {n: _target(problem, v) for n, v in each["columns"].items() if v.ndim == 1}
        axes.axline((ends[0], ends[0]), slope=1, color=LIGHT["soft"], lw=0.9, ls=":")
        axes.vlines(y, columns["lower"], columns["upper"], color=LIGHT["certified"], lw=1.6)
        axes.vlines(
            y, columns["attacked_low"], columns["attacked_high"], color=LIGHT["undecided"], lw=1.6
        )
        axes.plot(y, columns["mean"], "o", ms=2.6, color=LIGHT["ink"])
        axes.set(xlim=ends, ylim=ends, xlabel=f"{problem.target}, measured")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    unit = UNITS.get(problem.name)
    panels[0].set_ylabel("predicted" + (f" ({unit})" if unit else ""))
    errors(last, problem, found, settings)
    eps = settings.eps
    names = [
        Line2D([], [], ls="", marker="o", ms=4, color=LIGHT["ink"], label="predictive mean"),
        Line2D([], [], color=LIGHT["undecided"], lw=3, label="reached by an attack"),
        Line2D([], [], color=LIGHT["certified"], lw=3, label="certified: the mean at every x'"),
    ]
    rows = "patients" if problem.name == "diabetes" else "rows"
    about = f"{len(y)} {settings.evaluate} {rows}, |x' - x|∞ ≤ ε = {eps:g} sd of each feature"
    _legend(figure, names, about)


def _ends(
    problem: Regression, y: np.ndarray, found: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float]:
    """Where the axes of targets begin and end."""
    if problem.name == "diabetes":
        return 0.0, 360.0
    seen = [y, *(_target(problem, each["columns"]["mean"]) for each in found.values())]
    low, high = (float(end(np.concatenate(seen))) for end in (np.min, np.max))
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def errors(
    axes: Axes,
    problem: Regression,
    found: Mapping[str, Mapping[str, Any]],
    settings: Settings,
) -> None:
    """Attacked and certified error over the radius: the worst case lies in the band.

    Args:
        axes: to draw on.
        problem: for its units.
        found: for each training its "curve".
        settings: for eps.
    """
    _style(axes, "root mean square error")
    colours = {"plain": LIGHT["broken"], "robust": LIGHT["certified"]}
    for training, each in found.items():
        curve = each["curve"]
        eps = np.asarray(curve["eps"])
        low, high = (
            problem.target_sd * np.asarray(curve[f"{name}_rmse"])
            for name in ("attacked", "certified")
        )
        axes.fill_between(eps, low, high, color=colours[training], alpha=0.22, lw=0)
        axes.plot(eps, low, color=colours[training], lw=1.4, ls=_DASHES)
        axes.plot(eps, high, color=colours[training], lw=1.6)
    axes.axvline(settings.eps, color=LIGHT["soft"], lw=0.8, alpha=0.7, zorder=0)
    axes.annotate(
        f"ε = {settings.eps:g}",
        (settings.eps, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=LIGHT["soft"],
        fontsize=8,
    )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="radius ε (sd of each feature)", xlim=(0, None))
    unit = UNITS.get(problem.name)
    axes.set_ylabel("error" + (f" ({unit})" if unit else ""))
    axes.legend(
        handles=[
            *(Patch(color=colours[name], alpha=0.5, lw=0, label=name) for name in found),
            Line2D([], [], color=LIGHT["soft"], lw=1.6, label="certified"),
            Line2D([], [], color=LIGHT["soft"], lw=1.4, ls=_DASHES, label="attacked"),
        ],
        loc="upper left",
        frameon=False,
        fontsize=8,
        labelcolor=LIGHT["ink"],
    )


def _target(problem: Regression, values: Any) -> np.ndarray:
    return np.asarray(values, np.float64) * problem.target_sd + problem.target_mean


def _feature(problem: Regression, x: np.ndarray) -> np.ndarray:
    return x[:, 0] * problem.feature_sd[0] + problem.feature_mean[0]


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=LIGHT["ink"])
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["line"])
    axes.tick_params(colors=LIGHT["soft"], labelsize=8, length=0)
    axes.grid(color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=LIGHT["soft"], fontsize=8.5)


def _legend(figure: FigureBase, handles: Sequence[Artist], title: str) -> None:
    """Below the panels, where it covers nothing."""
    legend = figure.legend(
        handles=handles,
        title=title,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=LIGHT["ink"],
        title_fontsize=8.5,
    )
    legend.get_title().set_color(LIGHT["soft"])
