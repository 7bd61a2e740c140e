"""Boxes of values: around sets, intersected, and where overflow left nothing."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.sets import Box, LpBall, Set


def hull(region: Set) -> Box:
    """The smallest box around a set."""
    if not isinstance(region, LpBall):
        return region
    center, eps = jnp.asarray(region.center), jnp.asarray(region.eps)
    kind = jnp.finfo(center.dtype)
    # What rounding takes off the ends; nothing of a point.
    reach = eps + jnp.where(eps > 0, 2 * kind.eps * (jnp.abs(center) + eps) + kind.tiny, 0)
    return Box(center - reach, center + reach)


def intersect(a: Box, b: Box) -> Box:
    """The intersection of two bounds of one value.

    Both hold it, so they meet; where rounding has parted them, the gap between is kept.
    """
    lower, upper = jnp.maximum(a.lower, b.lower), jnp.minimum(a.upper, b.upper)
    return Box(jnp.minimum(lower, upper), jnp.maximum(lower, upper))


def drop_nan(box: Box) -> Box:
    """No bound where overflow left none: NaN, or an end beyond all numbers, becomes an open end."""
    lower = jnp.where(box.lower < jnp.inf, box.lower, -jnp.inf)
    return Box(lower, jnp.where(box.upper > -jnp.inf, box.upper, jnp.inf))


def stacked(box: Box) -> Array:
    """Puts both ends on a leading axis: what is done to both is compiled once."""
    return jnp.stack(jnp.broadcast_arrays(box.lower, box.upper))


def unstacked(ends: Array) -> Box:
    """Makes the box of two ends on a leading axis."""
    return Box(ends[0], ends[1])


def sides(below: float, above: float, *, like: Array) -> Array:
    """Puts a number for lower and one for upper ends on a leading axis, to go with ends there."""
    shape = (2, *[1] * (like.ndim - 1))
    return jnp.asarray(np.array([below, above], like.dtype).reshape(shape))
