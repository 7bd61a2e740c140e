"""What elementwise functions, and sums of exponentials, are off by in floating point.

    values      |fl h(x) - h(x)| <= (R |h(x)| + A + X |x|) u + 2 t       `function_error`
    slopes      |fl h'(x) - h'(x)| <= (R' |h'(x)| + A') u                `slope_error`
    curvatures  the largest |h''|: what a slope changes by where its point does

The first two are measured and not proved: `experiments.studies.roundoff` sweeps float32 for them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.arithmetic import magnitude, unknown_rounding
from bnncert.bounds.graph import Node
from bnncert.bounds.rules.extremes import EXACT_FUNCTIONS
from bnncert.bounds.rules.reductions import to_last
from bnncert.sets import Box


def function_error(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    """R, and A + X |x|, of `arithmetic.py`'s model, for a function that is not linear.

    Those of softmax and log-sum-exp grow with the spread D of their operand, of C coordinates:
    exp(x - max x) has an argument that is off by u D. Its relative error is (R + 2 D) u, that of
    the sum (R + 2 D + C) u, and an interval rule that takes the sum of differences makes it again.

    Raises:
        UnsupportedPrimitiveError: nothing known.
    """
    if node.op in ("softmax", "log_softmax", "logsumexp", "cumlogsumexp"):
        error = _exponential_sum_error(node, boxes[0])
        return (error, 0.0) if node.op == "softmax" else (16.0, error)
    if node.op in EXACT_FUNCTIONS:
        return 0.0, 0.0
    if node.op == "integer_pow":
        return 4.0 * abs(node.params["y"]) + 4.0, 0.0
    if node.op == "exp":  # a compiler multiplies exponentials by adding up their arguments
        return 16.0 + 4.0 * magnitude(boxes[0]), 0.0
    if node.op not in FUNCTION_ERRORS:
        raise unknown_rounding(node)
    relative, absolute = FUNCTION_ERRORS[node.op]
    if node.op in ("elu", "celu"):  # alpha (e^x - 1): what e^x - 1 is off by grows with alpha
        absolute *= jnp.maximum(1, jnp.abs(_parameter(node)))
    if node.op in OPERAND_ERRORS:
        return relative, absolute + OPERAND_ERRORS[node.op] * magnitude(boxes[0])
    return relative, absolute


def slope_error(node: Node) -> tuple[float, float]:
    """R and A of the slope of an elementwise function, as `relaxations` computes it."""
    if node.op == "integer_pow":
        return 4.0 * abs(node.params["y"]) + 8.0, 0.0
    return SLOPE_ERRORS.get(node.op, SLOPE_ERROR)


def curvature(node: Node, box: Box, free: bool) -> ArrayLike:
    """The largest |h''| where a tangent may touch an elementwise function.

    Args:
        node: the function.
        box: of its operand.
        free: whether a tangent may touch it anywhere; else, no nearer to a pole than the middle.
    """
    if node.op in CURVATURES:
        return CURVATURES[node.op]
    if node.op in _PARAMETRIC:
        return _PARAMETRIC[node.op](_parameter(node))
    if node.op in _GROWTHS:
        # The default tangent touches within 1 / ln 2 of the lower end (`powers.growth`).
        last = box.upper if free else jnp.minimum(box.upper, box.lower + 1.5)
        return _GROWTHS[node.op](last)
    if node.op == "integer_pow":
        exponent: Any = node.params["y"]
        factor = float(abs(exponent * (exponent - 1)))
        return _power_curvature(float(exponent), factor, box, free)
    at, exponent, factor = _POLES[node.op]
    return _power_curvature(exponent, factor, Box(box.lower - at, box.upper - at), free)


def _power_curvature(exponent: float, factor: float, box: Box, free: bool) -> ArrayLike:
    """Of x^p, the largest factor |x|^(p - 2)."""
    size = magnitude(box)
    if not factor:
        return 0.0
    if exponent >= 2:
        return factor * size ** (exponent - 2)
    near = jnp.minimum(jnp.abs(box.lower), jnp.abs(box.upper))
    return factor * (near if free else jnp.maximum(near, 0.49 * size)) ** (exponent - 2)


def _parameter(node: Node) -> Array:
    """The constant of a function that has one."""
    constant: Any = node.operands[1]
    return jnp.asarray(constant, node.dtype)


def _exponential_sum_error(node: Node, box: Box) -> Array:
    """(12 D + 32 C + 128), for each value."""
    axes = node.params["axes"] if "axes" in node.params else (node.params["axis"],)
    axes = tuple(map(int, axes))
    count = math.prod(box.lower.shape[i] for i in axes)
    most = jnp.max(to_last(box.upper, axes), -1)
    spread = most - jnp.min(to_last(box.lower, axes), -1)
    kept = [1 if i in axes else n for i, n in enumerate(box.lower.shape)]
    spread = spread.reshape(node.shape if node.op == "logsumexp" else kept)
    return 12.0 * spread + (32.0 * count + 128.0)


_RELATIVE = "exp sqrt rsqrt reciprocal square leaky_relu soft_sign cbrt asinh log log1p".split()
_ALSO_ABSOLUTE = (
    "expm1 tanh logistic erf atan sin cos softplus squareplus log_sigmoid elu selu celu gelu silu "
    "mish hard_silu".split()
)

FUNCTION_ERRORS: Mapping[str, tuple[float, float]] = {
    **{op: (16.0, 0.0) for op in _RELATIVE},
    **{op: (16.0, 4.0) for op in _ALSO_ABSOLUTE},
    # max(a, b) + log1p(exp(-|a - b|)): the very formula of softplus, and v e^-v < 0.4 keeps the
    # rounding of the difference small.
    "logaddexp": (16.0, 4.0),
    "erfc": (192.0, 0.0),
    "exp2": (160.0, 0.0),
    "sinh": (64.0, 4.0),
    "gelu_tanh": (16.0, 32.0),
}
"""R and A by function: about twice what sweeps of float32 have been seen to need, or more."""

OPERAND_ERRORS: Mapping[str, float] = {"squareplus": 4.0}
"""X by function: (x + sqrt(x^2 + b)) / 2 cancels where x is negative."""

CURVATURES: Mapping[str, float] = {
    "tanh": 0.77,
    "logistic": 0.1,
    "erf": 0.97,
    "erfc": 0.97,
    "atan": 0.65,
    "asinh": 0.39,
    "softplus": 0.25,
    "logaddexp": 0.25,
    "log_sigmoid": 0.25,
    "soft_sign": 2.0,
    "selu": 1.76,
    "gelu": 0.8,
    "gelu_tanh": 0.81,
    "silu": 0.5,
    "mish": 0.65,
    "hard_silu": 0.34,
    "sin": 1.0,
    "cos": 1.0,
    "square": 2.0,
    "leaky_relu": 0.0,
}
"""The largest |h''| by function: rounded up."""

_PARAMETRIC: Mapping[str, Callable[[Array], Array]] = {
    "squareplus": lambda b: 0.5 / jnp.sqrt(b),
    "celu": lambda alpha: 1 / alpha,
    "elu": jnp.abs,
}
"""As `CURVATURES`, by the function's constant."""

_GROWTHS: Mapping[str, Callable[[Array], Array]] = {
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.exp,
}
"""h'' of exponentials, or more."""

_POLES: Mapping[str, tuple[float, float, float]] = {
    "log": (0.0, 0.0, 1.0),
    "log1p": (-1.0, 0.0, 1.0),
    "sqrt": (0.0, 0.5, 0.25),
    "rsqrt": (0.0, -0.5, 0.75),
    "reciprocal": (0.0, -1.0, 2.0),
}
"""|h''| = c |x - a|^(p - 2): a, p and c by function."""

SLOPE_ERROR = (16.0, 4.0)
"""As `FUNCTION_ERRORS`, of derivatives, where `SLOPE_ERRORS` has none."""

SLOPE_ERRORS: Mapping[str, tuple[float, float]] = {"exp2": (160.0, 4.0), "erfc": (192.0, 0.0)}
"""As `SLOPE_ERROR`, of single functions."""
