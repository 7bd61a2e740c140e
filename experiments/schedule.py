"""Schedules of certified training: pure functions of the step, built from Optax's.

With T = epochs * steps_per_epoch, the radius and the weight of the clean term go

    step:  0 ... warmup T ......................... (warmup + ramp) T ... T
    eps:   0     0          linearly up             eps                   eps
    lam:   1     1          linearly down           lam                   lam

so that training starts from an ordinary network and the two terms change places together.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.settings import TrainConfig

Step = int | Int[Array, ""]


def threat_schedule(
    train: TrainConfig, steps_per_epoch: int
) -> Callable[[Step], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Return step -> (eps, lam), both float32 scalars.

    Args:
        train: the fields eps, lam, epochs, warmup and ramp.
        steps_per_epoch: minibatches in an epoch.

    >>> from experiments.config import PRESETS
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
