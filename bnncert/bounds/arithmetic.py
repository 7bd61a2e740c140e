"""Floating-point arithmetic: a model of it, and intervals that hold in it.

`rounding="outward"` bounds what a network *computes*, not only what it is in real arithmetic.

The model. The network runs node by node as it was traced, by operations of unit roundoff u
(float32: 2^-24) and smallest normal number t (2^-126); nothing overflows. With |d| <= u:

    + - * / and conversions   fl(a o b) = (a o b)(1 + d), and off by t where that underflows
    sums of n products        in any order, with or without fused multiply-add, but by no fast
                              algorithm (Winograd, Strassen, FFT); factors rounded to u at most
    division by a constant    may be a product with its reciprocal
    functions h               |fl h(x) - h(x)| <= (R |h(x)| + A + X |x|) u + 2 t
    moves, comparisons, max   exact; one that is compiled twice comes out alike
    subnormal values          may be taken for 0; weights are not subnormal

Real arithmetic is the case d = 0: the bounds hold there too. So they do for any order of summation,
any batch and any fusion. They are computed in floating point themselves, under the same model.

Sums. Each product of y = sum_i w_i x_i passes through at most n roundings, in any order, so

    fl(y) = sum_i w_i x_i (1 + theta_i),     |theta_i| <= gamma(n) = n u / (1 - n u)

(Higham 2002, section 3.1). The network computes the *exact* sum at x_i (1 + theta_i): at a point of
the box widened by gamma(n) max(|l_i|, |u_i|) on either side. The bound is the interval rule on that
box, and the rule rounds as well: by centre c and radius r it is off by at most

    |fl(W c) - W c| + |fl(|W| r) - |W| r|  <=  gamma(n) |W| (|c| + r)

and |c| + r = max(|l|, |u|): the same widening once more, with n + 8 for the few roundings of c, r
and of the widening. Two products as before, no third for magnitudes. An operand taken for 0 is off
by t: the box is widened by 2 t as well. A product that underflows costs t, in the network and in
the rule: 8 t for each are added at the end, with a few u of the value for the last roundings.

A function that increases is evaluated at both ends, with the error that its value may have there,
and the network's value has the same error once more. Others likewise, at the points where their
rule evaluates them. R, A and X (`function_error`) are measured and not proved; they are as good as
the backend's functions, and `experiments.studies.roundoff` checks them there.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM 2002, chapters 2, 3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds import rules
from bnncert.bounds.graph import Graph, Node, unsupported
from bnncert.bounds.operands import Operand, Ref
from bnncert.bounds.rules import AFFINE, affine_rule
from bnncert.bounds.rules.affine import magnitude as with_magnitudes
from bnncert.bounds.rules.reductions import to_last
from bnncert.sets import Box


class Arithmetic(NamedTuple):
    """In which floating-point arithmetic a network runs.

    Attributes:
        unit_roundoff: of the network's operations; None: of the dtype of each value.
    """

    unit_roundoff: float | None = None

    def unit(self, node: Node) -> float:
        """The network's unit roundoff at a node: no less than that of the dtype."""
        return max(self.unit_roundoff or 0.0, own_unit(node))


class Roundings(NamedTuple):
    """How many roundings a term passes through.

    Attributes:
        forward: on the way to one coordinate of the value; 0: the operation is exact.
        backward: on the way to one coefficient of an operand, in the transpose; 0: it is exact.
    """

    forward: int
    backward: int


def own_unit(node: Node) -> float:
    """The unit roundoff of a node's dtype, in which bounds are computed."""
    return 0.5 * float(jnp.finfo(node.dtype).eps)


def tiny(node: Node) -> float:
    """The smallest normal number of a node's dtype."""
    return float(jnp.finfo(node.dtype).tiny)


def gamma(n: int, unit: float) -> float:
    """The largest relative error that n roundings leave: n u / (1 - n u).

    Raises:
        ValueError: n u is 1/2 or more, where nothing can be said.
    """
    if not 2 * n * unit < 1:
        raise ValueError(
            f"a sum of {n} terms has no error bound at unit roundoff {unit:g}: n u must be below "
            '1/2. Bound in a wider format (float32 or float64), or with rounding="nearest".'
        )
    return n * unit / (1 - n * unit)


def magnitude(box: Box) -> Array:
    """The largest magnitude in a box, elementwise."""
    return jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))


def roundings(graph: Graph, node: Node) -> Roundings:
    """Of an operation that is affine in its bounded operands, or a product of two of them.

    Raises:
        UnsupportedPrimitiveError: an operation whose rounding is not known.
    """
    shapes = [graph.nodes[i].shape for i in node.refs]
    size, largest = math.prod(node.shape), max((math.prod(s) for s in shapes), default=1)
    op = node.op
    if op in _EXACT:
        return Roundings(0, 0)
    if op == "windows":
        return Roundings(0, node.shape[0] - 1)
    if op in _REPEATING:
        return Roundings(0, size if op == "gather" else max(0, -(-size // max(largest, 1)) - 1))
    if op in ("add", "add_any", "sub"):
        return Roundings(1, 0)
    if op == "convert_element_type":
        return Roundings(1, 1)
    if op in ("mul", "div"):
        return Roundings(3, 3)
    if op == "reduce_sum":
        return Roundings(max(1, largest // max(size, 1)), 0)
    if op == "cumsum":
        length = node.shape[node.params["axis"]]
        return Roundings(length, length)
    if op == "reduce_window_sum":
        window = math.prod(node.params["window_dimensions"])
        return Roundings(window, window)
    if op == "scatter-add":
        updates = node.operands[2]
        return Roundings(math.prod(_shape(graph, updates)) + 1, 0)
    if op == "dot_general":
        return _dot_roundings(graph, node)
    if op == "conv_general_dilated":
        return _convolution_roundings(graph, node)
    raise _unknown(node)


def interval(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Arithmetic) -> Box:
    """The interval of what a node computes, from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation, or nothing known of its rounding.
    """
    if node.op in _EXACT or node.op in _REPEATING or node.op in EXACT_FUNCTIONS:
        return rules.interval(node, *boxes)
    if affine_rule(node) or (node.op in rules.BILINEAR and len(boxes) == 2):
        return _sum_interval(graph, node, boxes, arithmetic)
    relative, absolute = function_error(node, boxes)
    units = arithmetic.unit(node) + own_unit(node)
    box = rules.interval(node, *(_off_subnormal(box, tiny(node)) for box in boxes))
    return widened(box, units * relative, units * absolute + 8 * tiny(node))


def function_error(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    """R, and A + X |x|, of the module's model, for a function that is not linear.

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
        return 4.0 * abs(int(node.params["y"])) + 4.0, 0.0  # pyright: ignore[reportArgumentType]
    if node.op not in FUNCTION_ERRORS:
        raise _unknown(node)
    relative, absolute = FUNCTION_ERRORS[node.op]
    if node.op in ("elu", "celu"):  # alpha (e^x - 1): what e^x - 1 is off by grows with alpha
        absolute *= jnp.maximum(1, jnp.abs(jnp.asarray(node.operands[1], node.dtype)))  # pyright: ignore
    if node.op in OPERAND_ERRORS:
        return relative, absolute + OPERAND_ERRORS[node.op] * magnitude(boxes[0])
    return relative, absolute


def slope_error(node: Node) -> tuple[float, float]:
    """R and A of the slope of an elementwise function, as `relaxations` computes it."""
    if node.op == "integer_pow":
        return 4.0 * abs(int(node.params["y"])) + 8.0, 0.0  # pyright: ignore[reportArgumentType]
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
    if node.op in ("exp", "exp2", "expm1"):
        # The default tangent touches within 1 / ln 2 of the lower end (`powers.growth`).
        last = box.upper if free else jnp.minimum(box.upper, box.lower + 1.5)
        return jnp.exp2(last) if node.op == "exp2" else jnp.exp(last)
    if node.op == "squareplus":
        return 0.5 / jnp.sqrt(jnp.asarray(node.operands[1], node.dtype))  # pyright: ignore
    if node.op == "celu":
        return 1 / jnp.asarray(node.operands[1], node.dtype)  # pyright: ignore
    if node.op == "elu":
        return jnp.abs(jnp.asarray(node.operands[1], node.dtype))  # pyright: ignore
    exponent = _POWERS[node.op] if node.op in _POWERS else float(int(node.params["y"]))  # pyright: ignore
    factor = abs(exponent * (exponent - 1)) if exponent else float(node.op in _POWERS)
    size = magnitude(box)
    if not factor:
        return 0.0
    if exponent >= 2:
        return factor * size ** (exponent - 2)
    near = jnp.minimum(jnp.abs(box.lower), jnp.abs(box.upper))
    if node.op == "log1p":
        near, size = 1 + box.lower, 1 + box.upper
    return factor * (near if free else jnp.maximum(near, 0.49 * size)) ** (exponent - 2)


def widened(box: Box, relative: ArrayLike, absolute: ArrayLike) -> Box:
    """Each end moved outward by `relative` of its magnitude, and by `absolute`."""
    return Box(
        box.lower - (relative * jnp.abs(box.lower) + absolute),
        box.upper + (relative * jnp.abs(box.upper) + absolute),
    )


def _sum_interval(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Arithmetic) -> Box:
    """Of an operation that is linear in each operand: its rule on widened operands."""
    terms = roundings(graph, node).forward
    unit, own = arithmetic.unit(node), own_unit(node)
    relative, absolute = 0.0, 8 * (terms + 2) * tiny(node)
    if terms > 3:
        relative = gamma(terms + 2, unit) + gamma(terms + 12, own)
        relative *= 1 + 4 * relative
    if node.op in MIXING and len(boxes) == 1:
        return _mixed(node, boxes[0], relative, absolute)
    if terms > 3 and affine_rule(node) and AFFINE[node.op].has_offset:
        absolute += relative * jnp.abs(constant_part(node, boxes))
    if terms > 1:  # what subnormal operands add to a sum is covered by `absolute`
        boxes = [_scaled(box, relative, 2 * tiny(node)) for box in boxes]
    return widened(rules.interval(node, *boxes), 4 * (unit + own), absolute)


def _mixed(node: Node, box: Box, relative: float, absolute: float) -> Box:
    """By centre and radius, the radius widened before it is multiplied."""
    radius = box.radius + relative * (jnp.abs(box.center) + box.radius) + 2 * tiny(node)
    center = node.evaluate(*node.fill([box.center]))
    reach = with_magnitudes(node, radius) + absolute
    return Box(center - reach, center + reach)


def constant_part(node: Node, boxes: Sequence[Box]) -> Array:
    """The value of an affine operation at 0."""
    return node.evaluate(*node.fill([jnp.zeros_like(box.lower) for box in boxes]))


def _off_subnormal(box: Box, smallest: float) -> Box:
    """Ends moved outward until none is subnormal: one may be read as 0, where h may be far off."""
    lower = jnp.where((box.lower > 0) & (box.lower < smallest), 0, box.lower)
    return Box(lower, jnp.where(box.upper > -smallest, jnp.maximum(box.upper, smallest), box.upper))


def _scaled(box: Box, relative: float, absolute: float) -> Box:
    """The box of all x (1 + theta), |theta| <= relative."""
    reach = relative * magnitude(box) + absolute
    return Box(box.lower - reach, box.upper + reach)


def _dot_roundings(graph: Graph, node: Node) -> Roundings:
    (contract, _), (batch, _) = node.params["dimension_numbers"]
    first, second = (_shape(graph, o) for o in node.operands)
    summed = math.prod(first[i] for i in contract)
    kept = summed * math.prod(first[i] for i in batch)
    frees = {0: math.prod(second) // max(kept, 1), 1: math.prod(first) // max(kept, 1)}
    places = [place for place, o in enumerate(node.operands) if isinstance(o, Ref)]
    return Roundings(max(summed, 1), max(1, *(frees[place] for place in places)))


def _convolution_roundings(graph: Graph, node: Node) -> Roundings:
    """Of patches times kernel; backward, at most each tap of each feature for an image's pixel."""
    _, rhs, out = node.params["dimension_numbers"]
    kernel = _shape(graph, node.operands[1])
    features = kernel[rhs[0]]
    taps = math.prod(kernel) // max(features, 1)
    space = math.prod(kernel[i] for i in rhs[2:])
    groups = node.params["feature_group_count"]
    backward = space * features // groups
    if isinstance(node.operands[1], Ref):  # for a tap of the kernel: every position it was at
        positions = math.prod(node.shape[i] for i in (out[0], *out[2:]))
        backward = max(backward, positions)
    return Roundings(max(taps, 1), max(backward, 1))


def _shape(graph: Graph, operand: Operand) -> tuple[int, ...]:
    return graph.nodes[operand.index].shape if isinstance(operand, Ref) else jnp.shape(operand)


def _exponential_sum_error(node: Node, box: Box) -> Array:
    """(12 D + 32 C + 128), for each value."""
    axes = node.params["axes"] if "axes" in node.params else (node.params["axis"],)
    axes = tuple(map(int, axes))
    count = math.prod(box.lower.shape[i] for i in axes)
    keeps = node.op != "logsumexp"
    most = jnp.max(to_last(box.upper, axes), -1)
    spread = most - jnp.min(to_last(box.lower, axes), -1)
    if keeps:
        shape = [1 if i in axes else n for i, n in enumerate(box.lower.shape)]
        spread = spread.reshape(shape)
    else:
        spread = spread.reshape(node.shape)
    return 12.0 * spread + (32.0 * count + 128.0)


def _unknown(node: Node) -> Exception:
    known = {*FUNCTION_ERRORS, *_EXACT, *EXACT_FUNCTIONS, *_REPEATING, *rules.BILINEAR}
    hint = f'rounding="outward" does not know how \'{node.op}\' rounds; "nearest" bounds it.'
    return unsupported(node, sorted(known), hint)


_EXACT = frozenset(
    "reshape transpose squeeze expand_dims rev slice split dynamic_slice unstack stack concatenate "
    "dynamic_update_slice scatter pad select_n neg".split()
)
"""Operations that move values, each to one place."""

_REPEATING = frozenset("tile windows broadcast_in_dim gather".split())
"""Operations that move values, each to several places."""

MIXING = ("dot_general", "conv_general_dilated")
"""Operations whose interval rule is by centre and radius."""

EXACT_FUNCTIONS = frozenset(
    "max min abs hard_tanh sign floor ceil round reduce_max reduce_min cummax cummin".split()
)

_RELATIVE = "exp sqrt rsqrt reciprocal square leaky_relu soft_sign cbrt asinh log log1p".split()
_ALSO_ABSOLUTE = (
    "expm1 tanh logistic erf atan sin cos softplus squareplus log_sigmoid elu selu celu gelu silu "
    "mish hard_silu".split()
)

FUNCTION_ERRORS: Mapping[str, tuple[float, float]] = {
    **{op: (16.0, 0.0) for op in _RELATIVE},
    **{op: (16.0, 4.0) for op in _ALSO_ABSOLUTE},
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
    "atan": 0.65,
    "asinh": 0.39,
    "softplus": 0.25,
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

_POWERS: Mapping[str, float] = {
    "log": 0.0,  # its h'' is that of a power 0, but for the factor
    "log1p": 0.0,
    "sqrt": 0.5,
    "rsqrt": -0.5,
    "reciprocal": -1.0,
}

SLOPE_ERROR = (16.0, 4.0)
"""As `FUNCTION_ERRORS`, of derivatives, where `SLOPE_ERRORS` has none."""

SLOPE_ERRORS: Mapping[str, tuple[float, float]] = {"exp2": (160.0, 4.0)}
"""As `SLOPE_ERROR`, of single functions."""
