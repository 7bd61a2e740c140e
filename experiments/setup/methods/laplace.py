"""Laplace's approximation: map, then a Gaussian over the weights of the last layer."""

from dataclasses import dataclass, field
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from bnncert import infer
from bnncert.types import Algorithm, Batch, Key, Threat

from ..data import Split
from ..requirements import one_of
from .map import MAP
from .task import Refined, Task, normal_prior

CURVATURES = ("fisher", "hessian")


@dataclass(frozen=True)
class Laplace:
    """Map, then a Gaussian over the last layer."""

    curvature: Annotated[str, *one_of("curvature of laplace", CURVATURES)] = "fisher"
    """The empirical Fisher matrix, or the exact Hessian (slow beyond 2,000 weights)."""
    mode: MAP = field(default_factory=MAP)

    def build(self, task: Task) -> Algorithm:
        """The mode, by map."""
        return self.mode.build(task)

    def refine(
        self, task: Task, key: Key, mean: PyTree, scales: PyTree, data: Split, threat: Threat
    ) -> Refined:
        """`bnncert.infer.laplace` about the mode, in batches over all training data."""
        method = infer.laplace.build(
            task.log_likelihood,
            normal_prior(mean, task.train.prior_scale, "last"),
            num_data=task.num_data,
            prepare=task.model.prepare,
            kl_weight=task.train.kl_weight,
            curvature=self.curvature,
        )
        size = task.train.batch_size
        starts = tqdm(range(0, len(data.y), size), desc="curvature", unit="batch")

        def batch(start: int) -> Batch:
            rows = np.arange(start, start + size)
            mask = jnp.asarray(rows < len(data.y), jnp.float32)
            rows = np.minimum(rows, len(data.y) - 1)
            return Batch(jnp.asarray(data.x[rows]), jnp.asarray(data.y[rows]), mask)

        posterior, info = method.fit(key, mean, map(batch, starts), threat)
        return posterior, {
            "negative_curvatures": int(info.num_negative),
            "negative_curvature_mass": float(info.negative_mass),
        }
