"""Training: one loop for every inference method, resumable to the bit.

All that is random is a pure function of (seed, epoch) or (seed, step): a run that was killed and
resumed takes the same steps as one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

from bnncert import certify
from bnncert.sets import ball
from bnncert.types import Algorithm, Apply, Batch, Threat
from experiments.pipeline import checkpoint
from experiments.pipeline.deployment import deployable
from experiments.pipeline.inference import build_algorithm
from experiments.setup.config import RunConfig
from experiments.setup.data import Split, epoch_batches
from experiments.setup.models import Model
from experiments.setup.schedule import (
    kl_weight_schedule,
    learning_rate_schedule,
    power_schedule,
    threat_schedule,
)
from experiments.setup.settings import PIXELS

IN_NATS = ("loss", "log_likelihood", "log_prior", "kl")
"""What the methods' infos have in nats over all data; logged per datum."""

CHECKPOINT_SECONDS = 10.0
"""Least time between two checkpoints: saving takes some 50 ms."""


class TrainingError(RuntimeError):
    """The loss or a number of the state is not finite: the last checkpoint is from before."""


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        posterior: as the algorithm gives it.
        seconds_per_epoch: median over the epochs.
        train_seconds: all epochs, those before a resume included.
    """

    posterior: Any
    seconds_per_epoch: float
    train_seconds: float


def train(config: RunConfig, model: Model, train_set: Split, held: Split, folder: Path) -> Trained:
    """Trains a posterior, from the last checkpoint in `folder` if there is one.

    Args:
        config: the run's settings.
        model: the network.
        train_set: training images.
        held: validation images; may be empty.
        folder: of the run: `metrics.jsonl` gains a line an epoch, `checkpoints/` the states.

    Returns:
        The posterior and how long it took.

    Raises:
        TrainingError: something became NaN or infinite; names the step and the leaf.
    """
    settings = config.train
    num, size = len(train_set.y), min(config.train.batch_size, len(train_set.y))
    steps_per_epoch = -(-num // size)
    key = jax.random.key(config.seed)
    params = model.init(jax.random.fold_in(key, 0))
    algorithm = build_algorithm(config, model, params, num, steps_per_epoch)
    state = algorithm.init(jax.random.fold_in(key, 1), params)
    # A copy: donated buffers must not be shared with `params`.
    state = jax.tree.map(jnp.copy, state)
    first = 0
    if checkpoint.latest(folder / "checkpoints") is not None:
        first, state = checkpoint.restore(folder / "checkpoints", (first, state))
        first = int(first)
    lines = keep_epochs(folder / "metrics.jsonl", first)
    update = make_update(config, algorithm, steps_per_epoch)
    measure = make_validation(config, model.apply, held, partial(deployable, model, train_set))
    images, labels = jnp.asarray(train_set.x), jnp.asarray(train_set.y)
    rates = learning_rate_schedule(settings, steps_per_epoch)
    threats = threat_schedule(settings, steps_per_epoch)
    powers = power_schedule(settings, steps_per_epoch)
    weight = kl_weight_schedule(settings, steps_per_epoch)
    saved = time.monotonic()
    total = settings.epochs * steps_per_epoch
    with (
        tqdm(total=total, initial=first * steps_per_epoch, desc="train", unit="step") as bar,
        open(folder / "metrics.jsonl", "a") as log,
    ):
        for epoch in range(first, settings.epochs):
            started = time.monotonic()
            infos, finite = [], []
            indices, mask = epoch_batches((config.seed, epoch), num, size)
            for i in range(steps_per_epoch):
                step = epoch * steps_per_epoch + i
                state, info, fine = update(
                    jax.random.fold_in(key, 2),
                    state,
                    np.int32(step),
                    indices[i],
                    mask[i],
                    images,
                    labels,
                )
                infos.append(info)
                finite.append(fine)
                bar.update()
                if i % 50 == 49:  # now and then: reading a number waits for the device
                    _show(bar, float(info.loss) / num, float(threats(step)[0]))
            _check_finite(state, np.asarray(finite), epoch * steps_per_epoch, folder)
            posterior = algorithm.posterior(state)
            seconds = time.monotonic() - started
            last = (epoch + 1) * steps_per_epoch - 1
            eps, lam = threats(last)
            line = {
                "epoch": epoch + 1,
                "step": last + 1,
                **{name: _mean(infos, name) / num for name in IN_NATS if hasattr(infos[0], name)},
                "eps": float(eps),
                "lam": float(lam),
                "power": float(powers(last)),
                "kl_weight": float(weight(last) if callable(weight) else weight),
                "learning_rate": float(np.asarray(rates(last))),
                **measure(posterior, key),
                "seconds": seconds,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            lines.append(line)
            _show(bar, line["loss"], line["eps"])
            done = epoch + 1 == settings.epochs
            if done or time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint.save(folder / "checkpoints", epoch + 1, (np.int32(epoch + 1), state))
                saved = time.monotonic()
    spent = [line["seconds"] for line in lines]
    return Trained(algorithm.posterior(state), float(np.median(spent)), float(np.sum(spent)))


def make_update(config: RunConfig, algorithm: Algorithm, steps_per_epoch: int) -> Callable:
    """One jitted step: gathers its minibatch on the device, and follows the schedules.

    It returns the new state, the method's info, and whether the loss and each leaf of the state
    are finite.

    A loop in Python, not `lax.scan`: inside XLA's loops the gradients of convolutions run 10 times
    slower on CPU, and the dispatch of a step is hidden behind the one before.
    """
    threats = threat_schedule(config.train, steps_per_epoch)
    powers = power_schedule(config.train, steps_per_epoch)

    @partial(jax.jit, donate_argnums=1)
    def update(
        key: PRNGKeyArray,
        state: PyTree,
        step: Array,
        indices: Array,
        mask: Array,
        images: Array,
        labels: Array,
    ) -> tuple[PyTree, Any, Array]:
        eps, lam = threats(step)
        here = jax.random.fold_in(key, step)
        x = images[indices]
        if config.train.flip:
            chosen = jax.random.bernoulli(jax.random.fold_in(here, 1), 0.5, (x.shape[0], 1, 1, 1))
            x = jnp.where(chosen, x[:, :, ::-1], x)
        threat = Threat(eps, lam, powers(step))
        state, info = algorithm.update(here, state, Batch(x, labels[indices], mask), threat)
        numbers = [info.loss, *_numbers(state).values()]
        return state, info, jnp.stack([jnp.isfinite(leaf).all() for leaf in numbers])

    return update


def make_validation(
    config: RunConfig,
    apply: Apply,
    held: Split,
    freeze: Callable[[PyTree], PyTree] = lambda samples: samples,
) -> Callable[[Any, PRNGKeyArray], dict[str, float | None]]:
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


def keep_epochs(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Cuts a metrics file back to its first epochs: a stopped run logs past its checkpoint."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # the line that was being written
        if line["epoch"] <= epochs:
            lines.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
    return lines


def _show(bar: tqdm, loss: float, eps: float) -> None:
    bar.set_postfix(loss=f"{loss:.4f}", eps=f"{eps:.4f}", refresh=False)


def _mean(infos: list[Any], name: str) -> float:
    return math.fsum(float(getattr(info, name)) for info in infos) / len(infos)


def _numbers(state: PyTree) -> dict[str, Array]:
    """The floating-point leaves of a state by their paths."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _check_finite(state: PyTree, finite: np.ndarray, first_step: int, folder: Path) -> None:
    """Raises unless every step of an epoch left all finite; names the first that did not."""
    if finite.all():
        return
    step = int(np.argmin(finite.all(1)))
    names = np.array(["the loss", *(f"state{name}" for name in _numbers(state))])
    wrong = names[~finite[step]]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    last = checkpoint.latest(folder / "checkpoints")
    kept = f"the checkpoint of epoch {last} is kept" if last else "no checkpoint was made yet"
    raise TrainingError(
        f"{wrong[0]}{more} became NaN or infinite at step {first_step + step}; {kept} in {folder}. "
        "Lower --train.learning-rate, or ramp eps more slowly "
        "(--train.ramp), and start again in another --out."
    )
