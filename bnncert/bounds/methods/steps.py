"""How rows pass the nodes of a function, over the boxes that are known of it.

A nonlinearity is relaxed once, when all that it acts on is bounded; what affine nodes are off by is
found once as well. A `Passage` is what is known of both, and grows from node to node.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.ops import Choice, Lines, Planes
from bnncert.bounds.ops.planes import from_lines
from bnncert.bounds.plan import Plan
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.bounds.rows import Step, Steps, TwoSteps, charged_step, planes_step, two_steps
from bnncert.sets import Box


class Passage(NamedTuple):
    """How rows pass the first nodes of a function.

    Attributes:
        errors: what affine ones are off by.
        relaxed: how the others are passed.
    """

    errors: Errors = EXACT
    relaxed: Mapping[int, Step | TwoSteps] = {}


def further(plan: Plan, boxes: Sequence[Box], known: Passage, choice: Choice) -> Passage:
    """The passage of all nodes that have boxes.

    Args:
        plan: of the function.
        boxes: of its first nodes.
        known: of fewer nodes, over the same boxes.
        choice: of the default planes: all variants are taken.
    """
    errors = plan.arithmetic.errors(plan.graph, boxes, known.errors)
    relaxed = dict(known.relaxed)
    for i in sorted(plan.relaxed):
        if i < len(boxes) and i not in relaxed:
            relaxed[i] = default_step(plan, i, boxes, errors, choice)
    return Passage(errors, relaxed)


def steps_of(plan: Plan, known: Passage) -> Steps:
    """How to pass the nodes of a passage."""
    steps, errors = plan.affine(), known.errors
    charged = {i: charged_step(steps[i], error) for i, error in errors.charged.items()}
    return Steps({**steps, **charged}, known.relaxed, errors.carried, errors.floors)


def steps_over(plan: Plan, boxes: Sequence[Box], choice: Choice) -> Steps:
    """How to pass every node, over the boxes of all."""
    return steps_of(plan, further(plan, boxes, Passage(), choice))


def default_step(
    plan: Plan, index: int, boxes: Sequence[Box], errors: Errors, choice: Choice
) -> Step | TwoSteps:
    """Passes a relaxed node by its default planes, all that it has."""
    node = plan.graph.nodes[index]
    count = node.operation.relaxation.variants(plan.graph, node)
    if count > 1 and node.operation.lines is not None:
        return _both_lines(plan, index, boxes, errors, choice)
    ways = [choice._replace(variant=variant) for variant in range(count)]
    steps = [relaxed_step(plan, index, boxes, errors, way) for way in ways]
    return steps[0] if count == 1 else two_steps(*steps)


def _both_lines(
    plan: Plan, index: int, boxes: Sequence[Box], errors: Errors, choice: Choice
) -> TwoSteps:
    """Mapped over both variants: what these share is computed once."""

    def one(variant: Array) -> Lines | None:
        return _planes(plan, index, boxes, errors, choice._replace(variant=variant)).lines

    graph, lines = plan.graph, jax.vmap(one)(jnp.arange(2))
    (operand,) = graph.nodes[index].refs
    first, second = (
        planes_step(graph, index, from_lines(operand, jax.tree.map(lambda f, i=i: f[i], lines)))
        for i in (0, 1)
    )
    return TwoSteps((first, second), lines)


def relaxed_step(
    plan: Plan, index: int, boxes: Sequence[Box], errors: Errors, choice: Choice
) -> Step:
    """Passes a relaxed node by the planes of one choice."""
    return planes_step(plan.graph, index, _planes(plan, index, boxes, errors, choice))


def _planes(plan: Plan, index: int, boxes: Sequence[Box], errors: Errors, choice: Choice) -> Planes:
    graph = plan.graph
    free = choice.lower is not None or choice.upper is not None
    planes = graph.nodes[index].operation.relaxation.planes(graph, index, boxes, choice)
    return plan.arithmetic.planes(graph, index, planes, boxes, errors.carried, free)
