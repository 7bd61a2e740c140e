"""Variational inference by natural gradients: vogn, noisy-adam and ivon share one step.

By a natural gradient no weight moves by more than 0.002 in a step, the learning rate of Adam
elsewhere: with steps of up to 0.5 the small CNN is at chance from the first epoch on
(`experiments/results`). Hence each one's `learning_rate` and `clip_step`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import optax
import tyro

from bnncert import infer
from bnncert.types import Algorithm

from ..requirements import Positive, Requirement
from .task import InitialScale, Task, plain_adam

_DECAY = Requirement("a decay in [0, 1)", lambda v: 0 <= v < 1)

Beta1 = Annotated[float, _DECAY, tyro.conf.arg(help="Decay of the mean of gradients.")]
Beta2 = Annotated[float, _DECAY, tyro.conf.arg(help="Decay of the mean of curvatures.")]
ClipStep = Annotated[
    Positive, tyro.conf.arg(help="Largest natural gradient of a weight, in its units.")
]


@dataclass(frozen=True)
class VOGN:
    """Natural gradients; curvature by squared gradients of single images."""

    learning_rate: ClassVar[float] = 0.3
    initial_scale: InitialScale = 0.1
    clip_step: ClipStep = 0.00667
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.vogn`."""
        return _build(infer.vogn, self, task)


@dataclass(frozen=True)
class NoisyAdam:
    """Natural gradients; curvature by squared gradients of minibatches."""

    learning_rate: ClassVar[float] = 0.1
    initial_scale: InitialScale = 0.1
    clip_step: ClipStep = 0.02
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.noisy_adam`."""
        return _build(infer.noisy_adam, self, task)


@dataclass(frozen=True)
class IVON:
    """Natural gradients; curvature by Price's theorem."""

    learning_rate: ClassVar[float] = 0.1
    initial_scale: InitialScale = 0.1
    clip_step: ClipStep = 0.02
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999

    def build(self, task: Task) -> Algorithm:
        """`bnncert.infer.ivon`."""
        return _build(infer.ivon, self, task)


def _build(module: Any, method: VOGN | NoisyAdam | IVON, task: Task) -> Algorithm:
    return module.build(
        task.log_likelihood,
        task.prior,
        num_data=task.num_data,
        prepare=task.model.prepare,
        optimizer=optax.chain(
            optax.clip(method.clip_step), optax.scale_by_learning_rate(task.rate)
        ),
        kl_weight=task.kl_weight,
        initial_scale=method.initial_scale,
        beta1=method.beta1,
        beta2=method.beta2,
        deterministic=plain_adam(),
    )
