"""CROWN and CROWN-IBP: which nodes are bounded by backward rows, and over which relaxations.

| method    | relaxed on                  | bounded by rows                     |
|-----------|-----------------------------|-------------------------------------|
| crown-ibp | intervals                   | the outputs                         |
| crown     | what has been found so far  | each node that is relaxed, in order |

Where a nonlinearity has two sets of planes neither of which is always the better (`has_variants`),
rows are swept through both, and their bounds intersected.

Sources: Zhang et al., NeurIPS 2018 (CROWN); Zhang et al., ICLR 2020 (CROWN-IBP).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph
from bnncert.bounds.interval import intersect, nominal, output_nodes, relaxed_operands
from bnncert.bounds.merging import exact_prefix
from bnncert.bounds.methods.ibp import interval_bounds
from bnncert.bounds.methods.rows import Step, Steps, concretize, linear_row, row_bounds, unit_row
from bnncert.bounds.methods.sweeper import (
    Options,
    Sweeper,
    affine,
    affine_errors,
    boxes_by_node,
    end_sets,
    relaxed_step,
    sweeper,
)
from bnncert.bounds.relax import has_variants, is_relaxed
from bnncert.bounds.relaxations import Choice, check_lower_slope
from bnncert.bounds.rounding import EXACT
from bnncert.sets import Box


@dataclass(frozen=True)
class CROWNIBP:
    """Backward linear bounds of the outputs, over relaxations on intervals.

    Never wider than IBP, with which it is intersected.

    Attributes:
        lower_slope: of the line below a ReLU that crosses 0: "adaptive", "zero", "one" or "chord".

    Raises:
        ValueError: an unknown slope.

    Cost: IBP, and one backward pass for each output.

    Source: Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural
    Networks", ICLR 2020.

    Example:
        >>> from bnncert import bound
        >>> box = Box(-jnp.ones(1), jnp.ones(1))
        >>> found = bound(lambda x: jax.nn.relu(x) - 0.5 * x, CROWNIBP("chord"))(box)
        >>> found.lower.tolist(), found.upper.tolist()                  # by IBP [-0.5, 1.5]
        ([0.0], [0.5])
    """

    lower_slope: str = "adaptive"
    name: ClassVar[str] = "crown-ibp"

    def __post_init__(self) -> None:
        check_lower_slope(self.lower_slope)

    def boxes(self, graph: Graph, options: Options) -> list[Box]:
        """A box for each node of a traced function."""
        sweep = self.sweeper(graph, options)
        return output_bounds(sweep, interval_bounds(sweep))

    def sweeper(self, graph: Graph, options: Options) -> Sweeper:
        """The traced function, to be swept as this method does."""
        return sweeper(graph, options._replace(lower_slope=self.lower_slope))

    def relaxed_on(self, sweep: Sweeper) -> tuple[list[Box], list[Box]]:
        """The intervals of all nodes, and what the nonlinearities are relaxed on."""
        boxes = interval_bounds(sweep)
        return boxes, boxes


@dataclass(frozen=True)
class CROWN:
    """Backward linear bounds of every node that a nonlinearity acts on, and of the outputs.

    Never wider than CROWN-IBP, with which it is intersected.

    Attributes:
        lower_slope: of the line below a ReLU that crosses 0: "adaptive", "zero", "one" or "chord".
        unstable_only: bound by rows only units that a ReLU's kink crosses: the others are relaxed
            exactly whatever their bounds (what is wider are later intervals, which rows are
            intersected with). For large networks of which few units cross; a loop of unknown
            length, so that reverse-mode differentiation is lost.

    Raises:
        ValueError: an unknown slope.

    Cost: CROWN-IBP, and one backward pass for each unit of each hidden layer after the first, and
    of the first where it is several affine operations that are not merged.

    Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
    Functions", NeurIPS 2018.

    Example:
        >>> from bnncert import bound
        >>> twice = lambda x: jax.nn.relu(jax.nn.relu(x) - x)           # relu(-x)
        >>> found = bound(twice, CROWN(lower_slope="one"))(Box(-jnp.ones(1), jnp.ones(1)))
        >>> found.lower.tolist(), found.upper.tolist()
        ([0.0], [1.0])
    """

    lower_slope: str = "adaptive"
    unstable_only: bool = False
    name: ClassVar[str] = "crown"

    def __post_init__(self) -> None:
        check_lower_slope(self.lower_slope)

    def boxes(self, graph: Graph, options: Options) -> list[Box]:
        """A box for each node of a traced function."""
        return self.swept(self.sweeper(graph, options))

    def swept(self, sweep: Sweeper) -> list[Box]:
        """The boxes, of a traced function that is made ready."""
        boxes = output_bounds(sweep, interval_bounds(sweep))
        return output_bounds(sweep, intermediate_bounds(sweep, boxes))

    def sweeper(self, graph: Graph, options: Options) -> Sweeper:
        """The traced function, to be swept as this method does."""
        own = {"lower_slope": self.lower_slope, "unstable_only": self.unstable_only}
        return sweeper(graph, options._replace(**own))

    def relaxed_on(self, sweep: Sweeper) -> tuple[list[Box], list[Box]]:
        """The intervals of all nodes, and what the nonlinearities are relaxed on."""
        boxes = interval_bounds(sweep)
        return boxes, intermediate_bounds(sweep, boxes)


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
