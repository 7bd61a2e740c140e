"""How many terms the sums have that a row is made of, and what these may lose."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.rounding.model import gamma, own_unit
from bnncert.sets import Box, LpBall, Set, dual_norm


def outward_set(graph: Graph, region: Set) -> Set:
    """A set of which the last product of a row cannot cut off anything."""
    size = math.prod(jnp.shape(region.center))
    dtype = jnp.result_type(region.center)
    relative = gamma(2 * (size + depth(graph)), 0.5 * float(jnp.finfo(dtype).eps))
    underflow = 8 * float(jnp.finfo(dtype).tiny)
    if isinstance(region, LpBall):
        # The Euclidean norm is its own dual; squares of small numbers must not be lost.
        center = region.center
        norm = dual_norm(center, 2) if region.p == 2 else jnp.sum(jnp.abs(center))
        reach = region.eps + relative * (region.eps + norm) + underflow
        return LpBall(region.center, reach, region.p)
    reach = relative * magnitude(region) + underflow
    return Box(region.lower - reach, region.upper + reach)


def rounded_up(graph: Graph, node: Node, error: ArrayLike) -> Array:
    """Larger by what its own computation, and the sum it enters, may have lost."""
    terms = max(math.prod(node.shape), *(math.prod(graph.nodes[i].shape) for i in node.refs), 1)
    return jnp.asarray(error) * (1 + 4 * gamma(terms + depth(graph), own_unit(node)))


def offset_gamma(graph: Graph, node: Node) -> float:
    """Of one sum over a node's value, among those of all nodes."""
    return gamma(math.prod(node.shape) + depth(graph), own_unit(node))


def depth(graph: Graph) -> int:
    """Sums of sums: the most that one term passes through on top of its own."""
    return 2 * len(graph.nodes) + 16


def ways(graph: Graph, index: int) -> int:
    """Into how many nodes a value flows."""
    return len(graph.users[index])
