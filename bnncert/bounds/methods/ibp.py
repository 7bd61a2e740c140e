"""IBP: interval bound propagation, affine runs as one where that is sharper.

    y = W x + b,   x in [c - r, c + r]        y in [W c + b - |W| r, W c + b + |W| r]
    y = h(x),      h increasing               y in [h(l), h(u)]

Operation by operation; where affine operations follow one another, a node that
matters is bounded a second time by the affine map that it is of earlier nodes (`merging.py`), and
the first sum of an `LpBall` by the dual norm (`norms.py`).

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from bnncert.bounds.merging import ends_of
from bnncert.bounds.methods.steps import Passage, steps_of
from bnncert.bounds.norms import first_sum
from bnncert.bounds.ops.boxes import drop_nan, hull, intersect
from bnncert.bounds.plan import Plan
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rounding import EXACT, Errors
from bnncert.bounds.rows import row_bounds
from bnncert.sets import Box

Look: TypeAlias = Callable[[int, list[Box], Any], tuple[Box | None, Any]]
"""`(index, boxes so far, memory) -> (another bound of the last of them, memory)`."""


@dataclass(frozen=True)
class IBP:
    """Intervals from the sets forward: the cheapest bounds, and what robust training optimises.

    The only method that is monotone in the set: a smaller set never gets a wider bound.

    Cost: 2 to 4 evaluations of the function, and up to 4 more where affine operations are merged.

    Source: Gowal et al. 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnncert import bound
        >>> box = bound(lambda x: x - x, IBP())(Box(jnp.zeros(1), jnp.ones(1)))
        >>> box.lower.tolist(), box.upper.tolist()                      # one affine map
        ([0.0], [0.0])
    """

    name: ClassVar[str] = "ibp"

    def boxes(self, plan: Plan) -> list[Box]:
        """A box for each node of a function."""
        return interval_bounds(plan)


def interval_bounds(plan: Plan) -> list[Box]:
    """IBP: a box for each node, affine runs merged where that is sharper and within the budget."""
    graph, arithmetic, runs = plan.graph, plan.arithmetic, plan.merged.runs
    sums = plan.merged.sums

    def merged(index: int, boxes: list[Box], errors: Errors) -> tuple[Box | None, Errors]:
        if index in sums:
            return first_sum(graph, index, boxes, arithmetic), errors
        if index not in runs:
            return None, errors
        errors = arithmetic.errors(graph, boxes, errors)
        steps = steps_of(plan, Passage(errors), runs[index])
        ends = dict(enumerate(plan.regions))
        for i in ends_of(graph, runs[index]) - set(ends):
            ends[i] = arithmetic.region(graph, boxes[i])
        return row_bounds(graph, index, steps, ends, plan.batch_size), errors

    return intervals(plan, merged, EXACT, also=sums.union(runs))[0]


def intervals(
    plan: Plan,
    look: Look,
    memory: Any,
    known: Mapping[int, Box] = {},
    also: Collection[int] = (),
) -> tuple[list[Box], Any]:
    """Intervals operation by operation, those that matter intersected with another bound.

    Args:
        plan: of the function.
        look: the other bound, of a node that matters: an output, or acted on by a nonlinearity.
        memory: what `look` is given at first.
        known: nodes whose boxes are settled.
        also: more nodes that matter.

    Returns:
        A box for each node, and what `look` returned last. Cost: some two evaluations of the
        function, and `look`.

    Raises:
        UnsupportedPrimitiveError: an operation without a rule.
    """
    graph, matter = plan.graph, {*plan.acted_on, *plan.outputs, *also}

    def apply(index: int, boxes: list[Box]) -> Box:
        if index in known:
            return known[index]
        node = graph.nodes[index]
        return plan.arithmetic.interval(graph, node, [boxes[i] for i in node.refs])

    def settle(index: int, boxes: list[Box], memory: Any) -> tuple[Box, Any]:
        if index not in matter or index in known:
            return boxes[index], memory
        box = drop_nan(boxes[index])  # on from here, comparisons would hide it
        second, memory = look(index, [*boxes[:index], box], memory)
        return (box if second is None else intersect(box, second)), memory

    return propagate(graph, Domain(lambda i: hull(graph.inputs[i]), apply, settle, memory))
