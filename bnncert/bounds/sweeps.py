"""Which nodes are bounded by backward rows, and over which relaxations: CROWN and CROWN-IBP.

| method    | relaxed on                  | bounded by rows                     |
|-----------|-----------------------------|-------------------------------------|
| crown-ibp | intervals                   | the outputs                         |
| crown     | what has been found so far  | each node that is relaxed, in order |

Where a nonlinearity has two sets of planes neither of which is always the better (`has_variants`),
rows are swept through both, and their bounds intersected.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds import rounding
from bnncert.bounds.arithmetic import Arithmetic
from bnncert.bounds.backward import (
    Step,
    Steps,
    affine_steps,
    charged_step,
    concretize,
    linear_row,
    planes_step,
    row_bounds,
    unit_row,
)
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.interval import (
    Refine,
    frontier,
    intersect,
    nominal,
    output_nodes,
    propagate,
    relaxed_operands,
)
from bnncert.bounds.merging import exact_prefix, merged_runs
from bnncert.bounds.norms import first_sum, first_sums
from bnncert.bounds.relax import has_variants, is_relaxed, relax
from bnncert.bounds.relaxations import Choice, Planes
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.sets import Box, Set


class Options(NamedTuple):
    """How rows are swept.

    Attributes:
        batch_size: rows at once.
        lower_slope: of a ReLU that crosses 0.
        unstable_only: bound by rows only what a kink crosses.
        arithmetic: of the network, which its bounds are to hold in; None: real arithmetic.
        margins: whether the outputs are differences of the last layer's, to be merged with it.
    """

    batch_size: int
    lower_slope: str = "adaptive"
    unstable_only: bool = False
    arithmetic: Arithmetic | None = None
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


def interval_bounds(sweep: Sweeper) -> list[Box]:
    """IBP: a box for each node, affine runs merged where that is sharper and within the budget."""
    graph, errors = sweep.graph, EXACT
    runs, normed = merged_runs(graph, sweep.options.margins), first_sums(graph)

    def merge(index: int, boxes: list[Box]) -> Box | None:
        nonlocal errors
        if index in normed:
            return first_sum(graph, index, boxes, sweep.options.arithmetic)
        if index not in runs:
            return None
        errors = affine_errors(sweep, boxes, errors)
        sets, steps = end_sets(sweep, frontier(graph, boxes)), affine(sweep, errors)
        passing = {i: steps.passing[i] for i in runs[index].passed}
        steps = steps._replace(passing=passing)
        return row_bounds(graph, index, steps, sets, sweep.options.batch_size)

    return boxes_by_node(sweep, merge, normed.union(runs))


def intermediate_bounds(sweep: Sweeper, boxes: Sequence[Box]) -> list[Box]:
    """The boxes, those that a nonlinearity acts on swept first to last over those found so far."""
    graph = sweep.graph
    exact, relaxed = exact_prefix(graph, sweep.options.margins), relaxed_operands(graph)
    variants = _variants(graph)
    passed: list[dict[int, Step]] = [{} for _ in variants]
    errors = EXACT

    def refine(index: int, tighter: list[Box]) -> Box | None:
        nonlocal errors
        found = boxes[index]
        if index in exact or index not in relaxed:
            return found
        errors = affine_errors(sweep, tighter, errors)
        through = affine(sweep, errors)
        for variant, steps in zip(variants, passed, strict=True):
            for i in range(index + 1):
                if i not in steps and is_relaxed(graph.nodes[i]):
                    steps[i] = relaxed_step(sweep, i, tighter, errors, Choice(variant=variant))
            found = intersect(found, _rows(sweep, index, through.and_passing(steps), found))
        return found

    return boxes_by_node(sweep, refine)


def output_bounds(sweep: Sweeper, boxes: Sequence[Box]) -> list[Box]:
    """The boxes, those of the outputs intersected with linear bounds over the others.

    Neither end is computed from the other, so that XLA drops the end that nobody asks for, and half
    of the cost. Both enclose the value at the centres of the sets, which keeps them in order.
    """
    graph, found = sweep.graph, list(boxes)
    values, sets = nominal(graph), end_sets(sweep, graph.inputs)
    for steps in relaxed_steps(sweep, boxes):
        for index in output_nodes(graph):
            swept = row_bounds(graph, index, steps, sets, sweep.options.batch_size)
            lower = jnp.maximum(found[index].lower, swept.lower)
            upper = jnp.minimum(found[index].upper, swept.upper)
            value = values[index]
            # Where f has no value there (NaN), fmin and fmax let it be.
            found[index] = Box(jnp.fmin(lower, value), jnp.fmax(upper, value))
    return found


def relaxed_steps(sweep: Sweeper, boxes: Sequence[Box]) -> list[Steps]:
    """How to pass every node, for each variant."""
    relaxed = [i for i, node in enumerate(sweep.graph.nodes) if is_relaxed(node)]
    errors = affine_errors(sweep, boxes)
    through = affine(sweep, errors)
    return [
        through.and_passing(
            {i: relaxed_step(sweep, i, boxes, errors, Choice(variant=v)) for i in relaxed}
        )
        for v in _variants(sweep.graph)
    ]


def affine_errors(sweep: Sweeper, boxes: Sequence[Box], known: Errors = EXACT) -> Errors:
    """What affine nodes may be off by, over the boxes so far; nothing in real arithmetic."""
    if sweep.options.arithmetic is None:
        return known
    return rounding.affine_errors(sweep.graph, boxes, sweep.options.arithmetic, known)


def relaxed_step(
    sweep: Sweeper, index: int, boxes: Sequence[Box], errors: Errors, *choices: Choice
) -> Step:
    """Passes a relaxed node by the planes of one choice, or of one for each side of a row."""
    graph, arithmetic, lower_slope = (
        sweep.graph,
        sweep.options.arithmetic,
        sweep.options.lower_slope,
    )

    def planes(choice: Choice) -> Planes:
        found = relax(graph, index, boxes, choice._replace(lower_slope=lower_slope))
        if arithmetic is None:
            return found
        free = choice.lower is not None or choice.upper is not None
        return rounding.outward_planes(graph, index, found, boxes, errors.carried, arithmetic, free)

    return planes_step(graph, *map(planes, choices))


def affine(sweep: Sweeper, errors: Errors) -> Steps:
    """How to pass affine nodes, what they are off by allowed for."""
    steps = sweep.affine()
    charged = {i: charged_step(steps[i], error) for i, error in errors.charged.items()}
    return Steps({**steps, **charged}, errors.carried, errors.floors)


def _variants(graph: Graph) -> tuple[int, ...]:
    relaxed = [i for i, node in enumerate(graph.nodes) if is_relaxed(node)]
    return (0, 1) if any(has_variants(graph, i) for i in relaxed) else (0,)


def _rows(sweep: Sweeper, index: int, steps: Steps, known: Box) -> Box:
    """Bounds of one node by rows: all, or those that a kink crosses."""
    graph = sweep.graph
    thresholds = _thresholds(graph, index) if sweep.options.unstable_only else None
    if thresholds is None:
        sets = end_sets(sweep, graph.inputs)
        return row_bounds(graph, index, steps, sets, sweep.options.batch_size)
    return _unstable_rows(sweep, index, steps, known, thresholds)


def _thresholds(graph: Graph, index: int) -> list[Array] | None:
    """Where the kinks of all that acts on a node lie; None where anything else acts on it."""
    if index in output_nodes(graph):
        return None
    found = []
    for node in graph.nodes:
        if index not in node.refs or not is_relaxed(node):
            continue
        if node.op not in ("max", "min", "clip", "leaky_relu") or len(node.refs) > 1:
            return None
        kinks = (0.0,) if node.op == "leaky_relu" else node.operands[1:]
        found += [jnp.broadcast_to(jnp.asarray(at, node.dtype), node.shape) for at in kinks]
    return found


def _unstable_rows(
    sweep: Sweeper,
    index: int,
    steps: Steps,
    known: Box,
    thresholds: Sequence[Array],
) -> Box:
    """Rows of the units that cross a kink, in chunks, for as long as there are any.

    Elsewhere the relaxation is exact whatever the bounds, and `known` is kept.
    """
    graph, node = sweep.graph, sweep.graph.nodes[index]
    size = math.prod(node.shape)
    chunk = min(sweep.options.batch_size, size, _UNSTABLE_CHUNK)
    crossing = [(known.lower < t) & (t < known.upper) for t in thresholds]
    unstable = jnp.stack(crossing).any(0).reshape(-1)
    order = jnp.argsort(~unstable)  # the unstable ones first
    order = jnp.concatenate([order, jnp.full(-size % chunk, size, order.dtype)])
    count = unstable.sum()
    lower, upper = known.lower.reshape(-1), known.upper.reshape(-1)
    sets = end_sets(sweep, graph.inputs)

    def one(i: Array) -> Box:
        return concretize(linear_row(index, unit_row(node, i), steps), sets)

    def more(state: tuple[Array, Array, Array]) -> Array:
        return state[0] < count

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, lower, upper = state
        rows = jax.lax.dynamic_slice(order, (start,), (chunk,))
        box = jax.vmap(one)(rows)
        lower = lower.at[rows].max(box.lower, mode="drop")
        return start + chunk, lower, upper.at[rows].min(box.upper, mode="drop")

    _, lower, upper = jax.lax.while_loop(more, body, (jnp.zeros((), count.dtype), lower, upper))
    return Box(lower.reshape(node.shape), upper.reshape(node.shape))


_UNSTABLE_CHUNK = 64
