"""Training a regression: any inference method, on the robust Gaussian likelihood.

    maximise   E_q[ log p_rob(D | w) ] - kl_weight KL(q || p),   p_rob = robust_gaussian

with the radius up from 0 and lam down from 1 (`experiments.setup.schedule`). Plain training is the
same code at radius 0 and lam 1: one compile serves both, as the threat is arrays.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

from bnncert import infer, likelihood
from bnncert.types import Algorithm, Batch, Threat
from experiments.pipeline.inference import build_algorithm
from experiments.pipeline.training import IN_NATS, TrainingError
from experiments.setup.data import epoch_batches
from experiments.setup.methods import MAP
from experiments.setup.models import Model
from experiments.setup.schedule import power_schedule, threat_schedule
from experiments.setup.settings import TrainConfig
from experiments.tasks.regression.data import Table
from experiments.tasks.regression.settings import Settings, run_config


class Fitted(NamedTuple):
    """What training leaves.

    Attributes:
        posterior: as the algorithm gives it.
        history: for each epoch the terms of the objective, nats a datum, and the threat.
        seconds: of all epochs, with compiling.
    """

    posterior: Any
    history: list[dict[str, Any]]
    seconds: float


Fit = Callable[[str], Fitted]
"""Trains as one of `experiments.tasks.regression.settings.TRAININGS`."""


def trainer(settings: Settings, model: Model, data: Table) -> Fit:
    """What trains a model on data, robustly or plainly, from the same start.

    Args:
        settings: of the run.
        model: the network.
        data: the training data.

    Returns:
        `fit(training)`. It raises TrainingError, naming the epoch, where the loss or a number of
        the state is not finite.
    """
    num, size = len(data.y), min(settings.batch_size, len(data.y))
    steps = -(-num // size)
    key = jax.random.key(settings.seed)
    params = model.init(jax.random.fold_in(key, 0))
    robust = likelihood.robust_gaussian(
        model.apply, noise_scale=settings.noise_scale, method=settings.method
    )
    # What it is built from is the same for both trainings: they differ in the threat.
    config = run_config(settings, "robust")
    many = settings.inference == "ensemble"
    config = dataclasses.replace(config, inference=MAP()) if many else config
    algorithm = build_algorithm(config, model, params, num, steps, log_likelihood=robust)
    # Of dense layers, members are faster vmapped, on CPUs too: one step compiles for all.
    algorithm = infer.ensemble.build(algorithm, settings.members) if many else algorithm
    start = model.init if many else params
    epoch = partial(_epoch(algorithm), jnp.asarray(data.x), jnp.asarray(data.y))

    def fit(training: str) -> Fitted:
        schedule = threats(run_config(settings, training).train, steps)
        state = algorithm.init(jax.random.fold_in(key, 1), start)
        history, started = [], time.monotonic()
        bar = tqdm(range(settings.epochs), desc=f"train, {training}", unit="epoch")
        for number in bar:
            indices, mask = epoch_batches((settings.seed, number), num, size)
            threat = jax.tree.map(lambda column, n=number: column[n], schedule)
            here = jax.random.fold_in(jax.random.fold_in(key, 2), number)
            state, info, finite = epoch(here, state, indices, mask, threat)
            line = {
                "training": training,
                "epoch": number + 1,
                **{n: float(getattr(info, n)) / num for n in IN_NATS if hasattr(info, n)},
                "eps": float(threat.eps[-1]),
                "lam": float(threat.lam[-1]),
            }
            if not (np.isfinite(line["loss"]) and finite):
                raise TrainingError(
                    f"the loss or a weight became NaN or infinite in epoch {number + 1} of "
                    f"{training} training (loss {line['loss']:.3g} nats a datum); lower "
                    f"--learning-rate, which is {settings.learning_rate:g}"
                )
            history.append(line)
            bar.set_postfix(loss=f"{line['loss']:.3f}", eps=f"{line['eps']:.3f}", refresh=False)
        return Fitted(algorithm.posterior(state), history, time.monotonic() - started)

    return fit


def threats(train: TrainConfig, steps_per_epoch: int) -> Threat:
    """The threat at every step of training: NumPy arrays of shape (epochs, steps_per_epoch).

    Args:
        train: the fields of `experiments.setup.schedule`.
        steps_per_epoch: minibatches in an epoch.
    """
    number = jnp.arange(train.epochs * steps_per_epoch)
    eps, lam = jax.vmap(threat_schedule(train, steps_per_epoch))(number)
    power = jax.vmap(power_schedule(train, steps_per_epoch))(number)
    columns: Any = [np.asarray(v).reshape(-1, steps_per_epoch) for v in (eps, lam, power)]
    return Threat(*columns)


def _epoch(algorithm: Algorithm) -> Callable[..., tuple[PyTree, Any, Array]]:
    """One jitted pass over the data: the state, the mean info, and whether all is finite."""

    @jax.jit
    def epoch(
        x: Array,
        y: Array,
        key: PRNGKeyArray,
        state: PyTree,
        indices: Array,
        mask: Array,
        threat: Threat,
    ) -> tuple[PyTree, Any, Array]:
        def step(state: PyTree, now: Any) -> tuple[PyTree, Any]:
            key, rows, mask, threat = now
            return algorithm.update(key, state, Batch(x[rows], y[rows], mask), threat)

        keys = jax.random.split(key, indices.shape[0])
        state, infos = jax.lax.scan(step, state, (keys, indices, mask, threat))
        numbers = [v for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating)]
        finite = jnp.stack([jnp.isfinite(v).all() for v in numbers]).all()
        return state, jax.tree.map(lambda v: v.mean(0), infos), finite

    return epoch
