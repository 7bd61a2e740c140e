"""Operations that reduce an axis: maximum, log-sum-exp, softmax and cumulative ones.

Intervals, exact for each output:

    max, min, cumulative max and min, log-sum-exp          increasing in every operand
    softmax_i, log_softmax_i                               increasing in x_i, decreasing in others

Planes, on the last axis of x in [l, u], shape (..., n):

max_j x_j
    below  any x_k
    above  with k the coordinate of the largest u, and c the second largest u:
           max_j x_j <= max(x_k, c), and the chord of that in x_k

log sum_j exp x_j, convex
    below  its tangent plane at the middle, whose gradient is the softmax there
    above  the lower in the middle of two:
           with the chords k_j x_j + o_j >= exp x_j, s(x) their sum and s0 = s(middle):
               log s(x) <= log s0 + (s(x) - s0) / s0
           with x_k the largest in the middle, r(x) the log-sum-exp of the others, of which the
           plane above is the first kind, and the chord of softplus on the range of r - x_k:
               x_k + softplus(r(x) - x_k); for two coordinates no plane is lower in the middle

softmax_i x = s(x_i - r_i(x)), s the logistic function and r_i the log-sum-exp of the others
    below  the line below s on the range of x_i - r_i, which rises, and the plane above r_i;
           or, with s_i(x) the sum of the chords of exp(x_j - x_i):  1/s_i >= 2/s0 - s_i/s0^2
    above  the line above s, and the tangent plane of r_i

Sources: Boopathy et al., "CNN-Cert", AAAI 2019 (maximum); Wei et al., "Convex bounds on the softmax
function with applications to robustness verification", AISTATS 2023.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops import curves
from bnncert.bounds.ops.elementwise import guarded, increasing
from bnncert.bounds.ops.extremes import off_subnormal, off_underflow
from bnncert.bounds.ops.lines import DEFAULT, Choice, by_variant, with_finite_gradients
from bnncert.bounds.ops.operation import (
    BY_INTERVAL,
    EXACT,
    IntervalRule,
    Operation,
    Relaxation,
    Rounding,
    of_one_value,
)
from bnncert.bounds.ops.piecewise import relu
from bnncert.bounds.ops.planes import Planes
from bnncert.bounds.ops.smooth import CURVES
from bnncert.sets import Box

Pair = tuple[Callable[[Array], Array], Callable[[Array], Array]]
"""A lower and an upper affine function."""


def maximum(x: Box, choice: Choice, repeats: Array | None = None) -> Pair:
    """The largest of the last axis; variant 1: its plainest planes (constant above).

    Args:
        x: the box of its coordinates.
        choice: which planes.
        repeats: which coordinates repeat another one; not all.
    """
    size = x.lower.shape[-1]
    if size == 1:
        return (lambda v: v[..., 0]), (lambda v: v[..., 0])

    def each(end: Array) -> Array:
        return end if repeats is None else jnp.where(repeats, -jnp.inf, end)

    variant = choice.variant
    largest = _one_hot(each(by_variant(variant, x.center, x.lower)), size)
    top_u = _one_hot(each(x.upper), size)
    others = jnp.max(jnp.where(top_u > 0, -jnp.inf, each(x.upper)), -1)
    l, u = (jnp.sum(jnp.where(top_u > 0, end, 0), -1) for end in (x.lower, x.upper))
    if repeats is not None:
        others = jnp.where(jnp.sum(~repeats, -1) == 1, l, others)
    lines = relu(*with_finite_gradients(l - others, u - others))
    above, offset = lines.upper_slope, lines.upper_offset + (1 - lines.upper_slope) * others
    certain = l >= others
    above = by_variant(variant, above, certain.astype(u.dtype))
    offset = by_variant(variant, offset, jnp.where(certain, 0, u))

    def lower(v: Array) -> Array:
        return jnp.sum(largest * v, -1)

    def upper(v: Array) -> Array:
        return above * jnp.sum(top_u * v, -1) + offset

    return lower, upper


def logsumexp(x: Box, choice: Choice) -> Pair:
    """The log-sum-exp of the last axis; variant 1: above it the first of the two planes."""
    every = jnp.ones(x.lower.shape[-1:], bool)
    above = _above(x, every, every.size)
    if not isinstance(choice.variant, int) or choice.variant:
        other = _chords(x, every)
        above = jax.tree.map(partial(by_variant, choice.variant), above, other)
    return _function(_tangent(x, every), x), _function(above, x)


def log_softmax(x: Box, choice: Choice) -> Pair:
    """X - log-sum-exp, along the last axis."""
    lower, upper = logsumexp(x, choice)
    return (lambda v: v - upper(v)[..., None]), (lambda v: v - lower(v)[..., None])


def softmax(x: Box, choice: Choice) -> Pair:
    """The softmax of the last axis; `choice` is of the logistic function's lines.

    Variant 1 is the second of the planes below.
    """
    size = x.lower.shape[-1]
    if size == 1:
        return jnp.ones_like, jnp.ones_like
    rows, others = _each(x)
    odds = log_odds(x)
    logistic = CURVES["logistic"]()
    lines = curves.lines(logistic, odds.lower, odds.upper, choice._replace(variant=0))

    def through(slope: Array, offset: Array, rest: Plane) -> Plane:
        turned = slope[..., None] * (jnp.eye(size, dtype=slope.dtype) - rest.slope)
        return Plane(turned, slope * (x.center - rest.value) + offset)

    lower = through(lines.lower_slope, lines.lower_offset, _above(rows, others, size - 1))
    if not isinstance(choice.variant, int) or choice.variant:
        lower = jax.tree.map(partial(by_variant, choice.variant), lower, _by_reciprocal(x))
    upper = through(lines.upper_slope, lines.upper_offset, _tangent(rows, others))
    return _function(lower, x), _function(upper, x)


def log_odds(x: Box) -> Box:
    """The range of each x_i minus the log-sum-exp of the others, along the last axis."""
    rows, others = _each(x)
    return Box(x.lower - _logsumexp(rows.upper, others), x.upper - _logsumexp(rows.lower, others))


class Plane(NamedTuple):
    """An affine function of the last axis, by its slopes and its value in the middle of a box."""

    slope: Array
    value: Array


def _function(plane: Plane, x: Box) -> Callable[[Array], Array]:
    """One plane, or (slopes of one axis more) several of the same point."""
    if plane.slope.ndim == x.lower.ndim:
        return lambda v: jnp.sum(plane.slope * (v - x.center), -1) + plane.value
    return lambda v: (
        jnp.einsum("...ij,...j->...i", plane.slope, v - x.center, precision=_HIGHEST) + plane.value
    )


def _each(x: Box) -> tuple[Box, Array]:
    """The box once for each coordinate, and which the others are."""
    size = x.lower.shape[-1]
    shape = (*x.lower.shape, size)
    lower, upper = (jnp.broadcast_to(end[..., None, :], shape) for end in (x.lower, x.upper))
    return Box(lower, upper), ~jnp.eye(size, dtype=bool)


def _logsumexp(v: Array, among: Array) -> Array:
    return jax.nn.logsumexp(jnp.where(among, v, -jnp.inf), -1)


def _tangent(x: Box, among: Array) -> Plane:
    """Below the log-sum-exp of some coordinates: the tangent plane at the middle."""
    middle = jnp.where(among, x.center, -jnp.inf)
    return Plane(jax.nn.softmax(middle), jax.nn.logsumexp(middle, -1))


def _above(x: Box, among: Array, count: int) -> Plane:
    """Above the log-sum-exp of `count` coordinates."""
    largest = _one_hot(jnp.where(among, x.center, -jnp.inf), x.lower.shape[-1])
    low, middle, high = (jnp.sum(largest * v, -1) for v in (x.lower, x.center, x.upper))
    if count == 1:
        return Plane(largest, middle)
    rest = among & (largest == 0)
    plane = _chords(x, rest) if count > 2 else _above(x, rest, 1)
    ends = _logsumexp(x.lower, rest) - high, _logsumexp(x.upper, rest) - low
    chord = curves.lines(CURVES["softplus"](), *ends, DEFAULT)
    slope = chord.upper_slope
    value = middle + slope * (plane.value - middle) + chord.upper_offset
    slope = slope[..., None] * plane.slope + (1 - slope[..., None]) * largest
    if count == 2:
        return Plane(slope, value)
    other = _chords(x, among)
    lower = value < other.value
    return Plane(
        jnp.where(lower[..., None], slope, other.slope), jnp.where(lower, value, other.value)
    )


def _chords(x: Box, among: Array) -> Plane:
    """Above the log-sum-exp: the tangent of log at the sum of the chords of exp."""
    shift = jnp.max(jnp.where(among, x.upper, -jnp.inf), -1, keepdims=True)
    shift = jax.lax.stop_gradient(shift)
    slope, offset = _exp_chord(*(jnp.where(among, v - shift, 0) for v in (x.lower, x.upper)))
    slope = jnp.where(among, slope, 0)
    total = jnp.sum(jnp.where(among, slope * (x.center - shift) + offset, 0), -1)
    return Plane(slope / total[..., None], jnp.log(total) + shift[..., 0])


def _by_reciprocal(x: Box) -> Plane:
    """Below the softmax: the second of the module's planes."""
    identity = jnp.eye(x.lower.shape[-1], dtype=bool)
    # Entry [..., i, j] is x_j - x_i.
    low = jnp.where(identity, 0, x.lower[..., None, :] - x.upper[..., :, None])
    high = jnp.where(identity, 0, x.upper[..., None, :] - x.lower[..., :, None])
    center = 0.5 * (low + high)
    least = jnp.exp(-jax.nn.logsumexp(high, -1))
    slope, offset = _exp_chord(*(jnp.minimum(d, _LARGEST_EXPONENT) for d in (low, high)))
    total = jnp.sum(slope * center + offset, -1)
    # Beyond, exp overflows: nothing better than the interval is known below.
    usable = jnp.max(high, -1) < _LARGEST_EXPONENT
    flatness = jnp.where(usable, 1 / total**2, 0)
    below = jnp.where(usable, 1 / total, least)

    slope = -flatness[..., None] * slope
    diagonal = jnp.sum(jnp.where(identity, 0, slope), -1, keepdims=True)
    return Plane(jnp.where(identity, -diagonal, slope), below)


_HIGHEST = jax.lax.Precision.HIGHEST
_LARGEST_EXPONENT = 40.0


def _exp_chord(l: Array, u: Array) -> tuple[Array, Array]:
    """Slope and offset of the chord of exp; at the end of which the line is the higher."""
    wide = u - l > jnp.sqrt(jnp.finfo(l.dtype).eps) * (1 + jnp.abs(l) + jnp.abs(u))
    middle_slope = jnp.exp(0.5 * (l + u))
    slope = jnp.where(wide, (jnp.exp(u) - jnp.exp(l)) / jnp.where(wide, u - l, 1), middle_slope)
    return slope, jnp.maximum(jnp.exp(l) - slope * l, jnp.exp(u) - slope * u)


def _one_hot(values: Array, size: int) -> Array:
    return jax.nn.one_hot(jnp.argmax(values, -1), size, dtype=values.dtype)


def minimum(x: Box, choice: Choice, repeats: Array | None = None) -> Pair:
    """The smallest of the last axis: minus the largest of -x."""
    lower, upper = maximum(Box(-x.upper, -x.lower), choice, repeats)
    return (lambda v: -upper(-v)), (lambda v: -lower(-v))


PLANES: Mapping[str, Callable[..., Pair]] = {
    "reduce_max": maximum,
    "reduce_min": minimum,
    "logsumexp": logsumexp,
    "log_softmax": log_softmax,
    "softmax": softmax,
}
"""By name: `(box of the last axis, choice) -> two affine functions of it`."""


def _planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    """A reduction brought to the last axis, and back where the axis stays."""
    node = graph.nodes[index]
    box, axes = boxes[node.refs[0]], _axes(node)
    last = partial(to_last, axes=axes)
    lower_fraction, upper_fraction = jax.tree.map(last, (choice.lower, choice.upper))
    choice = choice._replace(lower=lower_fraction, upper=upper_fraction)
    rule = PLANES[node.op]
    if "repeats" in node.params:
        rule = partial(rule, repeats=last(jnp.asarray(node.params["repeats"])))
    lower, upper = rule(Box(last(box.lower), last(box.upper)), choice)
    keeps = node.op in ("softmax", "log_softmax")

    def back(v: Array) -> Array:
        return from_last(v, node.shape, axes) if keeps else v.reshape(node.shape)

    return Planes(node.refs, lambda v: back(lower(last(v))), lambda v: back(upper(last(v))))


def _softmax_start(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
    node = graph.nodes[index]
    box, axes = boxes[node.refs[0]], _axes(node)
    odds = log_odds(Box(to_last(box.lower, axes), to_last(box.upper, axes)))
    start = curves.fractions(CURVES["logistic"](), odds.lower, odds.upper)
    fractions = jax.tree.map(lambda t: from_last(t, node.shape, axes), (start.lower, start.upper))
    return Choice(*fractions)


def _axes(node: Node) -> tuple[int, ...]:
    return tuple(map(int, node.params["axes"]))


def _log_softmax_interval(node: Node, box: Box) -> Box:
    axes = tuple(map(int, node.params["axes"]))
    return Box(_rival(box.lower, box.upper, axes), _rival(box.upper, box.lower, axes))


def _softmax_interval(node: Node, box: Box) -> Box:
    logs = _log_softmax_interval(node, box)
    return Box(jnp.exp(logs.lower), jnp.exp(logs.upper))


def _rival(own: Array, others: Array, axes: tuple[int, ...]) -> Array:
    """-log(1 + sum_{j != i} exp(others_j - own_i)) for each i along the axes."""
    flat_own, flat_others = (to_last(v, axes) for v in (own, others))
    itself = jnp.eye(flat_own.shape[-1], dtype=bool)
    differences = flat_others[..., None, :] - flat_own[..., :, None]
    total = jax.nn.logsumexp(jnp.where(itself, 0.0, differences), axis=-1)
    return from_last(-total, own.shape, axes)


def to_last(v: Array, axes: tuple[int, ...]) -> Array:
    """The axes flattened into one, the last."""
    others = [i for i in range(v.ndim) if i not in axes]
    return v.transpose(*others, *axes).reshape(*(v.shape[i] for i in others), -1)


def from_last(v: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The inverse of `to_last`, for a value of this shape."""
    order = [*(i for i in range(len(shape)) if i not in axes), *axes]
    moved = v.reshape([shape[i] for i in order])
    return moved.transpose([order.index(i) for i in range(len(shape))])


def _exponential_sum_error(node: Node, boxes: Sequence[Box]) -> Array:
    """12 D + 32 C + 128, for each value, D the spread of its operand, of C coordinates.

    exp(x - max x) has an argument that is off by u D. Its relative error is (R + 2 D) u, that of
    the sum (R + 2 D + C) u, and an interval rule that takes the sum of differences makes it again.
    """
    (box,) = boxes
    axes = node.params["axes"] if "axes" in node.params else (node.params["axis"],)
    axes = tuple(map(int, axes))
    count = math.prod(box.lower.shape[i] for i in axes)
    most = jnp.max(to_last(box.upper, axes), -1)
    spread = most - jnp.min(to_last(box.lower, axes), -1)
    kept = [1 if i in axes else n for i, n in enumerate(box.lower.shape)]
    spread = spread.reshape(node.shape if node.op == "logsumexp" else kept)
    return 12.0 * spread + (32.0 * count + 128.0)


def _relative(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    return _exponential_sum_error(node, boxes), 0.0


def _absolute(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    return 16.0, _exponential_sum_error(node, boxes)


def _record(
    name: str,
    interval: IntervalRule,
    rounding: Rounding,
    start: Callable[[Graph, int, Sequence[Box]], Choice | None] = lambda graph, index, boxes: None,
) -> Operation:
    own = Relaxation(_planes, start, 2)
    relaxation = own if name in PLANES else BY_INTERVAL

    def rule(node: Node, box: Box) -> Box:
        return off_underflow(interval(node, off_subnormal(box)), humped=False)

    return Operation(
        name,
        "reduction",
        guarded(interval, rounding) if rounding.exact else rule,
        of_one_value,
        relaxation=relaxation,
        rounding=rounding,
    )


_EXACT = EXACT._replace(planes="values")
_SUMS = Rounding(errors=_absolute, planes="interval")

REDUCTIONS: tuple[Operation, ...] = (
    *(_record(name, increasing, _EXACT) for name in ("reduce_max", "reduce_min")),
    *(_record(name, increasing, EXACT) for name in ("cummax", "cummin")),
    _record("cumlogsumexp", increasing, _SUMS),
    _record("logsumexp", increasing, _SUMS),
    _record("log_softmax", _log_softmax_interval, _SUMS),
    _record(
        "softmax",
        _softmax_interval,
        Rounding(errors=_relative, planes="interval"),
        _softmax_start,
    ),
)
