"""One regression from data to certified intervals, robust training beside plain.

A run writes one new folder: config.json; for each training a folder of its name, with metrics.jsonl
and checkpoints/, and posterior-NAME.npz and predictions-NAME.npz (a row a datum); figure.png;
results.json; and, last, report.html.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnncert import likelihood
from bnncert.posterior import spread

from ...pipeline.deployment import deploy
from ...pipeline.folder import PLACES, open_folder
from ...pipeline.inference import Problem
from ...pipeline.posteriors import save as save_posterior
from ...pipeline.training import Trained, train
from ...pipeline.writing import naming, whole, write_json, write_npz, write_text
from ...setup.config import options_of, to_dict
from ...setup.data import Split
from ...setup.logs import SHORT, compiling
from ...setup.methods import name_of
from ...setup.models import Model
from ...setup.provenance import provenance
from . import figures, network, page, tables
from .data import Regression, load
from .evaluation import Columns, Examine, examiner, measure
from .settings import TRAININGS, Settings, train_config

RADIUS = "standard deviations of each feature, over the training data"


def run(settings: Settings) -> tuple[Path, dict[str, Any]]:
    """Trains, bounds, attacks and draws.

    Args:
        settings: checked (`experiments.tasks.regression.settings.parse`).

    Returns:
        The run's folder, and what its results.json holds.

    Raises:
        FileExistsError: the folder holds something.
        FileNotFoundError, ValueError: nothing to resume, or a run of other settings.
        TrainingError, SoundnessError, LockedError, WriteError: see there.
    """
    if settings.data is not None:
        settings = dataclasses.replace(settings, data=settings.data.expanduser().resolve())
    regression = _problem(settings)  # before anything is written
    with open_folder(settings) as folder:
        _check_same_table(settings, folder)
        return folder, _whole(settings, regression, folder)


def _problem(settings: Settings) -> Regression:
    if settings.data is None or settings.target is None:
        return load(settings.preset)
    return tables.read(settings.data, settings.target)


def _check_same_table(settings: Settings, folder: Path) -> None:
    """Notes what tells a table from others, or raises ValueError where the run began on another."""
    if settings.data is None:
        return
    path, own = folder / "own.json", tables.digest(settings.data)
    if not path.is_file():
        write_json(path, {"data": {"source": str(settings.data), "digest": own}})
    elif json.loads(path.read_text())["data"]["digest"] != own:
        raise ValueError(
            f"{settings.data} changed since this run began: put it back as it was, or make another "
            "run with another --out"
        )


def _whole(settings: Settings, regression: Regression, folder: Path) -> dict[str, Any]:
    data: Split = getattr(regression, settings.evaluate)
    model = network.build(settings.hidden, len(regression.features))
    examine = examiner(settings, model.apply)
    trainings = TRAININGS if settings.training == "both" else (settings.training,)
    found = {}
    for training in trainings:
        trained = learn(settings, model, regression.train, training, folder / training)
        found[training] = evaluate(settings, regression, data, training, trained, examine)
        save_posterior(folder / f"posterior-{training}.npz", trained.posterior)
        rows = {"y": data.y, **found[training]["columns"]}
        write_npz(folder / f"predictions-{training}.npz", rows)
    with whole(folder / "figure.png") as unfinished:
        picture = figures.picture(regression, found, data, settings)
        picture.savefig(unfinished, format="png", dpi=150)
    results = _results(settings, regression, data, found)
    write_json(folder / "results.json", results)
    logs = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in found}
    epochs = {name: [json.loads(line) for line in lines] for name, lines in logs.items()}
    told = page.Told(settings, regression, data, found, results, epochs)
    write_text(folder / "report.html", page.page(told))
    return results


def learn(settings: Settings, model: Model, data: Split, training: str, folder: Path) -> Trained:
    """Trains robustly or plainly, from the same start.

        maximise   E_q[ log p_rob(D | w) ] - kl_weight KL(q || p),   p_rob = robust_gaussian

    with the radius up from 0 and lam down from 1; plainly, the radius stays 0 and lam 1.

    Args:
        settings: of the run.
        model: the network.
        data: the training data.
        training: one of `TRAININGS`.
        folder: of this training; it is made if need be.
    """
    log_likelihood = likelihood.robust_gaussian(
        model.apply, noise_scale=settings.noise_scale, method=settings.method
    )
    problem = Problem(model, data, log_likelihood, name=f"train, {training}", options="")
    with naming(folder):
        folder.mkdir(exist_ok=True)
    chosen = train_config(settings, training)
    return train(settings.inference, chosen, problem, settings.seed, folder)


def evaluate(
    settings: Settings,
    regression: Regression,
    data: Split,
    training: str,
    trained: Trained,
    examine: Examine,
) -> dict[str, Any]:
    """Everything about one posterior.

    Returns:
        "results", numbers for results.json; "columns" at the data; "curve", errors over the radius;
        and with one feature "line", the columns along it.
    """
    started = time.monotonic()
    posterior = trained.posterior
    samples = deploy(posterior, settings.num_samples, settings.seed)
    curve: dict[str, list[float]] = {"eps": []}
    steps = settings.curve_points
    at: dict[int, tuple[Columns, dict[str, Any]]] = {}
    name, total = f"bound and attack, {training}", 2 * steps + 1
    with tqdm(total=total, desc=name, unit="radius", delay=SHORT) as bar:
        for step in range(total):
            eps = settings.eps * step / steps
            what = compiling("bounds and attack and running the first radius", bar, 1)
            with nullcontext() if step else what:
                columns = examine(posterior, samples, data.x, eps)
            at[step] = columns, measure(columns, data, settings.noise_scale, eps)
            for name in ("attacked_rmse", "certified_rmse"):
                curve.setdefault(name, []).append(at[step][1][name])
            curve["eps"].append(eps)
            bar.update()
    columns, measured = at[steps]
    wide = float(spread(posterior))
    results = {
        **measured,
        "num_samples": len(columns["outputs"]),
        "posterior_scale": wide if math.isfinite(wide) else None,
        **{n: trained.last[n] for n in ("loss", "log_prior", "kl") if n in trained.last},
        "curve": curve,
        "train_seconds": trained.train_seconds,
        "evaluate_seconds": time.monotonic() - started,
    }
    found = {"results": results, "columns": columns, "curve": curve}
    if len(regression.features) == 1:
        found["line"] = examine(posterior, samples, figures.line(regression), settings.eps)
    return found


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
        f"{results['preset']}, {results['inference']}: {results['num_data']} "
        f"{results['evaluated_on']} data, eps {results['eps']:g} (in {RADIUS})\n"
        f"errors in standard deviations of the target, which is {results['target_sd']:.3g}\n"
        + "\n".join(rows)
    )


def _results(
    settings: Settings, regression: Regression, data: Split, found: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "preset": settings.preset,
        "inference": name_of(settings.inference),
        "seed": settings.seed,
        "evaluated_on": settings.evaluate,
        "num_train": len(regression.train.y),
        "num_data": len(data.y),
        "eps": settings.eps,
        "eps_unit": RADIUS,
        "error_unit": "standard deviations of the target, over the training data",
        "target": regression.target,
        "target_sd": regression.target_sd,
        "noise_scale": settings.noise_scale,
        "kl_weight": settings.kl_weight,
        **{training: each["results"] for training, each in found.items()},
        "tier": "exact; formal under expectation",
        "arithmetic": "float32; real under expectation",
        "settings": {n: v for n, v in options_of(to_dict(settings)).items() if n not in PLACES},
        **provenance(),
    }
