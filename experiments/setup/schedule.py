"""Schedules of certified training: pure functions of the step, built from Optax's.

With T = epochs * steps_per_epoch, the radius and the weight of the clean term go

    step:  0 ... warmup T ......................... (warmup + ramp) T ... T
    eps:   0     0          linearly up             eps                   eps
    lam:   1     1          linearly down           lam                   lam

so that training starts from an ordinary network and the two terms change places together. Where
their own ramps are not 0, the exponent of the mixture and the weight of the KL go

    step:   0 ................ (warmup + ramp) T ... (warmup + ramp + power_ramp) T ... T
    power:  0                  0    linearly up      power                              power

    step:       0               ...     kl_ramp T      ...   T
    kl_weight:  kl_weight / 10  linearly up  kl_weight       kl_weight

and else they are constant.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .settings import TrainConfig

Step = int | Int[Array, ""]

KL_START = 0.1
"""What share of the KL's weight its ramp starts from."""


def threat_schedule(
    train: TrainConfig, steps_per_epoch: int
) -> Callable[[Step], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Return step -> (eps, lam), both float32 scalars.

    Args:
        train: the fields eps, lam, epochs, warmup and ramp.
        steps_per_epoch: minibatches in an epoch.

    >>> from experiments.setup.presets import PRESETS
    >>> train = PRESETS["digits"].train
    >>> eps, lam = threat_schedule(train, steps_per_epoch=10)(0)
    >>> float(eps), float(lam)
    (0.0, 1.0)
    """
    total = train.epochs * steps_per_epoch
    begin = round(train.warmup * total)
    steps = max(round(train.ramp * total), 1)  # Optax takes 0 steps to mean "stay at the start"
    eps = optax.linear_schedule(0.0, train.eps, steps, transition_begin=begin)
    lam = optax.linear_schedule(1.0, train.lam, steps, transition_begin=begin)
    # Always float32 arrays: a Python float at one step and an array at the next would recompile.
    return lambda step: (jnp.float32(eps(step)), jnp.float32(lam(step)))


def power_schedule(train: TrainConfig, steps_per_epoch: int) -> Callable[[Step], Float[Array, ""]]:
    """Return step -> exponent of the mixture, a float32 scalar.

    Geometric first: the arithmetic mixture gives up what is not certified when its ramp begins.

    Args:
        train: the fields power, power_ramp, epochs, warmup and ramp.
        steps_per_epoch: minibatches in an epoch.
    """
    if not train.power_ramp:
        return lambda step: jnp.float32(train.power)
    total = train.epochs * steps_per_epoch
    begin = round(train.warmup * total) + round(train.ramp * total)
    steps = max(round(train.power_ramp * total), 1)
    power = optax.linear_schedule(0.0, train.power, steps, transition_begin=begin)
    return lambda step: jnp.float32(power(step))


def kl_weight_schedule(
    train: TrainConfig, steps_per_epoch: int
) -> float | Callable[[Step], Float[Array, ""]]:
    """Return the weight of the KL: a number if it is constant, else step -> float32 scalar.

    It starts above 0, at `KL_START` of itself: the scale and the step of a natural gradient depend
    on it from the first step on.

    Args:
        train: the fields kl_weight, kl_ramp and epochs.
        steps_per_epoch: minibatches in an epoch.
    """
    if not train.kl_ramp:
        return train.kl_weight
    steps = max(round(train.kl_ramp * train.epochs * steps_per_epoch), 1)
    weight = optax.linear_schedule(KL_START * train.kl_weight, train.kl_weight, steps)
    return lambda step: jnp.float32(weight(step))


def learning_rate_schedule(train: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return step -> learning rate, multiplied by the decay at each drop.

    Args:
        train: the fields learning_rate, learning_rate_drops, learning_rate_decay and epochs.
        steps_per_epoch: minibatches in an epoch.
    """
    total = train.epochs * steps_per_epoch
    scales: dict[int, float] = {}
    for fraction in train.learning_rate_drops:
        step = round(fraction * total)
        # Drops that fall on the same step of a short run still both count.
        scales[step] = scales.get(step, 1.0) * train.learning_rate_decay
    return optax.piecewise_constant_schedule(train.learning_rate, scales)
