"""Functions of two bounded values, and of their difference: max, min and logaddexp.

    max(a, b) = b + relu(a - b)            logaddexp(a, b) = b + softplus(a - b)
    min(a, b) = -max(-a, -b)

and with a line s v + o of the function on the right, s a + (1 - s) b + o: sums of a and b with
weights of one sign, where b + s (a - b), passed operation by operation, would meet b twice. The
difference is a third operand (`tracing.rewriting`), with bounds of its own, which the value does
not depend on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.boxes import intersect
from bnncert.bounds.ops.elementwise import guarded, increasing
from bnncert.bounds.ops.lines import Choice, with_finite_gradients
from bnncert.bounds.ops.operation import EXACT, Operation, Relaxation, Rounding
from bnncert.bounds.ops.piecewise import PIECEWISE
from bnncert.bounds.ops.planes import Planes
from bnncert.bounds.ops.smooth import SMOOTH
from bnncert.sets import Box


class _Half(NamedTuple):
    """What is left of a function of two values: one of their difference.

    Attributes:
        lines: its lines, on an interval.
        initial: its fractions.
        sign: -1: the function is minus that of the negated values.
    """

    lines: Callable[..., Any]
    initial: Callable[..., Choice]
    sign: int = 1


def _record(name: str, half: _Half, rounding: Rounding) -> Operation:
    def ends(node: Node, boxes: Sequence[Box]) -> tuple[Array, Array]:
        """The range of a - b, which the relu of max(a, b) is of; for a min, that of b - a."""
        a, b, difference = (boxes[i] for i in node.refs)
        box = intersect(difference, Box(a.lower - b.upper, a.upper - b.lower))
        l, u = with_finite_gradients(box.lower, box.upper)
        return (l, u) if half.sign > 0 else (-u, -l)

    def planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
        node = graph.nodes[index]
        lines = half.lines(*ends(node, boxes), choice=choice)

        def plane(slope: Array, offset: Array) -> Callable[[Array, Array], Array]:
            return lambda a, b: slope * a + (1 - slope) * b + half.sign * offset

        below = plane(lines.lower_slope, lines.lower_offset)
        above = plane(lines.upper_slope, lines.upper_offset)
        return Planes(node.refs[:2], *((below, above) if half.sign > 0 else (above, below)))

    def start(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
        return Choice(half.initial(*ends(graph.nodes[index], boxes)).lower, None)

    return Operation(
        name,
        "pair",
        guarded(increasing, rounding),
        None,
        relaxation=Relaxation(planes, start, 1),
        rounding=rounding,
        increasing=True,
    )


def _of_difference(operations: Sequence[Operation], name: str, *constants: float) -> Any:
    (operation,) = (o for o in operations if o.name == name)
    lines, initial = operation.lines, operation.initial
    assert lines is not None and initial is not None
    return (
        lambda l, u, choice: lines(l, u, *constants, choice=choice),
        lambda l, u: initial(l, u, *constants),
    )


_RELU = _of_difference(PIECEWISE, "max", 0.0)
_CHOSEN = EXACT._replace(constants="moves", planes="values")

PAIRS: tuple[Operation, ...] = (
    _record("max", _Half(*_RELU), _CHOSEN),
    _record("min", _Half(*_RELU, sign=-1), _CHOSEN),
    _record(
        "logaddexp",
        _Half(*_of_difference(SMOOTH, "softplus")),
        Rounding(absolute=4.0, curvature=0.25, constants="moves", planes="softplus"),
    ),
)
