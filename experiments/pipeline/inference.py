"""From the settings of a run to its inference method: what it is built from, and its two stages."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bnncert import attack, likelihood
from bnncert.types import Algorithm, Apply, LogLikelihood, Posterior, Threat
from experiments.setup.config import RunConfig
from experiments.setup.data import Split
from experiments.setup.methods import Refining, Task
from experiments.setup.methods.task import normal_prior
from experiments.setup.models import Model
from experiments.setup.schedule import kl_weight_schedule, learning_rate_schedule
from experiments.setup.settings import PIXELS, TrainConfig


def build_algorithm(
    config: RunConfig,
    model: Model,
    params: PyTree,
    num_data: int,
    steps_per_epoch: int,
    log_likelihood: LogLikelihood | None = None,
) -> Algorithm:
    """The inference method of a run, on its likelihood; of hmc, nuts and laplace the first stage.

    Args:
        config: the run's settings.
        model: the network.
        params: gives structure and shapes.
        num_data: training data.
        steps_per_epoch: minibatches in an epoch.
        log_likelihood: of one datum; by default that of an image, as the settings say.
    """
    task = _task(config.train, model, params, num_data, steps_per_epoch)
    own = task.log_likelihood if log_likelihood is None else log_likelihood
    return config.inference.build(task._replace(log_likelihood=own))


def refine(
    config: RunConfig, model: Model, posterior: Posterior, images: Split
) -> tuple[Posterior, dict[str, Any]]:
    """What comes after the training loop: sampling with HMC or NUTS, or a Laplace approximation.

    Args:
        config: the run's settings.
        model: the network.
        posterior: of the training loop.
        images: the training images.

    Returns:
        The posterior that is deployed, and what there is to report about it; other methods return
        theirs as it is.
    """
    method = config.inference
    if not isinstance(method, Refining):
        return posterior, {}
    key = jax.random.fold_in(jax.random.key(config.seed), 6)
    mean, scales = posterior.moments()
    task = _task(config.train, model, mean, len(images.y), 1)
    threat = Threat(*map(jnp.float32, (config.train.eps, config.train.lam, config.train.power)))
    return method.refine(task, key, mean, scales, images, threat)


def error_model(settings: TrainConfig, apply: Apply) -> LogLikelihood:
    """The log-likelihood of one image: certified, attacked (adversarial training), or plain."""
    if settings.likelihood == "certified":
        return likelihood.robust_categorical(apply, method=settings.method, clip=PIXELS)
    if settings.likelihood == "attacked":
        found = partial(attack.pgd, steps=settings.attack_steps, clip=PIXELS)
        return likelihood.attacked_categorical(apply, found)
    return likelihood.clean_categorical(apply)


def _task(
    train: TrainConfig, model: Model, params: PyTree, num_data: int, steps_per_epoch: int
) -> Task:
    return Task(
        train,
        model,
        error_model(train, model.apply),
        normal_prior(params, train.prior_scale, train.random_layers),
        num_data,
        train.epochs * steps_per_epoch,
        learning_rate_schedule(train, steps_per_epoch),
        cast(Any, kl_weight_schedule(train, steps_per_epoch)),
    )
