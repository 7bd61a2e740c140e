"""Runs of affine operations as the one map they are, for rows that pass them again and again.

    value of a node  =  sum_s J_s source_s + c        sources: sets, and values of nonlinearities

The rows of (J, c) are those of the identity, pulled back. A row a passes the run by one product,
a (J, c), in place of the transposes of its operations, one after the other: of a small function the
program is so much smaller, and each sweep of CROWN passes the runs of all that lies before.

The planes of a nonlinearity of several values are passed likewise, where rows come by often: its
rows are those of the unit rows and of their negatives, and those of the runs before it,

    max(a, 0) (J below) + min(a, 0) (J above)

In real arithmetic alone: what is computed is rounded operation by operation, and a row that is to
allow for it passes them as they are executed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.affine import MOVING
from bnncert.bounds.rows import SIGNS, Passed, Row, Step, Steps, pull_back, start, weighed

_FEW = 2**11
"""Coefficients of a run that are dearer to compile than to multiply by."""

_FEW_OF_PLANES = 2**10
"""Likewise of planes, which would be passed by fewer products than that."""


def composed_step(
    graph: Graph, steps: Callable[[], Mapping[int, Step]], known: dict[int, Step], index: int
) -> Step:
    """Finds how rows pass an affine node: with its run, where a nonlinearity acts on it.

    Args:
        graph: the traced function.
        steps: how they pass each affine node by itself.
        known: what was found before, which this is added to.
        index: of the node.
    """
    if index not in known:
        run, sources = run_of(graph, index)
        size = math.prod(graph.nodes[index].shape)
        width = sum(math.prod(graph.nodes[i].shape) for i in sources)
        step = steps()[index]
        small = size * (width + 1) <= _FEW and _of_one_dtype(graph, [*run, *sources])
        if index in graph.acted_on and not _is_short(graph, run) and small:
            before = {i: composed_step(graph, steps, known, i) for i in run if i != index}
            step = _composed(graph, index, Steps({**before, index: step}), sources)
        known[index] = step
    return known[index]


def composed_planes(graph: Graph, index: int, step: Step, affine: Mapping[int, Step]) -> Step:
    """Finds how rows pass a nonlinearity with the runs before it, of few coefficients.

    Args:
        graph: the traced function.
        index: of the nonlinearity.
        step: how they pass it by itself.
        affine: how they pass affine nodes.
    """
    node, size = graph.nodes[index], math.prod(graph.nodes[index].shape)
    runs = [run_of(graph, i) for i in step.operands]
    sources = sorted({source for _, found in runs for source in found})
    passed = sorted({i for run, _ in runs for i in run})
    width = sum(math.prod(graph.nodes[i].shape) for i in sources)
    few = sources and 2 * size * width <= _FEW_OF_PLANES
    if step.by_lines or not few or not _of_one_dtype(graph, [index, *passed, *sources]):
        return step
    steps = Steps({i: affine[i] for i in passed}, {index: step})

    def signed(sign: Array) -> Row:
        return jax.vmap(lambda row: pull_back(start(index, sign * row, steps), steps))(_unit(node))

    rows = jax.vmap(signed)(SIGNS)
    matrix = jnp.concatenate([rows.coefficients[i].reshape(2, size, -1) for i in sources], -1)
    offsets = jnp.broadcast_to(rows.offset, (2, size)) * SIGNS[:, None]
    matrix = (matrix * SIGNS[:, None, None]).reshape(2 * size, width)
    through = Partial(partial(_past_planes, _shapes(graph, sources)), matrix, offsets)
    return Step(through, len(node.shape), tuple(sources))


def run_of(graph: Graph, index: int) -> tuple[list[int], list[int]]:
    """Finds the affine nodes between a node and its sources, itself included; and these."""
    run, sources, waiting = set(), set(), [index]
    while waiting:
        i = waiting.pop()
        if graph.nodes[i].affine is None:
            sources.add(i)
        elif i not in run:
            run.add(i)
            waiting.extend(graph.nodes[i].refs)
    return sorted(run), sorted(sources)


def _of_one_dtype(graph: Graph, indices: Sequence[int]) -> bool:
    """Says whether no value is cast between: a matrix has one format."""
    return len({graph.nodes[i].dtype for i in indices}) == 1


def _is_short(graph: Graph, run: list[int]) -> bool:
    """Says whether a run is one operation, beside those that only move values."""
    return sum(graph.nodes[i].op not in MOVING for i in run) < 2


def _composed(graph: Graph, index: int, steps: Steps, sources: list[int]) -> Step:
    node, size = graph.nodes[index], math.prod(graph.nodes[index].shape)
    rows = jax.vmap(lambda row: pull_back(start(index, row, steps), steps))(_unit(node))
    parts = [rows.coefficients[i].reshape(size, -1) for i in sources]
    offset = jnp.broadcast_to(rows.offset, (size,)).astype(node.dtype)
    matrix = jnp.concatenate([*parts, offset[:, None]], 1)
    through = Partial(partial(_past_run, _shapes(graph, sources)), matrix)
    return Step(through, len(node.shape), tuple(sources))


def _past_run(shapes: Sequence[tuple[int, ...]], matrix: Array, a: Array) -> Passed:
    found = _times(a.reshape(-1), matrix)
    return Passed(_parted(found, shapes), found[-1])


def _past_planes(
    shapes: Sequence[tuple[int, ...]], matrix: Array, offsets: Array, a: Array
) -> Passed:
    a = a.reshape(-1)
    found = _times(jnp.concatenate([jnp.maximum(a, 0), jnp.minimum(a, 0)]), matrix)
    return Passed(_parted(found, shapes), weighed(a, *offsets))


def _times(row: Array, matrix: Array) -> Array:
    return jnp.matmul(row, matrix, precision=jax.lax.Precision.HIGHEST)


def _parted(row: Array, shapes: Sequence[tuple[int, ...]]) -> tuple[Array, ...]:
    """Gives the coefficients of one source after another."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = (row[end - math.prod(shape) : end] for end, shape in zip(ends, shapes, strict=True))
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _shapes(graph: Graph, sources: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(graph.nodes[i].shape for i in sources)


def _unit(node: Node) -> Array:
    size = math.prod(node.shape)
    return jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape)
