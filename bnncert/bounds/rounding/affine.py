"""Errors of affine nodes: charged to the rows that pass them, or carried on."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.affine import constant_part
from bnncert.bounds.ops.affine import magnitude as with_magnitudes
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.rounding.constants import constant_error
from bnncert.bounds.rounding.model import Precision, gamma, own_unit, roundings, tiny
from bnncert.bounds.rounding.reordering import reordering_error
from bnncert.bounds.rounding.terms import offset_gamma, rounded_up, ways
from bnncert.sets import Box


class Errors(NamedTuple):
    """Of affine nodes, by index.

    Attributes:
        charged: those that a row must allow for where it passes the node.
        carried: those that are left to what the node flows into; for rows that begin at the node.
        floors: of every node, what underflows in a row that comes through it: scalars.
        until: how many nodes have been looked at.
    """

    charged: Mapping[int, Array] = {}
    carried: Mapping[int, Array] = {}
    floors: Mapping[int, Array] = {}
    until: int = 0


EXACT = Errors()
"""Of real arithmetic."""


def affine_errors(
    graph: Graph, boxes: Sequence[Box], precision: Precision, known: Errors
) -> Errors:
    """The e_i of all affine nodes that have boxes.

    Args:
        graph: the traced function.
        boxes: of the first nodes.
        precision: the network's.
        known: of nodes that have been looked at.

    Cost: one evaluation of each affine operation.
    """
    charged, carried, floors = dict(known.charged), dict(known.carried), dict(known.floors)
    terms = sum(math.prod(node.shape) for node in graph.nodes)
    for index in range(known.until, len(boxes)):
        node = graph.nodes[index]
        floors[index] = _floor(node, terms, boxes[index])
        if node.affine is None:
            continue
        error = _affine_error(graph, node, boxes, precision)
        inherited = [carried.get(i) for i in node.refs]
        if any(e is not None for e in inherited) and _carries(node):
            parts = [
                jnp.zeros(graph.nodes[i].shape, graph.nodes[i].dtype) if e is None else e
                for i, e in zip(node.refs, inherited, strict=True)
            ]
            passed = with_magnitudes(node, *parts) * (1 + 16 * own_unit(node))
            error = passed if error is None else error + passed
        if error is None:
            continue
        into = [graph.nodes[user] for user in graph.users[index]]
        keeps = not into or (len(into) == 1 and _takes(into[0]))
        (carried if keeps else charged)[index] = error
    return Errors(charged, carried, floors, len(boxes))


def network_error(
    graph: Graph, node: Node, operands: Sequence[Box], precision: Precision
) -> Array | None:
    """What the network's value of an affine node is off by; None where it is exact."""
    terms = roundings(graph, node).forward
    sizes = [magnitude(box) + 2 * tiny(node) for box in operands]
    besides = _besides(graph, node, sizes, precision)
    if not terms:
        return besides
    size = with_magnitudes(node, *sizes)
    if node.has_constant:
        size += jnp.abs(constant_part(node, *(box.lower for box in operands)))
    error = precision.relative(node, terms) * size
    if besides is not None:
        error += besides
    return rounded_up(graph, node, error) + 8 * (terms + 2) * tiny(node)


def product_error(graph: Graph, index: int, boxes: Sequence[Box], precision: Precision) -> Array:
    """Bounds what a product of a value and weights is off by, and a row that passes it.

    The network's weights are those rounded to their format: one rounding more of each term.

    Args:
        graph: the traced function.
        index: of the product.
        boxes: of all nodes up to it.
        precision: the network's.
    """
    node, own = graph.nodes[index], own_unit(graph.nodes[index])
    sizes = [magnitude(boxes[i]) + 2 * tiny(node) for i in node.refs]
    counts = roundings(graph, node)
    backward = counts.backward + max(ways(graph, i) for i in node.refs) - 1
    relative = precision.relative(node, counts.forward + 1) + gamma(backward + 4, own)
    error = relative * node.evaluate(*sizes)
    reordered = reordering_error(graph, node, sizes, precision)
    if reordered is not None:
        error += reordered
    return rounded_up(graph, node, error) + 8 * (counts.forward + 2) * tiny(node)


def side_error(graph: Graph, node: Node, sizes: Sequence[Array], reach: Array) -> Array:
    """What a forward bound's two sides may be off by, once an affine node is passed.

    Args:
        graph: the function whose sets they are functions of.
        node: of that function or of a plane.
        sizes: for each operand `|A| |x| + |b|`, the larger of its sides.
        reach: `sum |x|`, the largest on the sets.
    """
    terms, own = roundings(graph, node).forward, own_unit(node)
    relative = gamma(terms + 12, own)
    error = 2 * relative * with_magnitudes(node, *sizes)
    if node.has_constant:
        constant = jnp.abs(constant_part(node, *sizes))
        error += relative * constant * (1 + reach) if terms > 1 else relative * constant
    return rounded_up(graph, node, error) + 16 * (terms + 2) * tiny(node) * (1 + reach)


def _affine_error(
    graph: Graph,
    node: Node,
    boxes: Sequence[Box],
    precision: Precision,
) -> Array | None:
    """e_i itself; None where the operation and its transpose are exact."""
    # The transpose of a cast rounds in the dtype of its operand.
    own = max(own_unit(node), *(own_unit(graph.nodes[i]) for i in node.refs))
    counts = roundings(graph, node)
    # An operand that goes several ways has its coefficients added up.
    backward = counts.backward + max(ways(graph, i) for i in node.refs) - 1
    constant = node.has_constant
    operands = [boxes[i] for i in node.refs]
    sizes = [magnitude(box) + 2 * tiny(node) for box in operands]
    besides = _besides(graph, node, sizes, precision)
    if not (counts.forward or backward or constant):
        return besides
    forward = precision.relative(node, counts.forward) if counts.forward else 0.0
    transposed = gamma(backward + 4, own) if backward else 0.0
    error = (forward + transposed) * with_magnitudes(node, *sizes)
    if besides is not None:
        error += besides
    if constant:
        error += (forward + offset_gamma(graph, node)) * jnp.abs(
            constant_part(node, *(box.lower for box in operands))
        )
    return rounded_up(graph, node, error) + 8 * (counts.forward + 2) * tiny(node)


def _besides(
    graph: Graph, node: Node, sizes: Sequence[Array], precision: Precision
) -> Array | None:
    """What a node is off by because its constants are, and because a compiler may reorder it."""
    found = (f(graph, node, sizes, precision) for f in (constant_error, reordering_error))
    known = [error for error in found if error is not None]
    return sum(known[1:], known[0]) if known else None


def _floor(node: Node, terms: int, box: Box) -> Array:
    """What coefficients of this value have lost by underflow: t for each term of each."""
    return 8 * tiny(node) * (terms + 2) * jnp.sum(1 + magnitude(box))


def _takes(node: Node) -> bool:
    """Whether a node's step allows for the error of what flows into it."""
    return node.operation.lines is not None or _carries(node)


def _carries(node: Node) -> bool:
    """Whether each coordinate of an operand goes to one coordinate of the value, at most."""
    affine = node.affine
    return affine is not None and affine.spreads in ("places", "adds")
