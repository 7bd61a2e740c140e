"""All operations that bounds know: a record each, in the room of its family.

    operation    what a record says
    affine       linear in what is bounded: moves, sums, products with constants
    elementwise  functions of one value: intervals by shape, lines that surely enclose
      piecewise  max, min, |x|, clip, leaky ReLU; steps
      smooth     curves by name: softplus, tanh, gelu, ...
      hinges     elu and selu: a curve with a concave kink
      powers     exponentials, logarithms and powers: with overflow, or a singular end
      waves      sin and cos
    pairs        max, min and logaddexp of two bounded values
    products     of two bounded values
    reductions   of an axis, not linear
    intervals    what is bounded by its interval alone: order statistics, tan, arcus functions
    normalising  a value over the root of its mean square

and what they are made of:

    lines        two lines, and which of the valid ones
    curves       the lines of a curve, from its values, its slopes and where it is convex
    planes       what every relaxation becomes: two affine functions of a node's operands
    extremes     what all but the affine ones allow for under- and overflow
    boxes        intersections, and boxes around sets

A node knows its operation (`operation_of`) from the trace on, as its operands are bounded there.
It is *relaxed* where it is in no way affine: it then needs an interval for its operands, in IBP,
CROWN-IBP and CROWN alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bnncert.bounds.graph import Node, UnsupportedPrimitiveError, unsupported
from bnncert.bounds.graph.advice import instead_of
from bnncert.bounds.ops.affine import AFFINE, AFFINE_OPERATIONS
from bnncert.bounds.ops.elementwise import enclosing_lines
from bnncert.bounds.ops.hinges import HINGES
from bnncert.bounds.ops.intervals import INTERVALS, OF_AN_AXIS
from bnncert.bounds.ops.lines import LOWER_SLOPES, Choice, Lines, check_lower_slope
from bnncert.bounds.ops.normalising import NORMALISING
from bnncert.bounds.ops.operation import Operation, Rounding
from bnncert.bounds.ops.pairs import PAIRS
from bnncert.bounds.ops.piecewise import PIECEWISE
from bnncert.bounds.ops.planes import Planes
from bnncert.bounds.ops.powers import POWERS
from bnncert.bounds.ops.products import PRODUCTS
from bnncert.bounds.ops.reductions import REDUCTIONS
from bnncert.bounds.ops.smooth import SMOOTH
from bnncert.bounds.ops.waves import WAVES
from bnncert.sets import Box

__all__ = [
    "AFFINE",
    "ELEMENTWISE",
    "LINES",
    "LOWER_SLOPES",
    "OPERATIONS",
    "SUPPORTED",
    "Choice",
    "Lines",
    "Operation",
    "Planes",
    "check_lower_slope",
    "interval",
    "lines",
    "operation_of",
]

ELEMENTWISE: tuple[Operation, ...] = (
    *PIECEWISE,
    *SMOOTH,
    *HINGES,
    *POWERS,
    *WAVES,
    *INTERVALS,
)
"""Functions of one value."""

EVERY: tuple[Operation, ...] = (
    *AFFINE_OPERATIONS,
    *ELEMENTWISE,
    *PAIRS,
    *PRODUCTS,
    *REDUCTIONS,
    *OF_AN_AXIS,
    *NORMALISING,
)
"""All records. Of several of one name the first that applies is meant."""


def _by_name(operations: Sequence[Operation]) -> dict[str, tuple[Operation, ...]]:
    found: dict[str, tuple[Operation, ...]] = {}
    for operation in operations:
        found[operation.name] = (*found.get(operation.name, ()), operation)
    return found


OPERATIONS: Mapping[str, tuple[Operation, ...]] = _by_name(EVERY)
"""By name."""

LINES: Mapping[str, Callable[..., Lines]] = {o.name: o.lines for o in ELEMENTWISE if o.lines}
"""The lines of a function of one value: `rule(l, u, *constants, choice=...)`."""

SUPPORTED = tuple(sorted(OPERATIONS))

_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


def operation_of(node: Node) -> Operation:
    """What is known of an operation on what is bounded of its operands, or a refusal."""
    if node.operation is not None:
        return node.operation
    found = (o for o in OPERATIONS.get(node.op, ()) if o.applies is None or o.applies(node))
    return next(found, _unknown(node.op))


def interval(node: Node, *operands: Box) -> Box:
    """The interval of a node's value from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation on these operands.
    """
    return operation_of(node).interval(node, *operands)


def lines(node: Node, operand: Box, choice: Choice) -> Lines:
    """The lines around a function of one value, as they are used (`elementwise`)."""
    return enclosing_lines(operation_of(node), node, operand, choice)


def _unknown(name: str) -> Operation:
    """An operation of which nothing is known: whoever asks is refused."""

    def refuse(node: Node, *boxes: Any) -> Any:
        raise _unsupported(node)

    return Operation(name, "elementwise", refuse, None, rounding=Rounding(errors=refuse))


def _unsupported(node: Node) -> UnsupportedPrimitiveError:
    hint = instead_of(node.op)
    if node.op in AFFINE:
        hint = "It is supported where it is linear: with the other operands constant."
    if node.op in _COMPARISONS:
        hint = (
            "What a comparison selects may jump. Write a rectifier as jax.nn.relu or "
            "jax.nn.leaky_relu (or jnp.where(x > 0, x, a * x)), the larger of two values as "
            "jnp.maximum, a range as jnp.clip; a mask must not depend on a set."
        )
    return unsupported(node, SUPPORTED, hint)
