"""Interval rules of products of two bounded values, where one of them is a weight.

For y_k = sum_i x_i W_ik with x_i in [xl_i, xu_i] and W_ik in [Wl_ik, Wu_ik], each used once, every
product has its extremes at the corners, and their sum is the exact interval of y_k.

`chord` gives what the backward pass needs: the weight eliminated. min_W W x is concave in x, so its
best linear lower bound on [xl, xu] is its chord (and above, mirrored). With

    lam = clip(-xl / (xu - xl), 0, 1)    m = min(xl, 0) (1 - lam)    dW = Wu - Wl
    (Wl + dW lam) x + dW m  <=  W x  <=  (Wu - dW lam) x - dW m

in matrix products and a scaling of columns alone; exact after a ReLU (xl >= 0: lam = m = 0).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds.graph import Node
from bnncert.sets import Box


class Chord(NamedTuple):
    """The chord of a bounded weight over x in [xl, xu]; fields have the shape of x."""

    lam: Float[Array, "*shape"]
    m: Float[Array, "*shape"]


def chord(x: Box) -> Chord:
    """`lam` and `m` of the module's formula."""
    width = x.upper - x.lower
    safe = jnp.where(width > 0, width, 1.0)
    below_zero = (x.lower < 0).astype(width.dtype)
    lam = jnp.clip(jnp.where(width > 0, -x.lower / safe, below_zero), 0.0, 1.0)
    return Chord(lam, jnp.minimum(x.lower, 0.0) * (1 - lam))


def weight_operand(a: Box, b: Box) -> int:
    """Which operand of a product is eliminated as the weight: 0 or 1, the one of more coordinates.

    Of equal ones, that of more axes: the matrix (1, n) beside a vector. Either choice is sound. The
    other operand is the one the bound stays linear in.
    """
    return 0 if (a.lower.size, a.lower.ndim) > (b.lower.size, b.lower.ndim) else 1


def _dot_general(node: Node, a: Box, b: Box) -> Box:
    """Corners of every product, summed; one row of `a` at a time: memory K * J, not I * K * J."""
    (contract_a, contract_b), (batch_a, batch_b) = node.params["dimension_numbers"]
    a = Box(*(_canonical(v, batch_a, contract_a, True) for v in (a.lower, a.upper)))
    b = Box(*(_canonical(v, batch_b, contract_b, False) for v in (b.lower, b.upper)))

    def one_row(row: Box, matrix: Box) -> Box:
        low, high = row.lower[:, None], row.upper[:, None]
        corners = [low * matrix.lower, low * matrix.upper, high * matrix.lower, high * matrix.upper]
        products = jnp.stack(corners)
        return Box(products.min(0).sum(0), products.max(0).sum(0))

    def one_batch(pair: tuple[Box, Box]) -> Box:
        rows, matrix = pair
        return jax.lax.map(lambda row: one_row(row, matrix), rows)

    out = jax.lax.map(one_batch, (a, b))
    return Box(out.lower.reshape(node.shape), out.upper.reshape(node.shape))


def _canonical(value: Array, batch: tuple, contract: tuple, rows_first: bool) -> Array:
    """As (batch, free, contracted), or (batch, contracted, free)."""
    free = [i for i in range(value.ndim) if i not in (*batch, *contract)]
    sizes = [math.prod(value.shape[i] for i in axes) for axes in (batch, free, contract)]
    if rows_first:
        return value.transpose(*batch, *free, *contract).reshape(sizes[0], sizes[1], sizes[2])
    return value.transpose(*batch, *contract, *free).reshape(sizes[0], sizes[2], sizes[1])


BILINEAR: dict[str, Callable[..., Box]] = {"dot_general": _dot_general}
