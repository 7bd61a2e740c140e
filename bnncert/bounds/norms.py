"""The first sum over a ball: its exact box, by the norms of its rows.

For y = W D (x - c) + b over { |x - c|_p <= eps }, D diagonal (what scales and places the ball's
coordinates before they are summed) and d its magnitudes,

    |y_i - y_i(c)|  <=  eps |W_i D|_q,     |W_i D|_2^2 = sum_j W_ij^2 d_j^2  =  W^2 d^2
                                           |W_i D|_inf = max_j |W_ij| d_j

The first is the operation itself with its coefficients squared, the second has a maximum in place
of its sum: a forward pass, where the rows of W one by one are as many as y has coordinates.

Rounded outward, y and y(c) are each off by the errors e_k of the operations up to here, carried on
by |W| D, and the norm by gamma of its terms. Squares below the smallest normal number t are lost,
sqrt(n t) at most, where the largest coefficient is 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.bounds.arithmetic import Arithmetic
from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.ops.affine import MIXING, magnitude, spreads
from bnncert.bounds.rounding import Precision, network_error, widened
from bnncert.bounds.rounding.model import gamma, own_unit, roundings, tiny
from bnncert.sets import Box, LpBall


def first_sums(graph: Graph) -> set[int]:
    """The nodes that `first_sum` bounds: they sum coordinates of one ball, none twice."""
    return {i for i in range(len(graph.nodes)) if _way(graph, i)}


def first_sum(graph: Graph, index: int, boxes: Sequence[Box], arithmetic: Arithmetic) -> Box:
    """The box of a node of `first_sums`.

    Args:
        graph: the traced function.
        index: of the node.
        boxes: of all nodes before it.
        arithmetic: that the box is to hold in.
    """
    begin, *way = _way(graph, index)
    region: Any = graph.inputs[begin]
    node = graph.nodes[index]
    value, scale = jnp.asarray(region.center), jnp.ones_like(region.center)
    for i in way:
        passed = graph.nodes[i]
        value = passed.evaluate(*passed.fill([value]))
        scale = magnitude(passed, scale) if i != index else scale
    norms, top = _row_norms(node, scale, region.p)
    reach = (region.eps * top * norms).astype(node.dtype)

    def rounded(box: Box, precision: Precision) -> Box:
        error = _carried_errors(graph, way, boxes, region, precision)
        lost = math.sqrt(8 * tiny(node) * math.prod(scale.shape))
        more = _more(graph, node) * (1 + 16 * len(way) * own_unit(node))
        wider = (reach + (region.eps * top * lost).astype(node.dtype)) * more
        wider += 2 * error * _more(graph, node)
        box = Box(value - wider, value + wider)
        return widened(box, 8 * own_unit(node), 8 * tiny(node))

    return arithmetic.allow(Box(value - reach, value + reach), rounded)


def _carried_errors(
    graph: Graph, way: Sequence[int], boxes: Sequence[Box], region: Any, precision: Precision
) -> Array:
    """What a network is off by once it has computed a sum, the operations before it included."""
    error = jnp.zeros_like(region.center)
    for i in way:
        node = graph.nodes[i]
        own = network_error(graph, node, [boxes[j] for j in node.refs], precision)
        error = magnitude(node, error) * _more(graph, node) + (0.0 if own is None else own)
    return error


def _way(graph: Graph, index: int) -> list[int]:
    """A ball and what lies between it and a sum of its coordinates; empty where it is none."""
    node = graph.nodes[index]
    if not _sums_rows(node):
        return []
    way: list[int] = [index]
    (i,) = node.refs
    while graph.nodes[i].refs:
        node = graph.nodes[i]
        if node.affine is None or len(node.refs) != 1:
            return []
        if spreads(graph, node) not in ("places", "adds"):
            return []
        way.append(i)
        i = next(iter(node.refs))
    return [i, *way[::-1]] if isinstance(graph.inputs[i], LpBall) else []


def _sums_rows(node: Node) -> bool:
    if node.op not in (*MIXING, "reduce_sum") or node.affine is None:
        return False
    if node.op != "conv_general_dilated":
        return True
    groups = (node.params["feature_group_count"], node.params["batch_group_count"])
    return groups == (1, 1) and not isinstance(node.operands[1], Ref)


def _more(graph: Graph, node: Node) -> float:
    """A factor for the roundings of one sum."""
    terms = roundings(graph, node).forward
    return 1 + 4 * gamma(terms + 64, own_unit(node))


def _row_norms(node: Node, scale: Array, p: int) -> tuple[Array, Array]:
    """The norm of each row and a factor for all, apart so that squares do not overflow."""
    coefficients = [jnp.abs(o) for o in node.operands if not isinstance(o, Ref)]
    tops = [_top(a) for a in (scale, *coefficients)]
    scale, *coefficients = (a / top for a, top in zip((scale, *coefficients), tops, strict=True))
    top = math.prod(tops[1:], start=tops[0])
    if p == 1:
        largest = _largest_product(node, scale, *coefficients)
        return largest, top
    iterator = iter(coefficients)
    squared = [o if isinstance(o, Ref) else next(iterator) ** 2 for o in node.operands]
    squares = node._replace(operands=tuple(squared))
    total = squares.evaluate(*squares.fill([scale**2]))
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0), top


def _top(a: Array) -> Array:
    largest = jax.lax.stop_gradient(jnp.max(a, initial=0.0))
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1.0)


def _largest_product(node: Node, scale: Array, *coefficients: Array) -> Array:
    """The operation with a maximum in place of its sum."""
    if node.op == "reduce_sum":
        return jnp.max(scale, axis=node.params["axes"], initial=0.0)
    if node.op == "dot_general":
        contract, batch = node.params["dimension_numbers"]
        given = (
            (scale, *coefficients) if isinstance(node.operands[0], Ref) else (*coefficients, scale)
        )
        first, second = map(_contracted_last, given, contract, batch)
        found = jnp.max(first[:, :, None] * second[:, None], axis=-1, initial=0.0)
        return found.reshape(node.shape)
    image, kernel, out = node.params["dimension_numbers"]
    filters = coefficients[0].transpose(kernel)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    patches = jax.lax.conv_general_dilated_patches(
        scale.transpose(image),
        filters.shape[2:],
        **{name: node.params[name] for name in names},
        precision=jax.lax.Precision.HIGHEST,
    )
    flat = patches.reshape(*patches.shape[:2], -1)  # batch, input feature and tap, pixel
    rows = filters.reshape(filters.shape[0], -1)
    found = jnp.max(flat[:, None] * rows[None, :, :, None], axis=2, initial=0.0)
    pixels = found.reshape(*found.shape[:2], *patches.shape[2:])
    return pixels.transpose(np.argsort(np.asarray(out)))


def _contracted_last(a: Array, contract: Sequence[int], batch: Sequence[int]) -> Array:
    """Axes as (batch, free, contracted)."""
    free = [i for i in range(a.ndim) if i not in (*contract, *batch)]
    sizes = [math.prod(a.shape[i] for i in axes) for axes in (batch, free, contract)]
    return a.transpose(*batch, *free, *contract).reshape(sizes)
