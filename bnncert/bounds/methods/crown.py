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
from bnncert.bounds.methods.rows import Step, Steps, TwoSteps, row_bounds, row_box, unit_row
from bnncert.bounds.methods.sweeper import (
    Options,
    Sweeper,
    affine,
    affine_errors,
    boxes_by_node,
    default_step,
    end_sets,
    sweeper,
)
from bnncert.bounds.relax import is_relaxed
from bnncert.bounds.relaxations import check_lower_slope
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

    def relaxed_on(self, sweep: Sweeper) -> tuple[list[Box], Steps]:
        """The intervals of all nodes, and how rows pass every node."""
        boxes = interval_bounds(sweep)
        return boxes, relaxed_steps(sweep, boxes)


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
        boxes, steps = intermediate_bounds(sweep, boxes)
        return output_bounds(sweep, boxes, steps)

    def sweeper(self, graph: Graph, options: Options) -> Sweeper:
        """The traced function, to be swept as this method does."""
        own = {"lower_slope": self.lower_slope, "unstable_only": self.unstable_only}
        return sweeper(graph, options._replace(**own))

    def relaxed_on(self, sweep: Sweeper) -> tuple[list[Box], Steps]:
        """The intervals of all nodes, and how rows pass every node."""
        boxes = interval_bounds(sweep)
        return boxes, intermediate_bounds(sweep, boxes)[1]


def intermediate_bounds(sweep: Sweeper, boxes: Sequence[Box]) -> tuple[list[Box], Steps]:
    """The boxes, those that a nonlinearity acts on swept first to last over those found so far.

    Returns:
        The boxes, and how rows pass every node over them: a nonlinearity is relaxed once, when all
        that it acts on is found.
    """
    graph = sweep.graph
    exact, acted_on = exact_prefix(graph, sweep.options.margins), relaxed_operands(graph)
    relaxed: dict[int, Step | TwoSteps] = {}
    errors = EXACT

    def steps_up_to(last: int, tighter: Sequence[Box]) -> Steps:
        nonlocal errors
        errors = affine_errors(sweep, tighter, errors)
        for i in range(last + 1):
            if i not in relaxed and is_relaxed(graph.nodes[i]):
                relaxed[i] = default_step(sweep, i, tighter, errors)
        return affine(sweep, errors).and_relaxed(relaxed)

    def refine(index: int, tighter: list[Box]) -> Box | None:
        found = boxes[index]
        if index in exact or index not in acted_on:
            return found
        return intersect(found, _rows(sweep, index, steps_up_to(index, tighter), found))

    found = boxes_by_node(sweep, refine)
    return found, steps_up_to(len(graph.nodes) - 1, found)


def output_bounds(sweep: Sweeper, boxes: Sequence[Box], steps: Steps | None = None) -> list[Box]:
    """The boxes, those of the outputs intersected with linear bounds over the others.

    Neither end is computed from the other, so that XLA drops the end that nobody asks for, and half
    of the cost. Both enclose the value at the centres of the sets, which keeps them in order.

    Args:
        sweep: the traced function.
        boxes: of all nodes.
        steps: how rows pass every node over these boxes, if that is known.
    """
    graph, found = sweep.graph, list(boxes)
    values, sets = nominal(graph), end_sets(sweep, graph.inputs)
    steps = relaxed_steps(sweep, boxes) if steps is None else steps
    for index in output_nodes(graph):
        swept = row_bounds(graph, index, steps, sets, sweep.options.batch_size)
        lower = jnp.maximum(found[index].lower, swept.lower)
        upper = jnp.minimum(found[index].upper, swept.upper)
        value = values[index]
        # Where f has no value there (NaN), fmin and fmax let it be.
        found[index] = Box(jnp.fmin(lower, value), jnp.fmax(upper, value))
    return found


def relaxed_steps(sweep: Sweeper, boxes: Sequence[Box]) -> Steps:
    """How to pass every node over some boxes."""
    errors, nodes = affine_errors(sweep, boxes), enumerate(sweep.graph.nodes)
    relaxed = {i: default_step(sweep, i, boxes, errors) for i, node in nodes if is_relaxed(node)}
    return affine(sweep, errors).and_relaxed(relaxed)


def _rows(sweep: Sweeper, index: int, steps: Steps, known: Box) -> Box:
    """Bounds of one node by rows: all, or those that a kink crosses."""
    graph = sweep.graph
    thresholds = _thresholds(graph, index) if sweep.options.unstable_only else None
    if thresholds is None:
        sets = end_sets(sweep, graph.inputs)
        return row_bounds(graph, index, steps, sets, sweep.options.batch_size, at_once=True)
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
        return row_box(index, unit_row(node, i), steps, sets, at_once=True)

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
