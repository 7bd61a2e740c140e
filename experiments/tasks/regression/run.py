"""One regression from data to certified intervals, robust training beside plain.

    python -m experiments.regression {diabetes,sine} [--inference NAME] [--seed N] [--out DIR] ...

writes one new folder, whole or not at all: results.json, figure.png, metrics.jsonl (a line an
epoch), and for each training posterior-NAME.npz and predictions-NAME.npz (a row a datum).
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import bnncert
from bnncert.posterior import spread
from experiments.pipeline.deployment import deploy
from experiments.pipeline.evaluation import SoundnessError
from experiments.pipeline.posteriors import save as save_posterior
from experiments.pipeline.training import TrainingError
from experiments.tasks.regression import figures, network
from experiments.tasks.regression.data import Problem, Table, load
from experiments.tasks.regression.evaluation import Columns, Examine, examiner, measure
from experiments.tasks.regression.settings import (
    TRAININGS,
    Settings,
    output_folder,
    parse,
    to_dict,
)
from experiments.tasks.regression.training import Fitted, trainer

RADIUS = "standard deviations of each feature, over the training data"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    settings = parse(arguments)
    try:
        folder, results = run(settings)
    except (OSError, ValueError, TrainingError, SoundnessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    print(f"{summary(results)}\nfigure: {folder / 'figure.png'}", flush=True)
    return 0


def run(settings: Settings) -> tuple[Path, dict[str, Any]]:
    """Trains, bounds, attacks and draws.

    Args:
        settings: checked (`experiments.tasks.regression.settings.parse`).

    Returns:
        The run's folder, and what its results.json holds.

    Raises:
        FileExistsError: the folder holds something.
        TrainingError, SoundnessError: see there; nothing is left behind.
    """
    problem = load(settings.preset)
    data: Table = getattr(problem, settings.evaluate)
    with new_folder(output_folder(settings)) as folder:
        model = network.build(settings.hidden, len(problem.features))
        fit, examine = trainer(settings, model, problem.train), examiner(settings, model.apply)
        trainings = TRAININGS if settings.training == "both" else (settings.training,)
        found = {}
        for training in trainings:
            fitted = fit(training)
            found[training] = evaluate(settings, problem, data, training, fitted, examine)
            _keep(folder, training, fitted, found[training]["columns"], data)
        results = _results(settings, problem, data, found)
        figure = figures.draw(problem, found, data, to_dict(settings))
        figure.savefig(folder / "figure.png", dpi=150)
        (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return output_folder(settings), results


def evaluate(
    settings: Settings,
    problem: Problem,
    data: Table,
    training: str,
    fitted: Fitted,
    examine: Examine,
) -> dict[str, Any]:
    """Everything about one posterior.

    Returns:
        "results", numbers for results.json; "columns" at the data; "curve", errors over the radius;
        and with one feature "line", the columns along it.
    """
    started = time.monotonic()
    posterior = fitted.posterior
    samples = deploy(posterior, settings.num_samples, settings.seed)
    curve: dict[str, list[float]] = {"eps": []}
    steps = settings.curve_points
    at: dict[int, tuple[Columns, dict[str, Any]]] = {}
    bar = tqdm(range(2 * steps + 1), desc=f"bound and attack, {training}", unit="radius")
    for step in bar:
        eps = settings.eps * step / steps
        columns = examine(posterior, samples, data.x, eps)
        at[step] = columns, measure(columns, data, settings.noise_scale, eps)
        for name in ("attacked_rmse", "certified_rmse"):
            curve.setdefault(name, []).append(at[step][1][name])
        curve["eps"].append(eps)
    columns, measured = at[steps]
    wide = float(spread(posterior))
    last = fitted.history[-1]
    results = {
        **measured,
        "num_samples": len(columns["outputs"]),
        "posterior_scale": wide if math.isfinite(wide) else None,
        **{name: last[name] for name in ("loss", "log_prior", "kl") if name in last},
        "curve": curve,
        "train_seconds": fitted.seconds,
        "evaluate_seconds": time.monotonic() - started,
    }
    found = {"results": results, "columns": columns, "curve": curve}
    if len(problem.features) == 1:
        found["line"] = examine(posterior, samples, figures.line(problem), settings.eps)
    return found


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `path` when all has gone well, and vanishes otherwise.

    Raises:
        FileExistsError: there is something at `path`.
    """
    path = path.expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty: it may hold another run" if path.is_dir() else "is a file"
        raise FileExistsError(f"{path} {what}; nothing was touched. Choose another --out")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def summary(results: Mapping[str, Any]) -> str:
    """The numbers that matter, for the terminal."""
    shown = (
        ("clean", "clean_rmse"),
        ("attacked", "attacked_rmse"),
        ("certified", "certified_rmse"),
        ("nats/datum", "log_likelihood"),
        ("half-width", "certified_half_width"),
        ("coverage", "coverage"),
        ("everywhere", "covered_everywhere"),
    )
    rows = ["          " + "".join(f"{name:>12}" for name, _ in shown)]
    for training in filter(results.__contains__, ("plain", "robust")):
        values = (results[training][name] for _, name in shown)
        rows.append(f"  {training:<8}" + "".join(f"{value:>12.3f}" for value in values))
    expected = {t: results[t]["expectation"] for t in TRAININGS if t in results}
    if all(expected.values()):
        widths = ", ".join(f"{t} {e['certified_half_width']:.3f}" for t, e in expected.items())
        rows.append(f"  half-width around E f of the whole posterior, not of draws: {widths}")
    return (
        f"{results['preset']}, {results['settings']['inference']}: {results['num_data']} "
        f"{results['evaluated_on']} data, eps {results['eps']:g} (in {RADIUS})\n"
        f"errors in standard deviations of the target, which is {results['target_sd']:.3g}\n"
        + "\n".join(rows)
    )


def _results(
    settings: Settings, problem: Problem, data: Table, found: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "preset": settings.preset,
        "inference": settings.inference,
        "seed": settings.seed,
        "evaluated_on": settings.evaluate,
        "num_train": len(problem.train.y),
        "num_data": len(data.y),
        "eps": settings.eps,
        "eps_unit": RADIUS,
        "error_unit": "standard deviations of the target, over the training data",
        "target": problem.target,
        "target_sd": problem.target_sd,
        "noise_scale": settings.noise_scale,
        "kl_weight": settings.kl_weight,
        **{training: each["results"] for training, each in found.items()},
        "tier": "exact; formal under expectation",
        "arithmetic": "float32; real under expectation",
        "settings": to_dict(settings),
        "versions": {"bnncert": bnncert.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }


def _keep(folder: Path, training: str, fitted: Fitted, columns: Columns, data: Table) -> None:
    """The files of one training."""
    save_posterior(folder / f"posterior-{training}.npz", fitted.posterior)
    rows: dict[str, Any] = {"y": data.y, **columns}
    np.savez_compressed(folder / f"predictions-{training}.npz", **rows)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in fitted.history)
