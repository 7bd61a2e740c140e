"""How a row passes a network with Gaussian weights; `bnncert.certify.formal.linear` says why.

Of the weights a row meets the means, and leaves behind what they deviate by: a mean, and what they
add to the square of a Lipschitz constant. A row is passed by `bnncert.bounds.rows.pull_back`; what
it leaves behind waits beside the nodes, under numbers that no node has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert._compiler.convolution import canonical
from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.methods.steps import View, relaxed_step
from bnncert.bounds.ops import Choice
from bnncert.bounds.ops.affine import MIXING, MOVING
from bnncert.bounds.ops.boxes import hull
from bnncert.bounds.plan import Plan
from bnncert.bounds.rounding import EXACT
from bnncert.bounds.rows import (
    AnyStep,
    Apart,
    Passed,
    Row,
    Step,
    Steps,
    Ways,
    dot,
    map_rows,
    pull_back,
)
from bnncert.certify.formal.rectified import folded_mean
from bnncert.sets import Box, LpBall, Set, dual_norm

_WAYS = (("adaptive", 0), ("zero", 1))
"""Of the lines below a kink, and of those of a curve, the choices that rows try."""

_SPREAD = -(2**30)
"""Where a row collects L^2: a place beside the nodes, of a number that no node has."""


_MOVES = MOVING - {"neg"}
"""What weights pass as they are, so that squares of their deviations do as well."""


class Margin(NamedTuple):
    """What is known of a lower bound F on a row, as a function of Gaussian weights.

    Attributes:
        mean: E F.
        lipschitz: L, of F as a function of standard normal numbers.
    """

    mean: Array
    lipschitz: Array


class Weights(NamedTuple):
    """The Gaussian weights of a graph.

    Attributes:
        scales: of each leaf, its standard deviations.
        leaf: for each node that is a leaf, or one rearranged, which.
        repeats: of these, the nodes in which one weight may stand several times.
        layers: the nodes that multiply a value by weights, and which operand these are.
        random: the nodes that depend on weights.
    """

    scales: Sequence[Array]
    leaf: Mapping[int, int]
    repeats: frozenset[int]
    layers: Mapping[int, int]
    random: frozenset[int]


def weights_of(graph: Graph, scales: Sequence[Array]) -> Weights:
    """Finds the weights of a graph, and where they are used.

    Args:
        graph: of the network over `Box`es of one point, the means of its random leaves, and then
            the set of inputs.
        scales: the leaves' standard deviations, in their order.

    Raises:
        UnsupportedPrimitiveError: a weight that is used twice.
    """
    leaf: dict[int, int] = {i: i for i in range(len(scales))}
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
    return Weights(scales, leaf, frozenset(repeats), layers, frozenset(random))


def _moves_once(graph: Graph, node: Node, moved: int) -> bool:
    """Whether a node moves each number to one place at most; a broadcast may add axes of size 1."""
    same = math.prod(node.shape) == math.prod(graph.nodes[moved].shape)
    return node.affine.spreads == "places" or (node.op == "broadcast_in_dim" and same)


def _used_twice(node: Node, before: Node) -> UnsupportedPrimitiveError:
    places = " and ".join(f"'{n.op}' at {n.source or 'a line in JAX'}" for n in (before, node))
    return UnsupportedPrimitiveError(
        f"one weight is used by {places}: bounds linear in the weights add up what independent "
        "layers deviate by. Fix the shared weight (a scale of None), or bound boxes of weights."
    )


def network_of(plan: Plan, weights: Weights) -> "Network":
    """What has to be bounded of a network, and by what."""
    nodes = plan.graph.nodes
    known, hidden = set(range(len(nodes))) - weights.random, set()
    for i, node in enumerate(nodes):
        if i not in weights.random or not node.refs:
            continue
        acts_on = set(node.refs) if i in plan.relaxed else set()
        if i in weights.layers:
            acts_on.discard(node.refs[weights.layers[i]])
        hidden |= acts_on - known
        known |= acts_on
        if i not in weights.layers and known.issuperset(node.refs):
            known.add(i)
    return Network(plan, weights, frozenset(hidden), frozenset(known))


class Network(NamedTuple):
    """A traced network with Gaussian weights.

    Attributes:
        plan: of the network.
        weights: those among its nodes.
        hidden: the nodes whose intervals rows find: what nonlinearities and layers act on.
        known: the nodes that have intervals.
    """

    plan: Plan
    weights: Weights
    hidden: frozenset[int]
    known: frozenset[int]

    def start(self, index: int) -> Box:
        """The interval of a set; nothing is known of weights."""
        if index in self.weights.random:
            return self._unknown(index)
        return hull(self.plan.graph.inputs[index])

    def apply(self, index: int, boxes: list[Box]) -> Box:
        """The interval of a node, where those of all that it acts on are known."""
        node = self.plan.graph.nodes[index]
        if index in self.weights.layers or not self.known.issuperset(node.refs):
            return self._unknown(index)
        return self.plan.arithmetic.interval(self.plan.graph, node, [boxes[j] for j in node.refs])

    def _unknown(self, index: int) -> Box:
        node = self.plan.graph.nodes[index]
        ends = (jnp.full(node.shape, end, node.dtype) for end in (-jnp.inf, jnp.inf))
        return Box(*ends)

    def further(self, boxes: Sequence[Box], known: Mapping[int, AnyStep]) -> dict[int, AnyStep]:
        """How rows pass the random nodes that have boxes."""
        plan, steps = self.plan, dict(known)
        for i in range(len(plan.graph.inputs), len(boxes)):
            if i in steps or i not in self.weights.random:
                continue
            if i in self.weights.layers:
                steps[i] = self._layer(i, boxes)
            elif i not in plan.relaxed:
                steps[i] = plan.affine()[i]
            else:
                steps[i] = self._relaxed(i, boxes)
        return steps

    def _relaxed(self, index: int, boxes: Sequence[Box]) -> AnyStep:
        """How rows pass a nonlinearity, in several ways at once."""
        plan, last = self.plan, self.plan.variants[index] - 1
        node = plan.graph.nodes[index]
        value = plan.arithmetic.interval(plan.graph, node, [boxes[j] for j in node.refs])
        steps = [
            relaxed_step(
                plan,
                index,
                View([*boxes[:index], value], EXACT),
                Choice(variant=min(variant, last), lower_slope=slope),
            )
            for slope, variant in _WAYS
        ]
        if node.operation.lines is None:
            return Apart(tuple(steps))
        return Ways(jax.tree.map(lambda *v: jnp.stack(v), *steps), len(steps))

    def interval(
        self, index: int, boxes: Sequence[Box], steps: Mapping[int, AnyStep], reach: float
    ) -> Box:
        """The interval of a hidden node that holds but for a probability."""
        node = self.plan.graph.nodes[index]

        def least(found: Margin) -> Array:
            return found.mean - reach * found.lipschitz

        def both(row: Array) -> Array:
            rows = jnp.stack([row, -row])
            return jax.vmap(lambda row: least(self.best(index, boxes, steps, row, least)))(rows)

        low, high = map_rows(both, node, self.plan.batch_size).T
        return Box(low.reshape(node.shape), -high.reshape(node.shape))

    def best(
        self,
        index: int,
        boxes: Sequence[Box],
        steps: Mapping[int, AnyStep],
        row: Array,
        score: Callable[[Margin], Array],
    ) -> Margin:
        """A lower bound on `<row, value of a node>`: of all ways that with the highest score."""
        found = self._bounded(index, boxes, steps, row)
        if found.mean.ndim == 0:
            return found
        value = score(found)
        way = jnp.argmax(jnp.where(jnp.isnan(value), -jnp.inf, value))
        return jax.tree.map(lambda v: v[way], found)

    def _bounded(
        self, index: int, boxes: Sequence[Box], steps: Mapping[int, AnyStep], row: Array
    ) -> Margin:
        """Of each way: the mean and the Lipschitz constant."""
        zero = jnp.zeros((), row.dtype)
        found = pull_back(Row({index: row}, zero, zero), Steps(steps))
        coefficients = found.coefficients
        mean, square = found.offset - found.lost, coefficients.get(_SPREAD, zero)
        for i, a in coefficients.items():
            if i < 0:
                continue
            rank = len(self.plan.graph.nodes[i].shape)
            if i in self.weights.leaf:
                loc, scale = self.plan.graph.inputs[i].center, self.weights.scales[i]
                mean = mean + _each(lambda a, loc=loc: dot(a, loc), rank, a)
                square = square + _each(lambda a, s=scale: jnp.sum((a * s) ** 2), rank, a)
            else:
                least = partial(_least, self._region(i, boxes))
                variance = coefficients.get(_beside(i))
                given = (a,) if variance is None else (a, variance)
                mean = mean + _each(least, rank, *given)
        return Margin(*jnp.broadcast_arrays(mean, _root(square + self._lost())))

    def _lost(self) -> float:
        """More than squares that underflow take off L^2."""
        leaves = self.plan.graph.inputs[: len(self.weights.scales)]
        total = sum(jnp.size(leaf.center) for leaf in leaves)
        return 2.0**20 * (1 + total) * float(jnp.finfo(leaves[0].center.dtype).tiny)

    def _region(self, index: int, boxes: Sequence[Box]) -> Set:
        inputs = self.plan.graph.inputs
        return inputs[index] if index < len(inputs) else boxes[index]

    def _layer(self, index: int, boxes: Sequence[Box]) -> Step:
        """How rows pass a layer: by its means, leaving behind what its weights deviate by."""
        graph, node = self.plan.graph, self.plan.graph.nodes[index]
        place = self.weights.layers[index]
        moved, h = node.refs[place], node.refs[1 - place]
        leaf = self.weights.leaf[moved]
        loc, scale = graph.inputs[leaf].center, jnp.asarray(self.weights.scales[leaf])
        scale = jnp.broadcast_to(scale, loc.shape).astype(loc.dtype)
        center, radius = boxes[h].center, boxes[h].radius

        def layer(value: Array, weight: Array) -> Array:
            weight = _rearranged(graph, moved, leaf, weight)
            return node.evaluate(*((value, weight) if place else (weight, value)))

        def transposed(weight: Array, row: Array) -> Array:
            _, pull = jax.vjp(lambda v: layer(v, weight), jnp.zeros_like(center))
            return canonical(pull)(row)[0]

        def of_weights(value: Array, row: Array) -> Array:
            _, pull = jax.vjp(lambda w: layer(value, w), jnp.zeros_like(loc))
            return canonical(pull)(row)[0]

        largest = jnp.abs(center) + radius
        met = math.prod(node.shape) * _terms(node, graph, 1 - place)
        once = met == math.prod(graph.nodes[moved].shape) and moved not in self.weights.repeats
        spreads = layer(largest**2, scale**2) if once else None

        def through(a: Array) -> Passed:
            variance = transposed(scale**2, a**2)
            if spreads is not None:
                square = dot(a**2, spreads)
            else:
                slopes = jnp.abs(of_weights(center, a)) + of_weights(radius, jnp.abs(a))
                square = jnp.sum((scale * slopes) ** 2)
            mean = transposed(loc, a)
            if h in self.weights.random:
                lost = math.sqrt(2 / math.pi) * dot(_root(variance), radius)
                return Passed((mean, square), 0.0, lost)
            return Passed((mean, variance, square), 0.0)

        beside = () if h in self.weights.random else (_beside(h),)
        return Step(through, len(node.shape), (h, *beside, _SPREAD))


def _beside(index: int) -> int:
    """Where a row collects the variances of its coefficients at a node; and back."""
    return -1 - index


def _rearranged(graph: Graph, index: int, leaf: int, weight: Array) -> Array:
    """A leaf's numbers as a node that rearranges it has them."""
    if index == leaf:
        return weight
    node = graph.nodes[index]
    (operand,) = node.refs
    return node.evaluate(*node.fill([_rearranged(graph, operand, leaf, weight)]))


def _terms(node: Node, graph: Graph, side: int) -> int:
    """How many weights a coordinate of a product sums over; 0 of a convolution: it shares them."""
    if node.op == "mul":
        return 1
    if node.op == "dot_general":
        contracted = node.params["dimension_numbers"][0][side]
        return math.prod(graph.nodes[node.refs[side]].shape[axis] for axis in contracted)
    return 0


def _each(f: Callable[..., Array], rank: int, *values: Array) -> Array:
    """Of values of this rank, or of each way's."""
    axes = tuple(0 if v.ndim > rank else None for v in values)
    return jax.vmap(f, axes)(*values) if any(axis == 0 for axis in axes) else f(*values)


def _least(region: Set, a: Array, variance: Array | None = None) -> Array:
    """The mean of the least value of `(a + g) . x` over a set, g Gaussian of these variances."""
    if isinstance(region, LpBall):
        middle = dot(a, region.center)
        if variance is None:
            return middle - region.eps * dual_norm(a, region.p)
        if region.p == 2:
            return middle - region.eps * _root(jnp.sum(a**2) + jnp.sum(variance))
        # The largest of n: at most the largest mean, and that of n centred ones.
        most = jnp.sqrt(2 * jnp.log(2.0 * a.size)) * _root(jnp.max(variance))
        return middle - region.eps * (dual_norm(a, region.p) + most)
    size = jnp.abs(a) if variance is None else folded_mean(a, variance)
    return dot(a, region.center) - dot(size, region.radius)


def _root(v: Array) -> Array:
    """The square root, with a derivative of 0 at 0; of what overflowed, infinite."""
    positive = v > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), 0.0)
    return jnp.where(jnp.isnan(v), jnp.inf, root)
