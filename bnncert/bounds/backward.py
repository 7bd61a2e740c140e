"""Backward linear bounds (CROWN): from one coordinate of a node back to where the values come from.

A row holds, for each node i still to be passed, coefficients with

    sum_i <lower_i, v_i> + lower_offset  <=  value  <=  sum_i <upper_i, v_i> + upper_offset

starting from one entry 1 at the target. Nodes are passed last to first. An affine node is passed by
its own transpose (`jax.vjp`: no rule for each operation), a nonlinearity by its two lines: a
positive coefficient takes the line on the same side, a negative one the other. What remains stands
on the frontier (the sets, or any node that is not passed), and is concretised there by the dual
norm.

Rows are vmapped. Lower and upper coefficients stay one array until the first relaxation.

Source: Zhang et al., NeurIPS 2018 (CROWN); Xu et al., NeurIPS 2020 (on general graphs, auto_LiRPA).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.convolution import canonical
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.relaxations import Lines
from bnncert.bounds.rules import AFFINE, affine_rule
from bnncert.bounds.rules.bilinear import chord, weight_operand
from bnncert.sets import Box, LpBall, Set


class Coefficients(NamedTuple):
    """Of one node's value in one row; the shape of the value. One object while they are equal."""

    lower: Array
    upper: Array


class Offset(NamedTuple):
    """The constant terms of one row."""

    lower: Array | float
    upper: Array | float


class Row(NamedTuple):
    """A linear bound: coefficients on the frontier, by node, and constants."""

    coefficients: dict[int, Coefficients]
    offset: Offset


Step = Callable[[Coefficients], tuple[list[tuple[int, Coefficients]], Offset]]
"""How a row passes one node: coefficients of its operands, by node, and what the offset gains."""


def linear_row(graph: Graph, target: int, row: Array, steps: Mapping[int, Step]) -> Row:
    """The linear bound of `<row, value of target>`.

    Args:
        graph: the traced function.
        target: index of the node.
        row: the shape of its value.
        steps: how to pass the nodes that are relaxed; one that is neither affine nor here is
            where the bound stops.
    """
    waiting = {target: Coefficients(row, row)}
    remaining: dict[int, Coefficients] = {}
    lower, upper = jnp.zeros((), row.dtype), jnp.zeros((), row.dtype)
    for index in range(target, -1, -1):
        if index not in waiting:
            continue
        coefficients = waiting.pop(index)
        node = graph.nodes[index]
        step = _affine_step(graph, node) if affine_rule(node) else steps.get(index)
        if step is None:
            remaining[index] = coefficients
            continue
        passed, gained = step(coefficients)
        lower, upper = lower + gained.lower, upper + gained.upper
        for operand, more in passed:
            waiting[operand] = _add(waiting[operand], more) if operand in waiting else more
    return Row(remaining, Offset(lower, upper))


def row_bounds(
    graph: Graph, target: int, steps: Mapping[int, Step], sets: Sequence[Set], batch_size: int
) -> Box:
    """Bounds on each coordinate of a node, by one row each.

    Args:
        graph: the traced function.
        target: index of the node.
        steps: as `linear_row`.
        sets: for each node, what to concretise over where a row ends there.
        batch_size: rows at once. Memory: batch_size times the widest value passed.
    """
    node = graph.nodes[target]

    def one(row: Array) -> Box:
        return concretize(linear_row(graph, target, row, steps), sets)

    box = map_rows(one, node, batch_size)
    return Box(box.lower.reshape(node.shape), box.upper.reshape(node.shape))


def map_rows(one: Callable[[Array], Any], node: Node, batch_size: int) -> Any:
    """Maps over the unit rows of a node's value, in chunks."""
    size = math.prod(node.shape)
    if size <= batch_size:
        return jax.vmap(one)(jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape))

    def unit(i: Array) -> Any:
        return one((jnp.arange(size) == i).astype(node.dtype).reshape(node.shape))

    return jax.lax.map(unit, jnp.arange(size), batch_size=batch_size)


def concretize(row: Row, sets: Sequence[Set]) -> Box:
    """The extremes of a linear bound over the sets it ends on: `a.c - |a|.r`, or the dual norm."""
    lower, upper = row.offset
    for index, (below, above) in row.coefficients.items():
        low, high = _extremes(below, sets[index])
        if above is not below:
            _, high = _extremes(above, sets[index])
        lower, upper = lower + low, upper + high
    # Overflow in a line leaves no bound, not a NaN.
    lower = jnp.where(jnp.isnan(lower), -jnp.inf, lower)
    return Box(lower, jnp.where(jnp.isnan(upper), jnp.inf, upper))


def elementwise_step(operand: int, lines: Lines) -> Step:
    """Passes an elementwise nonlinearity of one bounded operand by its two lines."""

    def step(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        def through(a: Array, plus: tuple[Array, Array], minus: tuple[Array, Array]):
            positive, negative = jnp.maximum(a, 0), jnp.minimum(a, 0)
            offset = _dot(positive, plus[1]) + _dot(negative, minus[1])
            return positive * plus[0] + negative * minus[0], offset

        below = (lines.lower_slope, lines.lower_offset)
        above = (lines.upper_slope, lines.upper_offset)
        lower, lower_offset = through(coefficients.lower, below, above)
        upper, upper_offset = through(coefficients.upper, above, below)
        return [(operand, Coefficients(lower, upper))], Offset(lower_offset, upper_offset)

    return step


def chord_step(node: Node, boxes: Sequence[Box]) -> Step:
    """Passes a product of two bounded values: the weight is eliminated by its chord."""
    a, b = (boxes[i] for i in node.refs)
    weight_at = weight_operand(a, b)
    weight, x = (a, b) if weight_at == 0 else (b, a)
    kept = node.refs[1 - weight_at]
    width = weight.upper - weight.lower
    lam, m = chord(x)

    def product(value: Array, by: Array) -> Array:
        return node.evaluate(by, value) if weight_at == 0 else node.evaluate(value, by)

    def transposed(row: Array, by: Array) -> Array:
        return canonical(jax.vjp(lambda value: product(value, by), jnp.zeros_like(m))[1])(row)[0]

    rise = product(m, width)

    def step(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        def through(row: Array, sign: float) -> tuple[Array, Array]:
            # sign 1: a lower bound; -1: an upper bound, with the chord's two sides exchanged.
            positive, negative = jnp.maximum(row, 0), jnp.minimum(row, 0)
            below, above = (positive, negative) if sign > 0 else (negative, positive)
            slope = transposed(below, weight.lower) + transposed(above, weight.upper)
            bent = lam * transposed(below - above, width)
            return slope + bent, _dot(below - above, rise)

        lower, lower_offset = through(coefficients.lower, 1.0)
        upper, upper_offset = through(coefficients.upper, -1.0)
        return [(kept, Coefficients(lower, upper))], Offset(lower_offset, upper_offset)

    return step


def _affine_step(graph: Graph, node: Node) -> Step:
    """Passes an affine node: coefficients by its transpose, the offset by its value at 0."""
    zeros = [jnp.zeros(graph.nodes[i].shape, graph.nodes[i].dtype) for i in node.refs]
    at_zero, pullback = jax.vjp(lambda *values: node.evaluate(*node.fill(values)), *zeros)
    transpose = canonical(pullback)
    has_offset = AFFINE[node.op].has_offset and len(node.refs) < len(node.operands)

    def through(row: Array) -> tuple[tuple[Array, ...], Array | float]:
        return transpose(row), _dot(row, at_zero) if has_offset else 0.0

    def step(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        lower, lower_offset = through(coefficients.lower)
        if coefficients.upper is coefficients.lower:
            shared = [Coefficients(a, a) for a in lower]
            return list(zip(node.refs, shared, strict=True)), Offset(lower_offset, lower_offset)
        upper, upper_offset = through(coefficients.upper)
        both = map(Coefficients, lower, upper)
        return list(zip(node.refs, both, strict=True)), Offset(lower_offset, upper_offset)

    return step


def _add(a: Coefficients, b: Coefficients) -> Coefficients:
    lower = a.lower + b.lower
    if a.upper is a.lower and b.upper is b.lower:
        return Coefficients(lower, lower)
    return Coefficients(lower, a.upper + b.upper)


def _extremes(a: Array, region: Set) -> tuple[Array, Array]:
    """The smallest and the largest value of `<a, x>` over a set."""
    if isinstance(region, LpBall):
        middle, reach = _dot(a, region.center), region.eps * _dual_norm(a, region.p)
    else:
        middle, reach = _dot(a, region.center), _dot(jnp.abs(a), region.radius)
    return middle - reach, middle + reach


def _dual_norm(a: Array, p: int) -> Array:
    """Of the Lp norm: the largest magnitude for p = 1, the Euclidean norm for p = 2."""
    if p == 1:
        return jnp.max(jnp.abs(a), initial=0.0)
    square = jnp.sum(a * a)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST)
