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
from bnncert.bounds.graph.facts import ancestors
from bnncert.bounds.methods.crown import CROWN
from bnncert.bounds.methods.ibp import intervals
from bnncert.bounds.methods.steps import Passage, View, relaxed_step, steps_of
from bnncert.bounds.ops import Choice, check_lower_slope
from bnncert.bounds.ops.boxes import drop_nan, intersect
from bnncert.bounds.plan import Plan
from bnncert.bounds.rows import (
    SIGNS,
    Step,
    least,
    map_rows,
    pull_back,
    shaped,
    signed,
    start,
)
from bnncert.sets import Box

_MOST_FRACTIONS = 2**22
_FEW_FRACTIONS = 2**12
"""Fractions of one relaxation that are dearer to compile than to relax by."""
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

    def boxes(self, plan: Plan) -> list[Box]:
        """A box for each node of a function."""
        return optimized(plan, CROWN(self.lower_slope).boxes(plan), self)


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


def optimized(plan: Plan, boxes: Sequence[Box], method: AlphaCROWN) -> list[Box]:
    """The boxes, those of the outputs intersected over all steps of the optimiser.

    Args:
        plan: of the function.
        boxes: of all nodes, by CROWN.
        method: its options. Each step costs about three times CROWN.
    """
    for i in plan.affine():  # made before the loop: what is made inside may not leave it
        plan.passing(i)
    # Each device has its own: those that they shared would share their derivatives.
    axes = axes_of(plan.graph.inputs)
    fractions, boxes = varying((initial_fractions(plan, boxes), list(boxes)), axes)
    if not any(jax.tree.leaves(fractions[i]) for i in plan.outputs if i in fractions):
        return list(boxes)
    bounds = partial(fraction_bounds, plan, boxes, method.lower_slope)
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

    best = [boxes[i] for i in plan.outputs]
    carry = (fractions, optimizer.init(fractions), best)
    (fractions, _, best), _ = jax.lax.scan(step, carry, None, method.steps)
    # Once more outside the loop: what is differentiated is this bound, its fractions as they are.
    last = bounds(jax.lax.stop_gradient(fractions))
    found = list(boxes)
    for i, a, b in zip(plan.outputs, best, last, strict=True):
        found[i] = intersect(jax.lax.stop_gradient(a), b)
    return found


def initial_fractions(plan: Plan, boxes: Sequence[Box]) -> Fractions:
    """Where the optimiser starts: at CROWN's own planes, or near them."""
    graph = plan.graph
    free = {
        i: choice
        for i in sorted(plan.relaxed)
        if (choice := graph.nodes[i].operation.relaxation.start(graph, i, boxes)) is not None
    }
    # What is affine in the sets is exact by CROWN, and nothing in it is free.
    starts = sorted(plan.acted_on.union(plan.outputs) - plan.merged.prefix)
    total = sum(
        math.prod(graph.nodes[i].shape) * leaf.size
        for i in starts
        for choice in free.values()
        for leaf in jax.tree.leaves((choice.lower, choice.upper))
    )
    found: Fractions = {}
    for begin in starts:
        own = total <= _MOST_FRACTIONS or begin in plan.outputs
        rows = math.prod(graph.nodes[begin].shape) if own else 1
        found[begin] = {i: _repeated(free[i], rows) for i in ancestors(graph, begin) if i in free}
    return found


def fraction_bounds(
    plan: Plan, boxes: Sequence[Box], lower_slope: str, fractions: Fractions
) -> list[Box]:
    """Bounds of the outputs with these fractions, over intermediate bounds with these fractions.

    The intermediate ones are intersected with `boxes`; the outputs are as swept.
    """
    graph = plan.graph
    outputs: dict[int, Box] = {i: boxes[i] for i in plan.outputs}
    default = Choice(lower_slope=lower_slope)
    free: dict[int, Mapping[int, Step | Free]] = {}  # by relaxation, by the node that is bounded

    def swept(index: int, tighter: list[Box], known: Passage) -> tuple[Box, Passage]:
        if index not in fractions:
            return boxes[index], known
        errors = plan.arithmetic.errors(graph, tighter, known.errors)
        view, fixed = View(tighter, errors), dict(known.relaxed)
        for i in ancestors(graph, index):
            if i in fractions[index]:
                own = {begin: each[i] for begin, each in fractions.items() if i in each}
                free[i] = free.get(i) or _free_steps(plan, i, view, default, own)
            elif i not in fixed and i in plan.relaxed:
                fixed[i] = relaxed_step(plan, i, view, default)
        known = Passage(errors, fixed)
        unfree = steps_of(plan, known)

        def one(row: Array, free: dict[int, Step | Free]) -> Box:
            exact = pull_back(start(index, row, unfree), unfree, {*fixed, *free})

            def lower(sign: Array, free: dict[int, Step | Free]) -> Array:
                steps = {i: _free_step(plan, i, view, default, each) for i, each in free.items()}
                return least(
                    pull_back(signed(exact, sign), unfree.and_relaxed(steps)), plan.regions
                )

            low, high = jax.vmap(lower)(SIGNS, free)
            return drop_nan(Box(low, -high))

        node, own = graph.nodes[index], {i: free[i][index] for i in fractions[index]}
        if {leaf.shape[0] for leaf in jax.tree.leaves(fractions[index])} == {1}:
            shared = jax.tree.map(lambda leaf: leaf[0], own)
            box = map_rows(lambda row: one(row, shared), node, plan.batch_size)
        else:
            box = map_rows(one, node, plan.batch_size, own)
        found = shaped(box, node)
        if index in outputs:
            outputs[index] = found
        return _met(found, boxes[index]), known

    intervals(plan, swept, Passage())
    return [outputs[i] for i in plan.outputs]


def _free_steps(
    plan: Plan, index: int, view: View, default: Choice, fractions: Mapping[int, Free]
) -> Mapping[int, Step | Free]:
    """Finds how rows pass a relaxation, with the fractions of each node that is bounded.

    Of few it is relaxed once, for all of them: for each alone, a compiler would see it as often.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(fractions))
    if len(fractions) < 2 or size > _FEW_FRACTIONS:
        return fractions
    every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *fractions.values())
    steps = jax.vmap(jax.vmap(partial(_free_step, plan, index, view, default)))(every)
    counts = [jax.tree.leaves(free)[0].shape[0] for free in fractions.values()]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]

    def of(end: int, count: int) -> Step:
        return jax.tree.map(lambda leaf: leaf[end - count : end], steps)

    return {i: of(*part) for i, *part in zip(fractions, ends, counts, strict=True)}


def _free_step(plan: Plan, index: int, view: View, default: Choice, free: Step | Free) -> Step:
    if isinstance(free, Step):
        return free
    choice = default._replace(lower=free.below, upper=free.above)
    return relaxed_step(plan, index, view, choice)


def _met(found: Box, known: Box) -> Box:
    """Intersects; where both agree but for rounding, the derivative is that of the first.

    So it is where the optimiser starts: of the other one it would learn nothing.
    """
    lower, upper = _larger(found.lower, known.lower), -_larger(-found.upper, -known.upper)
    return Box(jnp.minimum(lower, upper), jnp.maximum(lower, upper))


@jax.custom_jvp
def _larger(first: Array, second: Array) -> Array:
    return jnp.maximum(first, second)


@_larger.defjvp
def _larger_jvp(values: tuple[Array, Array], slopes: tuple[Array, Array]) -> tuple[Array, Array]:
    first, second = values
    slack = 64 * float(jnp.finfo(first.dtype).eps) * (jnp.abs(first) + jnp.abs(second))
    near = jnp.isfinite(first) & (first >= second - slack)
    return _larger(first, second), jnp.where(near, *slopes)


def _repeated(choice: Choice, rows: int) -> Free:
    def repeat(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (rows, 2, *leaf.shape))

    return Free(*jax.tree.map(repeat, (choice.lower, choice.upper)))
