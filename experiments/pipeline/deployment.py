"""What is deployed of a posterior: the samples whose average is the predictor."""

from typing import Any

import jax
from jaxtyping import PyTree

from bnncert.posterior import Samples

from ..setup.data import Split
from ..setup.models import Model, freeze

FROZEN_ON = 2048
"""Training images, the first ones, that give deployed networks the statistics of batch-norm."""


def deploy(posterior: Any, num_samples: int, seed: int) -> PyTree:
    """Stacked weights: all members if they are few enough, or draws.

    Args:
        posterior: of `bnncert.posterior`.
        num_samples: the most that are deployed.
        seed: of the run.
    """
    if isinstance(posterior, Samples) and posterior.num_samples <= num_samples:
        return posterior.params
    key = jax.random.fold_in(jax.random.key(seed), 4)
    return posterior.sample(key, num_samples)


def deployable(model: Model, train_set: Split, samples: PyTree) -> PyTree:
    """Samples as the networks that are deployed: batch-norm frozen on the first training images."""
    return freeze(model, samples, train_set.x[:FROZEN_ON])
