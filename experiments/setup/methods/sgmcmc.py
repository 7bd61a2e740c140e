"""Stochastic-gradient Monte Carlo: the states of a noisy gradient descent are the samples.

Without momentum or a preconditioner, with steps as short as Adam's, the small CNN stays at chance
(`experiments/results`): hence each one's `learning_rate`, which is that of the gradient of the loss
per image.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import jax
import jax.numpy as jnp

from bnncert import infer
from bnncert.posterior import Samples
from bnncert.types import Algorithm

from ..requirements import Requirement
from ..settings import TrainConfig
from .task import Collect, CollectFrom, Task, collection, plain_adam


@dataclass(frozen=True)
class SGLD:
    """Stochastic-gradient Langevin dynamics."""

    learning_rate: ClassVar[float] = 0.04
    collect_from: CollectFrom = 0.75
    collect: Collect = 40

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.sgmcmc`."""
        return _build(self, task, friction=None)

    def check(self, train: TrainConfig) -> None:
        """A sampler has one target."""
        _check(train, "sgld")


@dataclass(frozen=True)
class SGHMC:
    """Stochastic-gradient Hamiltonian Monte Carlo: sgld with momentum."""

    learning_rate: ClassVar[float] = 0.006
    collect_from: CollectFrom = 0.75
    collect: Collect = 40
    friction: Annotated[float, Requirement("a number in (0, 1]", lambda v: 0 < v <= 1)] = 0.1
    """Share of the momentum that a step loses."""

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.sgmcmc`, with friction."""
        return _build(self, task, friction=self.friction)

    def check(self, train: TrainConfig) -> None:
        """A sampler has one target."""
        _check(train, "sghmc")


def _build(method: SGLD | SGHMC, task: Task, friction: float | None) -> Algorithm:
    start, every = collection(task, method.collect_from, method.collect)
    weight = task.train.kl_weight
    # Of the loss per image the gradient is taken with step h N / (2 kl_weight).
    unit = 2 * weight / task.num_data
    sampler = infer.sgmcmc.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        step_size=lambda step: unit * jnp.asarray(task.rate(step)),
        num_samples=method.collect,
        friction=friction,
        kl_weight=weight,
        every=every,
        burn_in=start,
        deterministic=plain_adam(),
    )

    def posterior(state: Any) -> Samples:
        if int(state.collected):
            return cast(Samples, sampler.posterior(state))
        return Samples(jax.tree.map(lambda leaf: leaf[None], state.params))  # before the first

    return sampler._replace(posterior=posterior)


def _check(train: TrainConfig, name: str) -> None:
    if train.kl_ramp:
        raise ValueError(
            f"--train.kl-ramp must be 0 with --inference {name}, got {train.kl_ramp}: a sampler "
            "has one target; collect later instead (--inference.collect-from)"
        )
