"""alpha-CROWN: the free planes of all relaxations, optimised by gradient descent on the bounds.

Every fraction in [0, 1] gives a valid plane (`Choice`), so any step of the optimiser is a sound
bound and the intersection of all steps is returned: it is never wider than CROWN, where it starts.
A row that bounds one coordinate of one node has fractions of its own for each relaxation it passes,
separately for its lower and its upper side; where a node has too many coordinates for that
(`_MOST_FRACTIONS`), its rows share them.

Source: Xu et al., "Fast and complete: enabling complete verification with rapid and massively
parallel incomplete verifiers", ICLR 2021.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnncert._varying import axes_of, varying
from bnncert.bounds.graph import Graph
from bnncert.bounds.interval import bounded_nodes, drop_nan, intersect, output_nodes
from bnncert.bounds.merging import affine_prefix
from bnncert.bounds.methods.crown import CROWN
from bnncert.bounds.methods.rows import (
    Row,
    Step,
    affine_row,
    both_signs,
    least,
    map_rows,
    relaxed_row,
    shaped,
)
from bnncert.bounds.methods.sweeper import (
    Options,
    Sweeper,
    affine,
    affine_errors,
    boxes_by_node,
    end_sets,
    relaxed_step,
)
from bnncert.bounds.relax import free_choice, is_relaxed
from bnncert.bounds.relaxations import Choice, check_lower_slope
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.sets import Box

_MOST_FRACTIONS = 2**22
_LEARNING_RATE = 0.1
_DECAY = 0.98


@dataclass(frozen=True)
class AlphaCROWN:
    """CROWN, the free lines of all its relaxations optimised: the tightest and the dearest.

    Never wider than CROWN, where the optimiser starts.

    Attributes:
        steps: of the optimiser, Adam.
        lower_slope: where the line below a ReLU that crosses 0 starts.

    Raises:
        ValueError: no steps; an unknown slope.

    Cost: three times that of CROWN for each step.

    Source: Xu et al., "Fast and complete: enabling complete verification with rapid and massively
    parallel incomplete verifiers", ICLR 2021.

    Example:
        >>> from bnncert import bound
        >>> f = lambda x: jax.nn.relu(x[0] + x[1]) + jax.nn.relu(x[0] - x[1]) - x[0]
        >>> box = Box(jnp.array([-1.0, -1.0]), jnp.array([1.5, 1.0]))
        >>> crown, best = (float(bound(f, m)(box).lower) for m in ("crown", AlphaCROWN(steps=30)))
        >>> best > crown
        True
    """

    steps: int = 50
    lower_slope: str = "adaptive"
    name: ClassVar[str] = "alpha-crown"

    def __post_init__(self) -> None:
        check_lower_slope(self.lower_slope)
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: alpha-crown takes at least one step.")

    def boxes(self, graph: Graph, options: Options) -> list[Box]:
        """A box for each node of a traced function."""
        start = CROWN(self.lower_slope)
        sweep = start.sweeper(graph, options)  # one: what it keeps must not be made inside the loop
        return optimized(sweep, start.swept(sweep), self.steps)


class Free(NamedTuple):
    """Fractions of one relaxation, for a row and its negative: leading axis 2.

    Attributes:
        below: of the plane below.
        above: of the plane above.
    """

    below: Array | None
    above: Array | None


Fractions: TypeAlias = dict[int, dict[int, Free]]
"""For each node that is bounded, for each relaxation on its way; leading axes: rows (or 1), 2."""


def optimized(sweep: Sweeper, boxes: Sequence[Box], num_steps: int) -> list[Box]:
    """The boxes, those of the outputs intersected over all steps of the optimiser.

    Args:
        sweep: the traced function.
        boxes: of all nodes, by CROWN.
        num_steps: of the optimiser. Each costs about three times CROWN.
    """
    # Each device has its own: those that they shared would share their derivatives.
    axes = axes_of(sweep.graph.inputs)
    fractions, boxes = varying((initial_fractions(sweep.graph, boxes), list(boxes)), axes)
    outputs = output_nodes(sweep.graph)
    if not any(jax.tree.leaves(fractions[i]) for i in outputs if i in fractions):
        return list(boxes)
    bounds = partial(fraction_bounds, sweep, boxes)
    optimizer = optax.adam(optax.exponential_decay(_LEARNING_RATE, 1, _DECAY))

    def loss(fractions: Fractions) -> tuple[Array, list[Box]]:
        found = bounds(fractions)
        widths = [jnp.where(jnp.isfinite(w), w, 0) for w in (b.upper - b.lower for b in found)]
        return sum((jnp.sum(w) for w in widths), jnp.zeros(())), found

    def step(carry: Any, _: None) -> tuple[Any, None]:
        fractions, state, best = carry
        (_, found), slopes = jax.value_and_grad(loss, has_aux=True)(fractions)
        slopes = jax.tree.map(jnp.nan_to_num, slopes)
        updates, state = optimizer.update(slopes, state)
        moved = optax.apply_updates(fractions, updates)
        fractions = jax.tree.map(optax.projections.projection_hypercube, moved)
        best = [intersect(b, f) for b, f in zip(best, found, strict=True)]
        return (fractions, state, best), None

    best = [boxes[i] for i in outputs]
    carry = (fractions, optimizer.init(fractions), best)
    (fractions, _, best), _ = jax.lax.scan(step, carry, None, num_steps)
    # Once more outside the loop: what is differentiated is this bound, its fractions as they are.
    last = bounds(jax.lax.stop_gradient(fractions))
    found = list(boxes)
    for i, a, b in zip(outputs, best, last, strict=True):
        found[i] = intersect(jax.lax.stop_gradient(a), b)
    return found


def initial_fractions(graph: Graph, boxes: Sequence[Box]) -> Fractions:
    """Where the optimiser starts: at CROWN's own planes, or near them."""
    free = {
        i: choice
        for i, node in enumerate(graph.nodes)
        if is_relaxed(node) and (choice := free_choice(graph, i, boxes)) is not None
    }
    prefix = affine_prefix(graph)  # by CROWN exact, and nothing in it is free
    starts = [i for i in sorted(bounded_nodes(graph)) if i not in prefix]
    total = sum(
        math.prod(graph.nodes[i].shape) * leaf.size
        for i in starts
        for choice in free.values()
        for leaf in jax.tree.leaves((choice.lower, choice.upper))
    )
    found: Fractions = {}
    for start in starts:
        own = total <= _MOST_FRACTIONS or start in output_nodes(graph)
        rows = math.prod(graph.nodes[start].shape) if own else 1
        found[start] = {i: _repeated(free[i], rows) for i in _ancestors(graph, start) if i in free}
    return found


def fraction_bounds(sweep: Sweeper, boxes: Sequence[Box], fractions: Fractions) -> list[Box]:
    """Bounds of the outputs with these fractions, over intermediate bounds with these fractions.

    The intermediate ones are intersected with `boxes`; the outputs are as swept.
    """
    graph, batch_size = sweep.graph, sweep.options.batch_size
    outputs: dict[int, Box] = {i: boxes[i] for i in output_nodes(graph)}
    sets = end_sets(sweep, graph.inputs)
    fixed: dict[int, Step] = {}
    errors = EXACT

    def refine(index: int, tighter: list[Box]) -> Box | None:
        nonlocal errors
        if index not in fractions:
            return boxes[index]
        errors = affine_errors(sweep, tighter, errors)
        unfree = affine(sweep, errors)
        for i in _ancestors(graph, index):
            if i not in fixed and i not in fractions[index] and is_relaxed(graph.nodes[i]):
                fixed[i] = relaxed_step(sweep, i, tighter, errors, Choice())
        unfree = unfree.and_relaxed(fixed)

        def one(row: Array, free: dict[int, Free]) -> Box:
            start = affine_row(index, row, unfree, {*fixed, *free})

            def lower(row: Row, free: dict[int, Free]) -> Array:
                steps = unfree.and_relaxed(_free_steps(sweep, tighter, errors, free))
                return least(relaxed_row(row, steps), sets)

            low, high = jax.vmap(lower)(both_signs(start), free)
            return drop_nan(Box(low, -high))

        node = graph.nodes[index]
        leading = {leaf.shape[0] for leaf in jax.tree.leaves(fractions[index])}
        if leading == {1}:
            shared = jax.tree.map(lambda leaf: leaf[0], fractions[index])
            box = map_rows(lambda row: one(row, shared), node, batch_size)
        else:
            box = map_rows(one, node, batch_size, fractions[index])
        swept = shaped(box, node)
        if index in outputs:
            outputs[index] = swept
        return intersect(swept, boxes[index])

    boxes_by_node(sweep, refine)
    return [outputs[i] for i in output_nodes(graph)]


def _free_steps(
    sweep: Sweeper, boxes: Sequence[Box], errors: Errors, free: Mapping[int, Free]
) -> dict[int, Step]:
    return {
        i: relaxed_step(sweep, i, boxes, errors, Choice(each.below, each.above))
        for i, each in free.items()
    }


def _repeated(choice: Choice, rows: int) -> Free:
    def repeat(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (rows, 2, *leaf.shape))

    return Free(*jax.tree.map(repeat, (choice.lower, choice.upper)))


def _ancestors(graph: Graph, index: int) -> list[int]:
    """Nodes that a node's value depends on, itself included, in order."""
    found = {index}
    for i in range(index, -1, -1):
        if i in found:
            found |= set(graph.nodes[i].refs)
    return sorted(found)
