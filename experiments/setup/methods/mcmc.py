"""Markov chains on some of the data: HMC and NUTS, started at the mean of a trained posterior.

Its standard deviations are the chains' scales: to adapt those of so many weights would take
thousands of draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import PyTree

from bnncert import infer
from bnncert.types import Algorithm, Batch, Key, Threat

from ..data import Split
from ..models import freeze
from ..requirements import AtLeast0, AtLeast1, Requirement
from .bbb import BBB
from .task import Refined, Task

Images = Annotated[
    AtLeast1,
    tyro.conf.arg(
        help="Training images, the first ones, that are sampled with: all of them in each step."
    ),
]
Warmup = Annotated[
    AtLeast0, tyro.conf.arg(help="Draws of each chain that adapt, and are discarded.")
]
Draws = Annotated[
    int,
    Requirement("at least 4, for R-hat", lambda v: v >= 4),
    tyro.conf.arg(help="Draws of each chain that are kept."),
]
Chains = Annotated[AtLeast1, tyro.conf.arg(help="Chains side by side.")]


@dataclass(frozen=True)
class HMC:
    """BBB, then HMC on some of the images, started at its mean."""

    images: Images = 1000
    warmup: Warmup = 50
    samples: Draws = 8
    chains: Chains = 2
    depth: AtLeast1 = 6
    """A draw takes 2^depth leapfrog steps."""
    start: BBB = field(default_factory=BBB)

    def build(self, task: Task) -> Algorithm:
        """Where the chains start, by bbb."""
        return self.start.build(task)

    def refine(
        self, task: Task, key: Key, mean: PyTree, scales: PyTree, data: Split, threat: Threat
    ) -> Refined:
        """`bnncert.infer.mcmc` with paths of one length."""
        steps = {"num_steps": 2**self.depth}
        return _sample(self, task, key, mean, scales, data, threat, kernel="hmc", **steps)


@dataclass(frozen=True)
class NUTS:
    """BBB, then NUTS on some of the images, started at its mean."""

    images: Images = 1000
    warmup: Warmup = 50
    samples: Draws = 8
    chains: Chains = 2
    depth: AtLeast1 = 6
    """A draw takes at most 2^depth - 1 leapfrog steps."""
    start: BBB = field(default_factory=BBB)

    def build(self, task: Task) -> Algorithm:
        """Where the chains start, by bbb."""
        return self.start.build(task)

    def refine(
        self, task: Task, key: Key, mean: PyTree, scales: PyTree, data: Split, threat: Threat
    ) -> Refined:
        """`bnncert.infer.mcmc` with paths that end where they turn."""
        most = {"max_tree_depth": self.depth}
        return _sample(self, task, key, mean, scales, data, threat, kernel="nuts", **most)


def worst(values: np.ndarray, extreme: Callable[[np.ndarray], Any]) -> float | None:
    """A statistic of a diagnostic, NaN apart; None if it is infinite: a chain did not move.

    >>> worst(np.array([1.0, np.nan, 1.2]), np.max), worst(np.array([1.0, np.inf]), np.max)
    (1.2, None)
    """
    known = values[~np.isnan(values)]
    found = float(extreme(known)) if known.size else np.nan
    return found if np.isfinite(found) else None


def _sample(
    method: HMC | NUTS,
    task: Task,
    key: Key,
    mean: PyTree,
    scales: PyTree,
    data: Split,
    threat: Threat,
    **kernel: Any,
) -> Refined:
    sampler = infer.mcmc.build(
        task.log_likelihood,
        task.prior,
        prepare=task.model.prepare,
        num_warmup=method.warmup,
        num_samples=method.samples,
        num_chains=method.chains,
        kl_weight=task.train.kl_weight,
        scales=scales,
        adapt_mass=False,
        progress_bar=True,
        **kernel,
    )
    part = slice(method.images)
    x, y = jnp.asarray(data.x[part]), jnp.asarray(data.y[part])
    samples, info = sampler.sample(key, mean, Batch(x, y, jnp.ones(len(y))), threat)
    found = infer.diagnostics.of_predictions(
        # probabilities of float32 stop moving near 1, their logarithms do not
        task.model.apply,
        freeze(task.model, samples.params, x),
        method.chains,
        x[:100],
        link=jax.nn.log_softmax,
    )
    return samples, {
        "divergences": int(info.divergences.sum()),
        "acceptance": float(info.acceptance.mean()),
        "leapfrog_steps": float(info.num_steps.mean()),
        "r_hat": worst(found.r_hat, np.max),
        "median_r_hat": worst(found.r_hat, np.median),
        "effective_sample_size": worst(found.ess, np.min),
        "mcmc_images": len(y),
    }
