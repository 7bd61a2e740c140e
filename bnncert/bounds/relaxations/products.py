"""Relaxations of bilinear operations: elementwise and matrix products, convolutions.

Two ways, for z = x * y with x in [xl, xu] and y in [yl, yu], or sums of such products.

McCormick: from (x - xl)(y - yl) >= 0 and (xu - x)(yu - y) >= 0, and mirrored for the upper side,

    lower   t (xl y + x yl - xl yl) + (1 - t) (xu y + x yu - xu yu)
    upper   t (xl y + x yu - xl yu) + (1 - t) (xu y + x yl - xu yl)        for each t in [0, 1]

Of these the corners t = 1 and t = 0 leave the same volume: neither is always the better. For sums
of products t has the shape of x, and nothing larger than the operands is built.

The chord eliminates y, a weight that is used for nothing else. min_y x y is concave in x, so its
best linear lower bound on [xl, xu] is its chord (and above, mirrored). With

    lam = clip(-xl / (xu - xl), 0, 1)    m = min(xl, 0) (1 - lam)    dy = yu - yl
    yl x + dy (lam x + m)  <=  x y  <=  yu x - dy (lam x + m)

Product by product it lies inside McCormick's two; exact after a ReLU (xl >= 0: lam = m = 0).

Source: McCormick, "Computability of global solutions to factorable nonconvex programs", 1976.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds.relaxations.lines import Choice, with_finite_gradients
from bnncert.bounds.relaxations.planes import Planes
from bnncert.sets import Box

Product = Callable[[Array, Array], Array]


class Chord(NamedTuple):
    """The chord of a bounded weight over x in [xl, xu]; fields have the shape of x."""

    lam: Float[Array, "*shape"]
    m: Float[Array, "*shape"]


def chord(x: Box) -> Chord:
    """`lam` and `m` of the module's formula."""
    x = Box(*with_finite_gradients(x.lower, x.upper))
    width = x.upper - x.lower
    safe = jnp.where(width > 0, width, 1.0)
    below_zero = (x.lower < 0).astype(width.dtype)
    lam = jnp.clip(jnp.where(width > 0, -x.lower / safe, below_zero), 0.0, 1.0)
    return Chord(lam, jnp.minimum(x.lower, 0.0) * (1 - lam))


def eliminate(product: Product, kept: int, x: Box, weight: Box) -> Planes:
    """The chord: planes in x alone.

    Args:
        product: `(x, weight) -> value`, bilinear.
        kept: index of the node x.
        x: its box.
        weight: the box of the weight.
    """
    lam, m = chord(x)
    width = weight.upper - weight.lower

    def lower(v: Array) -> Array:
        return product(v, weight.lower) + product(lam * v + m, width)

    def upper(v: Array) -> Array:
        return product(v, weight.upper) - product(lam * v + m, width)

    return Planes((kept,), lower, upper)


def mccormick(
    product: Product, operands: tuple[int, int], x: Box, y: Box, choice: Choice
) -> Planes:
    """Planes in both operands; `choice` holds t, in the shape of x.

    Args:
        product: `(x, y) -> value`, bilinear.
        operands: indices of the nodes x and y.
        x: box of the first.
        y: box of the second.
        choice: variant 0 is t = 1 in both sides, variant 1 is t = 0.
    """

    def plane(t: Array | None, near: Array, far: Array) -> Callable[[Array, Array], Array]:
        if t is None:
            a, b = (x.lower, near) if choice.variant == 0 else (x.upper, far)
            return lambda v, w: product(a, w) + product(v - a, b)
        corner = t * x.lower + (1 - t) * x.upper

        def mixed(v: Array, w: Array) -> Array:
            return (
                product(corner, w)
                + product(t * (v - x.lower), near)
                + product((1 - t) * (v - x.upper), far)
            )

        return mixed

    lower = plane(choice.lower, y.lower, y.upper)
    return Planes(operands, lower, plane(choice.upper, y.upper, y.lower))
