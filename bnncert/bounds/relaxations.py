"""Linear relaxations of nonlinearities on an interval.

Each function takes the pre-activation interval [l, u] and returns the two lines
`slope * x + offset` that enclose the nonlinearity h on it. Elementwise: any shape.

    convex h       above: the chord; below: a tangent
    S-shaped h     (tanh, sigmoid: convex below 0, concave above)  below: the chord where it
                   encloses; else a tangent, at the middle, or where the tangent through (u, h(u))
                   touches if that comes first (by bisection from the safe side); above: mirrored
    any other h    the interval of its values: slope 0

A chord's offset is the larger (above) or smaller (below) of those at its two ends: whatever the
rounding of the slope, the line encloses h.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, sections 3.2 and 3.3.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Elementwise: TypeAlias = Callable[[Array], Array]

LOWER_SLOPES = ("adaptive", "zero", "one", "chord")
_BISECTIONS = 30


class Lines(NamedTuple):
    """lower(x) <= h(x) <= upper(x) on [l, u]; every field has the shape of l."""

    lower_slope: Float[Array, "*shape"]
    lower_offset: Float[Array, "*shape"]
    upper_slope: Float[Array, "*shape"]
    upper_offset: Float[Array, "*shape"]


def relu(l: Array, u: Array, lower_slope: str = "adaptive") -> Lines:
    """max(x, 0): the chord above; below, a line through the origin.

    Args:
        l: lower ends.
        u: upper ends.
        lower_slope: for units that cross 0: "adaptive" (0 or 1, whichever leaves the smaller
            area), "zero", "one", or "chord" (parallel to the line above).
    """
    crossing = (l < 0) & (u > 0)
    width = jnp.where(crossing, u - l, 1.0)  # a safe divisor keeps gradients finite
    active = (l >= 0).astype(l.dtype)
    chord = jnp.where(crossing, u / width, active)
    below = {
        "adaptive": (u > -l).astype(l.dtype),
        "zero": jnp.zeros_like(l),
        "one": jnp.ones_like(l),
        "chord": chord,
    }[lower_slope]
    zero = jnp.zeros_like(l)
    return Lines(
        jnp.where(crossing, below, active), zero, chord, jnp.where(crossing, -chord * l, zero)
    )


def maximum(l: Array, u: Array, threshold: Array, lower_slope: str = "adaptive") -> Lines:
    """max(x, c) = relu(x - c) + c."""
    lines = relu(l - threshold, u - threshold, lower_slope)
    return Lines(
        lines.lower_slope,
        lines.lower_offset + threshold * (1 - lines.lower_slope),
        lines.upper_slope,
        lines.upper_offset + threshold * (1 - lines.upper_slope),
    )


def minimum(l: Array, u: Array, threshold: Array, lower_slope: str = "adaptive") -> Lines:
    """min(x, c) = -max(-x, -c)."""
    mirrored = maximum(-u, -l, -threshold, lower_slope)
    return Lines(
        mirrored.upper_slope, -mirrored.upper_offset, mirrored.lower_slope, -mirrored.lower_offset
    )


def leaky_relu(l: Array, u: Array, slope: Array, lower_slope: str = "adaptive") -> Lines:
    """X where x >= 0, else slope * x; the function is slope * x + (1 - slope) relu(x)."""
    ramp = relu(l, u, lower_slope)
    rise = 1 - jnp.asarray(slope, l.dtype)
    bent = Lines(*(rise * field for field in ramp))
    convex = rise >= 0  # a slope above 1 makes it concave: the two lines change places
    below = (bent.lower_slope, bent.lower_offset)
    above = (bent.upper_slope, bent.upper_offset)
    lower = [jnp.where(convex, b, a) for b, a in zip(below, above, strict=True)]
    upper = [jnp.where(convex, a, b) for b, a in zip(below, above, strict=True)]
    return Lines(slope + lower[0], lower[1], slope + upper[0], upper[1])


def softplus(l: Array, u: Array) -> Lines:
    """log(1 + e^x), convex: chord above, the tangent at the middle below."""
    return _convex(jax.nn.softplus, jax.nn.sigmoid, l, u, 0.5 * (l + u))


def exp(l: Array, u: Array) -> Lines:
    """e^x, convex: chord above; below a tangent near l, which keeps it from falling far under 0."""
    return _convex(jnp.exp, jnp.exp, l, u, jnp.minimum(0.5 * (l + u), l + 0.99))


def tanh(l: Array, u: Array) -> Lines:
    """The hyperbolic tangent, S-shaped."""
    # 1 - tanh(x)^2, without its cancellation at large |x|
    return _s_shaped(jnp.tanh, lambda x: 4 * _sigmoid_slope(2 * x), l, u)


def sigmoid(l: Array, u: Array) -> Lines:
    """1 / (1 + e^-x), S-shaped."""
    return _s_shaped(jax.nn.sigmoid, _sigmoid_slope, l, u)


def constant(lower: Array, upper: Array) -> Lines:
    """The lines of slope 0: an interval of values, for a function with no better relaxation."""
    zero = jnp.zeros_like(lower)
    return Lines(zero, lower, zero, upper)


def _sigmoid_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _chord_slope(h: Elementwise, dh: Elementwise, l: Array, u: Array) -> Array:
    """(h(u) - h(l)) / (u - l); the derivative where the ends are too close for a difference."""
    # Differences of h lose all digits below this width; its derivative is then as good a slope.
    tiny = jnp.sqrt(jnp.finfo(l.dtype).eps) * (1 + jnp.abs(l) + jnp.abs(u))
    wide = u - l > tiny
    return jnp.where(wide, (h(u) - h(l)) / jnp.where(wide, u - l, 1.0), dh(0.5 * (l + u)))


def _tangent(h: Elementwise, dh: Elementwise, at: Array) -> tuple[Array, Array]:
    slope = dh(at)
    return slope, h(at) - slope * at


def _convex(h: Elementwise, dh: Elementwise, l: Array, u: Array, at: Array) -> Lines:
    chord = _chord_slope(h, dh, l, u)
    above = jnp.maximum(h(l) - chord * l, h(u) - chord * u)
    return Lines(*_tangent(h, dh, at), chord, above)


def _s_shaped(h: Elementwise, dh: Elementwise, l: Array, u: Array) -> Lines:
    """For h convex below 0, concave above, and h - h(0) odd: the upper line mirrors the lower."""
    lower_slope, lower_offset = _s_lower(h, dh, l, u)
    slope, offset = _s_lower(h, dh, -u, -l)
    return Lines(lower_slope, lower_offset, slope, 2 * h(jnp.zeros_like(l)) - offset)


def _s_lower(h: Elementwise, dh: Elementwise, l: Array, u: Array) -> tuple[Array, Array]:
    """The line below h of the largest area: it supports the convex envelope of h at the middle."""
    chord = _chord_slope(h, dh, l, u)
    below = jnp.minimum(h(l) - chord * l, h(u) - chord * u)
    middle = 0.5 * (l + u)
    # Across 0 the chord lies below h just where it is no steeper than h at l.
    use_chord = (l >= 0) | ((u > 0) & (chord <= dh(l)))
    touching = _touching_point(h, dh, jnp.minimum(l, 0.0), jnp.maximum(u, 0.0))
    at = jnp.where(u <= 0, middle, jnp.minimum(middle, touching))
    slope, offset = _tangent(h, dh, at)
    return jnp.where(use_chord, chord, slope), jnp.where(use_chord, below, offset)


def _touching_point(h: Elementwise, dh: Elementwise, l: Array, u: Array) -> Array:
    """The point d in [l, 0] whose tangent passes through (u, h(u)), or slightly below it.

    A tangent at d passes below (u, h(u)) for each d left of the solution, and then below h on all
    of [l, u]: so bisection that keeps the left end is sound after any number of steps. Derivatives
    take the point as given: they are those of a valid line, one that does not slide.
    """
    l, u = jax.lax.stop_gradient((l, u))
    target = h(u)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        safe, unsafe = ends
        middle = 0.5 * (safe + unsafe)
        below = h(middle) + dh(middle) * (u - middle) <= target
        return jnp.where(below, middle, safe), jnp.where(below, unsafe, middle)

    return jax.lax.fori_loop(0, _BISECTIONS, halve, (l, jnp.zeros_like(l)))[0]
