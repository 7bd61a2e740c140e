"""Backward linear bounds (CROWN): from one coordinate of a node back to where the values come from.

A row holds, for each node i still to be passed, coefficients with

    sum_i <lower_i, v_i> + lower_offset  <=  value  <=  sum_i <upper_i, v_i> + upper_offset

starting from one entry 1 at the target. Nodes are passed last to first. An affine node is passed by
its own transpose (`jax.vjp`: no rule for each operation), a nonlinearity by its two planes: a
positive coefficient takes the plane on the same side, a negative one the other, and each is passed
by its transpose again. What remains stands on the frontier (the sets, or any node that is not
passed), and is concretised there by the dual norm.

Rows are vmapped. Lower and upper coefficients stay one array until the first relaxation.

Source: Zhang et al., NeurIPS 2018 (CROWN); Xu et al., NeurIPS 2020 (on general graphs, auto_LiRPA).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert._varying import axes_of, varying
from bnncert.bounds.convolution import canonical
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.interval import drop_nan
from bnncert.bounds.relaxations import Lines, Planes
from bnncert.bounds.rules import affine_rule
from bnncert.bounds.rules.affine import has_constant
from bnncert.sets import Box, LpBall, Set, dual_norm


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


class Steps(NamedTuple):
    """How rows pass a graph.

    Attributes:
        passing: each node; where one is not here, a row stops.
        slack: what a row allows for at the node where it begins (`rounding.Errors.carried`).
        floors: what it allows for at every node it comes to: scalars.
    """

    passing: Mapping[int, Step]
    slack: Mapping[int, Array] = {}
    floors: Mapping[int, Array] = {}

    def and_passing(self, more: Mapping[int, Step]) -> "Steps":
        """With steps for more nodes."""
        return self._replace(passing={**self.passing, **more})


def linear_row(target: int, row: Array, steps: Steps) -> Row:
    """The linear bound of `<row, value of target>`.

    Args:
        target: index of the node.
        row: the shape of its value.
        steps: how to pass each node.
    """
    waiting = {target: Coefficients(row, row)}
    remaining: dict[int, Coefficients] = {}
    lower, upper = jnp.zeros((), row.dtype), jnp.zeros((), row.dtype)
    if target in steps.slack:
        slack = charge(row, steps.slack[target])
        lower, upper = lower - slack, upper + slack
    floors: list[Array] = []
    for index in range(target, -1, -1):
        if index not in waiting:
            continue
        coefficients = waiting.pop(index)
        if index in steps.floors:
            floors.append(steps.floors[index])
        if index not in steps.passing:
            remaining[index] = coefficients
            continue
        passed, gained = steps.passing[index](coefficients)
        lower, upper = lower + gained.lower, upper + gained.upper
        for operand, more in passed:
            waiting[operand] = _add(waiting[operand], more) if operand in waiting else more
    if floors:  # the same for all rows: one sum
        floor = jnp.sum(jnp.stack(floors))
        lower, upper = lower - floor, upper + floor
    return Row(remaining, Offset(lower, upper))


def row_bounds(
    graph: Graph, target: int, steps: Steps, sets: Sequence[Set], batch_size: int
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
        return concretize(linear_row(target, row, steps), sets)

    box = map_rows(one, node, batch_size)
    # A set of another dtype (the function casts) must not pass it on.
    lower, upper = (end.reshape(node.shape).astype(node.dtype) for end in (box.lower, box.upper))
    return drop_nan(Box(lower, upper))


def map_rows(one: Callable[..., Any], node: Node, batch_size: int, *each: Any) -> Any:
    """Maps over the unit rows of a node's value, in chunks.

    Args:
        one: `(row, *its part of each) -> anything`.
        node: whose value's coordinates the rows are.
        batch_size: rows at once.
        each: pytrees with a leading axis over rows.
    """
    size = math.prod(node.shape)
    if size <= batch_size:
        return jax.vmap(one)(jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape), *each)

    def unit(xs: tuple) -> Any:
        i, *parts = xs
        return one(unit_row(node, i), *parts)

    return jax.lax.map(unit, (jnp.arange(size), *each), batch_size=batch_size)


def unit_row(node: Node, i: Array) -> Array:
    """The row of the i-th coordinate of a node's value."""
    size = math.prod(node.shape)
    return (jnp.arange(size) == i).astype(node.dtype).reshape(node.shape)


def concretize(row: Row, sets: Sequence[Set]) -> Box:
    """The extremes of a linear bound over the sets it ends on: `a.c - |a|.r`, or the dual norm."""
    lower, upper = row.offset
    for index, (below, above) in row.coefficients.items():
        low, high = _extremes(below, sets[index])
        if above is not below:
            _, high = _extremes(above, sets[index])
        lower, upper = lower + low, upper + high
    return drop_nan(Box(jnp.asarray(lower), jnp.asarray(upper)))  # of an overflow in a plane


def affine_steps(graph: Graph) -> dict[int, Step]:
    """How to pass each affine node."""
    return {i: _affine_step(graph, node) for i, node in enumerate(graph.nodes) if affine_rule(node)}


def charged_step(step: Step, error: Array) -> Step:
    """Passes a node whose value is off by up to `error`."""

    def charged(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        passed, gained = step(coefficients)
        below = charge(coefficients.lower, error)
        same = coefficients.upper is coefficients.lower
        above = below if same else charge(coefficients.upper, error)
        return passed, Offset(gained.lower - below, gained.upper + above)

    return charged


def charge(row: Array, error: Array) -> Array:
    """`<|row|, error>`."""
    return _dot(jnp.abs(row), error)


def planes_step(graph: Graph, planes: Planes, others: Planes | None = None) -> Step:
    """Passes a relaxed node by its planes.

    Args:
        graph: the traced function.
        planes: for the rows' lower side; and for the upper side, unless there are
        others: for the upper side.
    """
    lower_side = _sided(graph, planes, True)
    upper_side = _sided(graph, planes if others is None else others, False)

    def step(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        lower, lower_offset = lower_side(coefficients.lower)
        upper, upper_offset = upper_side(coefficients.upper)
        both = map(Coefficients, lower, upper)
        return list(zip(planes.operands, both, strict=True)), Offset(lower_offset, upper_offset)

    return step


def _sided(
    graph: Graph, planes: Planes, lower_side: bool
) -> Callable[[Array], tuple[tuple[Array, ...], Array]]:
    """Passes the coefficients of one side: positive ones by the plane of that side."""
    if planes.lines is not None:
        return _sided_lines(planes.lines, lower_side)
    with_, against = (planes.lower, planes.upper) if lower_side else (planes.upper, planes.lower)
    zeros = _zeros(graph, planes.operands)
    at_zero, transpose = _transposed(with_, zeros)
    other_at_zero, other_transpose = _transposed(against, zeros)

    def through(a: Array) -> tuple[tuple[Array, ...], Array]:
        parts = zip(transpose(jnp.maximum(a, 0)), other_transpose(jnp.minimum(a, 0)), strict=True)
        return tuple(p + n for p, n in parts), _weighed(a, at_zero, other_at_zero)

    return through


def _sided_lines(
    lines: Lines, lower_side: bool
) -> Callable[[Array], tuple[tuple[Array, ...], Array]]:
    below, above = (lines.lower_slope, lines.lower_offset), (lines.upper_slope, lines.upper_offset)
    (slope, offset), (other_slope, other_offset) = (below, above) if lower_side else (above, below)

    def through(a: Array) -> tuple[tuple[Array, ...], Array]:
        passed = jnp.maximum(a, 0) * slope + jnp.minimum(a, 0) * other_slope
        return (passed,), _weighed(a, offset, other_offset)

    return through


def _weighed(a: Array, positive: Array, negative: Array) -> Array:
    """`<max(a, 0), positive> + <min(a, 0), negative>`.

    A sum and no product: XLA fuses it with what made `a`, which a product would have to write out.
    """
    return jnp.sum(jnp.where(a > 0, a * positive, a * negative))


def _affine_step(graph: Graph, node: Node) -> Step:
    """Passes an affine node: coefficients by its transpose, the offset by its value at 0."""
    at_zero, transpose = _transposed(
        lambda *values: node.evaluate(*node.fill(values)), _zeros(graph, node.refs)
    )

    def through(row: Array) -> tuple[tuple[Array, ...], Array | float]:
        return transpose(row), _dot(row, at_zero) if has_constant(node) else 0.0

    def step(coefficients: Coefficients) -> tuple[list[tuple[int, Coefficients]], Offset]:
        lower, lower_offset = through(coefficients.lower)
        if coefficients.upper is coefficients.lower:
            shared = [Coefficients(a, a) for a in lower]
            return list(zip(node.refs, shared, strict=True)), Offset(lower_offset, lower_offset)
        upper, upper_offset = through(coefficients.upper)
        both = map(Coefficients, lower, upper)
        return list(zip(node.refs, both, strict=True)), Offset(lower_offset, upper_offset)

    return step


def _zeros(graph: Graph, operands: Sequence[int]) -> list[Array]:
    zeros = [jnp.zeros(graph.nodes[i].shape, graph.nodes[i].dtype) for i in operands]
    return varying(zeros, axes_of(graph.inputs))


def _transposed(
    f: Callable[..., Array], zeros: Sequence[Array]
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """An affine function's value at 0, and its transpose."""
    if not zeros:
        return f(), lambda row: ()
    axes = axes_of(zeros)
    at_zero, pullback = jax.vjp(lambda *values: varying(f(*values), axes), *zeros)
    transpose = canonical(pullback)
    return at_zero, lambda row: transpose(varying(row, axes))


def _add(a: Coefficients, b: Coefficients) -> Coefficients:
    lower = a.lower + b.lower
    if a.upper is a.lower and b.upper is b.lower:
        return Coefficients(lower, lower)
    return Coefficients(lower, a.upper + b.upper)


def _extremes(a: Array, region: Set) -> tuple[Array, Array]:
    """The smallest and the largest value of `<a, x>` over a set."""
    if isinstance(region, LpBall):
        middle, reach = _dot(a, region.center), region.eps * dual_norm(a, region.p)
    else:
        middle, reach = _dot(a, region.center), _dot(jnp.abs(a), region.radius)
    return middle - reach, middle + reach


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST)
