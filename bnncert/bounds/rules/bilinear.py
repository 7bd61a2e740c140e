"""Interval rules of products of two bounded values: elementwise, matrix products, convolutions.

Every product x_i W_ik has its extremes at the corners of its two intervals, and where each factor
is used once for an output the sum of those is the exact interval of y_k = sum_i x_i W_ik.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.graph.nodes import unsupported
from bnncert.sets import Box


def _mul(node: Node, a: Box, b: Box) -> Box:
    return Box(*_corners(a, b))


def _dot_general(node: Node, a: Box, b: Box) -> Box:
    (contract_a, contract_b), (batch_a, batch_b) = node.params["dimension_numbers"]
    a = Box(*(_canonical(v, batch_a, contract_a, True) for v in (a.lower, a.upper)))
    b = Box(*(_canonical(v, batch_b, contract_b, False) for v in (b.lower, b.upper)))
    out = jax.lax.map(lambda pair: _matmul(*pair), (a, b))
    return Box(out.lower.reshape(node.shape), out.upper.reshape(node.shape))


def _convolution(node: Node, x: Box, kernel: Box) -> Box:
    """A matrix product of patches (positions, taps) with the kernel (taps, features), by groups."""
    params = node.params
    if params["batch_group_count"] != 1:
        raise unsupported(node, (), "Two bounded values are convolved with batch_group_count = 1.")
    lhs, rhs, out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    kernels = [v.transpose(rhs) for v in (kernel.lower, kernel.upper)]  # features, inputs, *taps
    images = [v.transpose(lhs) for v in (x.lower, x.upper)]  # batch, inputs, *space
    features, inputs, *taps = kernels[0].shape

    def patches(image: Array) -> Array:
        return jax.lax.conv_general_dilated_patches(
            image,
            taps,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )

    found = []
    for group in range(groups):
        own = slice(group * features // groups, (group + 1) * features // groups)
        part = [image[:, group * inputs : (group + 1) * inputs] for image in images]
        rows = [patches(image) for image in part]
        batch, size, *space = rows[0].shape
        flat = Box(*(jnp.moveaxis(r, 1, -1).reshape(-1, size) for r in rows))
        matrix = Box(*(k[own].reshape(features // groups, size).T for k in kernels))
        box = _matmul(flat, matrix)
        found.append(
            [jnp.moveaxis(e.reshape(batch, *space, -1), -1, 1) for e in (box.lower, box.upper)]
        )
    back = [out.index(i) for i in range(len(out))]
    lower, upper = (jnp.concatenate(ends, 1).transpose(back) for ends in zip(*found, strict=True))
    return Box(lower, upper)


def _matmul(a: Box, b: Box) -> Box:
    """Corners of every product, summed; one row of `a` at a time: memory K * J, not I * K * J."""

    def one_row(row: Box) -> Box:
        lower, upper = _corners(Box(row.lower[:, None], row.upper[:, None]), b)
        return Box(lower.sum(0), upper.sum(0))

    return jax.lax.map(one_row, a)


def _corners(a: Box, b: Box) -> tuple[Array, Array]:
    """The least and the largest of the four products of ends."""
    products = [x * y for x in (a.lower, a.upper) for y in (b.lower, b.upper)]
    low, high = jnp.minimum, jnp.maximum
    return (
        low(low(products[0], products[1]), low(products[2], products[3])),
        high(high(products[0], products[1]), high(products[2], products[3])),
    )


def _canonical(value: Array, batch: tuple, contract: tuple, rows_first: bool) -> Array:
    """As (batch, free, contracted), or (batch, contracted, free)."""
    free = [i for i in range(value.ndim) if i not in (*batch, *contract)]
    sizes = [math.prod(value.shape[i] for i in axes) for axes in (batch, free, contract)]
    if rows_first:
        return value.transpose(*batch, *free, *contract).reshape(sizes[0], sizes[1], sizes[2])
    return value.transpose(*batch, *contract, *free).reshape(sizes[0], sizes[2], sizes[1])


BILINEAR: dict[str, Callable[..., Box]] = {
    "mul": _mul,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
"""`(node, *boxes) -> Box`, for two bounded operands."""
