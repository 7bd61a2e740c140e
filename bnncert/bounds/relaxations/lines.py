"""Two lines around an elementwise function on an interval, and those of functions with kinks.

Each function takes the pre-activation interval [l, u] and returns the two lines
`slope * x + offset` that enclose the function on it. Elementwise: any shape.

    relu(x) = max(x, 0)    above: the chord; below: a line through the origin, of slope 0 to 1
    max(x, c)              relu(x - c) + c
    min(x, c)              -max(-x, -c)
    leaky_relu(x)          a x + (1 - a) relu(x)
    |x|                    2 relu(x) - x
    clip(x, a, b)          min(max(x, a), b), a <= b: lines that turn about the kinks
    hard_tanh(x)           clip(x, -1, 1)

Which of the valid lines is a `Choice`.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, section 3.2; Xu et al., "Fast and Complete", ICLR 2021 (free slopes).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

LOWER_SLOPES = ("adaptive", "zero", "one", "chord")
"""Of the line below a ReLU that crosses 0: 0 or 1, what leaves less area; 0; 1; the chord's."""


def check_lower_slope(lower_slope: str) -> None:
    """Raises ValueError unless it is one of `LOWER_SLOPES`."""
    if lower_slope not in LOWER_SLOPES:
        ways = ", ".join(map(repr, LOWER_SLOPES))
        raise ValueError(f"lower_slope = {lower_slope!r}: choose one of {ways}.")


class Lines(NamedTuple):
    """lower(x) <= h(x) <= upper(x) on [l, u]; every field has the shape of l."""

    lower_slope: Float[Array, "*shape"]
    lower_offset: Float[Array, "*shape"]
    upper_slope: Float[Array, "*shape"]
    upper_offset: Float[Array, "*shape"]


class Choice(NamedTuple):
    """Which of the valid lines.

    Attributes:
        lower: of the free line below, in [0, 1] and of the shape of l; None: the default.
        upper: of the free line above, likewise.
        variant: 0 or 1: of two defaults that are both good, neither always the tighter.
        lower_slope: the default of a kink that is crossed: "adaptive" (0 or 1, whichever leaves the
            smaller area), "zero", "one", or "chord" (parallel to the line above).
    """

    lower: Array | None = None
    upper: Array | None = None
    variant: int = 0
    lower_slope: str = "adaptive"


DEFAULT = Choice()


def with_finite_gradients(l: Array, u: Array) -> tuple[Array, Array]:
    """The ends of an interval, as constants where they are so close that quotients overflow.

    The derivative of a quotient has the square of its divisor below: of an interval narrower than
    the root of the smallest normal number it is infinite, or NaN, and says nothing of the lines.
    """
    narrow = u - l < math.sqrt(jnp.finfo(l.dtype).tiny)
    fixed_l, fixed_u = jax.lax.stop_gradient((l, u))
    return jnp.where(narrow, fixed_l, l), jnp.where(narrow, fixed_u, u)


def constant(lower: Array, upper: Array) -> Lines:
    """The lines of slope 0: an interval of values, for a function with no better relaxation."""
    zero = jnp.zeros_like(lower)
    return Lines(zero, lower, zero, upper)


def negated(lines: Lines) -> Lines:
    """The lines of -h, from those of h."""
    lower_slope, lower_offset, upper_slope, upper_offset = lines
    return Lines(-upper_slope, -upper_offset, -lower_slope, -lower_offset)


def mirrored(lines: Lines) -> Lines:
    """The lines of h(-x) on [l, u], from those of h on [-u, -l]."""
    lower_slope, lower_offset, upper_slope, upper_offset = lines
    return Lines(-lower_slope, lower_offset, -upper_slope, upper_offset)


def swapped(choice: Choice) -> Choice:
    """The choice for -h."""
    return choice._replace(lower=choice.upper, upper=choice.lower)


def relu(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """max(x, 0): the chord above; below, a line through the origin, `choice.lower` its slope.

    With up = max(u, 0) and down = max(-l, 0) the chord is up (x + down) / (up + down).
    """
    up, down = jnp.maximum(u, 0), jnp.maximum(-l, 0)
    crossing = (up > 0) & (down > 0)
    width = jnp.where(crossing, up + down, 1)  # a safe divisor keeps gradients finite
    active = (l >= 0).astype(l.dtype)
    chord = jnp.where(crossing, up / width, active)
    # Where the width overflows, the chord's slope is 0, and its height that of its upper end.
    share = jnp.where(jnp.isinf(width), 1, down / width)
    offset = jnp.where(crossing, up * share, 0)
    if choice.lower is None:
        below = _default_slope(l, u, chord, choice)
    else:
        below = choice.lower
    return Lines(jnp.where(crossing, below, active), jnp.zeros_like(l), chord, offset)


def maximum(l: Array, u: Array, threshold: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """max(x, c) = relu(x - c) + c."""
    if isinstance(threshold, (int, float, np.ndarray)) and not np.any(threshold):
        return relu(l, u, choice)
    threshold = jnp.asarray(threshold, l.dtype)
    lines = relu(l - threshold, u - threshold, choice)
    return Lines(
        lines.lower_slope,
        lines.lower_offset + threshold * (1 - lines.lower_slope),
        lines.upper_slope,
        lines.upper_offset + threshold * (1 - lines.upper_slope),
    )


def minimum(l: Array, u: Array, threshold: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """min(x, c) = -max(-x, -c): the line above is the free one."""
    return negated(mirrored(maximum(-u, -l, -jnp.asarray(threshold), swapped(choice))))


def leaky_relu(l: Array, u: Array, slope: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """X where x >= 0, else slope * x; the function is slope * x + (1 - slope) relu(x)."""
    slope = jnp.asarray(slope, l.dtype)
    rise = 1 - slope
    convex = rise >= 0  # a slope above 1 makes it concave: the two lines change places
    below = _bent(relu(l, u, choice), slope, rise)
    above = _bent(relu(l, u, swapped(choice)), slope, rise)
    return Lines(
        jnp.where(convex, below.lower_slope, above.upper_slope),
        jnp.where(convex, below.lower_offset, above.upper_offset),
        jnp.where(convex, below.upper_slope, above.lower_slope),
        jnp.where(convex, below.upper_offset, above.lower_offset),
    )


def absolute(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """|x| = 2 relu(x) - x: below, a line through the origin of any slope in [-1, 1]."""
    lines = relu(l, u, choice)
    return Lines(
        2 * lines.lower_slope - 1,
        2 * lines.lower_offset,
        2 * lines.upper_slope - 1,
        2 * lines.upper_offset,
    )


def hard_tanh(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """clip(x, -1, 1)."""
    return clip(l, u, -1.0, 1.0, choice)


def clip(l: Array, u: Array, low: ArrayLike, high: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """min(max(x, a), b): each line turns about a kink, up to the other end of the function.

    Variant 1: the lines of the minimum, on those of the maximum.
    """
    # Kinks outside of [l, u], which may be infinite, do not matter.
    low, high = (jnp.asarray(end, l.dtype) for end in (low, high))
    low = jnp.where(low < l, l, low)
    high = jnp.where(high > u, jnp.maximum(u, low), high)
    if choice.variant:
        outer = minimum(jnp.maximum(l, low), jnp.maximum(u, low), high, choice)
        return _composed(outer, maximum(l, u, low, choice))
    slope, offset = _clip_lower(-u, -l, -high, -low, swapped(choice))
    return Lines(*_clip_lower(l, u, low, high, choice), slope, -offset)


def _bent(lines: Lines, slope: Array, rise: Array) -> Lines:
    return Lines(
        slope + rise * lines.lower_slope,
        rise * lines.lower_offset,
        slope + rise * lines.upper_slope,
        rise * lines.upper_offset,
    )


def _composed(outer: Lines, inner: Lines) -> Lines:
    """Of an increasing function of a function."""
    return Lines(
        outer.lower_slope * inner.lower_slope,
        outer.lower_slope * inner.lower_offset + outer.lower_offset,
        outer.upper_slope * inner.upper_slope,
        outer.upper_slope * inner.upper_offset + outer.upper_offset,
    )


def _default_slope(l: Array, u: Array, chord: Array, choice: Choice) -> Array:
    return {
        "adaptive": (u > -l).astype(l.dtype),
        "zero": jnp.zeros_like(l),
        "one": jnp.ones_like(l),
        "chord": chord,
    }[choice.lower_slope]


def _clip_lower(l: Array, u: Array, low: Array, high: Array, choice: Choice) -> tuple[Array, Array]:
    """Below clip.

    From (a, a), where l lies left of it, up to (u, min(u, b)) at the steepest; else the chord of
    min(x, b), concave.
    """
    turning = (l < low) & (u > low)
    rise = jnp.where(turning, jnp.minimum(u, high) - low, 0)
    steepest = rise / jnp.where(turning, u - low, 1)
    middle = 0.5 * (l + u)
    share = (middle > low).astype(l.dtype) if choice.lower is None else choice.lower
    slope = share * steepest
    concave = negated(mirrored(maximum(-u, -l, -high)))
    inside = l >= low
    return (
        jnp.where(inside, concave.lower_slope, slope),
        jnp.where(inside, concave.lower_offset, low * (1 - slope)),
    )
