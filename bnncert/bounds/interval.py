"""Interval bound propagation: a box for each node, from the sets forward.

Op by op, intervals forget that two coordinates came from one. Where a run of affine operations has
lost that (`_exactness`), it had better be bounded as the one affine map it is, where this pays
(`merged_nodes`; the map itself is pulled back in `backward.py`):

    the prefix  from the sets to the first nonlinearities; over an L1 or L2 ball this is the dual
                norm, sharper than the ball's hull by the square root of the dimension
    the tail    from the last nonlinearities to an output: margins f_j - f_y after the last layer

Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably
Robust Models", 2018 (the tail: section 3, "elision of the last layer").
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.operands import Ref
from bnncert.bounds.rules import AFFINE, affine_rule, interval
from bnncert.sets import Box, LpBall, Set

Refine = Callable[[int, list[Box]], Box | None]
Rule = Callable[..., Box]
"""`(node, *boxes of its bounded operands) -> Box`."""

_INDEPENDENT, _EXACT, _LOOSE = range(3)


def propagate(graph: Graph, refine: Refine, rule: Rule = interval) -> list[Box]:
    """A box for each node.

    Args:
        graph: the traced function.
        refine: `(index, boxes so far) -> Box` (or None): a second bound of a node that matters
            (`bounded_nodes`), to intersect with the first; the last box so far is the node's own.
        rule: the interval rule of each node.

    Returns:
        Boxes, one for each node. Cost: about two evaluations of the function, and `refine`.

    Raises:
        UnsupportedPrimitiveError: an operation without a rule.
    """
    matter = bounded_nodes(graph)
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


def affine_prefix(graph: Graph) -> set[int]:
    """Nodes that are affine in the sets alone."""
    num_sets = len(graph.inputs)
    return {i for i, (_, sources) in enumerate(_exactness(graph)) if max(sources) < num_sets}


def merged_nodes(graph: Graph) -> set[int]:
    """Nodes to bound as one affine map of their sources: the module's prefix and tail."""
    outputs = set(output_nodes(graph))
    places = (affine_prefix(graph) & bounded_nodes(graph)) | outputs
    exactness = _exactness(graph)
    return {i for i in places if exactness[i][0] == _LOOSE}


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


def _keeps_size(graph: Graph, node: Node) -> bool:
    """Whether a broadcast only adds axes of length 1."""
    return all(math.prod(graph.nodes[i].shape) == math.prod(node.shape) for i in node.refs)


def _exactness(graph: Graph) -> list[tuple[int, frozenset[int]]]:
    """For each node: is its op-by-op interval that of the merged affine map, and of which sources.

    Sources are the sets and the values of nonlinearities that an affine run starts from. A value is
    INDEPENDENT while each coordinate of a source reaches one of its coordinates at most, EXACT when
    its intervals are still those of the merged map, LOOSE when they may be wider.
    """
    found: list[tuple[int, frozenset[int]]] = []
    for index, node in enumerate(graph.nodes):
        itself = frozenset({index})
        if node.op == "input":
            state = _EXACT if isinstance(graph.inputs[index], LpBall) else _INDEPENDENT
            found.append((state, itself))
            continue
        if affine_rule(node) is None:
            found.append((_INDEPENDENT, itself))
            continue
        states, sources = zip(*(found[i] for i in node.refs), strict=True)
        union = frozenset().union(*sources)
        state = max(states)
        spreads = AFFINE[node.op].spreads
        if node.op == "broadcast_in_dim" and _keeps_size(graph, node):
            spreads = "places"
        if spreads == "mixes":
            state = _EXACT if state == _INDEPENDENT else _LOOSE
        elif spreads == "repeats":
            state = max(state, _EXACT)
        if len(union) < sum(map(len, sources)):  # a source meets itself
            state = _LOOSE if spreads == "adds" else max(state, _EXACT)
        found.append((state, union))
    return found
