"""The two lines around a smooth function that is convex on one interval, concave on either side.

    convex: all of it         exp, softplus, x^2       convex: x <= c     tanh, sigmoid
    convex: none of it        log, sqrt                convex: x >= c     x^3, erfc
    convex: a <= x <= b       gelu, silu, mish

Below h on [l, u]. Let C be the part of [l, u] where h is convex, D_u the last point of C whose
tangent passes through (u, h(u)) or below it, D_l the first whose tangent passes so at l. Each
tangent at a point of [D_l, D_u] lies below h: on C because h is convex there, beyond C because h is
concave there and the tangent lies below both ends. They and the two lines at the ends of [D_l, D_u]
are the convex envelope of h; where there is no such point (D_l > D_u), the envelope is the chord.

    variant 0    the tangent at the middle of [l, u], or the point of [D_l, D_u] next to it: it
                 supports the envelope in the middle, and so encloses the smallest area
    variant 1    where [l, u] leaves C: the tangent at the point that touches (D_u, D_l)
    a fraction   the tangent at D_l + t (D_u - D_l)

Above h: below -h, whose convex part is one of the two where h is concave (if [l, u] meets both, the
chord: so it is for each of these functions). D_u and D_l are found by bisection that keeps the safe
end, so a line is sound after any number of steps. Derivatives take both points as given: they are
those of a valid line, one that does not slide. A chord's offset is the safer of those at its ends.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, sections 3.2 and 3.3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.ops.lines import Choice, Lines

Elementwise: TypeAlias = Callable[[Array], Array]
End: TypeAlias = float | Array

_BISECTIONS = 30


class Curve(NamedTuple):
    """A function, and where it is convex.

    Attributes:
        value: h.
        slope: its derivative; where there is a kink, any between those on its sides.
        start: where the convex part begins; -inf: it has no beginning.
        end: where it ends; start > end: h is concave everywhere.
        reach: of the default tangent below, the largest distance from l.
        edge: no tangent is taken left of it: for a monotone function that is convex or concave on
            all of a domain with a singular end.
        one_end: whether the convex part has one end at most.
    """

    value: Elementwise
    slope: Elementwise
    start: End = -math.inf
    end: End = math.inf
    reach: float = math.inf
    edge: float = -math.inf
    one_end: bool = False


class Tangents(NamedTuple):
    """The points [first, last] whose tangents enclose, if any exist, and the default of them."""

    first: Array
    last: Array
    default: Array
    exist: Array


def lines(curve: Curve, l: Array, u: Array, choice: Choice) -> Lines:
    """The lines around a curve on [l, u].

    Where either side is searched for, both are at once: one loop for a compiler, not two.
    """
    if _is_searched(curve) and (choice.lower is None) == (choice.upper is None):
        return lines_of_sides(curve, negative(curve, l, u), l, u, choice)
    lower = below(curve, l, u, choice.lower, choice.variant)
    slope, offset = below(negative(curve, l, u), l, u, choice.upper, choice.variant)
    return Lines(*lower, -slope, -offset)


def lines_of_sides(curve: Curve, other: Curve, l: Array, u: Array, choice: Choice) -> Lines:
    """Finds the lines around a curve from where it, and its negative `other`, are convex."""
    fraction = None
    if choice.lower is not None and choice.upper is not None:
        fraction = jnp.stack(jnp.broadcast_arrays(choice.lower, choice.upper))
    both, l, u = _both_sides(curve, other, l, u)
    slope, offset = below(both, l, u, fraction, choice.variant)
    return Lines(slope[0], offset[0], -slope[1], -offset[1])


def _is_searched(curve: Curve) -> bool:
    """Whether it is neither convex everywhere nor concave."""
    everywhere = _is(curve.start, -math.inf) and _is(curve.end, math.inf)
    return not everywhere and not _is(curve.start, math.inf)


def _has_one_end(curve: Curve) -> bool:
    return _is(curve.start, -math.inf) or _is(curve.end, math.inf)


def _both_sides(curve: Curve, other: Curve, l: Array, u: Array) -> tuple[Curve, Array, Array]:
    """A curve and its negative as one, on a leading axis, and the interval for each."""
    ones = [1] * l.ndim
    sign = jnp.array([1, -1], l.dtype).reshape(2, *ones)

    def both(a: End, b: End) -> Array:
        if isinstance(a, float) and isinstance(b, float):
            return jnp.array([a, b], l.dtype).reshape(2, *ones)
        return jnp.stack([jnp.broadcast_to(jnp.asarray(end, l.dtype), l.shape) for end in (a, b)])

    sides = Curve(
        lambda x: sign * curve.value(x),
        lambda x: sign * curve.slope(x),
        both(curve.start, other.start),
        both(curve.end, other.end),
        edge=curve.edge,
        one_end=_has_one_end(curve) and _has_one_end(other),
    )
    wide = (2, *l.shape)
    return sides, jnp.broadcast_to(l, wide), jnp.broadcast_to(u, wide)


def below(
    curve: Curve, l: Array, u: Array, fraction: Array | None, variant: int | Array
) -> tuple[Array, Array]:
    """The line below a curve: slope and offset."""
    ends = jnp.stack([l, u])
    values = curve.value(ends)
    if _is(curve.start, math.inf):
        chord = _chord_slope(curve, ends, values, curve.slope(_middle(curve, ends)))
        return chord, jnp.minimum(*(values - chord * ends))
    first, last, at, exist = _tangents(curve, ends, values, variant)
    if fraction is not None:
        at = jnp.where(exist, jnp.clip(first + fraction * (last - first), first, last), at)
    if curve.edge > -math.inf:
        at = jnp.maximum(at, curve.edge)
    derivative, slope = curve.slope(jnp.stack([_middle(curve, ends), at]))
    chord = _chord_slope(curve, ends, values, derivative)
    slope, offset = (
        jnp.where(exist, slope, chord),
        jnp.where(exist, curve.value(at) - slope * at, jnp.minimum(*(values - chord * ends))),
    )
    if curve.edge > -math.inf:
        # Left of the edge: the smaller value, for a function that is monotone there.
        constant = u <= curve.edge
        return jnp.where(constant, 0, slope), jnp.where(constant, jnp.minimum(*values), offset)
    return slope, offset


def default_fraction(curve: Curve, l: Array, u: Array, variant: int | Array) -> Array:
    """The fraction that gives the default line below."""
    found = tangents(curve, l, u, variant)
    wide = found.last > found.first
    width = jnp.where(wide, found.last - found.first, 1)
    return jnp.where(wide, jnp.clip((found.default - found.first) / width, 0, 1), 0.5)


def fractions(curve: Curve, l: Array, u: Array, variant: int = 0) -> Choice:
    """The fractions that give the default lines."""
    upper = default_fraction(negative(curve, l, u), l, u, variant)
    return Choice(default_fraction(curve, l, u, variant), upper, variant)


def chord_slope(curve: Curve, l: Array, u: Array) -> Array:
    """(h(u) - h(l)) / (u - l); the derivative where the ends are too close for a difference."""
    ends = jnp.stack([l, u])
    return _chord_slope(curve, ends, curve.value(ends), curve.slope(_middle(curve, ends)))


def _chord_slope(curve: Curve, ends: Array, values: Array, derivative: Array) -> Array:
    (l, u), (low, high) = ends, values
    root = math.sqrt(jnp.finfo(l.dtype).eps)
    rises = jnp.abs(high - low) > root * (jnp.abs(low) + jnp.abs(high))
    wide = (u > l) & (rises | (u - l > root * (1 + jnp.abs(l) + jnp.abs(u))))
    return jnp.where(wide, (high - low) / jnp.where(wide, u - l, 1), derivative)


def _middle(curve: Curve, ends: Array) -> Array:
    return jnp.maximum(0.5 * (ends[0] + ends[1]), curve.edge)


def negative(curve: Curve, l: Array, u: Array) -> Curve:
    """-h, convex where h is concave: left of its convex part, or right of it."""
    start, end = _other_part(curve.start, curve.end, l, u)
    return curve._replace(
        value=lambda x: -curve.value(x),
        slope=lambda x: -curve.slope(x),
        start=start,
        end=end,
        reach=math.inf,
    )


def _other_part(start: End, end: End, l: Array, u: Array) -> tuple[End, End]:
    if _is(start, math.inf):
        return -math.inf, math.inf
    if _is(start, -math.inf):
        return end, math.inf
    if _is(end, math.inf):
        return -math.inf, start
    right = l >= start
    both = ~right & (u > end)  # [end, start]: nothing
    return jnp.where(right | both, end, -jnp.inf), jnp.where(right, jnp.inf, start)


def _is(end: End, value: float) -> bool:
    return isinstance(end, float) and end == value


def tangents(curve: Curve, l: Array, u: Array, variant: int | Array) -> Tangents:
    """The points of [l, u] whose tangents lie below a curve."""
    ends = jnp.stack([l, u])
    return _tangents(curve, ends, curve.value(ends), variant)


def _tangents(curve: Curve, ends: Array, values: Array, variant: int | Array) -> Tangents:
    (l, u), start, end = ends, curve.start, curve.end
    middle = 0.5 * (l + u)
    if _is(start, math.inf):
        return Tangents(middle, middle, middle, jnp.zeros(l.shape, bool))
    a, b = jnp.maximum(l, start), jnp.minimum(u, end)
    exist, first, last = a <= b, l, u
    if not _is(start, -math.inf) or not _is(end, math.inf):
        a, b = jnp.where(exist, a, middle), jnp.where(exist, b, middle)
        before, after = l < start, u > end
        of_l, of_u = _touching_points(curve, ends, values, a, b)
        first, last = jnp.where(before, of_l.point, l), jnp.where(after, of_u.point, u)
        exist &= (of_l.touches | ~before) & (of_u.touches | ~after)
    exist &= first <= last
    first, last = jnp.where(exist, first, middle), jnp.where(exist, last, middle)
    default = jnp.clip(middle, first, last)
    if not isinstance(variant, int) or variant == 1:
        touching = jnp.where(u > end, last, jnp.where(l < start, first, default))
        default = jnp.where(variant == 1, touching, default)
    if curve.reach < math.inf:
        default = jnp.minimum(default, l + curve.reach)
    return Tangents(first, last, default, exist)


class Touching(NamedTuple):
    """Finds the tangent through an end of [l, u]: where it touches the convex part, if it does.

    Beyond the far end of that part, a tangent passes above the end.
    """

    point: Array
    touches: Array


def _touching_points(
    curve: Curve, ends: Array, values: Array, a: Array, b: Array
) -> tuple[Touching, Touching]:
    """Finds the tangents through l and u, in one search on [a, b], where the curve is convex.

    Seen from l the safe end is b, from u it is a. What is not asked for may be anything.
    """
    if curve.one_end or _has_one_end(curve):  # only one of the two is asked for
        left = jnp.broadcast_to(ends[0] < curve.start, a.shape)
        x, value = (jnp.where(left, pair[0], pair[1]) for pair in (ends, values))
        found = _touching_point(curve, x, value, jnp.where(left, b, a), jnp.where(left, a, b))
        return found, found
    found = _touching_point(curve, ends, values, jnp.stack([b, a]), jnp.stack([a, b]))
    of_l, of_u = (Touching(*(each[side] for each in found)) for side in (0, 1))
    return of_l, of_u


def _touching_point(curve: Curve, x: Array, target: Array, safe: Array, unsafe: Array) -> Touching:
    """The point whose tangent passes through (x, target), or one next to it that passes below.

    Between `safe`, farther from x, and `unsafe`: on a convex part, the tangent's height at x rises
    as its point comes closer to x. First `safe` itself is tried.
    """

    def halve(i: Array, found: Array) -> Array:
        safe, unsafe, touches = found
        point = jnp.where(i == 0, safe, 0.5 * (safe + unsafe))
        below = curve.value(point) + curve.slope(point) * (x - point) <= target
        touches = jnp.where(i == 0, below, touches)
        return jnp.stack([jnp.where(below, point, safe), jnp.where(below, unsafe, point), touches])

    x, target, *given = jax.lax.stop_gradient((x, target, safe, unsafe))
    begin = jnp.stack(jnp.broadcast_arrays(*given, jnp.zeros((), given[0].dtype)))
    found = jax.lax.fori_loop(0, _BISECTIONS + 1, halve, begin)
    return jax.lax.stop_gradient(Touching(found[0], found[2] > 0))
