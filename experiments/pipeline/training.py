"""Training: one loop for every task and inference method, resumable to the bit.

All that is random is a pure function of (seed, epoch) or (seed, step): a run that was killed and
resumed takes the same steps as one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

from bnncert.types import Algorithm, Batch, Threat

from ..setup.data import epoch_batches
from ..setup.logs import SHORT, compiling
from ..setup.methods import Inference
from ..setup.requirements import flag
from ..setup.schedule import (
    kl_weight_schedule,
    learning_rate_schedule,
    power_schedule,
    threat_schedule,
)
from ..setup.settings import TrainConfig
from . import checkpoint
from .inference import Problem, build_algorithm
from .writing import naming, write_text

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
        last: what was logged of the last epoch.
    """

    posterior: Any
    seconds_per_epoch: float
    train_seconds: float
    last: dict[str, Any]


def train(
    method: Inference, settings: TrainConfig, problem: Problem, seed: int, folder: Path
) -> Trained:
    """Trains a posterior, from the last checkpoint in `folder` if there is one.

    Args:
        method: of inference, with its own settings.
        settings: of training.
        problem: what is to be learned.
        seed: of the run.
        folder: of the run: `metrics.jsonl` gains a line an epoch, `checkpoints/` the states.

    Returns:
        The posterior and how long it took.

    Raises:
        TrainingError: something became NaN or infinite; names the step and the leaf.
    """
    data, num = problem.data, len(problem.data.y)
    size = min(settings.batch_size, num)
    steps_per_epoch = -(-num // size)
    key = jax.random.key(seed)
    params = problem.model.init(jax.random.fold_in(key, 0))
    algorithm = build_algorithm(method, settings, problem, params, steps_per_epoch)
    state = algorithm.init(jax.random.fold_in(key, 1), params)
    # A copy: donated buffers must not be shared with `params`.
    state = jax.tree.map(jnp.copy, state)
    first = 0
    if checkpoint.latest(folder / "checkpoints") is not None:
        first, state = checkpoint.restore(folder / "checkpoints", (first, state))
        first = int(first)
    lines = keep_epochs(folder / "metrics.jsonl", first)
    update = make_update(settings, algorithm, steps_per_epoch)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    schedules = _at_each_epoch(settings, steps_per_epoch)
    saved = time.monotonic()
    done = first * steps_per_epoch
    bar = tqdm(
        total=settings.epochs * steps_per_epoch,
        initial=done,
        desc=problem.name,
        unit="step",
        delay=SHORT if first < settings.epochs else 0,
    )
    with bar, naming(folder / "metrics.jsonl"), open(folder / "metrics.jsonl", "a") as log:
        for epoch in range(first, settings.epochs):
            started = time.monotonic()
            infos, finite = [], []
            indices, mask = epoch_batches((seed, epoch), num, size)
            for i in range(steps_per_epoch):
                step = epoch * steps_per_epoch + i
                minibatch = indices[i], mask[i], x, y
                first_one = step == done
                with compiling("the training step", bar, 1) if first_one else nullcontext():
                    state, info, fine = update(
                        jax.random.fold_in(key, 2), state, np.int32(step), *minibatch
                    )
                infos.append(info)
                finite.append(fine)
                bar.update()
                if i % 50 == 49:  # now and then: reading a number waits for the device
                    _show(bar, float(info.loss) / num, schedules[epoch]["eps"])
            _check_finite(state, np.asarray(finite), epoch * steps_per_epoch, problem, folder)
            seconds = time.monotonic() - started
            measured = problem.measure and problem.measure(algorithm.posterior(state), key)
            line = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps_per_epoch,
                **{name: _mean(infos, name) / num for name in IN_NATS if hasattr(infos[0], name)},
                **schedules[epoch],
                **(measured or {}),
                "seconds": seconds,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            lines.append(line)
            _show(bar, line["loss"], line["eps"])
            last = epoch + 1 == settings.epochs
            if last or time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint.save(folder / "checkpoints", epoch + 1, (np.int32(epoch + 1), state))
                saved = time.monotonic()
    spent = [line["seconds"] for line in lines]
    posterior = algorithm.posterior(state)
    return Trained(posterior, float(np.median(spent)), float(np.sum(spent)), lines[-1])


def make_update(settings: TrainConfig, algorithm: Algorithm, steps_per_epoch: int) -> Callable:
    """One jitted step: gathers its minibatch on the device, and follows the schedules.

    It returns the new state, the method's info, and whether the loss and each leaf of the state
    are finite.

    A loop in Python, not `lax.scan`: inside XLA's loops the gradients of convolutions run 10 times
    slower on CPU, and the dispatch of a step is hidden behind the one before.
    """
    threats = threat_schedule(settings, steps_per_epoch)
    powers = power_schedule(settings, steps_per_epoch)

    @partial(jax.jit, donate_argnums=1)
    def update(
        key: PRNGKeyArray,
        state: PyTree,
        step: Array,
        indices: Array,
        mask: Array,
        inputs: Array,
        targets: Array,
    ) -> tuple[PyTree, Any, Array]:
        eps, lam = threats(step)
        here = jax.random.fold_in(key, step)
        x = inputs[indices]
        if settings.flip:
            chosen = jax.random.bernoulli(jax.random.fold_in(here, 1), 0.5, (x.shape[0], 1, 1, 1))
            x = jnp.where(chosen, x[:, :, ::-1], x)
        threat = Threat(eps, lam, powers(step))
        state, info = algorithm.update(here, state, Batch(x, targets[indices], mask), threat)
        numbers = [info.loss, *_numbers(state).values()]
        return state, info, jnp.stack([jnp.isfinite(leaf).all() for leaf in numbers])

    return update


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
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _at_each_epoch(settings: TrainConfig, steps_per_epoch: int) -> list[dict[str, float]]:
    """What the schedules come to at the last step of each epoch."""
    last = jnp.arange(1, settings.epochs + 1) * steps_per_epoch - 1
    weight = kl_weight_schedule(settings, steps_per_epoch)
    eps, lam = jax.vmap(threat_schedule(settings, steps_per_epoch))(last)
    columns: dict[str, Any] = {
        "eps": eps,
        "lam": lam,
        "power": jax.vmap(power_schedule(settings, steps_per_epoch))(last),
        "kl_weight": jax.vmap(weight)(last) if callable(weight) else np.full(len(last), weight),
        "learning_rate": jax.vmap(learning_rate_schedule(settings, steps_per_epoch))(last),
    }
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


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


def _check_finite(
    state: PyTree, finite: np.ndarray, first_step: int, problem: Problem, folder: Path
) -> None:
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
        f"Lower {flag(problem.options)}learning-rate, or ramp eps more slowly "
        f"({flag(problem.options)}ramp), and start again in another --out."
    )
