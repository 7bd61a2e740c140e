"""Intervals of what a network computes: the interval rules, their operands and values widened.

Sums by widened operands, functions by widened values: both derived in `arithmetic.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import ArrayLike

from bnncert.bounds import rules
from bnncert.bounds.arithmetic import (
    EXACT,
    REPEATING,
    SINGLE,
    Float,
    gamma,
    magnitude,
    own_unit,
    roundings,
    tiny,
)
from bnncert.bounds.function_errors import EXACT_FUNCTIONS, function_error
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.graph.tracing import Tracking
from bnncert.bounds.interval import propagate
from bnncert.bounds.rounding.constants import constant_error
from bnncert.bounds.rounding.reordering import histories, reordering_error
from bnncert.bounds.rules import affine_rule
from bnncert.bounds.rules.affine import MIXING, constant_part, has_constant, mix
from bnncert.sets import Box


def outward_interval(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Float) -> Box:
    """The interval of what a node computes, from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation, or nothing known of its rounding.
    """
    box = _rounded(graph, node, boxes, arithmetic)
    sizes = [magnitude(box) + 2 * tiny(node) for box in boxes]
    for besides in (constant_error, reordering_error):
        error = besides(graph, node, sizes, arithmetic)
        if error is not None:
            box = widened(box, 0.0, error)
    return box


def tracking(arithmetic: Float) -> Tracking:
    """What `graph.trace` is to know of constants, in an arithmetic."""

    def boxes(graph: Graph) -> list[Box]:
        def rule(node: Node, *operands: Box) -> Box:
            return outward_interval(graph, node, operands, arithmetic)

        return propagate(graph, lambda index, boxes: None, rule)

    return Tracking(boxes, histories)


def _rounded(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Float) -> Box:
    """As `outward_interval`, for the constants as they are."""
    if node.op in EXACT or node.op in REPEATING or node.op in EXACT_FUNCTIONS:
        return rules.interval(node, *boxes)
    if affine_rule(node) or (node.op in rules.BILINEAR and len(boxes) == 2):
        return _sum_interval(graph, node, boxes, arithmetic)
    relative, absolute = function_error(node, boxes)
    units = arithmetic.unit(node) + own_unit(node)
    box = rules.interval(node, *(_off_subnormal(box, tiny(node)) for box in boxes))
    return widened(box, units * relative, units * absolute + 8 * tiny(node))


def widened(box: Box, relative: ArrayLike, absolute: ArrayLike) -> Box:
    """Each end moved outward by `relative` of its magnitude, and by `absolute`."""
    return Box(
        box.lower - (relative * jnp.abs(box.lower) + absolute),
        box.upper + (relative * jnp.abs(box.upper) + absolute),
    )


def _sum_interval(graph: Graph, node: Node, boxes: Sequence[Box], arithmetic: Float) -> Box:
    """Of an operation that is linear in each operand: its rule on widened operands.

    Where each value is one rounded result there is nothing to widen before it: its error is
    relative to the value itself. A sum of even two products may cancel, and is not like that.
    """
    terms = roundings(graph, node).forward
    unit, own = arithmetic.unit(node), own_unit(node)
    absolute = 8 * (terms + 2) * tiny(node)
    if node.op in SINGLE:
        boxes = [_scaled(box, 0.0, 2 * tiny(node)) for box in boxes] if terms > 1 else boxes
        return widened(rules.interval(node, *boxes), 4 * (unit + own), absolute)
    relative = arithmetic.relative(node, terms) + gamma(terms + 12, own)
    relative *= 1 + 4 * relative
    if node.op in MIXING and len(boxes) == 1:
        box = boxes[0]
        radius = box.radius + relative * (jnp.abs(box.center) + box.radius) + 2 * tiny(node)
        return widened(mix(node, box.center, radius), 0.0, absolute)
    if affine_rule(node) and has_constant(node):
        absolute += relative * jnp.abs(constant_part(node, *(box.lower for box in boxes)))
    # What subnormal operands add to a sum is covered by `absolute`.
    boxes = [_scaled(box, relative, 2 * tiny(node)) for box in boxes]
    return widened(rules.interval(node, *boxes), 4 * (unit + own), absolute)


def _off_subnormal(box: Box, smallest: float) -> Box:
    """Ends moved outward until none is subnormal: one may be read as 0, where h may be far off."""
    lower = jnp.where((box.lower > 0) & (box.lower < smallest), 0, box.lower)
    return Box(lower, jnp.where(box.upper > -smallest, jnp.maximum(box.upper, smallest), box.upper))


def _scaled(box: Box, relative: float, absolute: float) -> Box:
    """The box of all x (1 + theta), |theta| <= relative."""
    reach = relative * magnitude(box) + absolute
    return Box(box.lower - reach, box.upper + reach)
