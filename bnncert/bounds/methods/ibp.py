"""IBP: interval bound propagation, affine runs as one where that is sharper.

    y = W x + b,   x in [c - r, c + r]        y in [W c + b - |W| r, W c + b + |W| r]
    y = h(x),      h increasing               y in [h(l), h(u)]

Operation by operation (`interval.py`); where affine operations follow one another, a node that
matters is bounded a second time by the affine map that it is of earlier nodes (`merging.py`), and
the first sum of an `LpBall` by the dual norm (`norms.py`).

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018.
"""

from dataclasses import dataclass
from typing import ClassVar

from bnncert.bounds.graph import Graph
from bnncert.bounds.interval import frontier
from bnncert.bounds.merging import merged_runs
from bnncert.bounds.methods.rows import row_bounds
from bnncert.bounds.methods.sweeper import (
    Options,
    Sweeper,
    affine,
    affine_errors,
    boxes_by_node,
    end_sets,
    sweeper,
)
from bnncert.bounds.norms import first_sum, first_sums
from bnncert.bounds.rounding import EXACT
from bnncert.sets import Box


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

    def boxes(self, graph: Graph, options: Options) -> list[Box]:
        """A box for each node of a traced function."""
        return interval_bounds(sweeper(graph, options))


def interval_bounds(sweep: Sweeper) -> list[Box]:
    """IBP: a box for each node, affine runs merged where that is sharper and within the budget."""
    graph, errors = sweep.graph, EXACT
    runs, normed = merged_runs(graph, sweep.options.margins), first_sums(graph)

    def merge(index: int, boxes: list[Box]) -> Box | None:
        nonlocal errors
        if index in normed:
            return first_sum(graph, index, boxes, sweep.options.arithmetic)
        if index not in runs:
            return None
        errors = affine_errors(sweep, boxes, errors)
        sets, steps = end_sets(sweep, frontier(graph, boxes)), affine(sweep, errors)
        steps = steps._replace(affine={i: steps.affine[i] for i in runs[index].passed})
        return row_bounds(graph, index, steps, sets, sweep.options.batch_size)

    return boxes_by_node(sweep, merge, normed.union(runs))
