"""Linear bounds that hold in floating-point arithmetic: what a row must allow for.

Under the model of `arithmetic.py` a node computes its operation on what its operands computed, and
then is off by some e_i:

    v_i = op_i(v_j, ...) + error,     |error| <= e_i   on the boxes of the operands

A row passes node i with coefficients a_i. Each error is an unknown of its own, which the row meets
with weight a_i, so the bound gives way by <|a_i|, e_i>: errors travel as the *linear bounds* do,
with their cancellations, along the operations as they are executed and never through a merged map.

Affine nodes, |op| the operation with the magnitudes of its coefficients, m those of the operands:

    the network   gamma(n) (|op|(m) + |b|)    n roundings to a value, b the constant part
    the row       gamma(k) |op|(m)            its transpose is computed too: what it returns is off
                                              by gamma(k) |op|^T |a|, and that meets m
    its offset    gamma(N) |b|                <a, b> is a sum of N terms

Relaxed nodes by lines of slopes s and offsets o, S and O the larger magnitudes of the two, H that
of the node's own value, w the width of the operand's box:

    the network   (R H + A) u
    the row       gamma(k) S m;  for its offset gamma(N) O
    the lines     A slope is what was computed; the offset must make up for it. Of kinks, by the few
                  roundings of their formulas: 32 u ((1 + S)(m + H) + O). Of curves also: the slope
                  of a tangent at p is off from h'(p) by (R' S + A') u, over a distance of w at
                  most; values of h that lines were laid through, or compared with by bisection, are
                  off by (R H + A) u: four of these.

Products by McCormick or a chord: each term of their planes is at most 8 |x| * |y|.

What no line is known to enclose in rounded arithmetic (softmax, log-sum-exp) is bounded by its
interval, which does.

Where they are charged. <|a_i|, e_i> reads a row once more. So the e_i of an affine node is
*carried* on through what only places or adds, to the lines of the nonlinearity it flows into: they
move apart by e_i |s|, at no cost to a row. A row that begins at such a node begins with its e_i.
Errors are charged at the node itself where it goes several ways, or into a mixing operation.

What remains is the last product, over the sets or over boxes: these are widened by gamma of its
size. A coefficient that underflows is off by t for each of its terms, and meets the node's value:
each node that a row comes through adds t (terms) sum (1 + m).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.arithmetic import (
    EXACT_FUNCTIONS,
    Arithmetic,
    constant_part,
    function_error,
    gamma,
    magnitude,
    own_unit,
    roundings,
    slope_error,
    tiny,
)
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.operands import Ref
from bnncert.bounds.relaxations import LINES, Lines, Planes
from bnncert.bounds.rules import AFFINE, affine_rule
from bnncert.bounds.rules.affine import magnitude as with_magnitudes
from bnncert.sets import Box, LpBall, Set


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
    graph: Graph, boxes: Sequence[Box], arithmetic: Arithmetic, known: Errors
) -> Errors:
    """The e_i of all affine nodes that have boxes.

    Args:
        graph: the traced function.
        boxes: of the first nodes.
        arithmetic: the network's.
        known: of nodes that have been looked at.

    Cost: one evaluation of each affine operation.
    """
    charged, carried, floors = dict(known.charged), dict(known.carried), dict(known.floors)
    users = _users(graph)
    for index in range(known.until, len(boxes)):
        node = graph.nodes[index]
        floors[index] = _floor(graph, node, boxes[index])
        if not affine_rule(node):
            continue
        error = _affine_error(graph, node, boxes, users, arithmetic)
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
        into = [graph.nodes[user] for user in users[index]]
        keeps = not into or (len(into) == 1 and _takes(into[0]))
        (carried if keeps else charged)[index] = error
    return Errors(charged, carried, floors, len(boxes))


def outward_planes(
    graph: Graph,
    index: int,
    planes: Planes,
    boxes: Sequence[Box],
    carried: Mapping[int, Array],
    arithmetic: Arithmetic,
) -> Planes:
    """Planes that enclose what a node computes, errors carried to it included.

    Args:
        graph: the traced function.
        index: of the node.
        planes: that enclose it in real arithmetic.
        boxes: of all nodes up to it, itself included.
        carried: as `Errors`.
        arithmetic: the network's.
    """
    node = graph.nodes[index]
    if not planes.operands or node.op in _BY_INTERVAL:
        box = boxes[index]
        slack = 2 * _offset_gamma(graph, node) * magnitude(box)
        lower, upper = box.lower - slack, box.upper + slack
        return Planes((), lambda: lower, lambda: upper)
    if planes.lines is not None:
        return _outward_lines(graph, index, planes, boxes, carried, arithmetic)
    error = _planes_error(graph, node, boxes, arithmetic)
    return Planes(
        planes.operands,
        lambda *v: planes.lower(*v) - error,
        lambda *v: planes.upper(*v) + error,
    )


def outward_set(graph: Graph, region: Set) -> Set:
    """A set of which the last product of a row cannot cut off anything."""
    size = math.prod(jnp.shape(region.center))
    dtype = jnp.result_type(region.center)
    relative = gamma(2 * (size + _depth(graph)), 0.5 * float(jnp.finfo(dtype).eps))
    underflow = 8 * float(jnp.finfo(dtype).tiny)
    if isinstance(region, LpBall):
        norm = jnp.linalg.norm(region.center.reshape(-1), region.p) if size else 0.0
        reach = region.eps + relative * (region.eps + norm) + underflow
        return LpBall(region.center, reach, region.p)
    reach = relative * magnitude(region) + underflow
    return Box(region.lower - reach, region.upper + reach)


def network_error(
    graph: Graph, node: Node, operands: Sequence[Box], arithmetic: Arithmetic
) -> Array | None:
    """What the network's value of an affine node is off by; None where it is exact."""
    terms = roundings(graph, node).forward
    if not terms:
        return None
    size = with_magnitudes(node, *(magnitude(box) + 2 * tiny(node) for box in operands))
    if _has_constant(node):
        size += jnp.abs(constant_part(node, operands))
    error = gamma(terms + 2, arithmetic.unit(node)) * size
    return _rounded_up(graph, node, error) + 8 * (terms + 2) * tiny(node)


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
    if _has_constant(node):
        zeros = [Box(jnp.zeros_like(size), jnp.zeros_like(size)) for size in sizes]
        constant = jnp.abs(constant_part(node, zeros))
        error += relative * constant * (1 + reach) if terms > 1 else relative * constant
    return _rounded_up(graph, node, error) + 16 * (terms + 2) * tiny(node) * (1 + reach)


def _has_constant(node: Node) -> bool:
    return AFFINE[node.op].has_offset and len(node.refs) < len(node.operands)


def _affine_error(
    graph: Graph,
    node: Node,
    boxes: Sequence[Box],
    users: Sequence[Sequence[int]],
    arithmetic: Arithmetic,
) -> Array | None:
    """e_i itself; None where the operation and its transpose are exact."""
    own, unit = own_unit(node), arithmetic.unit(node)
    counts = roundings(graph, node)
    # An operand that goes several ways has its coefficients added up.
    ways = max((len(users[i]) for i in node.refs), default=1) - 1
    backward = counts.backward + ways
    constant = _has_constant(node)
    if not (counts.forward or backward or constant):
        return None
    operands = [boxes[i] for i in node.refs]
    forward = gamma(counts.forward + 2, unit) if counts.forward else 0.0
    transposed = gamma(backward + 4, own) if backward else 0.0
    size = with_magnitudes(node, *(magnitude(box) + 2 * tiny(node) for box in operands))
    error = (forward + transposed) * size
    if constant:
        error += (forward + _offset_gamma(graph, node)) * jnp.abs(constant_part(node, operands))
    return _rounded_up(graph, node, error) + 8 * (counts.forward + 2) * tiny(node)


def _outward_lines(
    graph: Graph,
    index: int,
    planes: Planes,
    boxes: Sequence[Box],
    carried: Mapping[int, Array],
    arithmetic: Arithmetic,
) -> Planes:
    node, operand = graph.nodes[index], planes.operands[0]
    own, unit = own_unit(node), arithmetic.unit(node)
    below, low, above, high = planes.lines  # pyright: ignore[reportGeneralTypeIssues]
    box, value = boxes[operand], magnitude(boxes[index])
    size, width = magnitude(box), box.upper - box.lower
    slope = jnp.maximum(jnp.abs(below), jnp.abs(above))
    offset = jnp.maximum(jnp.abs(low), jnp.abs(high))
    relative, absolute = function_error(node, [box])
    error = unit * (relative * value + absolute)
    error += own * (
        32 * ((1 + slope) * (size + value) + offset) + 4 * (relative * value + absolute)
    )
    if node.op not in EXACT_FUNCTIONS:
        of_slope, constant = slope_error(node)
        error += own * (of_slope * slope + constant) * width
    error += gamma(_ways(graph, operand) + 4, own) * slope * size
    error += _offset_gamma(graph, node) * offset
    error = _rounded_up(graph, node, error) + 16 * tiny(node)
    low_error = high_error = error
    if operand in carried:
        inherited = (1 + 16 * own) * carried[operand]
        low_error, high_error = (
            error + jnp.abs(below) * inherited,
            error + jnp.abs(above) * inherited,
        )
    lines = Lines(below, low - low_error, above, high + high_error)
    return Planes(
        planes.operands,
        lambda v: lines.lower_slope * v + lines.lower_offset,
        lambda v: lines.upper_slope * v + lines.upper_offset,
        lines,
    )


def _planes_error(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Arithmetic) -> Array:
    """Of planes that are functions: products of two values, max and min of two or of an axis."""
    own, unit = own_unit(node), arithmetic.unit(node)
    sizes = [magnitude(boxes[i]) for i in node.refs]
    ways = max(_ways(graph, i) for i in node.refs)
    if node.op in ("max", "min"):
        size, terms = sum(sizes[1:], sizes[0]), 1
        error = own * 64 * size + (gamma(ways + 8, own) + 2 * _offset_gamma(graph, node)) * size
    elif node.op in ("reduce_max", "reduce_min"):
        size, terms = _largest(node, sizes[0]), 1
        error = own * 64 * size + (gamma(ways + 8, own) + 3 * _offset_gamma(graph, node)) * size
    else:
        counts = roundings(graph, node)
        size, terms = node.evaluate(*sizes), counts.forward + counts.backward
        rows = gamma(terms + ways + 16, own) + _offset_gamma(graph, node)
        error = (gamma(counts.forward + 2, unit) + 8 * rows) * size
    return _rounded_up(graph, node, error) + 32 * (terms + 4) * tiny(node)


def _floor(graph: Graph, node: Node, box: Box) -> Array:
    """What coefficients of this value have lost by underflow: t for each term of each."""
    terms = sum(math.prod(node.shape) for node in graph.nodes)
    return 8 * tiny(node) * (terms + 2) * jnp.sum(1 + magnitude(box))


def _largest(node: Node, size: Array) -> Array:
    axes = tuple(map(int, node.params["axes"]))
    return jnp.max(size, axes).reshape(node.shape)


def _rounded_up(graph: Graph, node: Node, error: ArrayLike) -> Array:
    """Larger by what its own computation, and the sum it enters, may have lost."""
    terms = max(math.prod(node.shape), *(math.prod(graph.nodes[i].shape) for i in node.refs), 1)
    return jnp.asarray(error) * (1 + 4 * gamma(terms + _depth(graph), own_unit(node)))


def _offset_gamma(graph: Graph, node: Node) -> float:
    """Of one sum over a node's value, among those of all nodes."""
    return gamma(math.prod(node.shape) + _depth(graph), own_unit(node))


def _depth(graph: Graph) -> int:
    return 2 * len(graph.nodes) + 16


def _users(graph: Graph) -> list[list[int]]:
    """For each node, the nodes that act on it."""
    found: list[list[int]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        for i in node.refs:
            found[i].append(index)
    return found


def _ways(graph: Graph, index: int) -> int:
    return sum(index in node.refs for node in graph.nodes)


def _takes(node: Node) -> bool:
    """Whether a node's step allows for the error of what flows into it."""
    return _by_lines(node) or (bool(affine_rule(node)) and _carries(node))


def _carries(node: Node) -> bool:
    """Whether each coordinate of an operand goes to one coordinate of the value, at most."""
    return AFFINE[node.op].spreads in ("places", "adds") if node.op in AFFINE else False


def _by_lines(node: Node) -> bool:
    one = len(node.refs) == 1 and isinstance(node.operands[0], Ref)
    return node.op in LINES and one and affine_rule(node) is None


_BY_INTERVAL = frozenset(("softmax", "log_softmax", "logsumexp", "cbrt"))
