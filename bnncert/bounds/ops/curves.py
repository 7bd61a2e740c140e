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
    """

    value: Elementwise
    slope: Elementwise
    start: End = -math.inf
    end: End = math.inf
    reach: float = math.inf
    edge: float = -math.inf


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
    given = [fraction for fraction in (choice.lower, choice.upper) if fraction is not None]
    if _is_searched(curve) and len(given) != 1:
        both, l, u = _both_sides(curve, l, u)
        fraction = jnp.stack(jnp.broadcast_arrays(*given)) if given else None
        slope, offset = below(both, l, u, fraction, choice.variant)
        return Lines(slope[0], offset[0], -slope[1], -offset[1])
    lower = below(curve, l, u, choice.lower, choice.variant)
    slope, offset = below(negative(curve, l, u), l, u, choice.upper, choice.variant)
    return Lines(*lower, -slope, -offset)


def _is_searched(curve: Curve) -> bool:
    """Whether it is neither convex everywhere nor concave."""
    everywhere = _is(curve.start, -math.inf) and _is(curve.end, math.inf)
    return not everywhere and not _is(curve.start, math.inf)


def _both_sides(curve: Curve, l: Array, u: Array) -> tuple[Curve, Array, Array]:
    """A curve and its negative as one, on a leading axis, and the interval for each."""
    other, ones = negative(curve, l, u), [1] * l.ndim
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
    )
    wide = (2, *l.shape)
    return sides, jnp.broadcast_to(l, wide), jnp.broadcast_to(u, wide)


def below(
    curve: Curve, l: Array, u: Array, fraction: Array | None, variant: int | Array
) -> tuple[Array, Array]:
    """The line below a curve: slope and offset."""
    h, dh = curve.value, curve.slope
    chord = chord_slope(curve, l, u)
    under_chord = jnp.minimum(h(l) - chord * l, h(u) - chord * u)
    if _is(curve.start, math.inf):
        return chord, under_chord
    first, last, at, exist = tangents(curve, l, u, variant)
    if fraction is not None:
        at = jnp.where(exist, jnp.clip(first + fraction * (last - first), first, last), at)
    if curve.edge > -math.inf:
        at = jnp.maximum(at, curve.edge)
    slope = dh(at)
    slope, offset = (
        jnp.where(exist, slope, chord),
        jnp.where(exist, h(at) - slope * at, under_chord),
    )
    if curve.edge > -math.inf:
        # Left of the edge: the smaller value, for a function that is monotone there.
        constant = u <= curve.edge
        return jnp.where(constant, 0, slope), jnp.where(constant, jnp.minimum(h(l), h(u)), offset)
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
    low, high = curve.value(l), curve.value(u)
    root = math.sqrt(jnp.finfo(l.dtype).eps)
    rises = jnp.abs(high - low) > root * (jnp.abs(low) + jnp.abs(high))
    wide = (u > l) & (rises | (u - l > root * (1 + jnp.abs(l) + jnp.abs(u))))
    derivative = curve.slope(jnp.maximum(0.5 * (l + u), curve.edge))
    return jnp.where(wide, (high - low) / jnp.where(wide, u - l, 1), derivative)


def negative(curve: Curve, l: Array, u: Array) -> Curve:
    """-h, convex where h is concave: left of its convex part, or right of it."""
    value, slope, start, end, _, edge = curve
    start, end = _other_part(start, end, l, u)
    return Curve(lambda x: -value(x), lambda x: -slope(x), start, end, edge=edge)


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
    start, end = curve.start, curve.end
    middle = 0.5 * (l + u)
    if _is(start, math.inf):
        return Tangents(middle, middle, middle, jnp.zeros(l.shape, bool))
    a, b = jnp.maximum(l, start), jnp.minimum(u, end)
    exist, first, last = a <= b, l, u
    a, b = jax.lax.stop_gradient((jnp.where(exist, a, middle), jnp.where(exist, b, middle)))
    from_l, from_u = not _is(start, -math.inf), not _is(end, math.inf)
    points, touches = _touching_points(curve, l, u, a, b, from_l, from_u)
    if from_u:
        last, exist = jnp.where(u > end, points[-1], u), exist & ((u <= end) | touches[-1])
    if from_l:
        first, exist = jnp.where(l < start, points[0], l), exist & ((l >= start) | touches[0])
    exist &= first <= last
    first, last = jnp.where(exist, first, middle), jnp.where(exist, last, middle)
    default = jnp.clip(middle, first, last)
    if not isinstance(variant, int) or variant == 1:
        touching = jnp.where(u > end, last, jnp.where(l < start, first, default))
        default = jnp.where(variant == 1, touching, default)
    if curve.reach < math.inf:
        default = jnp.minimum(default, l + curve.reach)
    return Tangents(first, last, default, exist)


def _touching_points(
    curve: Curve, l: Array, u: Array, a: Array, b: Array, from_l: bool, from_u: bool
) -> tuple[list[Array], list[Array]]:
    """Those of the tangents through the ends of [l, u] that are asked for, in one search.

    On [a, b], where the curve is convex; seen from l the safe end is b, from u it is a.
    """
    ends = [*([(l, b, a)] if from_l else []), *([(u, a, b)] if from_u else [])]
    sides = jax.lax.stop_gradient([(x, curve.value(x), *rest) for x, *rest in ends])
    if len(sides) < 2:
        found = [_touching_point(curve, *side) for side in sides]
        return [point for point, _ in found], [touches for _, touches in found]
    both = (jnp.stack(jnp.broadcast_arrays(*each)) for each in zip(*sides, strict=True))
    points, touches = _touching_point(curve, *both)
    return list(points), list(touches)


def _touching_point(
    curve: Curve, x: Array, target: Array, safe: Array, unsafe: Array
) -> tuple[Array, Array]:
    """The point whose tangent passes through (x, target), or one next to it that passes below.

    Between `safe`, farther from x, and `unsafe`: on a convex part, the tangent's height at x rises
    as its point comes closer to x. Also, whether the tangent at `safe` passes below.
    """
    h, dh = curve.value, curve.slope

    def passes_below(point: Array) -> Array:
        return h(point) + dh(point) * (x - point) <= target

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        safe, unsafe = ends
        middle = 0.5 * (safe + unsafe)
        below = passes_below(middle)
        return jnp.where(below, middle, safe), jnp.where(below, unsafe, middle)

    found = jax.lax.fori_loop(0, _BISECTIONS, halve, (safe, unsafe))[0]
    return jax.lax.stop_gradient((found, passes_below(safe)))
