"""How rows pass the nodes of a function, over the boxes that are known of it.

A nonlinearity is relaxed once, when all that it acts on is bounded; what affine nodes are off by is
found once as well. A `Passage` is what is known of both, and grows from node to node.

It is relaxed in several *ways*: by each of its default planes (variants), and, where rows are to be
bounded as well over the wider boxes that came first, over both (views). All are found by one
program that is mapped over them, and passed by one.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.arithmetic import Real
from bnncert.bounds.merging import Run
from bnncert.bounds.ops import Choice
from bnncert.bounds.plan import Plan
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.bounds.rows import AnyStep, Apart, Charged, Step, Steps, Ways, planes_step
from bnncert.bounds.runs import composed_planes
from bnncert.sets import Box


class View(NamedTuple):
    """What is known of a function's values.

    Attributes:
        boxes: of its first nodes.
        errors: what affine ones are off by.
    """

    boxes: Sequence[Box]
    errors: Errors


class Passage(NamedTuple):
    """How rows pass the first nodes of a function.

    Attributes:
        errors: what affine ones are off by.
        relaxed: how the others are passed.
        both: likewise, over the wider boxes as well: (wider, these) where they differ.
    """

    errors: Errors = EXACT
    relaxed: Mapping[int, AnyStep] = {}
    both: Mapping[int, AnyStep] = {}


def view_of(plan: Plan, boxes: Sequence[Box], known: Errors = EXACT) -> View:
    """What is known where the first nodes have boxes; `known` of fewer of them."""
    return View(boxes, plan.arithmetic.errors(plan.graph, boxes, known))


def further(
    plan: Plan,
    boxes: Sequence[Box],
    known: Passage,
    choice: Choice,
    wider: View | None = None,
    changed: frozenset[int] = frozenset(),
    often: frozenset[int] = frozenset(),
) -> Passage:
    """The passage of all nodes that have boxes.

    Args:
        plan: of the function.
        boxes: of its first nodes.
        known: of fewer nodes, over the same boxes.
        choice: of the default planes: all variants are taken.
        wider: another view, over which they are relaxed as well.
        changed: the nodes of which it knows other boxes.
        often: the nodes that rows pass again and again.
    """
    own = view_of(plan, boxes, known.errors)
    relaxed, both = dict(known.relaxed), dict(known.both)
    for i in sorted(plan.relaxed):
        if i >= len(boxes) or i in relaxed:
            continue
        differ = wider is not None and not changed.isdisjoint(plan.graph.nodes[i].refs)
        views = [wider, own] if wider is not None and differ else [own]
        both[i] = step = default_step(plan, i, views, choice, i in often)
        if isinstance(step, Ways | Apart) and differ:
            step = step.last(step.number // 2)
        relaxed[i] = step
    return Passage(own.errors, relaxed, both)


def steps_of(plan: Plan, known: Passage, run: Run | None = None) -> Steps:
    """Says how to pass the nodes of a passage, or of one run alone."""
    errors = known.errors
    affine = _affine(plan, errors.charged, run)
    return Steps(affine, known.relaxed, errors.carried, errors.floors)


def steps_of_both(plan: Plan, known: Passage, wider: View, changed: frozenset[int]) -> Steps:
    """How to pass the nodes of a passage over the wider boxes as well, in as many ways each."""
    shapes = {
        i: (1 if changed.isdisjoint(plan.graph.nodes[i].refs) else 2, plan.variants[i])
        for i in known.both
    }
    views, variants = (max(axis) for axis in zip(*shapes.values(), (1, 1), strict=True))

    def ways(index: int) -> AnyStep:
        step = known.both[index]
        if not isinstance(step, Ways | Apart):
            return step
        return step.spread(shapes[index], (views, variants))

    def errors(of_wider: Mapping[int, Array], of_own: Mapping[int, Array]) -> dict[int, Array]:
        return {
            i: jnp.repeat(jnp.stack([of_wider[i], error]), variants, 0)
            if views > 1 and i in changed
            else error
            for i, error in of_own.items()
        }

    own, other = known.errors, wider.errors
    return Steps(
        _affine(plan, errors(other.charged, own.charged)),
        {i: ways(i) for i in shapes},
        errors(other.carried, own.carried),
        errors(other.floors, own.floors),
    )


def steps_over(plan: Plan, boxes: Sequence[Box], choice: Choice) -> Steps:
    """How to pass every node, over the boxes of all."""
    return steps_of(plan, further(plan, boxes, Passage(), choice))


def default_step(
    plan: Plan, index: int, views: Sequence[View], choice: Choice, often: bool = False
) -> AnyStep:
    """Passes a relaxed node by its default planes, all that it has, over each view.

    Where rows pass it often, of a small function by one matrix.
    """
    variants = plan.variants[index]
    ways = list(product(range(len(views)), range(variants)))

    as_one = often and isinstance(plan.arithmetic, Real)
    affine = {i: plan.passing(i) for i in plan.affine()} if as_one else {}

    def made(view: View, choice: Choice) -> Step:
        step = relaxed_step(plan, index, view, choice)
        return composed_planes(plan.graph, index, step, affine) if as_one else step

    if len(ways) == 1:
        return made(views[0], choice)
    if _keeps_weights(plan, index):
        return Apart(
            tuple(made(views[view], choice._replace(variant=variant)) for view, variant in ways)
        )
    node, (last, *_) = plan.graph.nodes[index], views[::-1]
    places = sorted({*node.refs, index})

    def stacked(values: Sequence[Array]) -> Array:
        return jnp.stack([values[view] for view, _ in ways])

    def one(boxes: Sequence[Box], carried: Mapping[int, Array], variant: Array | int) -> Step:
        found = list(last.boxes)
        for place, box in zip(places, boxes, strict=True):
            found[place] = box
        errors = last.errors._replace(carried={**last.errors.carried, **carried})
        return made(View(found, errors), choice._replace(variant=variant))

    variant = jnp.array([variant for _, variant in ways]) if variants > 1 else 0
    if len(views) == 1:
        own = [last.boxes[i] for i in places]
        steps = jax.vmap(lambda variant: one(own, {}, variant))(variant)
        return Ways(steps, len(ways))
    boxes = [
        Box(*map(stacked, zip(*(vars(view.boxes[i]).values() for view in views), strict=True)))
        for i in places
    ]
    carried = {
        i: stacked([view.errors.carried[i] for view in views])
        for i in node.refs
        if i in last.errors.carried
    }
    axes = (0, 0, 0 if variants > 1 else None)
    return Ways(jax.vmap(one, axes)(boxes, carried, variant), len(ways))


def relaxed_step(plan: Plan, index: int, view: View, choice: Choice) -> Step:
    """Passes a relaxed node by the planes of one choice."""
    graph, (boxes, errors) = plan.graph, view
    free = choice.lower is not None or choice.upper is not None
    planes = graph.nodes[index].operation.relaxation.planes(graph, index, boxes, choice)
    planes = plan.arithmetic.planes(graph, index, planes, boxes, errors.carried, free)
    return planes_step(graph, index, planes)


def _affine(plan: Plan, charged: Mapping[int, Array], run: Run | None = None) -> dict[int, AnyStep]:
    """How to pass affine nodes that are off by so much."""
    passed = plan.affine() if run is None else run.passed
    whole = run is None or run.whole
    steps = {i: plan.passing(i) if whole else plan.affine()[i] for i in passed}
    return {**steps, **{i: Charged(steps[i], charged[i]) for i in charged if i in steps}}


def _keeps_weights(plan: Plan, index: int) -> bool:
    """Whether the planes hold a weight's box, the same in every way, and as large as the weight."""
    return plan.graph.nodes[index].operation.family == "product" and plan.variants[index] == 1
