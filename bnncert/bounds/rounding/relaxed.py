"""Planes of relaxed nodes that enclose what these compute."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.ops.lines import Lines
from bnncert.bounds.ops.planes import Planes, from_lines
from bnncert.bounds.rounding.constants import constant_error
from bnncert.bounds.rounding.functions import (
    curvature,
    function_error,
    rounding_of,
    slope_error,
)
from bnncert.bounds.rounding.model import Precision, gamma, own_unit, roundings, tiny
from bnncert.bounds.rounding.reordering import reordering_error
from bnncert.bounds.rounding.terms import offset_gamma, rounded_up, ways
from bnncert.sets import Box


def outward_planes(
    graph: Graph,
    index: int,
    planes: Planes,
    boxes: Sequence[Box],
    carried: Mapping[int, Array],
    precision: Precision,
    free: bool = False,
) -> Planes:
    """Planes that enclose what a node computes, errors carried to it included.

    Args:
        graph: the traced function.
        index: of the node.
        planes: that enclose it in real precision.
        boxes: of all nodes up to it, itself included.
        carried: as `Errors`.
        precision: the network's.
        free: whether they are by fractions, and not the default ones.
    """
    node = graph.nodes[index]
    if not planes.operands or rounding_of(node).planes == "interval":
        box = boxes[index]
        slack = 2 * offset_gamma(graph, node) * magnitude(box)
        lower, upper = box.lower - slack, box.upper + slack
        return Planes((), lambda: lower, lambda: upper)
    if planes.lines is None:
        error = _planes_error(graph, index, planes, boxes, precision)
        return Planes(
            planes.operands,
            lambda *v: planes.lower(*v) - error,
            lambda *v: planes.upper(*v) + error,
        )
    (operand,) = planes.operands
    below, low, above, high = lines = planes.lines
    low_error = high_error = _lines_error(graph, index, lines, boxes, precision, free)
    if operand in carried:
        inherited = (1 + 16 * own_unit(node)) * carried[operand]
        low_error = low_error + jnp.abs(below) * inherited
        high_error = high_error + jnp.abs(above) * inherited
    return from_lines(operand, Lines(below, low - low_error, above, high + high_error))


def _lines_error(
    graph: Graph,
    index: int,
    lines: Lines,
    boxes: Sequence[Box],
    precision: Precision,
    free: bool,
) -> Array:
    """Of lines around a function of one value."""
    node = graph.nodes[index]
    (operand,) = node.refs
    own, unit = own_unit(node), precision.unit(node)
    below, low, above, high = lines
    box, value = boxes[operand], magnitude(boxes[index])
    size = magnitude(box)
    slope = jnp.maximum(jnp.abs(below), jnp.abs(above))
    offset = jnp.maximum(jnp.abs(low), jnp.abs(high))
    relative, absolute = function_error(node, [box])
    off = relative * value + absolute
    error = (unit + 4 * own) * off + 32 * own * ((1 + slope) * (size + value) + offset)
    if not rounding_of(node).exact:
        of_slope, constant = slope_error(node)
        error += own * (of_slope * slope + constant) * (box.upper - box.lower + 2 * size)
        error += 8 * own * curvature(node, box, free) * size * size
    of_constants = constant_error(graph, node, [size], precision)
    reordered = reordering_error(graph, node, [size], precision)
    for besides in (of_constants, reordered):
        if besides is not None:
            error += besides
    error += gamma(ways(graph, operand) + 4, own) * slope * size
    error += offset_gamma(graph, node) * offset
    return rounded_up(graph, node, error) + 16 * tiny(node)


def _planes_error(
    graph: Graph, index: int, planes: Planes, boxes: Sequence[Box], precision: Precision
) -> Array:
    """Of planes that are functions: of products, of functions of two values, of extrema."""
    node = graph.nodes[index]
    own, kind = own_unit(node), rounding_of(node).planes
    sizes = [magnitude(boxes[i]) for i in node.refs]
    flows, offset = max(ways(graph, i) for i in node.refs), offset_gamma(graph, node)
    if kind == "products":
        counts = roundings(graph, node)
        size, terms = node.evaluate(*sizes), counts.forward + counts.backward
        rows = gamma(terms + flows + 16, own) + offset
        error = (precision.relative(node, counts.forward) + 8 * rows) * size
    elif planes.size is not None:
        error, terms = _sized_error(graph, index, planes.size(), boxes, precision)
    elif len(sizes) == 1:
        size, terms = _largest(node, sizes[0]), 1
        error = own * 64 * size + (gamma(flows + 8, own) + 3 * offset) * size
    else:
        # The bounds of a - b hold for what a network would compute of it, and for a - b itself.
        size, terms = sizes[0] + sizes[1], 1
        rows = gamma(flows + 8, own) + 2 * offset
        if kind == "softplus":
            value = magnitude(boxes[index])
            error = _softplus_error(node, size, value, boxes, precision) + rows * (1 + size)
        else:
            error = own * 64 * size + rows * size
    reordered = reordering_error(graph, node, sizes, precision)
    if reordered is not None:
        error += reordered
    return rounded_up(graph, node, error) + 32 * (terms + 4) * tiny(node)


def _sized_error(
    graph: Graph, index: int, size: Array, boxes: Sequence[Box], precision: Precision
) -> tuple[Array, int]:
    """Bounds what planes are off by that tell the size of their terms, and counts a coefficient's.

    Their coefficients are off by 128 u, and those of rows by as many roundings as are added up: an
    operand that is repeated in the value gathers as many.
    """
    node, own = graph.nodes[index], own_unit(graph.nodes[index])
    relative, absolute = function_error(node, [boxes[i] for i in node.refs])
    smallest = min(math.prod(graph.nodes[i].shape) for i in node.refs)
    terms = math.prod(node.shape) // max(smallest, 1) + 1
    flows = max(ways(graph, i) for i in node.refs)
    rows = gamma(terms + flows + 128, own) + 3 * offset_gamma(graph, node)
    off = relative * magnitude(boxes[index]) + absolute
    error = (precision.unit(node) + 4 * own) * off + rows * size
    return jnp.where(jnp.isnan(error), jnp.inf, error), terms


def _softplus_error(
    node: Node, size: Array, value: Array, boxes: Sequence[Box], precision: Precision
) -> Array:
    """As `_lines_error`, for lines of softplus on a difference of at most `size`, slopes 0 to 1."""
    own, unit = own_unit(node), precision.unit(node)
    relative, absolute = function_error(node, boxes)
    of_slope, constant = slope_error(node)
    off = (unit + 4 * own) * (relative * value + absolute)
    lines = 64 * (2 * size + value + 1) + 3 * (of_slope + constant) * size
    return jnp.asarray(off + own * (lines + 8 * curvature(node, boxes[0], True) * size * size))


def _largest(node: Node, size: Array) -> Array:
    axes = tuple(map(int, node.params["axes"]))
    return jnp.max(size, axes).reshape(node.shape)
