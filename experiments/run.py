"""One whole run: train, evaluate, certify, attack, report.

    python -m experiments.run PRESET [--inference NAME] [--seed N] [--data-dir DIR] [--out DIR] ...

writes one new folder: config.json, metrics.jsonl, checkpoints/, posterior.npz, results.json,
certificates.npz, gallery.npz and report.html.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bnncert
from bnncert.posterior import Samples, spread
from experiments import outcomes
from experiments.allocator import keep_freed_pages
from experiments.evaluation import Evaluated, SoundnessError, evaluate
from experiments.inference import refine
from experiments.posteriors import save as save_posterior
from experiments.report import write_report
from experiments.setup.config import RunConfig, from_dict, options_of, output_folder, to_dict
from experiments.setup.data import Dataset, load, validation_split
from experiments.setup.methods import name_of
from experiments.setup.models import build
from experiments.setup.presets import parse
from experiments.training import Trained, TrainingError, deployable, train

SPLIT_SEED = 0
"""The held-out images are the same for every seed: a seed varies the run, not the task."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(arguments)
    keep_freed_pages()
    try:
        folder = run(config)
    except (OSError, TypeError, ValueError, TrainingError, SoundnessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "add --resume to the same command to go on"
        print(f"\nstopped; {again} from the last checkpoint", file=sys.stderr)
        return 130
    print(f"report: {folder / 'report.html'}")
    return 0


def run(config: RunConfig) -> Path:
    """Trains, certifies, attacks and reports.

    Args:
        config: checked settings (`experiments.setup.presets.parse`).

    Returns:
        The run's folder.

    Raises:
        FileExistsError: the folder holds another run.
        FileNotFoundError: the data set is not there; or nothing to resume.
        ValueError: `--resume` with other settings than the run's own.
        TrainingError, SoundnessError: see there.
    """
    dataset = load(config.dataset, config.data_dir)  # before anything is written
    folder = open_folder(config)
    model = build(config.model, dataset)
    train_set, held = validation_split(dataset.train, config.train.validation, SPLIT_SEED)
    _say(
        f"{config.preset}: {name_of(config.inference)} on {len(train_set.y)} images, "
        f"{config.train.epochs} epochs, eps up to {config.train.eps:.4g} -> {folder}"
    )
    trained = train(config, model, train_set, held, folder)
    started = time.monotonic()
    posterior, found = refine(config, model, trained.posterior, train_set)
    refinement = time.monotonic() - started if found else None
    trained = trained._replace(posterior=posterior)
    samples = deployable(model, train_set, deploy(config, posterior))
    # With batch-norm a draw is no network without training data: what is kept is what is deployed.
    kept = posterior if model.prepare is None else Samples(samples)
    save_posterior(folder / "posterior.npz", kept)
    evaluated = evaluate(config.eval, model.apply, samples, dataset.test, config.seed)
    found = {**found, "refinement_seconds": refinement}
    results = write_results(config, folder, dataset, trained, evaluated, found)
    write_report(folder)
    _say(summary(results))
    return folder


def deploy(config: RunConfig, posterior: Any) -> Any:
    """The samples whose average is the predictor: all members if they are few enough, or draws."""
    if isinstance(posterior, Samples) and posterior.num_samples <= config.eval.num_samples:
        return posterior.params
    key = jax.random.fold_in(jax.random.key(config.seed), 4)
    return posterior.sample(key, config.eval.num_samples)


def open_folder(config: RunConfig) -> Path:
    """Makes the run's folder and its config.json, or finds the run to resume.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `run`.
    """
    folder = output_folder(config)
    recorded = folder / "config.json"
    if config.resume:
        if not recorded.exists():
            raise FileNotFoundError(
                f"no run to resume in {folder} (there is no config.json); leave out --resume to "
                "start one, or name its folder with --out"
            )
        _check_same(from_dict(json.loads(recorded.read_text())), config)
        return folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    # A config.tmp alone is a run that was killed before it began.
    if folder.exists() and any(path.name != "config.tmp" for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty: it may hold another run, and nothing in it was touched. "
            "Choose another --out, or continue that run with --resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(recorded, to_dict(config))
    return folder


def write_results(
    config: RunConfig,
    folder: Path,
    dataset: Dataset,
    trained: Trained,
    evaluated: Evaluated,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Writes certificates.npz, gallery.npz and, last, results.json: its presence means finished."""
    certificates = evaluated.certificates
    _write_npz(folder / "certificates.npz", certificates)
    chosen = outcomes.pick(certificates, each=8)
    gallery = {
        "index": chosen,
        "image": dataset.test.x[chosen],
        "attacked": evaluated.attacked[chosen],
    }
    _write_npz(folder / "gallery.npz", gallery)
    settings = config.train
    results = {
        **evaluated.results,
        "inference": name_of(config.inference),
        "preset": config.preset,
        "seed": config.seed,
        "dataset": config.dataset,
        "model": config.model,
        "epochs": settings.epochs,
        "train_eps": settings.eps,
        "likelihood": settings.likelihood,
        "random_layers": settings.random_layers,
        "inference_settings": to_dict(config)["inference"],
        "lam": settings.lam,
        "power": settings.power,
        "kl_weight": settings.kl_weight,
        "prior_scale": settings.prior_scale,
        "posterior_scale": float(spread(trained.posterior)),
        "kl": _last_kl(folder),
        "seconds_per_epoch": trained.seconds_per_epoch,
        "train_seconds": trained.train_seconds,
        "versions": {"bnncert": bnncert.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        **found,
        "class_names": list(dataset.class_names),
    }
    _write_json(folder / "results.json", results)
    return results


def summary(results: dict[str, Any]) -> str:
    """The three accuracies and what they mean, for the terminal."""
    names = ("clean", "attacked", "certified")
    rows = "".join(f"  {name:<10}{results[f'{name}_accuracy']:>8.2%}\n" for name in names)
    return (
        f"{results['num_test']} test images, eps {results['eps']:.4g}, "
        f"{results['num_samples']} posterior samples deployed\n{rows}"
        f"  NLL {results['nll']:.4f} nats, ECE {results['ece']:.4f}, "
        f"{results['train_seconds']:.0f} s of training, "
        f"{results['evaluate_seconds']:.0f} s of evaluation"
    )


def _check_same(recorded: RunConfig, asked: RunConfig) -> None:
    """What decides the numbers must be as it was; folders may have moved."""
    before, now = options_of(to_dict(recorded)), options_of(to_dict(asked))
    places = ("out", "data_dir", "resume")
    changed = [
        f"{name}: {before[name]} -> {now[name]}"
        for name in now
        if name in before and name not in places and before[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"--resume with other settings than the run's own ({'; '.join(changed)}); repeat its "
            "options, or start another run with another --out"
        )


def _last_kl(folder: Path) -> float | None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1]).get("kl") if lines else None


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
