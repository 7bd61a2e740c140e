"""elu with alpha > 1, and selu: convex left of 0, a line right of it, and a concave kink between.

With s the slope right of 0 and c = h(l) / l that of the chord of h on [l, 0]: where l < 0 < u and
c > s, the concave envelope of h on [l, u] is c x, then s x. Every line k x with s <= k <= c lies
above: s x = h(x) for x >= 0, and for x < 0 the chord c x is above h, which is convex there. The
default supports the envelope in the middle of [l, u] (k = c left of 0, else s), and so encloses the
smallest area; a fraction t is k = s + t (c - s).

Elsewhere the lines are those of the curve (`curves.py`), whose tangent at the kink has k = s.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.relaxations import curves
from bnncert.bounds.relaxations.lines import DEFAULT, Choice, Lines, with_finite_gradients
from bnncert.bounds.relaxations.smooth import CURVES


class Hinge(NamedTuple):
    """The line c x: its slope, that of the function right of 0, and where c x may be used."""

    steep: Array
    flat: Array
    applies: Array


def lines(op: str, l: Array, u: Array, *constants: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """The lines of elu or selu on [l, u]."""
    found = curves.lines(CURVES[op](*constants), l, u, choice)
    steep, flat, applies = _hinge(op, l, u, *constants)
    fraction = _default(l, u) if choice.upper is None else choice.upper
    slope = flat + fraction * (steep - flat)
    return found._replace(
        upper_slope=jnp.where(applies, slope, found.upper_slope),
        upper_offset=jnp.where(applies, 0, found.upper_offset),
    )


def fractions(op: str, l: Array, u: Array, *constants: ArrayLike) -> Choice:
    """The fractions that give the default lines."""
    lower, upper, *_ = curves.fractions(CURVES[op](*constants), l, u)
    applies = _hinge(op, l, u, *constants).applies
    return Choice(lower, jnp.where(applies, _default(l, u), jnp.asarray(upper)))


def _default(l: Array, u: Array) -> Array:
    return (u < -l).astype(l.dtype)


def _hinge(op: str, l: Array, u: Array, *constants: ArrayLike) -> Hinge:
    curve = CURVES[op](*constants)
    crossing = (l < 0) & (u > 0)
    ends = with_finite_gradients(jnp.where(crossing, l, -1), jnp.zeros_like(l))
    steep = curves.chord_slope(curve, *ends)
    flat = curve.slope(jnp.ones_like(l))
    return Hinge(steep, flat, crossing & (steep > flat))


HINGES: Mapping[str, Callable[..., Lines]] = {
    "elu": lambda l, u, alpha, choice=DEFAULT: lines("elu", l, u, alpha, choice=choice),
    "selu": lambda l, u, choice=DEFAULT: lines("selu", l, u, choice=choice),
}
