"""From the settings of a run to its inference method: one function of the table for each name.

All share the error model, the prior, the schedules and the loop; they differ in what they optimise
with, and in what they return.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
from jaxtyping import PyTree

from bnncert import attack, infer, likelihood
from bnncert import prior as priors
from bnncert.types import Algorithm, Apply, LogLikelihood
from experiments.schedule import learning_rate_schedule
from experiments.settings import RunConfig, TrainConfig

PIXELS = (0.0, 1.0)
"""The adversary stays in the range of pixels, in training, certificate and attack alike."""


def build_algorithm(
    config: RunConfig, apply: Apply, params: PyTree, num_data: int, steps_per_epoch: int
) -> Algorithm:
    """The inference method of a run, on its likelihood.

    Args:
        config: the run's settings.
        apply: `(params, x) -> logits` for one image.
        params: gives structure and shapes.
        num_data: training images.
        steps_per_epoch: minibatches in an epoch.
    """
    settings = config.train
    prior = priors.normal(params, settings.prior_scale, where=_random_leaves(settings, params))
    return _BUILDERS[config.inference](
        settings,
        error_model(settings, apply),
        prior,
        num_data=num_data,
        rate=learning_rate_schedule(settings, steps_per_epoch),
    )


def error_model(settings: TrainConfig, apply: Apply) -> LogLikelihood:
    """The log-likelihood of one image: certified, attacked (adversarial training), or plain."""
    if settings.likelihood == "certified":
        return likelihood.robust_categorical(apply, method=settings.method, clip=PIXELS)
    if settings.likelihood == "attacked":
        found = partial(attack.pgd, steps=settings.attack_steps, clip=PIXELS)
        return likelihood.attacked_categorical(apply, found)
    return likelihood.clean_categorical(apply)


def _random_leaves(settings: TrainConfig, params: PyTree) -> Callable[[str], bool] | None:
    """Which leaves have a posterior: all, or those of the last layer (by name: Dense_1 of two)."""
    if settings.random_layers == "all":
        return None
    last = list(priors.named(params))[-1].split("/")[0]
    return lambda name: name.split("/")[0] == last


def _adam(settings: TrainConfig, num_data: int, rate: optax.Schedule) -> Any:
    return optax.chain(
        # The loss is summed over the data: per image, the norm is num_data times smaller.
        optax.clip_by_global_norm(settings.clip_norm * num_data),
        optax.adam(rate),
    )


def _map(settings: TrainConfig, loglik: LogLikelihood, prior: PyTree, **known: Any) -> Algorithm:
    return infer.map.build(
        loglik,
        prior,
        num_data=known["num_data"],
        optimizer=_adam(settings, **known),
        prior_weight=settings.kl_weight,
    )


def _bbb(settings: TrainConfig, loglik: LogLikelihood, prior: PyTree, **known: Any) -> Algorithm:
    return infer.svi.build(
        loglik,
        prior,
        num_data=known["num_data"],
        optimizer=_adam(settings, **known),
        kl_weight=settings.kl_weight,
        initial_scale=settings.initial_scale,
    )


def _natural_gradient(
    module: Any, settings: TrainConfig, loglik: LogLikelihood, prior: PyTree, **known: Any
) -> Algorithm:
    return module.build(
        loglik,
        prior,
        num_data=known["num_data"],
        optimizer=optax.chain(
            optax.clip(settings.clip_step), optax.scale_by_learning_rate(known["rate"])
        ),
        kl_weight=settings.kl_weight,
        initial_scale=settings.initial_scale,
        beta1=settings.beta1,
        beta2=settings.beta2,
        deterministic=optax.adam(2e-3),
    )


_BUILDERS: dict[str, Callable[..., Algorithm]] = {
    "map": _map,
    "bbb": _bbb,
    "vogn": partial(_natural_gradient, infer.vogn),
    "noisy-adam": partial(_natural_gradient, infer.noisy_adam),
    "ivon": partial(_natural_gradient, infer.ivon),
}
