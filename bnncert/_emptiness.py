"""Empty sets: what is said of them where only a running program knows that they are empty.

A set is empty where lower > upper, where a radius is negative, or where any of its numbers is NaN
or infinite; and a decision at a point needs a set that holds it. Of all points of an empty set
anything is true, and nothing is meant. Where the numbers are known, it is an error
(`bnncert.sets.check_set`). Where they are traced, bounds are computed over some point in its place,
so that no NaN arises in them or in derivatives, and are dropped: the cost is a few operations.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from bnncert.sets import Box, LpBall, Set, bits_of, dual_norm, is_concrete, is_subnormal


def is_valid(region: Set) -> Bool[Array, ""]:
    """Says True of a set of one example that is finite and not empty."""
    if isinstance(region, LpBall):
        finite = jnp.all(jnp.abs(region.center) < jnp.inf)
        return finite & (region.eps >= 0) & (region.eps < jnp.inf)
    lower, upper = jnp.asarray(region.lower), jnp.asarray(region.upper)
    return jnp.all((lower <= upper) & (lower > -jnp.inf) & (upper < jnp.inf))


def holds(region: Set, x: Array) -> Bool[Array, ""]:
    """Says True where a set holds a point (a ball: but for the rounding of its distance)."""
    if isinstance(region, LpBall):
        away = (x - region.center).ravel()
        distance = jnp.sum(jnp.abs(away)) if region.p == 1 else dual_norm(away, 2)
        return distance <= region.eps * (1 + 1e-5)
    return jnp.all((x >= region.lower) & (x <= region.upper))


def empty_unless(condition: Bool[Array, ""], region: Set) -> Set:
    """Gives the set, or an empty one."""
    if isinstance(region, LpBall):
        return LpBall(region.center, jnp.where(condition, region.eps, -1.0), region.p)
    return Box(jnp.where(condition, region.lower, 1.0), jnp.where(condition, region.upper, -1.0))


def settled(regions: Sequence[Set]) -> tuple[tuple[Set, ...], Bool[Array, ""] | None]:
    """Gives sets to compute with, and whether what is computed over them may be said.

    Args:
        regions: as `check_set` passed them.

    Returns:
        The sets, with one point in place of each that is traced and empty: no NaN arises, nor in
        derivatives. And whether none was; None where all numbers were known, and checked.
    """
    found, valid = [], None
    for region in regions:
        traced = not all(map(is_concrete, jax.tree.leaves(region)))
        if traced:
            here = is_valid(region)
            valid = here if valid is None else valid & here
            region = _point_unless(here, region)
        found.append(_off_subnormal(region))
    return tuple(found), valid


def unbounded_unless(valid: Bool[Array, ""] | None, box: Box) -> Box:
    """Gives the bounds, or none: what `settled` says of them is applied."""
    if valid is None:
        return box
    lower, upper = jnp.asarray(box.lower), jnp.asarray(box.upper)
    least, most = _extremes(lower.dtype)
    return Box(jnp.where(valid, lower, least), jnp.where(valid, upper, most))


def _extremes(dtype: Any) -> tuple[Any, Any]:
    """Gives the two ends that are no bound, in the dtype of an output."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return -jnp.inf, jnp.inf
    if jnp.issubdtype(dtype, jnp.bool):
        return False, True
    return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max


def _point_unless(valid: Array, region: Set) -> Set:
    """Gives the set, or a finite point, in the middle of the numbers that it has."""
    middle = region.center
    middle = jnp.where(jnp.abs(middle) < jnp.inf, middle, jnp.zeros_like(middle))
    if isinstance(region, LpBall):
        center = jnp.where(valid, region.center, middle)
        return LpBall(center, jnp.where(valid, region.eps, 0.0), region.p)
    return Box(jnp.where(valid, region.lower, middle), jnp.where(valid, region.upper, middle))


def _off_subnormal(region: Set) -> Set:
    """Moves subnormal ends and radii outward: backends take them for 0, the set for a point.

    Those of float16 are numbers like any others: products of it are computed in float32.
    """
    if jnp.result_type(region.center) == jnp.float16:
        return region
    if isinstance(region, LpBall):
        eps = jnp.asarray(region.eps)
        tiny = jnp.finfo(eps.dtype).tiny
        return LpBall(region.center, jnp.where(is_subnormal(eps), tiny, eps), region.p)
    lower, upper = jnp.asarray(region.lower), jnp.asarray(region.upper)
    tiny = jnp.finfo(lower.dtype).tiny
    wide = bits_of(lower) != bits_of(upper)
    below = jnp.where(jnp.signbit(lower), -tiny, 0.0)
    above = jnp.where(jnp.signbit(upper), -0.0, tiny)
    return Box(
        jnp.where(wide & is_subnormal(lower), below, lower),
        jnp.where(wide & is_subnormal(upper), above, upper),
    )
