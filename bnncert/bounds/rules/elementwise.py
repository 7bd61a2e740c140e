"""Interval rules of elementwise functions that are not increasing: exact images of [l, u].

    decreasing        erfc, rsqrt, and 1/x, x^-n on either side of the pole: the ends change places
    one minimum       |x|, x^2, x^n for even n, gelu, silu, mish, hard_silu: the larger of the two
                      ends above; below their smaller, or the minimum where [l, u] contains it
    waves             sin and cos: 1 and -1 where [l, u] contains a crest or a trough
    x^p               increasing or decreasing on x > 0; outside no bound

The minima of gelu, silu and mish were computed in float64 and are rounded down here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.relaxations import waves
from bnncert.bounds.relaxations.smooth import CURVES
from bnncert.sets import Box

Rule = Callable[[Node, Box], Box]


def _ends(node: Node, box: Box) -> tuple[Array, Array]:
    return node.evaluate(*node.fill([box.lower])), node.evaluate(*node.fill([box.upper]))


def _hull(node: Node, box: Box) -> Box:
    a, b = _ends(node, box)
    return Box(jnp.minimum(a, b), jnp.maximum(a, b))


def _nowhere(box: Box, defined: Array) -> Box:
    """No bound where the function is not defined on all of the interval."""
    return Box(jnp.where(defined, box.lower, -jnp.inf), jnp.where(defined, box.upper, jnp.inf))


def _valley(at: float, least: float) -> Rule:
    """Decreasing left of `at`, increasing right of it."""

    def rule(node: Node, box: Box) -> Box:
        hull = _hull(node, box)
        inside = (box.lower <= at) & (at <= box.upper)
        bottom = least - abs(least) * float(jnp.finfo(node.dtype).eps)
        return Box(jnp.where(inside, bottom, hull.lower), hull.upper)

    return rule


def _gelu_tanh(node: Node, box: Box) -> Box:
    """By the formula that does not cancel where x is negative."""
    value = CURVES["gelu_tanh"]().value
    return _valley(-0.7524614220710163, -0.1700407505712541)(node._replace(evaluate=value), box)


def _integer_pow(node: Node, box: Box) -> Box:
    exponent: Any = node.params["y"]
    if exponent < 0:
        return _pole(node, box)
    return _valley(0.0, 0.0)(node, box) if exponent and exponent % 2 == 0 else _hull(node, box)


def _pole(node: Node, box: Box) -> Box:
    """Monotone on either side of 0."""
    one_side = (box.lower > 0) | (box.upper < 0)
    safe = Box(jnp.where(one_side, box.lower, 1), jnp.where(one_side, box.upper, 1))
    return _nowhere(_hull(node, safe), one_side)


def _rsqrt(node: Node, box: Box) -> Box:
    positive = box.lower > 0
    safe = Box(jnp.where(positive, box.lower, 1), jnp.where(positive, box.upper, 1))
    return _nowhere(_hull(node, safe), positive)


def _pow(node: Node, box: Box) -> Box:
    """For a constant exponent; at 0 itself where the exponent is not negative."""
    exponent = jnp.asarray(node.operands[1], node.dtype)  # pyright: ignore
    defined = (box.lower > 0) | ((box.lower == 0) & (exponent >= 0))
    safe = Box(jnp.where(defined, box.lower, 1), jnp.where(defined, box.upper, 1))
    return _nowhere(_hull(node, safe), defined)


def _elu(node: Node, box: Box) -> Box:
    """Increasing for alpha >= 0; below 0 it falls to 0 at 0 otherwise: a third candidate."""
    hull = _hull(node, box)
    kink = node.evaluate(*node.fill([jnp.clip(jnp.zeros_like(box.lower), box.lower, box.upper)]))
    return Box(jnp.minimum(hull.lower, kink), jnp.maximum(hull.upper, kink))


def _sin(node: Node, box: Box) -> Box:
    return waves.image(jnp.sin, -0.5 * jnp.pi, box.lower, box.upper)


def _cos(node: Node, box: Box) -> Box:
    return waves.image(jnp.cos, jnp.pi, box.lower, box.upper)


ELEMENTWISE: Mapping[str, Rule] = {
    "abs": _valley(0.0, 0.0),
    "square": _valley(0.0, 0.0),
    "gelu": _valley(-0.7517915246935646, -0.16997120747990372),
    "gelu_tanh": _gelu_tanh,
    "silu": _valley(-1.2784645427610741, -0.2784645427610739),
    "mish": _valley(-1.1924312145154952, -0.3088434130172506),
    "hard_silu": _valley(-1.5, -0.375),
    "integer_pow": _integer_pow,
    "reciprocal": _pole,
    "rsqrt": _rsqrt,
    "pow": _pow,
    "elu": _elu,
    "erfc": _hull,
    "sin": _sin,
    "cos": _cos,
}
