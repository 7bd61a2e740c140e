"""Which nodes are bounded by backward rows, and over which relaxations: CROWN and CROWN-IBP.

| method    | relaxed on                  | bounded by rows                     |
|-----------|-----------------------------|-------------------------------------|
| crown-ibp | intervals                   | the outputs                         |
| crown     | what has been found so far  | each node that is relaxed, in order |

Where a nonlinearity has two sets of planes neither of which is always the better (`has_variants`),
rows are swept through both, and their bounds intersected.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.backward import (
    Step,
    affine_steps,
    concretize,
    linear_row,
    planes_step,
    row_bounds,
    unit_row,
)
from bnncert.bounds.graph import Graph
from bnncert.bounds.interval import (
    affine_prefix,
    frontier,
    intersect,
    merged_nodes,
    nominal,
    output_nodes,
    propagate,
    relaxed_operands,
)
from bnncert.bounds.relax import has_variants, is_relaxed, relax
from bnncert.bounds.relaxations import Choice
from bnncert.sets import Box


class Options(NamedTuple):
    """How rows are swept.

    Attributes:
        batch_size: rows at once.
        lower_slope: of a ReLU that crosses 0.
        unstable_only: bound by rows only what a kink crosses.
    """

    batch_size: int
    lower_slope: str = "adaptive"
    unstable_only: bool = False


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


def interval_bounds(sweep: Sweeper) -> list[Box]:
    """IBP: a box for each node, affine runs merged where that is sharper."""
    graph = sweep.graph
    merged = merged_nodes(graph)

    def merge(index: int, boxes: list[Box]) -> Box | None:
        if index not in merged:
            return None
        sets = frontier(graph, boxes)
        return row_bounds(graph, index, sweep.affine(), sets, sweep.options.batch_size)

    return propagate(graph, merge)


def intermediate_bounds(sweep: Sweeper, boxes: Sequence[Box]) -> list[Box]:
    """The boxes, those that a nonlinearity acts on swept first to last over those found so far."""
    graph = sweep.graph
    exact, relaxed = affine_prefix(graph), relaxed_operands(graph)
    variants = _variants(graph)
    steps: list[dict[int, Step]] = [dict(sweep.affine()) for _ in variants]

    def refine(index: int, tighter: list[Box]) -> Box | None:
        found = boxes[index]
        if index in exact or index not in relaxed:
            return found
        for variant, passed in zip(variants, steps, strict=True):
            for i in range(index + 1):
                if i not in passed and is_relaxed(graph.nodes[i]):
                    passed[i] = _step(sweep, i, tighter, variant)
            found = intersect(found, _rows(sweep, index, passed, found))
        return found

    return propagate(graph, refine)


def output_bounds(sweep: Sweeper, boxes: Sequence[Box]) -> list[Box]:
    """The boxes, those of the outputs intersected with linear bounds over the others.

    Neither end is computed from the other, so that XLA drops the end that nobody asks for, and half
    of the cost. Both enclose the value at the centres of the sets, which keeps them in order.
    """
    graph, found = sweep.graph, list(boxes)
    values = nominal(graph)
    for steps in relaxed_steps(sweep, boxes):
        for index in output_nodes(graph):
            swept = row_bounds(graph, index, steps, graph.inputs, sweep.options.batch_size)
            lower = jnp.maximum(found[index].lower, swept.lower)
            upper = jnp.minimum(found[index].upper, swept.upper)
            value = values[index]
            # Where f has no value there (NaN), fmin and fmax let it be.
            found[index] = Box(jnp.fmin(lower, value), jnp.fmax(upper, value))
    return found


def relaxed_steps(sweep: Sweeper, boxes: Sequence[Box]) -> list[dict[int, Step]]:
    """How to pass every node, for each variant."""
    relaxed = [i for i, node in enumerate(sweep.graph.nodes) if is_relaxed(node)]
    return [
        {**sweep.affine(), **{i: _step(sweep, i, boxes, variant) for i in relaxed}}
        for variant in _variants(sweep.graph)
    ]


def _step(sweep: Sweeper, index: int, boxes: Sequence[Box], variant: int) -> Step:
    choice = Choice(variant=variant, lower_slope=sweep.options.lower_slope)
    return planes_step(sweep.graph, relax(sweep.graph, index, boxes, choice))


def _variants(graph: Graph) -> tuple[int, ...]:
    relaxed = [i for i, node in enumerate(graph.nodes) if is_relaxed(node)]
    return (0, 1) if any(has_variants(graph, i) for i in relaxed) else (0,)


def _rows(sweep: Sweeper, index: int, steps: Mapping[int, Step], known: Box) -> Box:
    """Bounds of one node by rows: all, or those that a kink crosses."""
    graph, batch_size = sweep.graph, sweep.options.batch_size
    thresholds = _thresholds(graph, index) if sweep.options.unstable_only else None
    if thresholds is None:
        return row_bounds(graph, index, steps, graph.inputs, batch_size)
    return _unstable_rows(sweep, index, steps, known, thresholds)


def _thresholds(graph: Graph, index: int) -> list[Array] | None:
    """Where the kinks of all that acts on a node lie; None where anything else acts on it."""
    if index in output_nodes(graph):
        return None
    found = []
    for node in graph.nodes:
        if index not in node.refs or not is_relaxed(node):
            continue
        if node.op not in ("max", "min", "leaky_relu") or len(node.refs) == 2:
            return None
        at = 0.0 if node.op == "leaky_relu" else node.operands[1]
        found.append(jnp.broadcast_to(jnp.asarray(at, node.dtype), node.shape))
    return found


def _unstable_rows(
    sweep: Sweeper,
    index: int,
    steps: Mapping[int, Step],
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

    def one(i: Array) -> Box:
        return concretize(linear_row(index, unit_row(node, i), steps), graph.inputs)

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
