"""Interval bound propagation: a box for each node, from the sets forward.

Operation by operation; where that loses too much, a node that matters is bounded a second time, by
the affine map that it is of earlier nodes (`merging.py`).

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018.
"""

import math
from collections.abc import Callable, Collection

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.rules import AFFINE, affine_rule, interval
from bnncert.sets import Box, LpBall, Set

Refine = Callable[[int, list[Box]], Box | None]
Rule = Callable[..., Box]
"""`(node, *boxes of its bounded operands) -> Box`."""


def propagate(
    graph: Graph, refine: Refine, rule: Rule = interval, also: Collection[int] = ()
) -> list[Box]:
    """A box for each node.

    Args:
        graph: the traced function.
        refine: `(index, boxes so far) -> Box` (or None): a second bound of a node that matters
            (`bounded_nodes`), to intersect with the first; the last box so far is the node's own.
        rule: the interval rule of each node.
        also: more nodes to refine.

    Returns:
        Boxes, one for each node. Cost: about two evaluations of the function, and `refine`.

    Raises:
        UnsupportedPrimitiveError: an operation without a rule.
    """
    matter = bounded_nodes(graph).union(also)
    boxes: list[Box] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            boxes.append(hull(graph.inputs[index]))
        else:
            boxes.append(rule(node, *(boxes[i] for i in node.refs)))
        if index not in matter:
            continue
        boxes[index] = drop_nan(boxes[index])  # on from here, comparisons would hide it
        second = refine(index, boxes)
        if second is not None:
            boxes[index] = intersect(boxes[index], second)
    return boxes


def bounded_nodes(graph: Graph) -> set[int]:
    """Nodes whose bounds matter: the outputs, and what a nonlinearity is relaxed on."""
    return relaxed_operands(graph) | set(output_nodes(graph))


def relaxed_operands(graph: Graph) -> set[int]:
    """Nodes that a nonlinearity acts on."""
    return {i for node in graph.nodes if node.refs and not affine_rule(node) for i in node.refs}


def output_nodes(graph: Graph) -> list[int]:
    """Nodes that are outputs."""
    return sorted({o.index for o in graph.outputs if isinstance(o, Ref)})


def spreads(graph: Graph, node: Node) -> str:
    """`AffineRule.spreads` of an affine node; a broadcast to as many values places."""
    kept = all(math.prod(graph.nodes[i].shape) == math.prod(node.shape) for i in node.refs)
    return "places" if node.op == "broadcast_in_dim" and kept else AFFINE[node.op].spreads


def input_sets(graph: Graph) -> list[frozenset[int]]:
    """For each node, the sets that its value depends on."""
    found: list[frozenset[int]] = []
    for index, node in enumerate(graph.nodes):
        own = (index,) if node.op == "input" else ()
        found.append(frozenset(own).union(*(found[i] for i in node.refs)))
    return found


def frontier(graph: Graph, boxes: list[Box]) -> list[Set]:
    """What a linear bound that ends on a node is concretised over: a set itself, or the box."""
    return [*graph.inputs, *boxes[len(graph.inputs) :]]


def hull(region: Set) -> Box:
    """The smallest box around a set."""
    if not isinstance(region, LpBall):
        return region
    center, eps = jnp.asarray(region.center), jnp.asarray(region.eps)
    kind = jnp.finfo(center.dtype)
    # What rounding takes off the ends; nothing of a point.
    reach = eps + jnp.where(eps > 0, 2 * kind.eps * (jnp.abs(center) + eps) + kind.tiny, 0)
    return Box(center - reach, center + reach)


def intersect(a: Box, b: Box) -> Box:
    """The intersection of two bounds of one value.

    Both hold it, so they meet; where rounding has parted them, the gap between is kept.
    """
    lower, upper = jnp.maximum(a.lower, b.lower), jnp.minimum(a.upper, b.upper)
    return Box(jnp.minimum(lower, upper), jnp.maximum(lower, upper))


def nominal(graph: Graph) -> list[Array]:
    """The value of each node at the centres of the sets."""
    values: list[Array] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            values.append(graph.inputs[index].center)
        else:
            values.append(node.evaluate(*node.fill([values[i] for i in node.refs])))
    return values


def drop_nan(box: Box) -> Box:
    """No bound where overflow left none: NaN, or an end beyond all numbers, becomes an open end."""
    lower = jnp.where(box.lower < jnp.inf, box.lower, -jnp.inf)
    return Box(lower, jnp.where(box.upper > -jnp.inf, box.upper, jnp.inf))
