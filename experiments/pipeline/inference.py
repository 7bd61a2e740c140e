"""From what is to be learned to its inference method: what it is built from, and its two stages."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from bnncert.types import Algorithm, LogLikelihood, Posterior, Threat

from ..setup.data import Split
from ..setup.methods import Inference, Refining, Task
from ..setup.methods.task import normal_prior
from ..setup.models import Model
from ..setup.schedule import kl_weight_schedule, learning_rate_schedule
from ..setup.settings import TrainConfig

Measure = Callable[[Any, PRNGKeyArray], dict[str, float | None]]
"""`(posterior, key) -> numbers`, such as accuracies on data that are held out."""


class Problem(NamedTuple):
    """What is to be learned: all that the training loop needs to know of a task.

    Attributes:
        model: the network.
        data: what it is trained on.
        log_likelihood: of one datum.
        measure: follows training, once an epoch; None measures nothing.
        name: of the training, for its progress bar.
        options: what the options of training begin with, for messages.
    """

    model: Model
    data: Split
    log_likelihood: LogLikelihood
    measure: Measure | None = None
    name: str = "train"
    options: str = "train."


def build_algorithm(
    method: Inference, settings: TrainConfig, problem: Problem, params: PyTree, steps: int
) -> Algorithm:
    """An inference method on a problem; of hmc, nuts and laplace the first stage.

    Args:
        method: with its own settings.
        settings: of training.
        problem: what is to be learned.
        params: gives structure and shapes.
        steps: minibatches in an epoch.
    """
    return method.build(_task(settings, problem, params, steps))


def refine(
    method: Inference, settings: TrainConfig, problem: Problem, posterior: Posterior, seed: int
) -> tuple[Posterior, dict[str, Any]]:
    """What comes after the training loop: sampling with HMC or NUTS, or a Laplace approximation.

    Args:
        method: with its own settings.
        settings: of training.
        problem: what is to be learned.
        posterior: of the training loop.
        seed: of the run.

    Returns:
        The posterior that is deployed, and what there is to report about it; other methods return
        theirs as it is.
    """
    if not isinstance(method, Refining):
        return posterior, {}
    key = jax.random.fold_in(jax.random.key(seed), 6)
    mean, scales = posterior.moments()
    threat = Threat(*map(jnp.float32, (settings.eps, settings.lam, settings.power)))
    task = _task(settings, problem, mean, 1)
    return method.refine(task, key, mean, scales, problem.data, threat)


def _task(settings: TrainConfig, problem: Problem, params: PyTree, steps: int) -> Task:
    return Task(
        settings,
        problem.model,
        problem.log_likelihood,
        normal_prior(params, settings.prior_scale, settings.random_layers),
        len(problem.data.y),
        settings.epochs * steps,
        learning_rate_schedule(settings, steps),
        cast(Any, kl_weight_schedule(settings, steps)),
    )
