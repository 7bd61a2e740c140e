"""One loop over a traced function: a value for each node, from the sets forward.

What a value is, a `Domain` says: an interval, two affine functions of the sets, the moments of a
random value. It has three verbs,

    start    the value of a set
    apply    that of a node, from those of the nodes before it
    settle   a second look at it, for a node that matters: a tighter bound from all found so far

and what `settle` is to remember from node to node goes through the loop as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jaxtyping import Array

from bnncert.bounds.graph import Graph

Value = TypeVar("Value")


def as_it_is(index: int, values: list[Any], memory: Any) -> tuple[Any, Any]:
    """Leaves a value alone."""
    return values[index], memory


@dataclass(frozen=True)
class Domain(Generic[Value]):
    """A kind of value, and how it passes a node.

    Attributes:
        start: `(index of a set) -> value`.
        apply: `(index, all values so far) -> value` of the next node.
        settle: `(index, all values so far, memory) -> (value, memory)`; the last is the node's own.
        memory: with which the loop begins.
    """

    start: Callable[[int], Value]
    apply: Callable[[int, list[Value]], Value]
    settle: Callable[[int, list[Value], Any], tuple[Value, Any]] = as_it_is
    memory: Any = None


def propagate(graph: Graph, domain: Domain[Value]) -> tuple[list[Value], Any]:
    """A value for each node, and what was remembered.

    Args:
        graph: the traced function.
        domain: what a value is.
    """
    values: list[Value] = []
    memory = domain.memory
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            values.append(domain.start(index))
        else:
            values.append(domain.apply(index, values))
        values[index], memory = domain.settle(index, values, memory)
    return values, memory


def values_at(graph: Graph, points: Sequence[Array]) -> list[Array]:
    """The value of each node at one point of each set.

    Args:
        graph: the traced function.
        points: one for each set.
    """

    def apply(index: int, values: list[Array]) -> Array:
        node = graph.nodes[index]
        return node.evaluate(*node.fill([values[i] for i in node.refs]))

    return propagate(graph, Domain(lambda index: points[index], apply))[0]
