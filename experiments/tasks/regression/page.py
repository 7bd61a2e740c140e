"""The page of a regression's run: the error of the mean, under attack, and what is proved of it.

Errors are in the target's own units; radii stay in standard deviations of the features.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.figure import FigureBase

from ...report import figures as plots
from ...report.document import cautions, document, figure, percent_interval, table
from ...report.fineprint import portable, reproduced
from ...setup.config import options_of, to_dict
from ...setup.data import Split
from ...setup.methods import about, name_of
from ...setup.requirements import flag
from . import figures
from .data import Regression
from .settings import DESCRIBED, Settings, preset

FEW, AGREEING = 1000, 0.1
"""Data under which an interval is told; deviation of the draws over the noise's, likewise."""


class Told(NamedTuple):
    """A finished run.

    Attributes:
        settings: of the run.
        problem: what was learned.
        data: what was evaluated.
        found: for each training "results", "columns", "curve", and with one feature "line".
        results: of results.json.
        epochs: for each training, what was logged.
    """

    settings: Settings
    problem: Regression
    data: Split
    found: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Any]
    epochs: Mapping[str, Sequence[Mapping[str, Any]]]


def page(run: Told) -> str:
    """The whole document."""
    parts = (_headline, _cautions, _numbers, _picture, _training, _statement, _reproduction)
    return document(f"Regression: {run.problem.name}", "".join(part(run) for part in parts))


def _headline(run: Told) -> str:
    s, r = run.settings, run.results
    first = next(name for name in ("robust", "plain") if name in run.found)
    rmse = {n: r[first][f"{n}_rmse"] * r["target_sd"] for n in ("clean", "attacked", "certified")}
    method = name_of(s.inference)
    trained = " beside ".join(f"{name} training" for name in _trainings(run))
    split = "test data" if s.evaluate == "test" else "validation data"
    return (
        f"<h1>{escape(run.problem.name)}, {escape(DESCRIBED[s.preset])}; {method} "
        f"({escape(about(method))}), {trained}</h1>"
        f'<p class="lead">On {r["num_data"]:,} {split} the mean of the posterior by {first} '
        f"training has a root mean square error of <b>{rmse['clean']:.3g}</b>; an attack raises it "
        f'to <b>{rmse["attacked"]:.3g}</b>, and <b class="certified">at most '
        f"{rmse['certified']:.3g} is proved</b> for every perturbation with {_ball(s.eps)} "
        "standard deviations of each feature.</p>"
        f'<p class="soft">Of {escape(run.problem.target)}, whose standard deviation is '
        f"{r['target_sd']:.3g}: predicting the training data's mean has about that error.</p>"
    )


def _cautions(run: Told) -> str:
    s, r = run.settings, run.results
    found = []
    if s.evaluate != "test":
        found.append(
            "<b>These are validation data</b>, on which settings are chosen: numbers to report "
            "are those of <code>--evaluate test</code>."
        )
    if s.eps == 0:
        found.append(
            "<b>The radius is 0.</b> Nothing is perturbed: what is certified is the error as it is."
        )
    if "robust" in run.found and s.eps > 1.001 * s.train_eps:
        found.append(
            f"<b>Tested farther out than trained.</b> Robust training went up to {s.train_eps:g}, "
            f"and the test radius is {s.eps:g}."
        )
    if r["num_data"] < FEW:
        covered = ", ".join(
            f"{percent_interval(r[name]['coverage'], r['num_data'])}% ({name})"
            for name in _trainings(run)
        )
        found.append(
            f"<b>{r['num_data']} data are few.</b> As a sample of others like them, the coverage "
            f"of the 95% interval lies, with 95% confidence, within {covered}."
        )
    close = [n for n in _trainings(run) if r[n]["deviation"] < AGREEING * s.noise_scale]
    if close and r[close[0]]["num_samples"] > 1:
        told = ", ".join(f"{r[name]['deviation']:.2g} ({name})" for name in close)
        why = (
            f" The KL weight of {s.kl_weight:g} tempers the posterior, as if every datum had been "
            f"seen {1 / s.kl_weight:,.0f} times."
            if 0 < s.kl_weight < 1
            else ""
        )
        found.append(
            f"<b>The networks agree</b>: their outputs deviate by {told}, and the noise that is "
            f"assumed is {s.noise_scale:g}, in standard deviations of the target. The width of the "
            f"intervals is the noise's, and tells little of where data are missing.{why}"
        )
    return cautions(found)


ROWS: tuple[tuple[str, str, str, bool], ...] = (
    ("clean_rmse", "Error", "root mean square, of the mean", True),
    ("attacked_rmse", "Error under attack", "found: the worst is no less", True),
    ("certified_rmse", "Error certified", "proved: the worst is no more", True),
    ("attacked_half_width", "Reach of the mean, attacked", "half the range, on average", True),
    ("certified_half_width", "Reach of the mean, certified", "half the range, on average", True),
    ("interval_half_width", "95% interval", "half its width, on average", True),
    ("certified_interval_half_width", "The same of all x&prime;", "certified", True),
    ("coverage", "Covered", "of the data, by the 95% interval", False),
    (
        "covered_everywhere",
        "Covered everywhere",
        "proved, by that of every x&prime;",
        False,
    ),
    ("deviation", "Deviation of the networks", "on average", True),
)
"""Of results.json: a field, its name, what it is, and whether it is in units of the target."""


def _numbers(run: Told) -> str:
    r, trainings = run.results, _trainings(run)

    def shown(name: str, field: str, scaled: bool) -> str:
        value = r[name][field]
        return f"{value * r['target_sd']:.3g}" if scaled else f"{100 * value:.1f}%"

    rows = [
        (f"{title}<small> {hint}</small>", *(shown(name, field, scaled) for name in trainings))
        for field, title, hint, scaled in ROWS
    ]
    rows.append(
        (
            "Log-likelihood<small> nats a datum, standardised</small>",
            *(f"{r[name]['log_likelihood']:.3f}" for name in trainings),
        )
    )
    expected = [r[name]["expectation"] for name in trainings]
    if all(expected):
        rows.append(
            (
                "Reach of E f<small> of the whole posterior: formal tier, real arithmetic</small>",
                *(f"{each['certified_half_width'] * r['target_sd']:.3g}" for each in expected),
            )
        )
    found = table(
        "Errors, intervals and coverage",
        ["", *(f"{name} training" for name in trainings)],
        rows,
        kind="values",
        note=f"{r['num_data']:,} {run.settings.evaluate} data, {_ball(run.settings.eps)}; in units "
        "of the target unless they are shares",
    )
    return (
        f'<section class="panel"><h2>Clean &le; attacked &le; certified</h2>{found}<p class="note">'
        f"Attack: {run.settings.attack_steps} gradient-sign steps from each of "
        f"{run.settings.attack_restarts} starts. Bounds: {run.settings.certify_method}. The true "
        "worst error lies between the attacked and the certified one.</p></section>"
    )


def _picture(run: Told) -> str:
    def draw(f: FigureBase) -> None:
        figures.draw(f, run.problem, run.found, run.data, run.settings)

    one = len(run.problem.features) == 1
    caption = (
        "Along the feature: the predictive mean with its 95% interval, the range of the mean over "
        "the ball around each point, and the interval of all points of the ball."
        if one
        else "Each datum's predicted against its measured value, with the range of predictions "
        "that an attack reaches and the one that is proved; right, the errors over the radius: "
        "the worst error lies in the band."
    )
    title = "What is predicted, and what is proved of it"
    said = "; ".join(
        f"{name} training: error {each['results']['clean_rmse']:.2g}, certified "
        f"{each['results']['certified_rmse']:.2g} standard deviations of the target"
        for name, each in run.found.items()
    )
    size = figures.size(run.problem, run.found)
    found = figure(title, draw, caption, size=size, said=said, wide=True)
    if one:
        found += figure(
            "Error over the radius",
            lambda f: figures.errors(f.subplots(), run.problem, run.found, run.settings),
            "Attacked and certified root mean square error: the worst one lies in the band.",
            size=plots.SMALL,
            said=f"Up to radius {2 * run.settings.eps:g}; {said}",
        )
    return f'<div class="stack">{found}</div>'


def _training(run: Told) -> str:
    drawn = "".join(
        figure(
            f"Objective, {name} training",
            lambda f, lines=lines: plots.objective(f, lines, "nats per datum"),
            "Training loss and negative log-likelihood; below, the KL divergence of posterior and "
            "prior (of single networks: minus their log prior).",
            size=plots.SMALL,
            said=f"Over {len(lines)} epochs, the loss ends at {lines[-1]['loss']:.3g}.",
        )
        for name, lines in run.epochs.items()
    )
    return f'<h2>Training</h2><div class="pair">{drawn}</div>'


def _statement(run: Told) -> str:
    networks = next(iter(run.found.values()))["results"]["num_samples"]
    predictor = f"the average of {networks} networks" if networks > 1 else "one network"
    items = [
        f"<b>Which predictor.</b> {predictor.capitalize()} with fixed weights, which is what is "
        "deployed (<b>exact</b> tier): nothing is estimated from draws. The row of E f, where "
        "there is one, is about the whole Gaussian posterior (<b>formal</b> tier).",
        f"<b>Which inputs.</b> All x&prime; with {_ball(run.settings.eps)} standard deviations of "
        "each feature over the training data, every feature at once. A change that no patient or "
        "sensor makes counts too; a larger one is not covered.",
        "<b>Which statement.</b> The mean at every such x&prime; lies in its certified range. That "
        "the target of x&prime; is still y is an assumption, which the certified error makes.",
        "<b>Which arithmetic.</b> The bounds are rounded outward and hold for the networks in "
        "<b>float32</b>; those of E f hold in real arithmetic.",
        "<b>Coverage is counted.</b> That the 95% interval covers a datum is found on these data; "
        "covered everywhere means that no x&prime; of the ball takes it out of its interval.",
    ]
    listed = "".join(f"<li>{item}</li>" for item in items)
    return (
        '<section><h2>What is certified and what is not</h2><ul class="plain">'
        f"{listed}</ul></section>"
    )


def _reproduction(run: Told) -> str:
    spent = [
        math.fsum(each["results"][field] for each in run.found.values())
        for field in ("train_seconds", "evaluate_seconds")
    ]
    taken = f"Training took {spent[0]:,.0f} s, evaluation {spent[1]:,.0f} s."
    return reproduced(command(run.settings), taken, run.results, to_dict(run.settings))


def command(settings: Settings) -> str:
    """The command line of a run: every option in which it differs from its preset.

    >>> import dataclasses
    >>> command(dataclasses.replace(preset("sine"), seed=3, hidden=(8, 8)))
    'python -m experiments.regression sine --inference ensemble --seed 3 --hidden 8 8'
    """
    method = name_of(settings.inference)
    asked = options_of(to_dict(settings))
    usual = options_of(to_dict(preset(settings.preset, method)))
    words = ["python", "-m", "experiments.regression", settings.preset]
    for name, value in asked.items():
        if name in ("preset", "out", "resume"):
            continue
        if name in ("inference", "seed") or value != usual[name]:
            value = portable(value)
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _trainings(run: Told) -> list[str]:
    return [name for name in ("robust", "plain") if name in run.found]


def _ball(eps: float) -> str:
    norm = "|x&prime; &minus; x|<sub>&infin;</sub>"
    return f'<span class="math">{norm} &le; {eps:g}</span>'
