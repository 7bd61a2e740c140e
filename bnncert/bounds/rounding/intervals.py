"""Intervals of what a network computes: the interval rules, their operands and values widened.

Sums by widened operands, functions by widened values: both derived in `model.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import ArrayLike

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops import interval
from bnncert.bounds.ops.affine import MIXING, MOVING, constant_part, mix
from bnncert.bounds.ops.boxes import drop_nan, hull
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rounding.constants import constant_error
from bnncert.bounds.rounding.functions import function_error
from bnncert.bounds.rounding.model import Precision, gamma, own_unit, roundings, tiny
from bnncert.bounds.rounding.reordering import histories, reordering_error
from bnncert.bounds.tracing import Tracking
from bnncert.sets import Box


def outward_interval(graph: Graph, node: Node, boxes: Sequence[Box], precision: Precision) -> Box:
    """The interval of what a node computes, from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation, or nothing known of its rounding.
    """
    box = _rounded(graph, node, boxes, precision)
    sizes = [magnitude(box) + 2 * tiny(node) for box in boxes]
    for besides in (constant_error, reordering_error):
        error = besides(graph, node, sizes, precision)
        if error is not None:
            box = widened(box, 0.0, error)
    return box


def tracking(precision: Precision) -> Tracking:
    """What `trace` is to know of constants, at a precision."""

    def boxes(graph: Graph) -> list[Box]:
        def apply(index: int, found: list[Box]) -> Box:
            node = graph.nodes[index]
            return outward_interval(graph, node, [found[i] for i in node.refs], precision)

        matter = graph.acted_on.union(graph.output_nodes)

        def settle(index: int, found: list[Box], memory: None) -> tuple[Box, None]:
            return (drop_nan(found[index]) if index in matter else found[index]), memory

        domain = Domain(lambda index: hull(graph.inputs[index]), apply, settle)
        return propagate(graph, domain)[0]

    return Tracking(boxes, histories)


def _rounded(graph: Graph, node: Node, boxes: Sequence[Box], precision: Precision) -> Box:
    """As `outward_interval`, for the constants as they are."""
    operation = node.operation
    if node.op in MOVING or (operation.rounding is not None and operation.rounding.exact):
        return operation.interval(node, *boxes)
    if operation.roundings is not None:
        return _sum_interval(graph, node, boxes, precision)
    relative, absolute = function_error(node, boxes)
    units = precision.unit(node) + own_unit(node)
    box = interval(node, *(_off_subnormal(box, tiny(node)) for box in boxes))
    return widened(box, units * relative, units * absolute + 8 * tiny(node))


def widened(box: Box, relative: ArrayLike, absolute: ArrayLike) -> Box:
    """Each end moved outward by `relative` of its magnitude, and by `absolute`."""
    return Box(
        box.lower - (relative * jnp.abs(box.lower) + absolute),
        box.upper + (relative * jnp.abs(box.upper) + absolute),
    )


def _sum_interval(graph: Graph, node: Node, boxes: Sequence[Box], precision: Precision) -> Box:
    """Of an operation that is linear in each operand: its rule on widened operands.

    Where each value is one rounded result there is nothing to widen before it: its error is
    relative to the value itself. A sum of even two products may cancel, and is not like that.
    """
    terms = roundings(graph, node).forward
    unit, own = precision.unit(node), own_unit(node)
    absolute = 8 * (terms + 2) * tiny(node)
    if node.op in _SINGLE:
        boxes = [_scaled(box, 0.0, 2 * tiny(node)) for box in boxes] if terms > 1 else boxes
        return widened(interval(node, *boxes), 4 * (unit + own), absolute)
    relative = precision.relative(node, terms) + gamma(terms + 12, own)
    relative *= 1 + 4 * relative
    if node.op in MIXING and len(boxes) == 1:
        box = boxes[0]
        radius = box.radius + relative * (jnp.abs(box.center) + box.radius) + 2 * tiny(node)
        return widened(mix(node, box.center, radius), 0.0, absolute)
    if node.has_constant:
        absolute += relative * jnp.abs(constant_part(node, *(box.lower for box in boxes)))
    # What subnormal operands add to a sum is covered by `absolute`.
    boxes = [_scaled(box, relative, 2 * tiny(node)) for box in boxes]
    return widened(interval(node, *boxes), 4 * (unit + own), absolute)


def _off_subnormal(box: Box, smallest: float) -> Box:
    """Ends moved outward until none is subnormal: one may be read as 0, where h may be far off."""
    lower = jnp.where((box.lower > 0) & (box.lower < smallest), 0, box.lower)
    return Box(lower, jnp.where(box.upper > -smallest, jnp.maximum(box.upper, smallest), box.upper))


def _scaled(box: Box, relative: float, absolute: float) -> Box:
    """The box of all x (1 + theta), |theta| <= relative."""
    reach = relative * magnitude(box) + absolute
    return Box(box.lower - reach, box.upper + reach)


_SINGLE = frozenset("add add_any sub mul div convert_element_type".split())
"""Operations each value of which is one product, quotient, sum of two or conversion, rounded."""
