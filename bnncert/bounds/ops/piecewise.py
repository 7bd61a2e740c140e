"""Piecewise linear functions: two lines that enclose each, and their records.

    relu(x) = max(x, 0)    above: the chord; below: a line through the origin, of slope 0 to 1
    max(x, c)              relu(x - c) + c
    min(x, c)              -max(-x, -c)
    leaky_relu(x)          a x + (1 - a) relu(x)
    |x|                    2 relu(x) - x
    clip(x, a, b)          min(max(x, a), b), a <= b: lines that turn about the kinks
    hard_tanh(x)           clip(x, -1, 1)

Each takes the interval [l, u] of its operand. Steps (sign, floor, ceil, round) have intervals only.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions", NeurIPS 2018, section 3.2; Xu et al., "Fast and Complete", ICLR 2021 (free slopes).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from bnncert.bounds.ops.elementwise import (
    elementwise,
    increasing,
    valley,
    with_candidate_at_zero,
)
from bnncert.bounds.ops.lines import (
    DEFAULT,
    Choice,
    Lines,
    mirrored,
    negated,
    swapped,
)
from bnncert.bounds.ops.operation import EXACT, Operation, Parameter, Rounding


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
    if isinstance(choice.variant, int):
        return _clip(l, u, low, high, choice)
    ways = (_clip(l, u, low, high, choice._replace(variant=variant)) for variant in (0, 1))
    return Lines(*(jnp.where(choice.variant == 1, b, a) for a, b in zip(*ways, strict=True)))


def _clip(l: Array, u: Array, low: Array, high: Array, choice: Choice) -> Lines:
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


def _at_kink(kink: ArrayLike, middle: Array, concave: bool = False) -> Choice:
    """Each default is 0 or 1: the steeper where the middle lies on the steep side of the kink."""
    steep = (middle < kink if concave else middle > kink).astype(middle.dtype)
    return Choice(steep, steep)


def _initial_clip(l: Array, u: Array, low: ArrayLike = -1.0, high: ArrayLike = 1.0) -> Choice:
    middle = 0.5 * (l + u)
    return Choice((middle > low).astype(l.dtype), (middle < high).astype(l.dtype))


_SHIFTED = EXACT._replace(constants="moves")

PIECEWISE: tuple[Operation, ...] = (
    elementwise(
        "max",
        _SHIFTED,
        interval=increasing,
        increases=True,
        lines=maximum,
        initial=lambda l, u, c: _at_kink(c, 0.5 * (l + u)),
        kinked=True,
    ),
    elementwise(
        "min",
        _SHIFTED,
        interval=increasing,
        increases=True,
        lines=minimum,
        initial=lambda l, u, c: _at_kink(c, 0.5 * (l + u), concave=True),
        kinked=True,
    ),
    elementwise(
        "leaky_relu",
        Rounding(constants="scales"),
        interval=with_candidate_at_zero,
        increases=True,  # for a slope >= 0
        lines=leaky_relu,
        initial=lambda l, u, slope: _at_kink(0.0, 0.5 * (l + u)),
        function=jax.nn.leaky_relu,
        parameter=Parameter("mul", 0.01),
    ),
    elementwise(
        "abs",
        EXACT,
        interval=valley(0.0, 0.0),
        lines=absolute,
        initial=lambda l, u: _at_kink(0.0, 0.5 * (l + u)),
        kinked=True,
    ),
    elementwise(
        "clip",
        _SHIFTED,
        interval=increasing,
        increases=True,
        lines=clip,
        initial=_initial_clip,
        kinked=True,
        variants=2,
    ),
    elementwise(
        "hard_tanh",
        EXACT,
        interval=increasing,
        increases=True,
        lines=hard_tanh,
        initial=_initial_clip,
        kinked=True,
        function=jax.nn.hard_tanh,
    ),
    *(
        elementwise(name, EXACT, interval=increasing, increases=True)
        for name in ("sign", "floor", "ceil", "round")
    ),
)
