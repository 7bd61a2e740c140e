"""Classification of images: train, evaluate, certify, attack, report.

A run writes one new folder: config.json, metrics.jsonl, checkpoints/, posterior.npz, results.json,
certificates.npz, gallery.npz and report.html.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from bnncert import attack, certify, likelihood
from bnncert import prior as priors
from bnncert.posterior import Samples, spread
from bnncert.sets import ball
from bnncert.types import Apply, LogLikelihood

from ..pipeline import outcomes
from ..pipeline.deployment import deploy, deployable
from ..pipeline.evaluation import Evaluated, evaluate
from ..pipeline.folder import open_folder
from ..pipeline.inference import Measure, Problem, refine
from ..pipeline.posteriors import load as load_posterior
from ..pipeline.posteriors import save as save_posterior
from ..pipeline.training import Trained, train
from ..pipeline.writing import write_json, write_npz
from ..report.files import write_report
from ..setup import subject
from ..setup.config import RunConfig, to_dict
from ..setup.data import Dataset, Split, validation_split
from ..setup.methods import name_of
from ..setup.models import Model
from ..setup.provenance import provenance
from ..setup.settings import PIXELS, TrainConfig

SPLIT_SEED = 0
"""The held-out images are the same for every seed: a seed varies the run, not the task."""


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
        TrainingError, SoundnessError, LockedError, WriteError: see there.
    """
    dataset = subject.read(config)  # before anything is written
    config = subject.settled(config, dataset)
    model = begun_at(subject.build(config, dataset), config.start)
    with open_folder(config) as folder:
        own = subject.identity(config, dataset)
        if config.resume:
            subject.check(folder, config, dataset)
        elif own:
            write_json(folder / subject.RECORD, own)
        return _whole(config, dataset, model, folder)


def _whole(config: RunConfig, dataset: Dataset, model: Model, folder: Path) -> Path:
    """All of a run, from its settings and data to the report in its folder."""
    train_set, held = validation_split(dataset.train, config.train.validation, SPLIT_SEED)
    _say(
        f"{config.preset}: {name_of(config.inference)} on {len(train_set.y)} images, "
        f"{config.train.epochs} epochs, eps up to {config.train.eps:.4g} -> {folder}"
    )
    task = problem(config, model, train_set, held)
    trained = train(config.inference, config.train, task, config.seed, folder)
    started = time.monotonic()
    posterior, found = refine(config.inference, config.train, task, trained.posterior, config.seed)
    refinement = time.monotonic() - started if found else None
    trained = trained._replace(posterior=posterior)
    draws = deploy(posterior, config.eval.num_samples, config.seed)
    samples = deployable(model, train_set, draws)
    # With batch-norm a draw is no network without training data: what is kept is what is deployed.
    kept = posterior if model.prepare is None else Samples(samples)
    save_posterior(folder / "posterior.npz", kept)
    evaluated = evaluate(config.eval, model.apply, samples, dataset.test, config.seed)
    found = {**found, "refinement_seconds": refinement}
    results = write_results(config, folder, dataset, trained, evaluated, found)
    write_report(folder)
    _say(summary(results))
    return folder


def begun_at(model: Model, run: Path | None) -> Model:
    """A network that begins at the means of a finished run's posterior; None: at random.

    Raises:
        FileNotFoundError: the folder holds no posterior.
        ValueError: that is of another network.
    """
    if run is None:
        return model
    file = run / "posterior.npz"
    if not file.is_file():
        raise FileNotFoundError(
            f"--start {run}: there is no {file}; give the folder of a finished run"
        )
    means, _ = load_posterior(file).moments()
    own = jax.eval_shape(model.init, jax.random.key(0))
    shapes = [
        {name: jnp.shape(leaf) for name, leaf in priors.named(params).items()}
        for params in (own, means)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"--start {run}: its posterior is of a network of other layers ({shapes[1]}; here "
            f"{shapes[0]}); give a run of the same --model and --dataset"
        )
    return model._replace(init=lambda key: jax.tree.map(jnp.asarray, means))


def problem(config: RunConfig, model: Model, train_set: Split, held: Split) -> Problem:
    """What is to be learned.

    Args:
        config: the run's settings.
        model: the network.
        train_set: training images.
        held: validation images; may be empty.
    """
    measure = make_validation(config, model.apply, held, partial(deployable, model, train_set))
    return Problem(model, train_set, error_model(config.train, model.apply), measure)


def error_model(settings: TrainConfig, apply: Apply) -> LogLikelihood:
    """The log-likelihood of one image: certified, of a draw or of a posterior; attacked; plain."""
    if settings.likelihood == "quantile":
        return likelihood.quantile_categorical(
            apply, depth=settings.depth, method=settings.method, clip=PIXELS
        )
    if settings.likelihood == "certified":
        return likelihood.robust_categorical(apply, method=settings.method, clip=PIXELS)
    if settings.likelihood == "attacked":
        found = partial(attack.pgd, steps=settings.attack_steps, clip=PIXELS)
        return likelihood.attacked_categorical(apply, found)
    return likelihood.clean_categorical(apply)


def make_validation(
    config: RunConfig,
    apply: Apply,
    held: Split,
    freeze: Callable[[PyTree], PyTree] = lambda samples: samples,
) -> Measure:
    """Clean and certified accuracy of one posterior draw on the held-out images (by IBP)."""
    if not len(held.y):
        return lambda posterior, key: {"val_clean_accuracy": None, "val_certified_accuracy": None}

    @jax.jit
    def certify_all(samples: PyTree, x: Array, y: Array) -> tuple[Array, Array]:
        def one(x: Array) -> Any:
            region = ball(x, config.eval.eps, clip=PIXELS)
            return certify.decision(apply, samples, region, x=x, method="ibp")

        found = jax.vmap(one)(x)
        correct = found.predicted == y
        return correct.mean(), (correct & found.robust).mean()

    def measure(posterior: Any, key: PRNGKeyArray) -> dict[str, float | None]:
        draw = freeze(posterior.sample(jax.random.fold_in(key, 3), 1))
        clean, certified = certify_all(draw, held.x, held.y)
        return {
            "val_clean_accuracy": float(clean),
            "val_certified_accuracy": float(certified),
        }

    return measure


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
    write_npz(folder / "certificates.npz", certificates)
    chosen = outcomes.pick(certificates, each=8)
    gallery = {
        "index": chosen,
        "image": dataset.test.x[chosen],
        "attacked": evaluated.attacked[chosen],
    }
    write_npz(folder / "gallery.npz", gallery)
    settings = config.train
    results = {
        **evaluated.results,
        "inference": name_of(config.inference),
        "preset": config.preset,
        "seed": config.seed,
        "dataset": config.dataset if config.data is None else dataset.name,
        "model": Path(config.model).name,  # of one's own, without its folder
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
        "kl": trained.last.get("kl"),
        "seconds_per_epoch": trained.seconds_per_epoch,
        "train_seconds": trained.train_seconds,
        **provenance(),
        **found,
        "class_names": list(dataset.class_names),
    }
    write_json(folder / "results.json", results)
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


def _say(text: str) -> None:
    print(text, flush=True)
