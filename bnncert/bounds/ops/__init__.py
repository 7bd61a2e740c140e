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

and what they are made of:

    lines        two lines, and which of the valid ones
    curves       the lines of a curve, from its values, its slopes and where it is convex
    planes       what every relaxation becomes: two affine functions of a node's operands
    extremes     what all but the affine ones allow for under- and overflow
    boxes        intersections, and boxes around sets

A node is *relaxed* where it is in no way affine: it then needs an interval for its operands, in
IBP, CROWN-IBP and CROWN alike.
"""

from collections.abc import Callable, Mapping, Sequence

from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError, unsupported
from bnncert.bounds.graph.advice import instead_of
from bnncert.bounds.ops.affine import AFFINE, AFFINE_OPERATIONS, affine_of
from bnncert.bounds.ops.elementwise import enclosing_lines
from bnncert.bounds.ops.hinges import HINGES
from bnncert.bounds.ops.lines import LOWER_SLOPES, Choice, Lines, check_lower_slope
from bnncert.bounds.ops.operation import Operation
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
    "acted_on",
    "affine_of",
    "check_lower_slope",
    "free_choice",
    "has_variants",
    "interval",
    "is_relaxed",
    "lines",
    "operation_of",
    "relax",
]

ELEMENTWISE: tuple[Operation, ...] = (*PIECEWISE, *SMOOTH, *HINGES, *POWERS, *WAVES)
"""Functions of one value."""

EVERY: tuple[Operation, ...] = (
    *AFFINE_OPERATIONS,
    *ELEMENTWISE,
    *PAIRS,
    *PRODUCTS,
    *REDUCTIONS,
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
    """What is known of a node's operation on what is bounded of its operands.

    Raises:
        UnsupportedPrimitiveError: nothing.
    """
    if node.operation is not None:
        return node.operation
    for operation in OPERATIONS.get(node.op, ()):
        if operation.applies(node):
            return operation
    raise _unsupported(node)


def is_relaxed(node: Node) -> bool:
    """Whether a node is neither a set nor affine in what is bounded."""
    return bool(node.refs) and affine_of(node) is None


def acted_on(graph: Graph) -> set[int]:
    """Nodes that a nonlinearity acts on."""
    return {i for node in graph.nodes if is_relaxed(node) for i in node.refs}


def interval(node: Node, *operands: Box) -> Box:
    """The interval of a node's value from those of its bounded operands.

    Raises:
        UnsupportedPrimitiveError: no rule for this operation on these operands.
    """
    return operation_of(node).interval(node, *operands)


def relax(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    """Planes that enclose a node on the boxes of its operands: its own, else its interval.

    Args:
        graph: the traced function.
        index: of the node.
        boxes: of all nodes before it.
        choice: which of the valid planes.
    """
    node = graph.nodes[index]
    operation = operation_of(node)
    if operation.relaxation is not None:
        return operation.relaxation.planes(graph, index, boxes, choice)
    values = operation.interval(node, *(boxes[i] for i in node.refs))
    return Planes((), lambda: values.lower, lambda: values.upper)


def has_variants(graph: Graph, index: int) -> bool:
    """Whether a node has two defaults, neither of which is always the better."""
    node = graph.nodes[index]
    relaxation = operation_of(node).relaxation
    return relaxation is not None and relaxation.variants(graph, node)


def free_choice(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
    """Where an optimisation of a node's planes may start; None where it has but one choice."""
    relaxation = operation_of(graph.nodes[index]).relaxation
    return None if relaxation is None else relaxation.start(graph, index, boxes)


def lines(node: Node, operand: Box, choice: Choice) -> Lines:
    """The lines around a function of one value, as they are used (`elementwise`)."""
    return enclosing_lines(operation_of(node), node, operand, choice)


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
