"""Forward linear bounds: each node between two affine functions of the sets, first to last.

    <A_lower, x> + b_lower  <=  value  <=  <A_upper, x> + b_upper

An affine operation W acts on the two sides through their centre and half difference,

    lower' = W (lower + upper) / 2 - |W| (upper - lower) / 2        upper' likewise, with plus

and a nonlinearity through its planes, affine operations that are traced and passed in their turn.
Rounded outward, the sides move apart at each node by what the network computes otherwise there, and
by what they lose themselves: of a sum of n terms gamma(n) |W| (|A| |x| + |b|) (`rounding`).

Cost: as many evaluations as the sets have coordinates, n; memory n times the widest value.

Source: Xu et al., "Automatic perturbation analysis for scalable certified robustness and beyond",
NeurIPS 2020 (forward mode perturbation analysis).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.bounds.arithmetic import Arithmetic
from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.graph.operands import Operand
from bnncert.bounds.methods.ibp import interval_bounds
from bnncert.bounds.ops import Choice, check_lower_slope
from bnncert.bounds.ops.affine import linear, magnitude
from bnncert.bounds.ops.boxes import drop_nan, intersect
from bnncert.bounds.ops.extremes import magnitude as magnitude_of
from bnncert.bounds.plan import Plan
from bnncert.bounds.propagate import Domain, propagate
from bnncert.bounds.rounding import network_error, side_error
from bnncert.bounds.rounding.model import gamma, own_unit
from bnncert.bounds.tracing import trace
from bnncert.sets import Box, LpBall, Set, dual_norm


@dataclass(frozen=True)
class Forward:
    """Linear bounds from the sets forward, for few inputs and many outputs.

    Never wider than IBP, with which it is intersected.

    Attributes:
        lower_slope: of the line below a ReLU that crosses 0: "adaptive", "zero", "one" or "chord".

    Raises:
        ValueError: an unknown slope.

    Cost: an evaluation for each coordinate of the sets. Memory: these times the widest layer.

    Source: Xu et al., "Automatic perturbation analysis for scalable certified robustness and
    beyond", NeurIPS 2020 (forward mode perturbation analysis).

    Example:
        >>> from bnncert import bound
        >>> box = Box(-jnp.ones(1), jnp.ones(1))
        >>> found = bound(lambda x: jax.nn.relu(x) - 0.5 * x, Forward("chord"))(box)
        >>> found.lower.tolist(), found.upper.tolist()                  # by IBP [-0.5, 1.5]
        ([0.0], [0.5])
    """

    lower_slope: str = "adaptive"
    name: ClassVar[str] = "forward"

    def __post_init__(self) -> None:
        check_lower_slope(self.lower_slope)

    def boxes(self, plan: Plan) -> list[Box]:
        """A box for each node of a function."""
        return forward_bounds(plan, interval_bounds(plan), Choice(lower_slope=self.lower_slope))


class Side(NamedTuple):
    """One affine function of all n coordinates of the sets.

    Attributes:
        A: shape (n, *value).
        b: shape (*value).
    """

    A: Array
    b: Array


class Between(NamedTuple):
    """Two affine functions between which a value lies."""

    lower: Side
    upper: Side


class Enclosed(NamedTuple):
    """What is known of a node: two affine functions of the sets, and a box."""

    between: Between
    box: Box


class Swept(NamedTuple):
    """A function that is passed forward, or a plane of one.

    Attributes:
        graph: its nodes.
        arithmetic: that the bounds are to hold in.
        reach: the largest |x| of all coordinates of the sets.
    """

    graph: Graph
    arithmetic: Arithmetic
    reach: Array


def forward_bounds(plan: Plan, boxes: Sequence[Box], choice: Choice) -> list[Box]:
    """The boxes, intersected at each node that matters with those of forward linear bounds.

    Args:
        plan: of the function.
        boxes: of all nodes, by intervals.
        choice: of the planes.
    """
    graph, arithmetic = plan.graph, plan.arithmetic
    identity, matter = _inputs(graph), plan.acted_on.union(plan.outputs)
    reach = jnp.concatenate([_reach(region).reshape(-1) for region in plan.regions])
    swept = Swept(graph, arithmetic, reach)

    def apply(index: int, known: list[Enclosed]) -> Enclosed:
        node = graph.nodes[index]
        found = [*(each.box for each in known), boxes[index]]
        if index not in plan.relaxed:
            between = _affine(swept, node, [known[i].between for i in node.refs])
            between = arithmetic.allow(
                between,
                lambda between, precision: _apart(
                    between, network_error(graph, node, [found[i] for i in node.refs], precision)
                ),
            )
            return Enclosed(between, boxes[index])
        own = arithmetic.interval(graph, node, [found[i] for i in node.refs])
        found[index] = intersect(boxes[index], own)
        planes = node.operation.relaxation.planes(graph, index, found, choice)
        planes = arithmetic.planes(graph, index, planes, found, {}, free=False)
        operands = [known[i].between for i in planes.operands]
        lower = _through(swept, planes.lower, operands, node)
        upper = _through(swept, planes.upper, operands, node)
        return Enclosed(Between(lower.lower, upper.upper), boxes[index])

    def settle(index: int, known: list[Enclosed], memory: None) -> tuple[Enclosed, None]:
        node, (between, box) = graph.nodes[index], known[index]
        if index not in matter or not node.refs:
            return known[index], memory
        last = 4 * gamma(len(plan.regions) + 8, own_unit(node))
        sides = arithmetic.allow(
            between, lambda between, precision: _apart(between, last * _size(between, reach))
        )
        ends = _concretize(sides, plan.regions)
        cast = jax.tree.map(lambda end: end.astype(node.dtype), ends)
        return Enclosed(between, intersect(box, drop_nan(cast))), memory

    domain = Domain(lambda index: Enclosed(identity[index], boxes[index]), apply, settle)
    return [each.box for each in propagate(graph, domain)[0]]


def _inputs(graph: Graph) -> list[Between]:
    """The sets as functions of themselves: rows of the identity."""
    avals = [(node.shape, node.dtype) for node in graph.nodes[: len(graph.inputs)]]
    sizes = [math.prod(shape) for shape, _ in avals]
    found, start = [], 0
    for (shape, dtype), size in zip(avals, sizes, strict=True):
        identity = jnp.eye(sum(sizes), size, -start, dtype=dtype).reshape(-1, *shape)
        side = Side(identity, jnp.zeros(shape, dtype))
        found.append(Between(side, side))
        start += size
    return found


def _affine(swept: Swept, node: Node, operands: Sequence[Between]) -> Between:
    """Passes an operation that is affine in its bounded operands."""
    graph, arithmetic, reach = swept

    def rounded(passed: Between, precision: Any) -> Between:
        sizes = [_size(operand, reach) for operand in operands]
        return _apart(passed, side_error(graph, node, sizes, jnp.sum(reach)))

    return arithmetic.allow(_exactly(node, operands), rounded)


def _exactly(node: Node, operands: Sequence[Between]) -> Between:
    lowers, uppers = [o.lower for o in operands], [o.upper for o in operands]
    alike = all(low is high for low, high in zip(lowers, uppers, strict=True))
    if node.affine.negates and not alike:
        halves = [
            jax.tree.map(lambda l, u: 0.5 * (u - l), *pair)
            for pair in zip(lowers, uppers, strict=True)
        ]
        centers = [
            jax.tree.map(lambda l, u: 0.5 * (l + u), *pair)
            for pair in zip(lowers, uppers, strict=True)
        ]
        center = _evaluate(node, centers)
        radius = Side(
            jax.vmap(lambda *v: magnitude(node, *v))(*(s.A for s in halves)),
            magnitude(node, *(s.b for s in halves)),
        )
        return Between(
            jax.tree.map(jnp.subtract, center, radius), jax.tree.map(jnp.add, center, radius)
        )
    lower = _evaluate(node, lowers)
    if alike:
        return Between(lower, lower)
    return Between(lower, _evaluate(node, uppers))


def _apart(between: Between, error: Array | None) -> Between:
    """The two sides moved apart."""
    if error is None:
        return between
    lower, upper = between
    return Between(Side(lower.A, lower.b - error), Side(upper.A, upper.b + error))


def _size(between: Between, reach: Array) -> Array:
    """The largest magnitude of any partial sum of either side: `|A| |x| + |b|`."""

    def one(side: Side) -> Array:
        flat = jnp.abs(side.A).reshape(side.A.shape[0], -1)
        weighed = jnp.matmul(reach.astype(flat.dtype), flat, precision=jax.lax.Precision.HIGHEST)
        return weighed.reshape(side.b.shape) + jnp.abs(side.b)

    if between.lower is between.upper:
        return one(between.lower)
    return jnp.maximum(one(between.lower), one(between.upper))


def _reach(region: Set) -> Array:
    if isinstance(region, LpBall):
        return jnp.abs(region.center) + region.eps
    return magnitude_of(region)


def _evaluate(node: Node, sides: Sequence[Side]) -> Side:
    coefficients = jax.vmap(lambda *v: linear(node, *v))(*(s.A for s in sides))
    return Side(coefficients, node.evaluate(*node.fill([s.b for s in sides])))


def _through(
    swept: Swept, f: Callable[..., Array], operands: Sequence[Between], node: Node
) -> Between:
    """Passes an affine function of values given by their sides."""
    zeros = [np.zeros(o.lower.b.shape, o.lower.b.dtype) for o in operands]
    points = tuple(Box(z, z) for z in zeros)
    graph = trace(f, points, {}) if points else None
    output: Operand = graph.outputs[0] if graph else f()
    if graph is None or not isinstance(output, Ref):
        value = jnp.broadcast_to(jnp.asarray(output), node.shape)
        size = swept.reach.shape[0]
        side = Side(jnp.zeros((size, *node.shape), node.dtype), value)
        return Between(side, side)
    inner = swept._replace(graph=graph)

    def apply(index: int, sides: list[Between]) -> Between:
        passed = graph.nodes[index]
        return _affine(inner, passed, [sides[i] for i in passed.refs])

    return propagate(graph, Domain(lambda index: operands[index], apply))[0][output.index]


def _concretize(between: Between, sets: Sequence[Set]) -> Box:
    lower, upper = between.lower.b, between.upper.b
    start = 0
    for region in sets:
        size = math.prod(jnp.shape(region.center))
        low, _ = _extremes(between.lower.A[start : start + size], region)
        _, high = _extremes(between.upper.A[start : start + size], region)
        lower, upper, start = lower + low, upper + high, start + size
    return drop_nan(Box(lower, upper))


def _extremes(A: Array, region: Set) -> tuple[Array, Array]:
    """The smallest and the largest value of each column of A on a set."""
    flat = A.reshape(A.shape[0], -1)

    def weighed(by: Array, rows: Array) -> Array:
        return jnp.matmul(by.reshape(-1), rows, precision=jax.lax.Precision.HIGHEST)

    middle = weighed(region.center, flat)
    if isinstance(region, LpBall):
        reach = region.eps * jax.vmap(lambda a: dual_norm(a, region.p), in_axes=1)(flat)
    else:
        reach = weighed(region.radius, jnp.abs(flat))
    return (middle - reach).reshape(A.shape[1:]), (middle + reach).reshape(A.shape[1:])
