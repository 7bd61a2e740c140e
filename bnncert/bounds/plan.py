"""A traced function made ready: what every method asks about its nodes, found once."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

from bnncert.bounds.arithmetic import Arithmetic, Real
from bnncert.bounds.graph import Graph
from bnncert.bounds.merging import Merged, merged
from bnncert.bounds.ops import Operation
from bnncert.bounds.rows import Step, affine_steps
from bnncert.bounds.runs import composed_step
from bnncert.sets import Set


class Options(NamedTuple):
    """What all methods are told.

    Attributes:
        batch_size: rows of a backward pass at once.
        arithmetic: that bounds are to hold in.
        margins: whether the outputs are differences of the last layer's, to be merged with it.
        operations: the user's own.
    """

    batch_size: int
    arithmetic: Arithmetic
    margins: bool = False
    operations: tuple[Operation, ...] = ()


class Plan(NamedTuple):
    """A traced function, and what is true of its nodes.

    Attributes:
        graph: the traced function.
        arithmetic: that its bounds are to hold in.
        batch_size: rows at once.
        outputs: the nodes that are outputs.
        relaxed: the nodes that are neither sets nor affine in what is bounded.
        variants: of each relaxed one, how many default planes it has.
        acted_on: the nodes that a relaxed one acts on.
        merged: what is bounded as one affine map.
        regions: what a row that ends on a set is concretised over, by set.
        affine: how rows pass each affine node by itself; made when first asked for.
        passing: how they pass an affine node, with all of its run where that is one map (`runs`).
    """

    graph: Graph
    arithmetic: Arithmetic
    batch_size: int
    outputs: tuple[int, ...]
    relaxed: frozenset[int]
    variants: Mapping[int, int]
    acted_on: frozenset[int]
    merged: Merged
    regions: tuple[Set, ...]
    affine: Callable[[], Mapping[int, Step]]
    passing: Callable[[int], Step]


def make_plan(graph: Graph, options: Options) -> Plan:
    """The plan of a traced function."""
    arithmetic = options.arithmetic
    affine = cache(partial(affine_steps, graph))
    composed = partial(composed_step, graph, affine, {})
    relaxed = frozenset(i for i, node in enumerate(graph.nodes) if node.is_relaxed)
    return Plan(
        graph,
        arithmetic,
        options.batch_size,
        graph.output_nodes,
        relaxed,
        {i: _variants(graph, i) for i in relaxed},
        graph.acted_on,
        merged(graph, options.margins),
        tuple(arithmetic.region(graph, region) for region in graph.inputs),
        affine,
        composed if isinstance(arithmetic, Real) else lambda index: affine()[index],
    )


def _variants(graph: Graph, index: int) -> int:
    node = graph.nodes[index]
    variants = node.operation.relaxation.variants
    return variants if isinstance(variants, int) else variants(graph, node)
