"""The Gaussian weights of a traced network: where they are, and the layers that multiply by them.

A weight is w = m + s z + sum_r u_r c_r, with z of its own, and c_1, ..., c_R the factors that all
weights share (none of a factorised Gaussian): independent standard normal numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert import prior as priors
from bnncert._compiler.convolution import canonical
from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.ops.affine import MIXING, MOVING
from bnncert.posterior import Gaussian, LowRank, MeanField
from bnncert.posterior.leaves import unflatten
from bnncert.types import Posterior

_MOVES = MOVING - {"neg"}
"""What weights pass as they are, so that squares of their deviations do as well."""


class Leaf(NamedTuple):
    """Gaussian weights of one name.

    Attributes:
        loc: m, any shape.
        scale: s, the same shape.
        factors: u, of shape (R, *that of loc); None of a factorised Gaussian.
    """

    loc: Array
    scale: Array
    factors: Array | None = None

    @property
    def variance(self) -> Array:
        """Computes s^2 + sum_r u_r^2."""
        own = jnp.square(self.scale)
        return own if self.factors is None else own + jnp.square(self.factors).sum(0)

    @property
    def deviation(self) -> Array:
        """Computes the root of that, of numbers whose squares would underflow as well."""
        if self.factors is None:
            return self.scale
        largest = jnp.maximum(self.scale, jnp.abs(self.factors).max(0, initial=0.0))
        unit = jnp.where(largest > 0, largest, 1.0)
        total = jnp.square(self.scale / unit) + jnp.square(self.factors / unit).sum(0)
        return largest * jnp.sqrt(total)


def leaves_of(posterior: Posterior) -> dict[str, Leaf]:
    """Lists the random leaves of a Gaussian posterior, by name.

    Args:
        posterior: factorised, of shared factors, or with full covariance.

    Raises:
        TypeError: another one.
    """
    if not isinstance(posterior, (MeanField, LowRank, Gaussian)):
        raise TypeError(
            f"posterior is a {type(posterior).__name__}: bounds linear in the weights are of a "
            "Gaussian, bnncert.posterior.MeanField, LowRank or Gaussian. Any other can be drawn "
            "from: bnncert.certify.sampled_safety."
        )
    locs = {n: jnp.asarray(v) for n, v in priors.named(posterior.loc).items()}
    if isinstance(posterior, Gaussian):
        names = posterior.random
        columns = jax.vmap(lambda u: unflatten(u, posterior.loc, names))(posterior.scale_tril.T)
        return {n: Leaf(locs[n], jnp.zeros_like(locs[n]), columns[n]) for n in names}
    scales = {n: s for n, s in priors.named(posterior.scale).items() if s is not None}
    factors: dict[str, Any] = dict.fromkeys(scales)
    if isinstance(posterior, LowRank):
        given = priors.named(posterior.deviations)
        factors = {
            n: jnp.zeros((posterior.rank, *locs[n].shape), locs[n].dtype)
            if given[n] is None
            else jnp.asarray(given[n])
            for n in scales
        }
    return {
        n: Leaf(locs[n], jnp.broadcast_to(s, locs[n].shape).astype(locs[n].dtype), factors[n])
        for n, s in scales.items()
    }


class Weights(NamedTuple):
    """The Gaussian weights of a graph.

    Attributes:
        leaves: of each leaf, its numbers.
        leaf: for each node that is a leaf, or one rearranged, which.
        repeats: of these, the nodes in which one weight may stand several times.
        layers: the nodes that multiply a value by weights, and which operand these are.
        random: the nodes that depend on weights.
    """

    leaves: Sequence[Leaf]
    leaf: Mapping[int, int]
    repeats: frozenset[int]
    layers: Mapping[int, int]
    random: frozenset[int]

    @property
    def correlated(self) -> bool:
        """Says whether weights of different layers depend on each other."""
        return any(leaf.factors is not None for leaf in self.leaves)


def weights_of(graph: Graph, leaves: Sequence[Leaf]) -> Weights:
    """Finds the weights of a graph, and where they are used.

    Args:
        graph: of the network over a `Box` for each of its random leaves, and then the set of
            inputs.
        leaves: in their order.

    Raises:
        UnsupportedPrimitiveError: a weight that is used twice.
    """
    leaf: dict[int, int] = {i: i for i in range(len(leaves))}
    repeats: set[int] = set()
    layers: dict[int, int] = {}
    random: set[int] = set(leaf)
    used: dict[int, Node] = {}
    for i, node in enumerate(graph.nodes):
        if random.isdisjoint(node.refs):
            continue
        random.add(i)
        places = [place for place, j in enumerate(node.refs) if j in leaf]
        if places and len(node.refs) == 1 and node.op in _MOVES and not node.has_constant:
            (moved,) = node.refs
            leaf[i] = leaf[moved]
            if moved in repeats or not _moves_once(graph, node, moved):
                repeats.add(i)
            continue
        for own in (leaf[node.refs[place]] for place in places):
            if own in used:
                raise _used_twice(node, used[own])
            used[own] = node
        # Weights that are repeated before may meet one value of a sum several times.
        if len(node.refs) == 2 and len(places) == 1:
            sums = node.op in MIXING and node.refs[places[0]] not in repeats
            if sums or node.op == "mul":
                layers[i] = places[0]
    return Weights(leaves, leaf, frozenset(repeats), layers, frozenset(random))


class Layer(NamedTuple):
    """A product of a value and Gaussian weights.

    Attributes:
        node: of the graph.
        first: whether the weights are its first operand.
        value: the node that is the other.
        leaf: the weights.
        arranged: `weights -> ` these as the product has them.
        once: whether each weight is in one coordinate of the product.
    """

    node: Node
    first: bool
    value: int
    leaf: Leaf
    arranged: Callable[[Array], Array]
    once: bool

    def __call__(self, value: Array, weight: Array) -> Array:
        """Multiplies a value and weights."""
        weight = self.arranged(weight)
        return self.node.evaluate(*((weight, value) if self.first else (value, weight)))

    def to_value(self, weight: Array, row: Array, like: Array) -> Array:
        """Passes a row back to the value, which is of the shape of `like`."""
        _, pull = jax.vjp(lambda v: self(v, weight), jnp.zeros_like(like))
        return canonical(pull)(row)[0]

    def to_weights(self, value: Array, row: Array) -> Array:
        """Passes a row back to the weights."""
        _, pull = jax.vjp(lambda w: self(value, w), jnp.zeros_like(self.leaf.loc))
        return canonical(pull)(row)[0]


def layer_of(graph: Graph, weights: Weights, index: int) -> Layer:
    """Gives the layer that a node is."""
    node, place = graph.nodes[index], weights.layers[index]
    moved, value = node.refs[place], node.refs[1 - place]
    leaf = weights.leaf[moved]
    met = math.prod(node.shape) * _terms(node, graph, 1 - place)
    once = met == math.prod(graph.nodes[moved].shape) and moved not in weights.repeats

    def arranged(weight: Array) -> Array:
        return _rearranged(graph, moved, leaf, weight)

    return Layer(node, place == 0, value, weights.leaves[leaf], arranged, once)


def _moves_once(graph: Graph, node: Node, moved: int) -> bool:
    """Says whether a node moves each number to one place at most; axes of size 1 may be new."""
    same = math.prod(node.shape) == math.prod(graph.nodes[moved].shape)
    return node.affine.spreads == "places" or (node.op == "broadcast_in_dim" and same)


def _used_twice(node: Node, before: Node) -> UnsupportedPrimitiveError:
    places = " and ".join(f"'{n.op}' at {n.source or 'a line in JAX'}" for n in (before, node))
    return UnsupportedPrimitiveError(
        f"one weight is used by {places}: bounds linear in the weights add up what independent "
        "layers deviate by. Fix the shared weight (a scale of None), or bound boxes of weights."
    )


def _rearranged(graph: Graph, index: int, leaf: int, weight: Array) -> Array:
    """Gives a leaf's numbers as a node that rearranges it has them."""
    if index == leaf:
        return weight
    node = graph.nodes[index]
    (operand,) = node.refs
    return node.evaluate(*node.fill([_rearranged(graph, operand, leaf, weight)]))


def _terms(node: Node, graph: Graph, side: int) -> int:
    """Counts the weights that a coordinate of a product sums over; 0 of a convolution."""
    if node.op == "mul":
        return 1
    if node.op == "dot_general":
        contracted = node.params["dimension_numbers"][0][side]
        return math.prod(graph.nodes[node.refs[side]].shape[axis] for axis in contracted)
    return 0
