"""elu and selu: convex left of 0, a line right of it, and for alpha > 1 a concave kink between.

With s the slope right of 0 and c = h(l) / l that of the chord of h on [l, 0]: where l < 0 < u and
c > s, the concave envelope of h on [l, u] is c x, then s x. Every line k x with s <= k <= c lies
above: s x = h(x) for x >= 0, and for x < 0 the chord c x is above h, which is convex there. The
default supports the envelope in the middle of [l, u] (k = c left of 0, else s), and so encloses the
smallest area; a fraction t is k = s + t (c - s).

Elsewhere the lines are those of the curve (`curves.py`), whose tangent at the kink has k = s.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.ops import curves
from bnncert.bounds.ops.curves import Curve
from bnncert.bounds.ops.elementwise import elementwise, increasing, with_candidate_at_zero
from bnncert.bounds.ops.lines import DEFAULT, Choice, Lines, finite, with_finite_gradients
from bnncert.bounds.ops.operation import (
    LinesRule,
    Operation,
    Parameter,
    Rounding,
    parameter_of,
)

_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)


class Hinge(NamedTuple):
    """The line c x: its slope, that of the function right of 0, and where c x may be used."""

    steep: Array
    flat: Array
    applies: Array


def elu(alpha: ArrayLike, scale: float = 1.0) -> Curve:
    """x, or alpha (e^x - 1) for x <= 0: convex everywhere for alpha <= 1; times a scale."""

    def value(x: Array) -> Array:
        return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))

    def slope(x: Array) -> Array:
        return scale * jnp.where(x > 0, 1, alpha * jnp.exp(jnp.minimum(x, 0)))

    return Curve(value, slope, end=jnp.where(jnp.asarray(alpha) <= 1, jnp.inf, 0.0))


def selu() -> Curve:
    """Elu with the two constants of self-normalising networks."""
    scale, alpha = _SELU
    return elu(alpha, scale)


def lines(curve: Curve, l: Array, u: Array, choice: Choice) -> Lines:
    """The lines of elu or selu on [l, u]."""
    found = curves.lines(curve, l, u, choice)
    steep, flat, applies = _hinge(curve, l, u)
    fraction = _default(l, u) if choice.upper is None else choice.upper
    slope = flat + fraction * (steep - flat)
    return found._replace(
        upper_slope=jnp.where(applies, slope, found.upper_slope),
        upper_offset=jnp.where(applies, 0, found.upper_offset),
    )


def fractions(curve: Curve, l: Array, u: Array) -> Choice:
    """The fractions that give the default lines."""
    lower, upper, *_ = curves.fractions(curve, l, u)
    applies = _hinge(curve, l, u).applies
    return Choice(lower, jnp.where(applies, _default(l, u), jnp.asarray(upper)))


def _default(l: Array, u: Array) -> Array:
    return (u < -l).astype(l.dtype)


def _hinge(curve: Curve, l: Array, u: Array) -> Hinge:
    crossing = (l < 0) & (u > 0)
    ends = with_finite_gradients(jnp.where(crossing, l, -1), jnp.zeros_like(l))
    steep = curves.chord_slope(curve, *ends)
    flat = curve.slope(jnp.ones_like(l))
    return Hinge(steep, flat, crossing & (steep > flat))


def _lines_of(curve: Callable[..., Curve]) -> LinesRule:
    def rule(l: Array, u: Array, *constants: ArrayLike, choice: Choice = DEFAULT) -> Lines:
        return finite(lines(curve(*constants), l, u, choice))

    return rule


HINGES: tuple[Operation, ...] = (
    elementwise(
        "elu",
        Rounding(
            # alpha (e^x - 1): what e^x - 1 is off by grows with alpha
            errors=lambda node, boxes: (16.0, 4.0 * jnp.maximum(1, jnp.abs(parameter_of(node)))),
            absolute=4.0,
            curvature=lambda node, box, free: jnp.abs(parameter_of(node)),
        ),
        interval=with_candidate_at_zero,  # for alpha < 0 it falls to 0 at 0
        curve=elu,
        lines=_lines_of(elu),
        initial=lambda l, u, alpha: fractions(elu(alpha), l, u),
        function=jax.nn.elu,
        parameter=Parameter("mul", 1.0, 0.0),
    ),
    elementwise(
        "selu",
        Rounding(absolute=4.0, curvature=1.76),
        interval=increasing,
        increases=True,
        curve=selu,
        lines=_lines_of(selu),
        initial=lambda l, u: fractions(selu(), l, u),
        function=jax.nn.selu,
    ),
)
