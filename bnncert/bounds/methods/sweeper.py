"""A traced function made ready for backward rows, in the arithmetic asked for.

What IBP (of merged affine runs), CROWN-IBP, CROWN and alpha-CROWN share: how rows pass affine nodes
and relaxed ones, what both are off by in rounded arithmetic, and over which sets rows end.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from bnncert.bounds import rounding
from bnncert.bounds.arithmetic import Float
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.interval import Refine, propagate
from bnncert.bounds.methods.rows import (
    Step,
    Steps,
    TwoSteps,
    affine_steps,
    charged_step,
    planes_step,
    two_steps,
)
from bnncert.bounds.relax import has_variants, relax
from bnncert.bounds.relaxations import Choice
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.sets import Box, Set


class Options(NamedTuple):
    """What all methods are told, and how rows are swept.

    Attributes:
        batch_size: rows at once.
        lower_slope: of a ReLU that crosses 0, as its method says.
        unstable_only: bound by rows only what a kink crosses, as its method says.
        arithmetic: of the network, which its bounds are to hold in; None: real arithmetic.
        margins: whether the outputs are differences of the last layer's, to be merged with it.
    """

    batch_size: int
    lower_slope: str = "adaptive"
    unstable_only: bool = False
    arithmetic: Float | None = None
    margins: bool = False


class Sweeper(NamedTuple):
    """A traced function, ready to be swept.

    Attributes:
        graph: the traced function.
        affine: steps of its affine nodes, made when first asked for.
        options: how rows are swept.
    """

    graph: Graph
    affine: Callable[[], Mapping[int, Step]]
    options: Options


def sweeper(graph: Graph, options: Options) -> Sweeper:
    """Of a traced function; its affine steps are made once for all sweeps."""
    return Sweeper(graph, cache(lambda: affine_steps(graph)), options)


def boxes_by_node(sweep: Sweeper, refine: Refine, also: Collection[int] = ()) -> list[Box]:
    """`interval.propagate`, in the arithmetic asked for."""
    graph, arithmetic = sweep.graph, sweep.options.arithmetic
    if arithmetic is None:
        return propagate(graph, refine, also=also)

    def rule(node: Node, *boxes: Box) -> Box:
        return rounding.outward_interval(graph, node, boxes, arithmetic)

    return propagate(graph, refine, rule, also)


def end_sets(sweep: Sweeper, sets: Sequence[Set]) -> list[Set]:
    """What rows are concretised over, in the arithmetic asked for."""
    if sweep.options.arithmetic is None:
        return list(sets)
    return [rounding.outward_set(sweep.graph, region) for region in sets]


def affine_errors(sweep: Sweeper, boxes: Sequence[Box], known: Errors = EXACT) -> Errors:
    """What affine nodes may be off by, over the boxes so far; nothing in real arithmetic."""
    if sweep.options.arithmetic is None:
        return known
    return rounding.affine_errors(sweep.graph, boxes, sweep.options.arithmetic, known)


def relaxed_step(
    sweep: Sweeper, index: int, boxes: Sequence[Box], errors: Errors, choice: Choice
) -> Step:
    """Passes a relaxed node by the planes of one choice."""
    graph, arithmetic = sweep.graph, sweep.options.arithmetic
    choice = choice._replace(lower_slope=sweep.options.lower_slope)
    planes = relax(graph, index, boxes, choice)
    if arithmetic is not None:
        free = choice.lower is not None or choice.upper is not None
        planes = rounding.outward_planes(
            graph, index, planes, boxes, errors.carried, arithmetic, free
        )
    return planes_step(graph, index, planes)


def default_step(
    sweep: Sweeper, index: int, boxes: Sequence[Box], errors: Errors
) -> Step | TwoSteps:
    """Passes a relaxed node by its default planes, all that it has."""
    first = relaxed_step(sweep, index, boxes, errors, Choice())
    if not has_variants(sweep.graph, index):
        return first
    return two_steps(first, relaxed_step(sweep, index, boxes, errors, Choice(variant=1)))


def affine(sweep: Sweeper, errors: Errors) -> Steps:
    """How to pass affine nodes, what they are off by allowed for."""
    steps = sweep.affine()
    charged = {i: charged_step(steps[i], error) for i, error in errors.charged.items()}
    return Steps({**steps, **charged}, slack=errors.carried, floors=errors.floors)
