"""Operations that are bounded by their interval alone.

    sort, top_k            an order statistic grows in every operand: those of the lower ends, and
                           those of the upper ends
    reduce_prod, cumprod   products of intervals, one after the other
    tan                    its two ends, where no pole lies between
    asin, acos, ...        monotone where they are defined

Where a function is not defined on all of an interval there is no bound. Rounding is known of those
that choose among values.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.ops.boxes import drop_nan
from bnncert.bounds.ops.elementwise import elementwise, guarded, hull, increasing, where_defined
from bnncert.bounds.ops.extremes import off_subnormal, off_underflow
from bnncert.bounds.ops.operation import (
    BY_INTERVAL,
    EXACT,
    IntervalRule,
    Operation,
    Rounding,
    of_one_value,
)
from bnncert.bounds.ops.products import corners
from bnncert.sets import Box


def _has_no_pole(node: Node, box: Box) -> Array:
    """Says whether an interval lies between two poles of the tangent, with room to spare."""
    eps = float(jnp.finfo(box.lower.dtype).eps)
    turn = jnp.floor(box.lower / math.pi + 0.5)
    room = 8 * eps * (2 + jnp.abs(box.lower))
    low, high = (turn - 0.5) * math.pi, (turn + 0.5) * math.pi
    near = jnp.abs(box.lower) < min(1e4, 0.05 / eps)  # farther out the turns are too coarse to tell
    return near & (box.lower > low + room) & (box.upper < high - room)


def _within(low: float, high: float) -> Callable[[Node, Box], Array]:
    return lambda node, box: (box.lower >= low) & (box.upper <= high)


def _inside(node: Node, box: Box) -> Array:
    return (box.lower > -1) & (box.upper < 1)


def _reduced_product(node: Node, box: Box) -> Box:
    axes = tuple(node.params["axes"])
    shape = box.lower.shape
    moved = [jnp.moveaxis(end, axes, range(len(axes))) for end in (box.lower, box.upper)]
    rest = [n for i, n in enumerate(shape) if i not in axes]
    flat: Any = tuple(end.reshape(-1, *rest) for end in moved)
    one = jnp.ones(rest, box.lower.dtype)
    (low, high), _ = jax.lax.scan(_multiplied, (one, one), flat)
    return Box(low, high)


def _cumulative_product(node: Node, box: Box) -> Box:
    axis, reverse = node.params["axis"], node.params["reverse"]
    ends: Any = tuple(jnp.moveaxis(end, axis, 0) for end in (box.lower, box.upper))
    one = jnp.ones(ends[0].shape[1:], box.lower.dtype)
    _, found = jax.lax.scan(_multiplied, (one, one), ends, reverse=reverse)
    return Box(*(jnp.moveaxis(end, 0, axis) for end in found))


def _multiplied(so_far: tuple[Array, Array], more: tuple[Array, Array]) -> Any:
    """Multiplies two intervals, for what may be multiplied by any number after them."""
    box = drop_nan(off_underflow(Box(*corners(Box(*so_far), Box(*more))), humped=False))
    most = float(jnp.finfo(box.lower.dtype).max)  # what overflowed lies beyond it
    found = jnp.minimum(box.lower, most), jnp.maximum(box.upper, -most)
    return found, found


def _of_an_axis(name: str, interval: IntervalRule, rounding: Rounding | None) -> Operation:
    def rule(node: Node, box: Box) -> Box:
        return interval(node, off_subnormal(box))

    return Operation(
        name,
        "reduction",
        rule if rounding is None else guarded(interval, rounding),
        of_one_value,
        relaxation=BY_INTERVAL,
        rounding=rounding,
    )


INTERVALS: tuple[Operation, ...] = (
    elementwise("tan", None, interval=where_defined(increasing, _has_no_pole)),
    elementwise("asin", None, interval=where_defined(increasing, _within(-1.0, 1.0))),
    elementwise("acos", None, interval=where_defined(hull, _within(-1.0, 1.0))),
    elementwise("atanh", None, interval=where_defined(increasing, _inside)),
    elementwise("acosh", None, interval=where_defined(increasing, _within(1.0, math.inf))),
    elementwise("erf_inv", None, interval=where_defined(increasing, _inside)),
)
"""Functions of one value."""

OF_AN_AXIS: tuple[Operation, ...] = (
    *(_of_an_axis(name, increasing, EXACT) for name in ("sort", "top_k")),
    _of_an_axis("reduce_prod", _reduced_product, None),
    _of_an_axis("cumprod", _cumulative_product, None),
)
