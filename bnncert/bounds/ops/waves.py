"""sin and cos: curves whose inflections lie pi apart.

Between two inflections the function is convex or concave. Where [l, u] meets one convex part, the
line below is that of `curves.py` (beyond that part it is concave); where it meets two, it is the
constant minimum. Above: below -sin(x) = sin(-x), -cos(x) = cos(x - pi).

Far out, where the next floating-point number is a considerable part of a period away: [-1, 1].
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.ops import curves
from bnncert.bounds.ops.curves import Curve
from bnncert.bounds.ops.elementwise import elementwise
from bnncert.bounds.ops.lines import DEFAULT, Choice, Lines, finite
from bnncert.bounds.ops.operation import Operation, Rounding
from bnncert.sets import Box

_PERIOD = 2 * math.pi
# Each with the beginning of a convex part.
_WAVES = {
    "sin": (Curve(jnp.sin, jnp.cos), -math.pi),
    "cos": (Curve(jnp.cos, lambda x: -jnp.sin(x)), 0.5 * math.pi),
}


def image(value: curves.Elementwise, lowest: float, l: Array, u: Array) -> Box:
    """The interval of a wave of period 2 pi, which is -1 at `lowest` and 1 half a period on."""
    values = value(jnp.stack([l, u]))
    low, high = jnp.minimum(*values), jnp.maximum(*values)
    far = _is_far(l, u)
    return Box(
        jnp.where(far | _contains(l, u, lowest), -1, low),
        jnp.where(far | _contains(l, u, lowest + math.pi), 1, high),
    )


def fractions(name: str, l: Array, u: Array) -> Choice:
    """The fractions that give the default lines."""
    sides = (_single(side, start, l) for side, start in _sides(*_WAVES[name]))
    lower, upper = (curves.default_fraction(side, l, u, 0) for side in sides)
    return Choice(lower, upper)


def _wave(name: str, l: Array, u: Array, choice: Choice) -> Lines:
    curve, start = _WAVES[name]
    lower, upper = (_single(side, start, l) for side, start in _sides(curve, start))
    if (choice.lower is None) == (choice.upper is None):
        found = curves.lines_of_sides(lower, upper, l, u, choice)
    else:
        slope, offset = curves.below(upper, l, u, choice.upper, choice.variant)
        found = Lines(*curves.below(lower, l, u, choice.lower, choice.variant), -slope, -offset)
    # Where an interval meets two convex parts, the constant minimum.
    box, far = image(curve.value, start + 0.5 * math.pi, l, u), _is_far(l, u)
    minima, maxima = ((u > side.start + _PERIOD) | far for side in (lower, upper))
    return Lines(
        jnp.where(minima, 0, found.lower_slope),
        jnp.where(minima, box.lower, found.lower_offset),
        jnp.where(maxima, 0, found.upper_slope),
        jnp.where(maxima, box.upper, found.upper_offset),
    )


def _sides(curve: Curve, convex_from: float) -> tuple[tuple[Curve, float], tuple[Curve, float]]:
    """A wave and its negative, each with where it is convex."""
    value, slope = curve.value, curve.slope
    negative = Curve(lambda x: -value(x), lambda x: -slope(x))
    return (curve, convex_from), (negative, convex_from + math.pi)


def _single(curve: Curve, convex_from: float, l: Array) -> Curve:
    """With the first convex part that ends beyond l."""
    start = convex_from + _PERIOD * jnp.floor((l - convex_from) / _PERIOD)
    start = jnp.where(l > start + math.pi, start + _PERIOD, start)
    return curve._replace(start=start, end=start + math.pi)


def _contains(l: Array, u: Array, point: float) -> Array:
    """Whether a point of `point` + 2 pi k lies in [l, u], or within rounding of it."""
    slack = 4 * jnp.finfo(l.dtype).eps * (1 + jnp.maximum(jnp.abs(l), jnp.abs(u)))
    return jnp.floor((u + slack - point) / _PERIOD) > jnp.floor((l - slack - point) / _PERIOD)


def _is_far(l: Array, u: Array) -> Array:
    limit = 0.5 / math.sqrt(jnp.finfo(l.dtype).eps)
    return jnp.maximum(jnp.abs(l), jnp.abs(u)) > limit


def _record(name: str, value: curves.Elementwise, lowest: float) -> Operation:
    def interval(node: Node, box: Box) -> Box:
        return image(value, lowest, box.lower, box.upper)

    def lines(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
        return finite(_wave(name, l, u, choice))

    return elementwise(
        name,
        Rounding(absolute=4.0, curvature=1.0),
        interval=interval,
        lines=lines,
        initial=lambda l, u: fractions(name, l, u),
        variants=2,
    )


WAVES: tuple[Operation, ...] = (
    _record("sin", jnp.sin, -0.5 * math.pi),
    _record("cos", jnp.cos, math.pi),
)
