"""What Gaussian weights of a layer deviate by: `bnncert.gaussian.margins` derives it.

A row passes a layer by the means of its weights and leaves behind what they deviate by: a mean, and
what they add to L^2. `pull_back` carries it beside the nodes, under numbers that no node has.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.ops.affine import magnitude
from bnncert.bounds.plan import Plan
from bnncert.bounds.rounding import Precision, network_error, product_error, widened
from bnncert.bounds.rounding.model import gamma
from bnncert.bounds.rounding.terms import depth
from bnncert.bounds.rows import AnyStep, Charged, Passed, Step, dot
from bnncert.gaussian.folded import folded_mean
from bnncert.gaussian.weights import Layer, Leaf
from bnncert.sets import Box

SPREAD = -(2**30)
"""Where a row collects L^2, but for factors."""

SHARED = SPREAD - 1
"""Where it collects the derivatives by factors: those that have a sign, and the sizes of others."""


def beside(index: int) -> int:
    """Gives the place where a row collects the variances of its coefficients at a node."""
    return -1 - index


class Spread(NamedTuple):
    """What is known of a value under Gaussian weights: bounds on it of known means.

    Attributes:
        lower: the mean of a bound from below.
        upper: of one from above.
        square: L^2 of either, each coordinate by itself.
        leaves: the weights that they depend on.
    """

    lower: Array
    upper: Array
    square: Array
    leaves: frozenset[int]


def settled(box: Box) -> Spread:
    """Says what is known of a value that lies in a box."""
    return Spread(box.lower, box.upper, jnp.zeros_like(box.lower), frozenset())


class Slack(NamedTuple):
    """What computing with deviations gives way by, in the arithmetic of a plan.

    Attributes:
        plan: of the network.
    """

    plan: Plan

    def up(self, value: Array, terms: int) -> Array:
        """Rounds sums of so many numbers, none of them negative, up."""
        return self.plan.arithmetic.allow(value, lambda v, _: v * (1 + self._gamma(v, terms)))

    def size(self, value: Array, sizes: Array, terms: int) -> Array:
        """Rounds the magnitude of sums up, by those of their terms, which may underflow."""
        lost = 8 * (terms + 2) * float(jnp.finfo(value.dtype).tiny)
        return self.plan.arithmetic.allow(
            jnp.abs(value), lambda v, _: v + self._gamma(v, terms) * sizes + lost
        )

    def less(self, value: Array, size: Array, terms: int) -> Array:
        """Rounds sums down whose terms have magnitudes of this sum."""
        return self.plan.arithmetic.allow(value, lambda v, _: v - self._gamma(v, terms) * size)

    def middle(self, box: Box) -> tuple[Array, Array]:
        """Gives the centre and the radius of a box, which hold it."""
        center = box.center
        return center, self.plan.arithmetic.allow(
            box.radius, lambda r, _: r + self._gamma(r, 4) * (jnp.abs(center) + r)
        )

    def squares(self, value: Array, terms: int, *factors: Array) -> Array:
        """Rounds sums of products with squares, which may have underflowed, up."""
        largest = sum((jnp.max(jnp.abs(f), initial=0.0) for f in factors), 1.0)
        lost = 8 * (terms + 2) * float(jnp.finfo(value.dtype).tiny) * largest
        return self.up(value, terms) + lost

    def affine(self, index: int, mean: Box, boxes: Sequence[Box]) -> Box:
        """Widens means of bounds on an affine node by what it is off by."""
        graph, node = self.plan.graph, self.plan.graph.nodes[index]

        def charge(box: Box, precision: Precision) -> Box:
            error = network_error(graph, node, [boxes[i] for i in node.refs], precision)
            return box if error is None else widened(box, 0.0, 4 * error)

        return self.plan.arithmetic.allow(mean, charge)

    def product(self, index: int, mean: Box, boxes: Sequence[Box]) -> Box:
        """Widens means of bounds on a layer by what it and their two products are off by."""
        graph = self.plan.graph

        def charge(box: Box, precision: Precision) -> Box:
            return widened(box, 0.0, 4 * product_error(graph, index, boxes, precision))

        return self.plan.arithmetic.allow(mean, charge)

    def charged(self, index: int, step: Step, boxes: Sequence[Box]) -> AnyStep:
        """Charges rows that pass a layer with what it is off by."""
        graph, exact = self.plan.graph, step
        given: Any = step  # a step, or one that is charged

        def charge(_: AnyStep, precision: Precision) -> AnyStep:
            return Charged(exact, product_error(graph, index, boxes, precision))

        return self.plan.arithmetic.allow(given, charge)

    def _gamma(self, value: Array, terms: int) -> float:
        unit = 0.5 * float(jnp.finfo(value.dtype).eps)
        return gamma(2 * (terms + depth(self.plan.graph)) + 64, unit)


def row_through(layer: Layer, box: Box, inner: bool, slack: Slack) -> Step:
    """Finds how rows pass a layer.

    Args:
        layer: the layer.
        box: of the value that it acts on.
        inner: whether deviations stay behind there, and meet no coefficients of a set.
        slack: of the plan.
    """
    node, leaf, like = layer.node, layer.leaf, box.lower
    center, radius = slack.middle(box)
    terms, inputs = math.prod(node.shape), math.prod(like.shape)
    own = jnp.square(leaf.scale)
    square = _square(layer, center, radius, slack)
    shared = None if leaf.factors is None else _shared(layer, leaf.factors, center, radius, slack)

    def through(a: Array) -> Passed:
        mean = layer.to_value(leaf.loc, a, like)
        variance = layer.to_value(own, jnp.square(a), like)
        gained = (square(a),)
        if shared is not None:
            moved, derivatives = shared(a)
            variance = variance + jnp.square(moved).sum(0)
            gained = (*gained, derivatives)
        variance = slack.squares(variance, terms, own, jnp.square(a))
        if not inner:
            return Passed((mean, variance, *gained), 0.0)
        lost = math.sqrt(2 / math.pi) * dot(root(variance), radius)
        return Passed((mean, *gained), 0.0, slack.up(lost, inputs))

    operands = (layer.value,) if inner else (layer.value, beside(layer.value))
    places = (SPREAD,) if shared is None else (SPREAD, SHARED)
    return Step(through, len(node.shape), (*operands, *places))


def _square(layer: Layer, center: Array, radius: Array, slack: Slack) -> Callable[[Array], Array]:
    """Finds what a row gains of L^2, by weights' own deviations."""
    leaf, largest = layer.leaf, jnp.abs(center) + radius
    terms = math.prod(layer.node.shape)
    if layer.once:
        wide, own = jnp.square(largest), jnp.square(leaf.scale)
        spreads = slack.squares(layer(wide, own), wide.size, wide, own)

        def square(a: Array) -> Array:
            found = dot(jnp.square(a), spreads)
            return slack.squares(found, terms + wide.size, jnp.square(a), spreads)

        return square

    def square_of_sums(a: Array) -> Array:
        along, across = layer.to_weights(center, a), layer.to_weights(radius, jnp.abs(a))
        slopes = slack.size(along, layer.to_weights(jnp.abs(center), jnp.abs(a)), terms) + across
        total = jnp.sum(jnp.square(leaf.scale * slopes))
        return slack.squares(total, terms + leaf.loc.size, slopes)

    return square_of_sums


def _shared(
    layer: Layer, factors: Array, center: Array, radius: Array, slack: Slack
) -> Callable[[Array], tuple[Array, Array]]:
    """Finds what a row's coefficients move by with each factor, and its derivatives."""
    terms, total = math.prod(layer.node.shape), jnp.abs(factors).sum(0)
    signed = jax.vmap(lambda u: layer(center, u))(factors)
    sizes = layer(jnp.abs(center), total)

    def through(a: Array) -> tuple[Array, Array]:
        moved = jax.vmap(lambda u: layer.to_value(u, a, center))(factors)
        moved = slack.size(moved, layer.to_value(total, jnp.abs(a), center), terms)
        along = jax.vmap(lambda s: dot(a, s))(signed)
        off = slack.size(jnp.zeros_like(along), dot(jnp.abs(a), sizes), 2 * terms)
        across = jax.vmap(lambda m: dot(m, radius))(moved)
        return moved, jnp.stack([along, slack.up(off + across, radius.size)])

    return through


def forward_through(layer: Layer, box: Box, slack: Slack) -> tuple[Box, Array]:
    """Computes the means of bounds on a layer's value, and L^2.

    A coordinate meets each of its weights once, in a convolution as well, so that the weights' own
    deviations add up as squares.

    Args:
        layer: the layer.
        box: of the value that it acts on.
        slack: of the plan.
    """
    leaf = layer.leaf
    center, radius = slack.middle(box)
    terms = leaf.loc.size
    size = slack.up(folded_mean(leaf.loc, slack.squares(leaf.variance, 4)), 64)
    middle, reach = layer(center, leaf.loc), layer(radius, size)
    largest = jnp.square(jnp.abs(center) + radius)
    own = jnp.square(leaf.scale)
    square = slack.squares(layer(largest, own), terms, largest, own)
    if leaf.factors is not None:
        moved = jax.vmap(lambda u: layer(center, u))(leaf.factors)
        off = layer(jnp.abs(center), jnp.abs(leaf.factors).sum(0))
        across = jax.vmap(lambda u: layer(radius, jnp.abs(u)))(leaf.factors)
        square = square + jnp.square(slack.size(moved, off, terms) + across).sum(0)
        square = slack.up(square, terms)
    return Box(middle - reach, middle + reach), square


def forward_affine(plan: Plan, index: int, operands: list[Spread], apart: bool) -> Spread:
    """Computes what is known of an affine node, before what it is off by.

    Args:
        plan: of the network.
        index: of the node.
        operands: what is known of those that are no constants.
        apart: whether operands that depend on different weights are independent.
    """
    node = plan.graph.nodes[index]
    mean = node.operation.interval(node, *(Box(s.lower, s.upper) for s in operands))
    leaves = frozenset().union(*(s.leaves for s in operands))
    disjoint = sum(len(s.leaves) for s in operands) == len(leaves)
    sums = node.op in ("add", "add_any", "sub") and len(operands) == len(node.operands)
    if sums and disjoint and apart:
        square = sum((s.square for s in operands[1:]), operands[0].square)
    else:
        square = jnp.square(magnitude(node, *(root(s.square) for s in operands)))
    square = Slack(plan).squares(square, math.prod(mean.lower.shape) + 8)
    return Spread(mean.lower, mean.upper, jnp.broadcast_to(square, mean.lower.shape), leaves)


def own_spread(index: int, leaf: Leaf, slack: Slack) -> Spread:
    """Says what is known of weights themselves."""
    variance = slack.squares(leaf.variance, 4)
    return Spread(leaf.loc, leaf.loc, variance, frozenset({index}))


def root(v: Array) -> Array:
    """Computes the square root, of derivative 0 at 0; of what overflowed it is infinite."""
    positive = v > 0
    found = jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), 0.0)
    return jnp.where(jnp.isnan(v), jnp.inf, found)
