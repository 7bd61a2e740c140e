"""What an inference method is built from, and what a class has to have to be one.

A method is a frozen dataclass of its own settings. `build` makes its algorithm; where something
follows the training loop, `refine` does that. What all methods share (the error model, the prior,
the schedules, the loop) comes to it in a `Task`.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import optax
import tyro
from jaxtyping import PyTree

from bnncert import prior as priors
from bnncert.infer.svi import Schedule
from bnncert.types import Algorithm, Key, LogLikelihood, Posterior, Threat

from ..data import Split
from ..models import Model
from ..requirements import AtLeast1, Positive, Requirement
from ..settings import TrainConfig


class Task(NamedTuple):
    """What every method is built from.

    Attributes:
        train: the settings that all methods share.
        model: the network.
        log_likelihood: of one datum.
        prior: one of the params' leaves each; None where a leaf is deterministic.
        num_data: training data.
        total_steps: of the training loop.
        rate: step -> learning rate.
        kl_weight: of the KL, or step -> weight.
    """

    train: TrainConfig
    model: Model
    log_likelihood: LogLikelihood
    prior: PyTree
    num_data: int
    total_steps: int
    rate: optax.Schedule
    kl_weight: float | Schedule


Refined: TypeAlias = tuple[Posterior, dict[str, Any]]
"""The posterior that is deployed, and what there is to report about it."""


@runtime_checkable
class Inference(Protocol):
    """An inference method. The first line of its class's docstring says what it is.

    A class may also have `learning_rate`, a ClassVar: the default of `--train.learning-rate`, where
    its steps are in other units than Adam's.
    """

    def build(self, task: Task) -> Algorithm:
        """The algorithm that trains."""
        ...


@runtime_checkable
class Refining(Inference, Protocol):
    """A method of which training is the first stage."""

    def refine(
        self, task: Task, key: Key, mean: PyTree, scales: PyTree, data: Split, threat: Threat
    ) -> Refined:
        """What follows the training loop.

        Args:
            task: as for `build`; its prior is that of the random layers.
            key: of all that is random.
            mean: of the trained posterior.
            scales: its standard deviations; None at deterministic leaves.
            data: the training data.
            threat: at the end of the schedule.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """A method that excludes values of settings which all methods share."""

    def check(self, train: TrainConfig) -> None:
        """Raise a ValueError that names the option, its value and the way out."""
        ...


ClipNorm = Annotated[
    Positive,
    tyro.conf.arg(help="Largest global norm of a gradient (nats per image per unit of parameter)."),
]
InitialScale = Annotated[
    Positive,
    tyro.conf.arg(
        help="Posterior standard deviation at the start, relative to that of the weights' "
        "initialisation (sqrt(2 pi) / fan_in)."
    ),
]
CollectFrom = Annotated[
    float,
    Requirement("a number in [0, 1)", lambda v: 0 <= v < 1),
    tyro.conf.arg(help="Fraction of training after which weights are collected."),
]
Collect = Annotated[AtLeast1, tyro.conf.arg(help="Weights collected from there on, evenly.")]


def adam(task: Task, clip_norm: float) -> optax.GradientTransformation:
    """Adam, with gradients clipped to a norm a datum."""
    return optax.chain(
        # The loss is summed over the data: per image, the norm is num_data times smaller.
        optax.clip_by_global_norm(clip_norm * task.num_data),
        optax.adam(task.rate),
    )


def plain_adam() -> optax.GradientTransformation:
    """Of leaves without a prior: `Task.rate` is in the units of the random ones' own steps."""
    return optax.adam(TrainConfig.learning_rate)


def collection(task: Task, collect_from: float, collect: int) -> tuple[int, int]:
    """The first step whose weights are collected, and the steps from one to the next."""
    start = round(collect_from * task.total_steps)
    return start, max((task.total_steps - start) // collect, 1)


def normal_prior(params: PyTree, scale: float, layers: str) -> PyTree:
    """Independent normals on the weights of the random layers.

    Args:
        params: gives structure and shapes.
        scale: their standard deviation.
        layers: one of `RANDOM_LAYERS`.
    """
    return priors.normal(params, scale, where=_random(params, layers == "last"))


def _random(params: PyTree, last: bool) -> Callable[[str], bool]:
    """Picks the leaves with a prior, by name: all, or those of the last layer (Dense_1).

    Not those of batch-norm: its scale and bias are trained, and its statistics are the data's.
    """
    layer = list(priors.named(params))[-1].split("/")[0]

    def where(name: str) -> bool:
        here = name.split("/")[0]
        return here == layer if last else not here.startswith("BatchNorm")

    return where
