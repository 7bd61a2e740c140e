"""Interval rules of increasing functions: h([l, u]) = [h(l), h(u)].

`max`, `min` and `logaddexp` increase in each operand, so they stand here too; with both bounded,
their difference is a third, which their value does not depend on.
"""

from collections.abc import Callable

import jax.numpy as jnp

from bnncert.bounds.graph import Node
from bnncert.bounds.relaxations.smooth import CURVES
from bnncert.sets import Box


def increasing(node: Node, *boxes: Box) -> Box:
    """Evaluated at the lower ends, and at the upper ends."""
    lower = node.evaluate(*node.fill([box.lower for box in boxes]))
    upper = node.evaluate(*node.fill([box.upper for box in boxes]))
    return Box(lower, upper)


def _leaky_relu(node: Node, box: Box) -> Box:
    """Increasing for a slope >= 0 only; its one kink, 0, makes the third candidate otherwise."""
    lower, upper = (node.evaluate(*node.fill([end])) for end in (box.lower, box.upper))
    kink = node.evaluate(*node.fill([jnp.clip(jnp.zeros_like(box.lower), box.lower, box.upper)]))
    low = jnp.minimum(jnp.minimum(lower, upper), kink)
    return Box(low, jnp.maximum(jnp.maximum(lower, upper), kink))


def _squareplus(node: Node, box: Box) -> Box:
    """By the formula that does not cancel where x is negative, nor overflow."""
    value = CURVES["squareplus"](*node.operands[1:]).value  # pyright: ignore
    return Box(value(box.lower), value(box.upper))


MONOTONE: dict[str, Callable[..., Box]] = {
    "max": increasing,
    "min": increasing,
    "logaddexp": increasing,
    "leaky_relu": _leaky_relu,
    "softplus": increasing,
    "squareplus": _squareplus,
    "soft_sign": increasing,
    "log_sigmoid": increasing,
    "clip": increasing,
    "hard_tanh": increasing,
    "selu": increasing,
    "celu": increasing,
    "logistic": increasing,
    "tanh": increasing,
    "exp": increasing,
    "exp2": increasing,
    "expm1": increasing,
    "log": increasing,
    "log1p": increasing,
    "sqrt": increasing,
    "cbrt": increasing,
    "erf": increasing,
    "atan": increasing,
    "asinh": increasing,
    "sinh": increasing,
    "sign": increasing,
    "floor": increasing,
    "ceil": increasing,
    "round": increasing,
}
