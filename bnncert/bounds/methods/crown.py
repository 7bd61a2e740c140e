"""CROWN and CROWN-IBP: which nodes are bounded by backward rows, and over which relaxations.

| method    | relaxed on                  | bounded by rows                     |
|-----------|-----------------------------|-------------------------------------|
| crown-ibp | intervals                   | the outputs                         |
| crown     | what has been found so far  | each node that is relaxed, in order |

Where a nonlinearity has two sets of planes neither of which is always the better (variants),
rows are swept through both, and their bounds intersected.

Sources: Zhang et al., NeurIPS 2018 (CROWN); Zhang et al., ICLR 2020 (CROWN-IBP).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.coloring import colored_bounds
from bnncert.bounds.graph.facts import ancestors
from bnncert.bounds.methods.ibp import interval_bounds, intervals
from bnncert.bounds.methods.steps import (
    Passage,
    View,
    further,
    steps_of,
    steps_of_both,
    steps_over,
    view_of,
)
from bnncert.bounds.ops import Choice, check_lower_slope
from bnncert.bounds.ops.boxes import drop_nan, intersect
from bnncert.bounds.plan import Plan
from bnncert.bounds.propagate import values_at
from bnncert.bounds.rows import Steps, row_bounds, row_box, unit_row
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

    def boxes(self, plan: Plan) -> list[Box]:
        """A box for each node of a function."""
        return output_bounds(plan, *self.relaxed_on(plan))

    def relaxed_on(self, plan: Plan) -> tuple[list[Box], Steps]:
        """The intervals of all nodes, and how rows pass every node over them."""
        return over_intervals(plan, self.lower_slope)


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

    def boxes(self, plan: Plan) -> list[Box]:
        """A box for each node of a function."""
        wider = view_of(plan, interval_bounds(plan))
        boxes, known = intermediate_bounds(plan, wider.boxes, self, wider)
        return output_bounds(plan, boxes, steps_of_both(plan, known, wider, swept(plan)))

    def relaxed_on(self, plan: Plan) -> tuple[list[Box], Steps]:
        """The intervals of all nodes, and how rows pass every node over them."""
        boxes = interval_bounds(plan)
        return boxes, steps_of(plan, intermediate_bounds(plan, boxes, self)[1])


def over_intervals(plan: Plan, lower_slope: str) -> tuple[list[Box], Steps]:
    """The intervals of all nodes, and how rows pass every node over them."""
    boxes = interval_bounds(plan)
    return boxes, steps_over(plan, boxes, Choice(lower_slope=lower_slope))


def intermediate_bounds(
    plan: Plan, boxes: Sequence[Box], method: CROWN, wider: View | None = None
) -> tuple[list[Box], Passage]:
    """The boxes, those that a nonlinearity acts on swept first to last over those found so far.

    Args:
        plan: of the function.
        boxes: of all nodes.
        method: its options.
        wider: a view over which nodes are relaxed as well.

    Returns:
        The boxes, and how rows pass every node over them.
    """
    choice, changed = Choice(lower_slope=method.lower_slope), swept(plan)
    often = _passed_often(plan)

    def sweep(index: int, tighter: list[Box], known: Passage) -> tuple[Box, Passage]:
        found = boxes[index]
        if not _is_swept(plan, index):
            return found, known
        known = further(plan, tighter, known, choice, wider, changed, often)
        rows = _rows(plan, index, steps_of(plan, known), found, method.unstable_only)
        return intersect(found, rows), known

    unchanged = {i: box for i, box in enumerate(boxes) if i not in changed}
    found, known = intervals(plan, sweep, Passage(), unchanged)
    return found, further(plan, found, known, choice, wider, changed, often)


def swept(plan: Plan) -> frozenset[int]:
    """The nodes that are bounded by rows before the outputs are, and all that depend on them."""
    found: set[int] = set()
    for i, node in enumerate(plan.graph.nodes):
        if _is_swept(plan, i) or not found.isdisjoint(node.refs):
            found.add(i)
    return frozenset(found)


def _passed_often(plan: Plan) -> frozenset[int]:
    """Finds the nonlinearities that rows of several nodes pass."""
    targets = [i for i in range(len(plan.graph.nodes)) if _is_swept(plan, i) or i in plan.outputs]
    before = Counter(i for target in targets for i in ancestors(plan.graph, target) if i != target)
    return frozenset(i for i in plan.relaxed if before[i] > 1)


def _is_swept(plan: Plan, index: int) -> bool:
    return index in plan.acted_on and index not in plan.merged.exact


def output_bounds(plan: Plan, boxes: Sequence[Box], steps: Steps) -> list[Box]:
    """The boxes, those of the outputs intersected with linear bounds over the others.

    Where they cost much, neither end is computed from the other, so that XLA drops the end that
    nobody asks for, and half of the cost: both enclose the value at the centres of the sets, which
    keeps them in order. Of few products both are computed as one.

    Args:
        plan: of the function.
        boxes: of all nodes.
        steps: how rows pass every node over these boxes.
    """
    graph = plan.graph
    found, values = list(boxes), cache(lambda: values_at(graph, [s.center for s in graph.inputs]))
    for index in plan.outputs:
        few = math.prod(graph.nodes[index].shape) * plan.merged.forward <= _FEW
        rows = row_bounds(graph, index, steps, plan.regions, plan.batch_size, at_once=few)
        if few:
            found[index] = intersect(found[index], rows)
            continue
        lower = jnp.maximum(found[index].lower, rows.lower)
        upper = jnp.minimum(found[index].upper, rows.upper)
        value = values()[index]
        # Where f has no value there (NaN), fmin and fmax let it be.
        found[index] = Box(jnp.fmin(lower, value), jnp.fmax(upper, value))
    return found


_FEW = 2**18
"""Multiply-adds that are dearer to compile than to run."""


def _rows(plan: Plan, index: int, steps: Steps, known: Box, unstable_only: bool) -> Box:
    """Bounds of one node by rows: all, or those that a kink crosses."""
    thresholds = _thresholds(plan, index) if unstable_only else None
    if thresholds is None:
        few = math.prod(plan.graph.nodes[index].shape) * plan.merged.forward <= _FEW
        found = None if few else colored_bounds(plan, index, steps)
        if found is not None:
            return found
        return row_bounds(plan.graph, index, steps, plan.regions, plan.batch_size, at_once=True)
    return _unstable_rows(plan, index, steps, known, thresholds)


def _thresholds(plan: Plan, index: int) -> list[Array] | None:
    """Where the kinks of all that acts on a node lie; None where anything else acts on it."""
    if index in plan.outputs:
        return None
    found = []
    for i in sorted(plan.relaxed):
        node = plan.graph.nodes[i]
        if index not in node.refs:
            continue
        if node.op not in ("max", "min", "clip", "leaky_relu") or len(node.refs) > 1:
            return None
        kinks = (0.0,) if node.op == "leaky_relu" else node.operands[1:]
        found += [jnp.broadcast_to(jnp.asarray(at, node.dtype), node.shape) for at in kinks]
    return found


def _unstable_rows(
    plan: Plan,
    index: int,
    steps: Steps,
    known: Box,
    thresholds: Sequence[Array],
) -> Box:
    """Rows of the units that cross a kink, in chunks, for as long as there are any.

    Elsewhere the relaxation is exact whatever the bounds, and `known` is kept.
    """
    node = plan.graph.nodes[index]
    size = math.prod(node.shape)
    chunk = min(plan.batch_size, size, _UNSTABLE_CHUNK)
    crossing = [(known.lower < t) & (t < known.upper) for t in thresholds]
    unstable = jnp.stack(crossing).any(0).reshape(-1)
    order = jnp.argsort(~unstable)  # the unstable ones first
    order = jnp.concatenate([order, jnp.full(-size % chunk, size, order.dtype)])
    count = unstable.sum()
    lower, upper = known.lower.reshape(-1), known.upper.reshape(-1)

    def one(i: Array) -> Box:
        return row_box(index, unit_row(node, i), steps, plan.regions, at_once=True)

    def more(state: tuple[Array, Array, Array]) -> Array:
        return state[0] < count

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, lower, upper = state
        rows = jax.lax.dynamic_slice(order, (start,), (chunk,))
        box = jax.vmap(one)(rows)
        box = drop_nan(box)
        lower = lower.at[rows].max(box.lower, mode="drop")
        return start + chunk, lower, upper.at[rows].min(box.upper, mode="drop")

    _, lower, upper = jax.lax.while_loop(more, body, (jnp.zeros((), count.dtype), lower, upper))
    return Box(lower.reshape(node.shape), upper.reshape(node.shape))


_UNSTABLE_CHUNK = 64
