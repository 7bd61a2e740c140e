"""Where rows end: on a set, with coefficients some of which are Gaussian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.rows import dot
from bnncert.gaussian.folded import folded_mean
from bnncert.gaussian.layers import Slack, root
from bnncert.sets import LpBall, Set, dual_norm


def each(f: Callable[..., Any], rank: int, *values: Array) -> Any:
    """Applies a function to values of this rank, or to those of each way."""
    axes = tuple(0 if v.ndim > rank else None for v in values)
    return jax.vmap(f, axes)(*values) if any(axis == 0 for axis in axes) else f(*values)


def least_mean(region: Set, slack: Slack, a: Array, variance: Array | None = None) -> Array:
    """Bounds E min (a + g) . x over a set from below, g Gaussian of these variances."""
    if isinstance(region, LpBall):
        middle = dot(a, region.center)
        if variance is None:
            return middle - region.eps * dual_norm(a, region.p)
        if region.p == 2:
            total = jnp.sum(jnp.square(a)) + jnp.sum(variance)
            return middle - region.eps * slack.up(root(total), a.size)
        # The largest of n: at most the largest mean, and that of n centred ones.
        most = jnp.sqrt(2 * jnp.log(2.0 * a.size)) * root(jnp.max(variance))
        return middle - region.eps * slack.up(dual_norm(a, region.p) + most, 64)
    size = jnp.abs(a) if variance is None else slack.up(folded_mean(a, variance), 64)
    return dot(a, region.center) - dot(size, region.radius)
