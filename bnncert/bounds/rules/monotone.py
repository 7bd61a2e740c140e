"""Interval rules of increasing functions: h([l, u]) = [h(l), h(u)].

`max` and `min` increase in each operand, so they stand here too, with one bounded operand or both.
"""

from collections.abc import Callable

import jax.numpy as jnp

from bnncert.bounds.graph import Node
from bnncert.sets import Box


def _increasing(node: Node, *boxes: Box) -> Box:
    lower = node.evaluate(*node.fill([box.lower for box in boxes]))
    upper = node.evaluate(*node.fill([box.upper for box in boxes]))
    return Box(lower, upper)


def _leaky_relu(node: Node, box: Box) -> Box:
    """Increasing for a slope >= 0 only; its one kink, 0, makes the third candidate otherwise."""
    lower, upper = (node.evaluate(*node.fill([end])) for end in (box.lower, box.upper))
    kink = node.evaluate(*node.fill([jnp.clip(jnp.zeros_like(box.lower), box.lower, box.upper)]))
    low = jnp.minimum(jnp.minimum(lower, upper), kink)
    return Box(low, jnp.maximum(jnp.maximum(lower, upper), kink))


MONOTONE: dict[str, Callable[..., Box]] = {
    "max": _increasing,
    "min": _increasing,
    "leaky_relu": _leaky_relu,
    "softplus": _increasing,
    "logistic": _increasing,
    "tanh": _increasing,
    "exp": _increasing,
    "exp2": _increasing,
    "expm1": _increasing,
    "log": _increasing,
    "log1p": _increasing,
    "sqrt": _increasing,
    "cbrt": _increasing,
    "erf": _increasing,
    "atan": _increasing,
    "asinh": _increasing,
    "sinh": _increasing,
    "sign": _increasing,
    "floor": _increasing,
    "ceil": _increasing,
    "round": _increasing,
}
