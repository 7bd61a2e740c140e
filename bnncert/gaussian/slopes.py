"""The free lines of a row's relaxations, optimised for what the row is to prove.

Every fraction in [0, 1] gives valid lines (`bnncert.bounds.ops.Choice`), so that any step of the
optimiser is a bound F with a mean E and a Lipschitz constant L of its own. What counts is E / L, or
E where that is negative. The steps depend on means and constants alone, and so are no more random
than these; the best is kept.

Source: Xu et al., "Fast and complete: enabling complete verification with rapid and massively
parallel incomplete verifiers", ICLR 2021 (of one network, by E).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnncert.bounds.graph.facts import ancestors
from bnncert.bounds.methods.steps import Passage, View, relaxed_step
from bnncert.bounds.ops import Choice
from bnncert.gaussian.network import Margin, Network
from bnncert.sets import Box

_LEARNING_RATE = 0.1
_DECAY = 0.98


def optimised(
    network: Network,
    index: int,
    boxes: Sequence[Box],
    passage: Passage,
    row: Array,
    score: Callable[[Margin], Array],
    steps: int,
) -> Margin:
    """Bounds `<row, value of a node>` from below, by the best lines that are found for it.

    Args:
        network: the network.
        index: of the node.
        boxes: of all nodes.
        passage: how rows pass them, in the ways that are tried first.
        row: of the shape of the node's value.
        score: what a bound is worth.
        steps: of the optimiser, Adam.

    Returns:
        The bound of the highest score.
    """
    plan, view = network.plan, View(boxes, passage.errors)
    found = network.best(index, boxes, passage, row, score)
    free = {
        i: (choice.lower, choice.upper)
        for i in sorted(network.free().intersection(ancestors(plan.graph, index), passage.relaxed))
        if (choice := plan.graph.nodes[i].operation.relaxation.start(plan.graph, i, boxes))
    }
    if not free:
        return found

    def bounded(free: Any) -> Margin:
        own = {
            i: relaxed_step(plan, i, view, Choice(lower=below, upper=above))
            for i, (below, above) in free.items()
        }
        ways = passage._replace(relaxed={**passage.relaxed, **own})
        return network.best(index, boxes, ways, row, score)

    def loss(free: Any) -> tuple[Array, Margin]:
        found = bounded(free)
        spread = jnp.maximum(found.lipschitz, least_spread(found.mean.dtype))
        # In units of the mean: squares of derivatives, which Adam keeps, must not overflow.
        relative = jnp.where(found.mean > 0, jax.lax.stop_gradient(spread) / spread, 1)
        return -found.mean * relative, found

    optimizer = optax.adam(optax.exponential_decay(_LEARNING_RATE, 1, _DECAY))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        free, state, best = carry
        (_, found), slopes = jax.value_and_grad(loss, has_aux=True)(free)
        updates, state = optimizer.update(jax.tree.map(jnp.nan_to_num, slopes), state)
        moved = optax.apply_updates(free, updates)
        free = jax.tree.map(optax.projections.projection_hypercube, moved)
        return (free, state, _better(best, found, score)), None

    carry = (free, optimizer.init(free), found)
    (free, _, best), _ = jax.lax.scan(step, carry, None, steps)
    # Once more outside the loop: what is differentiated is this bound, its fractions as they are.
    last = bounded(jax.lax.stop_gradient(free))
    return _better(jax.lax.stop_gradient(best), last, score)


def least_spread(dtype: Any) -> float:
    """What a Lipschitz constant counts for at least: of weights that are known it is 0."""
    return float(jnp.finfo(dtype).tiny) ** 0.5


def _better(first: Margin, second: Margin, score: Callable[[Margin], Array]) -> Margin:
    better = score(second) > score(first)  # never of NaN
    return jax.tree.map(lambda a, b: jnp.where(better, b, a), first, second)
