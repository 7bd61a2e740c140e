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
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.bounds.arithmetic import Float, gamma, own_unit
from bnncert.bounds.arithmetic import magnitude as magnitude_of
from bnncert.bounds.graph import Graph, Node, trace
from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.bounds.interval import bounded_nodes, drop_nan, intersect
from bnncert.bounds.methods.ibp import interval_bounds
from bnncert.bounds.methods.sweeper import Options, sweeper
from bnncert.bounds.relax import is_relaxed, relax
from bnncert.bounds.relaxations import Choice, check_lower_slope
from bnncert.bounds.rounding import network_error, outward_planes, outward_set, side_error
from bnncert.bounds.rules.affine import SIGNED, linear, magnitude
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

    def boxes(self, graph: Graph, options: Options) -> list[Box]:
        """A box for each node of a traced function."""
        boxes = interval_bounds(sweeper(graph, options))
        return forward_bounds(graph, boxes, self.lower_slope, options.arithmetic)


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


def forward_bounds(
    graph: Graph, boxes: Sequence[Box], lower_slope: str, arithmetic: Float | None = None
) -> list[Box]:
    """The boxes, intersected at each node that matters with those of forward linear bounds.

    Args:
        graph: the traced function.
        boxes: of all nodes, by intervals.
        lower_slope: of a ReLU that crosses 0.
        arithmetic: of the network, which the bounds are to hold in; None: real arithmetic.
    """
    choice = Choice(lower_slope=lower_slope)
    found, sides = list(boxes), _inputs(graph)
    size = sides[0].lower.A.shape[0]
    matter = bounded_nodes(graph)
    sets, inexact = list(graph.inputs), None
    if arithmetic is not None:
        sets = [outward_set(graph, region) for region in sets]
        inexact = Inexact(graph, jnp.concatenate([_reach(s).reshape(-1) for s in sets]))
    for index, node in enumerate(graph.nodes[len(graph.inputs) :], len(graph.inputs)):
        operands = [sides[i] for i in node.refs]
        if is_relaxed(node):
            planes = relax(graph, index, found, choice)
            if arithmetic is not None:
                planes = outward_planes(graph, index, planes, found, {}, arithmetic)
            operands = [sides[i] for i in planes.operands]
            lower = _through(planes.lower, operands, node, size, inexact)
            upper = _through(planes.upper, operands, node, size, inexact)
            sides.append(Between(lower.lower, upper.upper))
        else:
            side = _affine(node, operands, inexact)
            if arithmetic is not None:
                error = network_error(graph, node, [found[i] for i in node.refs], arithmetic)
                side = _apart(side, error)
            sides.append(side)
        if index in matter:
            side = sides[index]
            if inexact is not None:
                last = 4 * gamma(len(sets) + 8, own_unit(node))
                side = _apart(side, last * _size(side, inexact.reach))
            swept = _concretize(side, sets)
            cast = jax.tree.map(lambda end, dtype=node.dtype: end.astype(dtype), swept)
            found[index] = intersect(found[index], drop_nan(cast))
    return found


class Inexact(NamedTuple):
    """For outward rounding: a function, and the largest |x| of all coordinates of its sets."""

    graph: Graph
    reach: Array


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


def _affine(node: Node, operands: Sequence[Between], inexact: Inexact | None) -> Between:
    """Passes an operation that is affine in its bounded operands."""
    passed = _exactly(node, operands)
    if inexact is None:
        return passed
    sizes = [_size(operand, inexact.reach) for operand in operands]
    return _apart(passed, side_error(inexact.graph, node, sizes, jnp.sum(inexact.reach)))


def _exactly(node: Node, operands: Sequence[Between]) -> Between:
    lowers, uppers = [o.lower for o in operands], [o.upper for o in operands]
    if node.op in SIGNED and any(low is not high for low, high in zip(lowers, uppers, strict=True)):
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
    if all(low is high for low, high in zip(lowers, uppers, strict=True)):
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
    f: Callable[..., Array],
    operands: Sequence[Between],
    node: Node,
    size: int,
    inexact: Inexact | None,
) -> Between:
    """Passes an affine function of values given by their sides."""
    zeros = [np.zeros(o.lower.b.shape, o.lower.b.dtype) for o in operands]
    points = tuple(Box(z, z) for z in zeros)
    graph = trace(f, points, {}) if points else None
    output: Operand = graph.outputs[0] if graph else f()
    if graph is None or not isinstance(output, Ref):
        value = jnp.broadcast_to(jnp.asarray(output), node.shape)
        side = Side(jnp.zeros((size, *node.shape), node.dtype), value)
        return Between(side, side)
    sides = list(operands)
    inexact = None if inexact is None else inexact._replace(graph=graph)
    for inner in graph.nodes[len(points) :]:
        sides.append(_affine(inner, [sides[i] for i in inner.refs], inexact))
    return sides[output.index]


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
