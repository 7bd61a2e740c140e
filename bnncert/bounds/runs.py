"""Runs of affine operations as the one map they are, for rows that pass them again and again.

    value of a node  =  sum_s J_s source_s + c        sources: sets, and values of nonlinearities

The rows of (J, c) are those of the identity, pulled back. A row a passes the run by one product,
a (J, c), in place of the transposes of its operations, one after the other: of a small function the
program is so much smaller, and each sweep of CROWN passes the runs of all that lies before.

In real arithmetic alone: what is computed is rounded operation by operation, and a row that is to
allow for it passes them as they are executed.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from bnncert.bounds.graph import Graph
from bnncert.bounds.ops.affine import MOVING
from bnncert.bounds.rows import Passed, Step, Steps, pull_back, start

_FEW = 2**12
"""Coefficients of a run that are dearer to compile than to multiply by."""


def composed_steps(
    graph: Graph, steps: Callable[[], Mapping[int, Step]]
) -> Callable[[int], Step]:
    """How rows pass an affine node: with all of its run, where a nonlinearity acts on it.

    Args:
        graph: the traced function.
        steps: how they pass each affine node by itself.

    Returns:
        `(index of an affine node) -> step`, each made when first asked for.
    """

    @cache
    def step(index: int) -> Step:
        run, sources = run_of(graph, index)
        size = math.prod(graph.nodes[index].shape)
        width = sum(math.prod(graph.nodes[i].shape) for i in sources)
        if index not in graph.acted_on or _is_short(graph, run) or size * (width + 1) > _FEW:
            return steps()[index]
        passed = {i: steps()[i] if i == index else step(i) for i in run}
        return _composed(graph, index, Steps(passed), sources)

    return step


def run_of(graph: Graph, index: int) -> tuple[list[int], list[int]]:
    """The affine nodes between a node and its sources, itself included; and the sources."""
    run, sources, waiting = set(), set(), [index]
    while waiting:
        i = waiting.pop()
        if graph.nodes[i].affine is None:
            sources.add(i)
        elif i not in run:
            run.add(i)
            waiting.extend(graph.nodes[i].refs)
    return sorted(run), sorted(sources)


def _is_short(graph: Graph, run: list[int]) -> bool:
    """Whether a run is one operation, beside those that only move values."""
    return sum(graph.nodes[i].op not in MOVING for i in run) < 2


def _composed(graph: Graph, index: int, steps: Steps, sources: list[int]) -> Step:
    node, size = graph.nodes[index], math.prod(graph.nodes[index].shape)
    unit = jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape)
    rows = jax.vmap(lambda row: pull_back(start(index, row, steps), steps))(unit)
    parts = [rows.coefficients[i].reshape(size, -1) for i in sources]
    offset = jnp.broadcast_to(rows.offset, (size,)).astype(node.dtype)
    matrix = jnp.concatenate([*parts, offset[:, None]], 1)
    shapes = tuple(graph.nodes[i].shape for i in sources)
    return Step(Partial(partial(_past_run, shapes), matrix), len(node.shape), tuple(sources))


def _past_run(shapes: tuple[tuple[int, ...], ...], matrix: Array, a: Array) -> Passed:
    found = jnp.matmul(a.reshape(-1), matrix, precision=jax.lax.Precision.HIGHEST)
    passed, begin = [], 0
    for shape in shapes:
        end = begin + math.prod(shape)
        passed.append(found[begin:end].reshape(shape))
        begin = end
    return Passed(tuple(passed), found[-1])
