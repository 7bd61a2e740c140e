"""A value over the root of its mean square: layer, group, instance and RMS normalisation.

    h_i(c, q) = c_i q^(-1/2)            q = a sum_j c_j^2 + e          e > 0

over the n coordinates of a group, a = 1 / n, c the value less its mean (for RMS the value itself).
The mean before, and the scale and shift after, are affine, and nodes of their own. So are the
squares and their sum: q has bounds of its own, those of a sum of squares and of no difference.

Interval, on c in [l, u] and q in [q_0, q_1]. With the others fixed, R_i = q - a c_i^2, and h_i =
c_i / sqrt(a c_i^2 + R_i) grows with c_i, since its derivative is R_i / q^(3/2) > 0; where c_i >= 0
it falls with R_i, else it grows. R_i and c_i have no coordinate in common, so on the box of c alone
this is exact:

    h_i <= u_i / sqrt(a u_i^2 + R)     R the least of R_i where u_i >= 0, else the largest
    h_i >= l_i / sqrt(a l_i^2 + R)     R the largest of R_i where l_i >= 0, else the least

never beyond a^(-1/2), since R_i > 0. And h_i <= u_i / sqrt(q_0), or u_i / sqrt(q_1) where u_i < 0:
the lesser of both. Below the root stands q_min + a (u_i^2 - the least c_i^2) where u_i >= 0, a sum
of what is not negative; where u_i < 0, q_max - a (l_i^2 - u_i^2).

Planes. s(q) = q^(-1/2) is convex. With s_0 = s(q_1) <= s <= s_1 = s(q_0), and any t > 0,

    s >= 3/2 t - t^3/2 q        the tangent where s is t
    s <= k_0 - k_1 q            the chord: k_1 = (s_0 s_1)^2 / (s_0 + s_1)
                                           k_0 = (s_0^2 + s_0 s_1 + s_1^2) / (s_0 + s_1)

(through (s_0^-2, s_0) and (s_1^-2, s_1): k_1 = (s_1 - s_0) / (s_0^-2 - s_1^-2), k_0 = s_1 + k_1
s_1^-2; so written, nothing cancels.) Then McCormick's planes of the product c_i s over [l_i, u_i]
and [s_0, s_1], each side of s replaced by the line that the sign of its coefficient asks for. In a
box of radius r all of this is O(r^2) wide, where h moves by O(r). Where the interval is nearer in
the middle of the box, as in wide ones, it is taken instead.

In rounded arithmetic q is what the network computes, and a sum of the squares of c may differ from
it: there the first interval is taken only where the squares are of the node c itself.

Sources: a normalisation by its variance and a product, Shi et al., "Robustness Verification for
Transformers", ICLR 2020, section 3.3; McCormick 1976 (`products`). That it is one node is ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.extremes import magnitude, off_subnormal, off_underflow
from bnncert.bounds.ops.lines import Choice, by_variant
from bnncert.bounds.ops.operation import Operation, Relaxation, Rounding
from bnncert.bounds.ops.planes import Planes
from bnncert.bounds.ops.reductions import from_last, to_last
from bnncert.sets import Box


class Groups(NamedTuple):
    """Which coordinates are normalised together: those along `axes`, in a shape of as many.

    Attributes:
        shape: that a value is reshaped to.
        axes: of it.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def apart(self, v: Array) -> Array:
        """One group after the other: (..., n)."""
        return to_last(v.reshape(self.shape), self.axes)

    def back(self, v: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `apart`, for a value of this shape."""
        return from_last(v, self.shape, self.axes).reshape(shape)

    def spread(self, v: Array, shape: tuple[int, ...]) -> Array:
        """A value for each group, repeated for each of its coordinates."""
        return jnp.broadcast_to(jnp.expand_dims(v, self.axes), self.shape).reshape(shape)


def least_constant(dtype: Any) -> float:
    """The least e with bounds: what squares lose by underflow is nothing beside it."""
    info = jnp.finfo(dtype)
    return float(info.tiny) / float(info.eps) ** 2


class _Side(NamedTuple):
    """A plane of each h_i: `of_c c_i + of_q q + offset`."""

    of_c: Array
    of_q: Array
    offset: Array


def relax(c: Box, q: Box, values: Box, choice: Choice) -> tuple[_Side, _Side]:
    """The planes of the module, elementwise; variants are of McCormick's corner.

    Args:
        c: its box.
        q: its box, above 0, repeated for each coordinate.
        values: the box of h.
        choice: of the corner, a fraction for each coordinate.
    """
    l, u = c.lower, c.upper
    s1, t, s0 = (jax.lax.rsqrt(v) for v in (q.lower, 0.5 * q.lower + 0.5 * q.upper, q.upper))
    tangent = 1.5 * t, -0.5 * t**3
    chord = (s0**2 + s0 * s1 + s1**2) / (s0 + s1), -s0 * s1 * (s0 * s1 / (s0 + s1))

    def side(fraction: Array | None, near: Array, far: Array, lines: Sequence[Any]) -> _Side:
        f = _fraction(l, u, choice.variant) if fraction is None else fraction
        corner = f * l + (1 - f) * u
        value, slope = (jnp.where(corner > 0, *pair) for pair in zip(*lines, strict=True))
        offset = corner * value - (f * l * near + (1 - f) * u * far)
        return _Side(f * near + (1 - f) * far, corner * slope, offset)

    middles = c.center, 0.5 * q.lower + 0.5 * q.upper
    lower = side(choice.lower, s0, s1, (tangent, chord))
    upper = side(choice.upper, s1, s0, (chord, tangent))
    # Of what overflows NaN is left, at which comparisons fail.
    return (
        _or_constant(_at(lower, *middles) > values.lower, lower, values.lower),
        _or_constant(_at(upper, *middles) < values.upper, upper, values.upper),
    )


def _fraction(l: Array, u: Array, variant: int | Array) -> Array:
    """The corner nearest to 0, where s counts least; or the farthest end."""
    nearest = jnp.clip(u / jnp.where(u > l, u - l, 1), 0, 1)
    farthest = (jnp.abs(l) >= jnp.abs(u)).astype(l.dtype)
    return jax.lax.stop_gradient(by_variant(variant, nearest, farthest))


def _at(side: _Side, c: Array, q: Array) -> Array:
    return side.of_c * c + side.of_q * q + side.offset


def _or_constant(better: Array, side: _Side, value: Array) -> _Side:
    of_c, of_q = (jnp.where(better, v, 0) for v in (side.of_c, side.of_q))
    return _Side(of_c, of_q, jnp.where(better, side.offset, value))


def interval(c: Box, q: Box, share: float | None, e: float) -> Box:
    """The box of h, groups on the last axis.

    Args:
        c: its box.
        q: its box, above 0, one for each group.
        share: a; None: nothing is known of q but its box.
        e: what is added.
    """
    # Beyond 1, in units of the largest: no square overflows.
    size = jnp.max(jnp.maximum(jnp.abs(c.lower), jnp.abs(c.upper)), -1, keepdims=True)
    unit = jax.lax.stop_gradient(jnp.maximum(size, 1))
    lower, upper = c.lower / unit, c.upper / unit
    # A sum of squares that overflows is no bound from below.
    least = jnp.where(q.lower < jnp.inf, q.lower, 0) / unit / unit
    most = q.upper / unit / unit
    # The least value is minus the largest on the box turned round.
    l, u = jnp.stack([-upper, lower]), jnp.stack([-lower, upper])
    below, limit = jnp.where(u < 0, most, least), jnp.inf
    if share is not None:
        own, limit = _below(l, u, share, e / unit / unit), share**-0.5
        below = jnp.where(u < 0, jnp.minimum(below, own), jnp.maximum(below, own))
    ends = u * jax.lax.rsqrt(below)
    ends = jnp.where((q.lower > 0) & ~jnp.isnan(ends), jnp.minimum(ends, limit), limit)
    return Box(-ends[0], ends[1])


def _below(l: Array, u: Array, share: float, e: Array) -> Array:
    """Computes what stands below the root where h is the largest."""
    inner = jnp.where(l > 0, l, jnp.where(u < 0, u, 0)) ** 2
    outer = jnp.maximum(l**2, u**2)
    low, high = (share * jnp.sum(v, -1, keepdims=True) + e for v in (inner, outer))
    taken = share * (outer - u**2)
    # Where most of a sum is taken off again, what is left is off by as much as the sum.
    lost = 8 * (l.shape[-1] + 8) * float(jnp.finfo(l.dtype).eps) * high
    rest = high - taken + jnp.where(taken > 0.5 * high, lost, 0)
    return jnp.where(u < 0, rest, low + share * (u**2 - inner))


def _planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    node = graph.nodes[index]
    c, q = (boxes[i] for i in node.refs)
    values = boxes[index] if index < len(boxes) else _interval(node, c, q)
    spread = node.params["spread"]
    lower, upper = relax(c, Box(spread(q.lower), spread(q.upper)), values, choice)

    def plane(side: _Side) -> Callable[[Array, Array], Array]:
        return lambda c, q: _at(side, c, spread(q))

    def size() -> Array:
        reach = 8 * magnitude(c) * jax.lax.rsqrt(spread(q.lower))
        sizes = (jnp.abs(s.offset) + jnp.where(s.of_c != 0, reach, 0) for s in (lower, upper))
        return jnp.maximum(*sizes)

    return Planes(node.refs, plane(lower), plane(upper), size=size)


def _start(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice:
    half = jnp.full(graph.nodes[index].shape, 0.5, graph.nodes[index].dtype)
    return Choice(half, half)


def _interval(node: Node, c: Box, q: Box) -> Box:
    groups: Groups | None = node.params["groups"]
    c = off_subnormal(c)
    q = Box(*(node.params["spread"](end) for end in (q.lower, q.upper)))
    if groups is None:
        return off_underflow(interval(c, q, None, 0.0), humped=False)
    c, q = (Box(groups.apart(box.lower), groups.apart(box.upper)) for box in (c, q))
    found = interval(c, q, node.params["share"], node.params["e"])
    back = Box(groups.back(found.lower, node.shape), groups.back(found.upper, node.shape))
    return off_underflow(back, humped=False)


def _errors(node: Node, boxes: Sequence[Box]) -> tuple[ArrayLike, ArrayLike]:
    """Counts roundings: of a root, a quotient and a product; of known groups, of their sums too.

    A scale may meet the root before c does: where that product underflows, it is off by t.
    """
    groups, scale = node.params["groups"], node.params["scale"]
    count = 0 if groups is None else math.prod(groups.shape[i] for i in groups.axes)
    if scale is None:
        return 64.0 + 2.0 * count, 0.0
    info = jnp.finfo(node.dtype)
    tiny, size = float(info.tiny), jnp.abs(scale)
    lost = jnp.where(size > 0, 4 * tiny / jnp.maximum(size, tiny), 0) / (0.5 * float(info.eps))
    return 64.0 + 2.0 * count, lost * magnitude(boxes[0])


NORMALISING: tuple[Operation, ...] = (
    Operation(
        "normalise",
        "reduction",
        _interval,
        None,
        relaxation=Relaxation(_planes, _start, 2),
        rounding=Rounding(errors=_errors, planes="sized"),
    ),
)
