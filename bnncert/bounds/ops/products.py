"""Products of two bounded values: elementwise and matrix products, convolutions.

Intervals. Every product x_i W_ik has its extremes at the corners of its two intervals, and where
each factor is used once for an output the sum of those is the exact interval of y_k.

Planes, in two ways, for z = x * y with x in [xl, xu] and y in [yl, yu], or sums of such products.

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

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert.bounds.graph import Graph, Node, unsupported
from bnncert.bounds.graph.facts import input_sets
from bnncert.bounds.ops.affine import convolution_roundings, dot_roundings
from bnncert.bounds.ops.extremes import off_overflow
from bnncert.bounds.ops.lines import Choice, by_variant, with_finite_gradients
from bnncert.bounds.ops.operation import (
    IntervalRule,
    Operation,
    Relaxation,
    Rounding,
    Roundings,
    of_two_values,
)
from bnncert.bounds.ops.planes import Corner, Planes
from bnncert.sets import Box

_FEW = 2**14
"""Products that are bounded at once, and not one row after the other."""

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
    if choice.lower is None and choice.upper is None:
        return _from_corner(product, operands, x, y, choice.variant)

    def plane(t: Array | None, near: Array, far: Array) -> Callable[[Array, Array], Array]:
        t = jnp.asarray(1 - choice.variant, near.dtype) if t is None else t
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


def _from_corner(
    product: Product, operands: tuple[int, int], x: Box, y: Box, variant: int | Array
) -> Planes:
    """Makes McCormick's planes for t = 1, or for t = 0."""
    corner = by_variant(variant, x.lower, x.upper)
    below = by_variant(variant, y.lower, y.upper)
    above = by_variant(variant, y.upper, y.lower)
    return Planes(
        operands,
        lambda v, w: product(corner, w) + product(v - corner, below),
        lambda v, w: product(corner, w) + product(v - corner, above),
        corner=Corner(corner, below, above),
    )


def _planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    node = graph.nodes[index]
    first, second = node.refs
    weight = _weight(graph, node)
    if weight is None:
        return mccormick(node.evaluate, (first, second), boxes[first], boxes[second], choice)
    if weight == 1:
        return eliminate(node.evaluate, first, boxes[first], boxes[second])
    return eliminate(lambda x, w: node.evaluate(w, x), second, boxes[second], boxes[first])


def _start(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
    node = graph.nodes[index]
    if _weight(graph, node) is not None:
        return None
    half = jnp.full(graph.nodes[node.refs[0]].shape, 0.5, node.dtype)
    return Choice(half, half)


def _variants(graph: Graph, node: Node) -> int:
    return 2 if _weight(graph, node) is None else 1


def _weight(graph: Graph, node: Node) -> int | None:
    """Which operand is a weight, that no other operand depends on; of two, the larger.

    Of equal ones that of more axes: the matrix (1, n) beside a vector. A convolution of two
    computed values eliminates its kernel.
    """
    reach = input_sets(graph)
    first, second = node.refs
    weights = [
        place
        for place, (own, other) in enumerate(((first, second), (second, first)))
        if _is_moved_input(graph, own) and not reach[own] & reach[other]
    ]
    if node.op == "conv_general_dilated" and not weights:
        return 1

    def size(place: int) -> tuple[int, int, int]:
        shape = graph.nodes[node.refs[place]].shape
        return math.prod(shape), len(shape), place

    return max(weights, key=size, default=None)


def _is_moved_input(graph: Graph, index: int) -> bool:
    """Whether a value is that of a set itself, at most scaled, moved and repeated."""
    node = graph.nodes[index]
    if not node.refs:
        return True
    affine = node.affine
    moves = affine is not None and affine.spreads in ("places", "repeats") and len(node.refs) == 1
    return moves and _is_moved_input(graph, node.refs[0])


def _mul(node: Node, a: Box, b: Box) -> Box:
    return Box(*corners(a, b))


def _dot_general(node: Node, a: Box, b: Box) -> Box:
    (contract_a, contract_b), (batch_a, batch_b) = node.params["dimension_numbers"]
    a = Box(*(_canonical(v, batch_a, contract_a, True) for v in (a.lower, a.upper)))
    b = Box(*(_canonical(v, batch_b, contract_b, False) for v in (b.lower, b.upper)))
    few = a.lower.size * b.lower.shape[-1] <= _FEW
    each = jax.vmap(_matmul) if few else lambda *pair: jax.lax.map(lambda p: _matmul(*p), pair)
    out = each(a, b)
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
    """Corners of every product, summed; one row of `a` at a time: memory K * J, not I * K * J.

    Few are taken at once: a loop is dearer to compile.
    """

    def one_row(row: Box) -> Box:
        lower, upper = corners(Box(row.lower[:, None], row.upper[:, None]), b)
        return Box(lower.sum(0), upper.sum(0))

    few = a.lower.shape[0] * b.lower.size <= _FEW
    return jax.vmap(one_row)(a) if few else jax.lax.map(one_row, a)


def corners(a: Box, b: Box) -> tuple[Array, Array]:
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


def _record(
    name: str, rule: IntervalRule, roundings: Callable[[Graph, Node], Roundings]
) -> Operation:
    return Operation(
        name,
        "product",
        lambda node, *boxes: off_overflow(rule(node, *boxes)),
        of_two_values,
        relaxation=Relaxation(_planes, _start, _variants),
        roundings=roundings,
        rounding=Rounding(planes="products"),
    )


PRODUCTS: tuple[Operation, ...] = (
    _record("mul", _mul, lambda graph, node: Roundings(3, 3)),
    _record("dot_general", _dot_general, dot_roundings),
    _record("conv_general_dilated", _convolution, convolution_roundings),
)
