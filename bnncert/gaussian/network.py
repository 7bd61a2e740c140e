"""A network with Gaussian weights, node by node: intervals of its values, and rows through it.

Of each value is known a box (`bnncert.gaussian.margins` says with what probability) and a
`Spread`, bounds on it whose means are known, found forwards. Rows find better boxes of what
nonlinearities and layers act on.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.methods.steps import Passage, View, relaxed_step
from bnncert.bounds.ops import Choice
from bnncert.bounds.ops.boxes import drop_nan, hull, intersect
from bnncert.bounds.plan import Plan
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rows import (
    AnyStep,
    Apart,
    Charged,
    Steps,
    Ways,
    dot,
    map_rows,
    pull_back,
    start,
)
from bnncert.gaussian.ends import each, least_mean
from bnncert.gaussian.layers import (
    SHARED,
    SPREAD,
    Slack,
    Spread,
    beside,
    forward_affine,
    forward_through,
    own_spread,
    root,
    row_through,
    settled,
)
from bnncert.gaussian.weights import Weights, layer_of
from bnncert.sets import Box, Set

_WAYS = (("adaptive", 0), ("zero", 1))
"""Of the lines below a kink, and of those of a curve, the choices that rows try."""


class Margin(NamedTuple):
    """What is known of a lower bound F on a row, as a function of Gaussian weights.

    Attributes:
        mean: E F.
        lipschitz: L, of F as a function of standard normal numbers.
    """

    mean: Array
    lipschitz: Array


class Known(NamedTuple):
    """What is known of a value.

    Attributes:
        box: where it lies; of what is random and acted on by nothing, perhaps everywhere.
        spread: bounds on it of known means.
    """

    box: Box
    spread: Spread


class Network(NamedTuple):
    """A traced network with Gaussian weights.

    Attributes:
        plan: of the network.
        weights: those among its nodes.
        hidden: the nodes whose intervals are found by means and deviations: what nonlinearities
            and layers act on.
        known: the nodes that have intervals.
        plain: the nodes of which forward bounds are the best there are: rows would find the same.
        relaxes: whether rows pass nonlinearities; else they end on them.
        rows: whether rows find intervals of hidden nodes too.
    """

    plan: Plan
    weights: Weights
    hidden: frozenset[int]
    known: frozenset[int]
    plain: frozenset[int]
    relaxes: bool
    rows: bool

    def units(self) -> int:
        """Counts the hidden values that are random."""
        nodes = self.plan.graph.nodes
        return sum(math.prod(nodes[i].shape) for i in self.hidden & self.weights.random)

    def free(self) -> frozenset[int]:
        """Finds the nonlinearities that rows pass by lines."""
        passed = self.plan.relaxed - self.weights.layers.keys()
        return frozenset(i for i in passed if not self._ends_on(i))

    def bounds(self, reach: float) -> tuple[list[Box], Passage]:
        """Finds the boxes of all nodes, and how rows pass them.

        Args:
            reach: how many Lipschitz constants below its mean a bound is taken to be.
        """

        def settle(index: int, values: list[Known], passage: Passage) -> tuple[Known, Passage]:
            found = values[index]
            if index not in self.hidden:
                return found, passage
            spread = found.spread
            deviation = reach * root(spread.square)
            box = self._ends(spread.lower, spread.upper, deviation)
            if self.rows and index not in self.plain:
                boxes = [value.box for value in values]
                passage = self.further(boxes, passage)
                box = intersect(box, drop_nan(self._by_rows(index, boxes, passage, reach)))
            box = intersect(found.box, drop_nan(box))
            return Known(box, spread if index in self.weights.random else settled(box)), passage

        domain = Domain(self._start, self._apply, settle, Passage())
        values, passage = propagate(self.plan.graph, domain)
        boxes = [value.box for value in values]
        return boxes, self.further(boxes, passage)

    def _start(self, index: int) -> Known:
        """Says what is known of a weight, or of a set."""
        box = hull(self.plan.graph.inputs[index])
        if index not in self.weights.random:
            return Known(box, settled(box))
        spread = own_spread(index, self.weights.leaves[index], Slack(self.plan))
        return Known(box if index in self.known else _everything(box), spread)

    def _apply(self, index: int, values: list[Known]) -> Known:
        """Says what is known of a node, from what it acts on."""
        graph, plan, slack = self.plan.graph, self.plan, Slack(self.plan)
        node = graph.nodes[index]
        boxes = [value.box for value in values]
        if index in self.known:
            box = plan.arithmetic.interval(graph, node, [boxes[i] for i in node.refs])
        else:
            box = _everything(Box(*[jnp.zeros(node.shape, node.dtype)] * 2))
        operands = [values[i].spread for i in node.refs]
        if index in self.weights.layers:
            layer = layer_of(graph, self.weights, index)
            mean, square = forward_through(layer, boxes[layer.value], slack)
            # The value it acts on counts by its box.
            own = values[node.refs[self.weights.layers[index]]].spread.leaves
            mean = slack.product(index, mean, boxes)
            return Known(box, Spread(mean.lower, mean.upper, square, own))
        if index in plan.relaxed or index not in self.weights.random:
            return Known(box, settled(box))
        found = forward_affine(plan, index, operands, not self.weights.correlated)
        mean = slack.affine(index, Box(found.lower, found.upper), boxes)
        return Known(box, found._replace(lower=mean.lower, upper=mean.upper))

    def further(self, boxes: Sequence[Box], known: Passage) -> Passage:
        """Finds how rows pass the nodes that have boxes."""
        plan, slack = self.plan, Slack(self.plan)
        errors = plan.arithmetic.errors(plan.graph, boxes, known.errors)
        view, steps = View(boxes, errors), dict(known.relaxed)
        for i in range(len(plan.graph.inputs), len(boxes)):
            if i in steps or self._ends_on(i):
                continue
            if i in self.weights.layers:
                layer = layer_of(plan.graph, self.weights, i)
                step = row_through(layer, boxes[layer.value], self._is_inner(layer.value), slack)
                steps[i] = slack.charged(i, step, boxes)
            elif i not in plan.relaxed:
                step = plan.affine()[i]
                steps[i] = Charged(step, errors.charged[i]) if i in errors.charged else step
            else:
                steps[i] = self._relaxed(i, view)
        return Passage(errors, steps)

    def _is_inner(self, index: int) -> bool:
        """Says whether deviations of what acts on a value meet no coefficients of a set there.

        So it is inside the network; and where two layers act on one set whose weights are not
        independent, so that the variances of their coefficients do not add up.
        """
        acting = sum(
            self.plan.graph.nodes[i].refs[1 - place] == index
            for i, place in self.weights.layers.items()
        )
        together = self.weights.correlated and acting > 1
        return not self._ends_on(index) or index in self.weights.random or together

    def _ends_on(self, index: int) -> bool:
        """Says whether rows end on a node."""
        if index < len(self.plan.graph.inputs):
            return True
        if index in self.plan.relaxed and index not in self.weights.layers:
            return not self.relaxes
        return index in self.plain and index not in self.weights.random

    def _relaxed(self, index: int, view: View) -> AnyStep:
        """Finds how rows pass a nonlinearity, in several ways at once."""
        last = self.plan.variants[index] - 1
        steps = [
            relaxed_step(
                self.plan, index, view, Choice(variant=min(variant, last), lower_slope=slope)
            )
            for slope, variant in _WAYS
        ]
        if self.plan.graph.nodes[index].operation.lines is None:
            return Apart(tuple(steps))
        return Ways(jax.tree.map(lambda *v: jnp.stack(v), *steps), len(steps))

    def _ends(self, lower: Array, upper: Array, deviation: Array) -> Box:
        """Moves means of bounds apart by so much, rounded outward."""

        def charge(box: Box, _: object) -> Box:
            unit = 4 * float(jnp.finfo(deviation.dtype).eps)
            low, high = (jnp.abs(end) + deviation for end in (lower, upper))
            return Box(box.lower - unit * low, box.upper + unit * high)

        return self.plan.arithmetic.allow(Box(lower - deviation, upper + deviation), charge)

    def _by_rows(self, index: int, boxes: list[Box], passage: Passage, reach: float) -> Box:
        """Finds the interval of a hidden node that holds but for a probability."""
        node = self.plan.graph.nodes[index]

        def least(found: Margin) -> Array:
            return self._ends(found.mean, found.mean, reach * found.lipschitz).lower

        def both(row: Array) -> Array:
            rows = jnp.stack([row, -row])
            return jax.vmap(lambda row: least(self.best(index, boxes, passage, row, least)))(rows)

        low, high = map_rows(both, node, self.plan.batch_size).T
        return Box(low.reshape(node.shape), -high.reshape(node.shape))

    def best(
        self,
        index: int,
        boxes: Sequence[Box],
        passage: Passage,
        row: Array,
        score: Callable[[Margin], Array],
    ) -> Margin:
        """Bounds `<row, value of a node>` from below: of all ways by that of the highest score."""
        found = self._bounded(index, boxes, passage, row)
        if found.mean.ndim == 0:
            return found
        value = score(found)
        way = jnp.argmax(jnp.where(jnp.isnan(value), -jnp.inf, value))
        return jax.tree.map(lambda v: v[way], found)

    def _bounded(self, index: int, boxes: Sequence[Box], passage: Passage, row: Array) -> Margin:
        """Computes the mean and the Lipschitz constant of each way."""
        slack, errors = Slack(self.plan), passage.errors
        steps = Steps({}, passage.relaxed, errors.carried, errors.floors)
        found = pull_back(start(index, row, steps), steps)
        zero = jnp.zeros((), row.dtype)
        coefficients = found.coefficients
        mean, square = found.offset - found.lost, coefficients.get(SPREAD, zero)
        shared: Any = coefficients.get(SHARED, 0.0)
        for i, a in coefficients.items():
            if i < 0:
                continue
            rank = len(self.plan.graph.nodes[i].shape)
            if i in self.weights.leaf:
                gained, own, along = each(partial(self._of_leaf, i), rank, a)
                mean, square, shared = mean + gained, square + own, shared + along
            else:
                least = partial(least_mean, self._region(i, boxes), slack)
                variance = coefficients.get(beside(i))
                given = (a,) if variance is None else (a, variance)
                mean = mean + each(least, rank, *given)
        if jnp.ndim(shared) > 1:  # of correlated weights, where a row has met any
            signed, sizes = jnp.moveaxis(shared, -2, 0)
            total = jnp.sum(jnp.square(jnp.abs(signed) + sizes), -1)
            square = square + slack.up(total, signed.shape[-1])
        square = slack.up(square, len(self.plan.graph.nodes))
        return Margin(*jnp.broadcast_arrays(mean, root(square)))

    def _of_leaf(self, index: int, a: Array) -> tuple[Array, Array, Array]:
        """Computes what a row gains where it ends on weights: mean, square, derivatives."""
        leaf, slack = self.weights.leaves[index], Slack(self.plan)
        size = dot(jnp.abs(a), self._magnitude(index))
        mean = slack.less(dot(a, leaf.loc), size, a.size)
        square = slack.squares(jnp.sum(jnp.square(a * leaf.scale)), a.size)
        if not self.weights.correlated:
            return mean, square, jnp.zeros(())
        assert leaf.factors is not None
        signed = jax.vmap(lambda u: dot(a, u))(leaf.factors)
        rest = jax.vmap(lambda u: dot(jnp.abs(a), jnp.abs(u)))(leaf.factors)
        rest = slack.size(jnp.zeros_like(rest), rest, a.size)
        return mean, square, jnp.stack([signed, rest])

    def _magnitude(self, index: int) -> Array:
        box = hull(self.plan.graph.inputs[index])
        return jnp.maximum(jnp.abs(box.lower), jnp.abs(box.upper))

    def _region(self, index: int, boxes: Sequence[Box]) -> Set:
        if index < len(self.plan.regions):
            return self.plan.regions[index]
        return self.plan.arithmetic.region(self.plan.graph, boxes[index])


def network_of(plan: Plan, weights: Weights, method: str) -> Network:
    """Finds what has to be bounded of a network, and by what.

    Args:
        plan: of the network over a `Box` for each random leaf, and the set of inputs.
        weights: those among its nodes.
        method: "alpha-crown", "crown", "crown-ibp" or "ibp": whether rows find intervals and pass
            nonlinearities.
    """
    nodes, inputs = plan.graph.nodes, plan.graph.inputs
    # In rounded arithmetic the intervals of all nodes are asked for.
    everywhere = plan.arithmetic.allow(False, lambda *_: True)
    known = set(range(len(nodes))) - (set() if everywhere else weights.random)
    hidden: set[int] = set()
    found = set(range(len(inputs))) - weights.random
    for i, node in enumerate(nodes):
        if not node.refs:
            continue
        acts_on = set(node.refs) if i in plan.relaxed else set()
        if i in weights.layers:
            acts_on.discard(node.refs[weights.layers[i]])
        hidden |= acts_on - found
        found |= acts_on
        moves = len(node.refs) == 1 and node.affine and node.affine.spreads in _ALONE
        alike = i not in weights.layers and (i in plan.relaxed or moves)
        if alike and found.issuperset(node.refs):
            found.add(i)
            known.add(i)
    return Network(
        plan,
        weights,
        frozenset(hidden),
        frozenset(known),
        _plain(plan, weights),
        relaxes=method != "ibp",
        rows=method in ("crown", "alpha-crown"),
    )


_ALONE = ("places", "repeats")
"""What a node does to its operand whose interval is exact for each coordinate by itself."""


def _plain(plan: Plan, weights: Weights) -> frozenset[int]:
    """Finds the nodes whose forward bounds are what rows would find: one layer over one box."""
    inputs, found = plan.graph.inputs, set[int]()
    of_set: set[int] = set()
    for i, node in enumerate(plan.graph.nodes):
        if i < len(inputs):
            if i in weights.random or isinstance(inputs[i], Box):
                found.add(i)
            of_set |= set() if i in weights.random else {i}
            continue
        if not of_set.isdisjoint(node.refs):
            of_set.add(i)
        if not found.issuperset(node.refs) or (i in plan.relaxed and i not in weights.layers):
            continue
        if i in weights.layers:
            (value,) = (j for j in node.refs if j not in weights.leaf)
            if value not in weights.random:
                found.add(i)
        elif len(node.refs) == 1:
            if node.affine.spreads == "places":
                found.add(i)
        elif node.op in ("add", "add_any", "sub") and not weights.correlated:
            if sum(j in of_set for j in node.refs) < 2:
                found.add(i)
    return frozenset(found)


def _everything(like: Box) -> Box:
    lower = jnp.asarray(like.lower)
    return Box(*(jnp.full(lower.shape, end, lower.dtype) for end in (-jnp.inf, jnp.inf)))
