"""Backward linear bounds (CROWN): from one coordinate of a node back to where the values come from.

A row bounds a linear form of a node's value from below: for each node i still to be passed it holds
coefficients a_i, with

    sum_i <a_i, v_i> + offset - lost  <=  <row, value>

starting from a_target = row. Nodes are passed last to first. An affine node is passed by its own
transpose (`jax.vjp`: no rule for each operation), a nonlinearity by its two planes: a positive
coefficient takes the plane below, a negative one the plane above, and each is passed by its
transpose again. What remains stands on the frontier (the sets, or any node that is not passed), and
is concretised there by the dual norm. `lost` is what the row allows for rounding.

A bound from above is that from below of the negated row, turned back. The two are one as long as
only affine nodes are passed: they part at the first nonlinearity. Rows are vmapped.

Where a nonlinearity has two pairs of planes neither of which is always the better (variants), or is
relaxed over several boxes, a row becomes several on its way: from there on all that it holds has a
leading axis for them, and its bound is the best of theirs.

Source: Zhang et al., NeurIPS 2018 (CROWN); Xu et al., NeurIPS 2020 (on general graphs, auto_LiRPA).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from bnncert._compiler.convolution import canonical
from bnncert._varying import axes_of, varying
from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.ops.boxes import drop_nan
from bnncert.bounds.ops.lines import Lines
from bnncert.bounds.ops.planes import Planes
from bnncert.sets import Box, LpBall, Set, dual_norm

Sets: TypeAlias = Sequence[Set] | Mapping[int, Set]
"""By node, what a row that ends there is concretised over."""


class Row(NamedTuple):
    """A linear bound from below, or several.

    Attributes:
        coefficients: of the frontier, by node; the shapes of the values, after an axis over ways
            where a nonlinearity was passed in several.
        offset: the constant term; likewise.
        lost: what the bound gives way by besides, never negative.
    """

    coefficients: dict[int, Array]
    offset: Array
    lost: Array


class Passed(NamedTuple):
    """What a row gains by passing one node.

    Attributes:
        coefficients: of its operands.
        offset: what the constant term gains.
        lost: what the bound gives way by.
    """

    coefficients: tuple[Array, ...]
    offset: Array | float
    lost: Array | float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """An affine function of the operands of a node, as rows pass it.

    Attributes:
        pullback: its transpose, of `jax.vjp`; None of a constant.
        at_zero: its value at 0.
        axes: of the mesh, that rows vary over.
        convolves: whether there is a convolution in it.
    """

    pullback: Any
    at_zero: Array
    axes: frozenset[str] = field(metadata={"static": True})
    convolves: bool = field(metadata={"static": True})

    def coefficients(self, row: Array) -> tuple[Array, ...]:
        """Those of the operands, from those of the value."""
        if self.pullback is None:
            return ()
        pullback = canonical(self.pullback) if self.convolves else self.pullback
        return tuple(pullback(varying(row, self.axes)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """How a row passes one node.

    Attributes:
        through: from the row's coefficients at the node, of the shape of its value; a pytree where
            steps are stacked (`jax.tree_util.Partial`).
        rank: of the node's value.
        operands: nodes, one of which may come more than once.
    """

    through: Callable[[Array], Passed]
    rank: int = field(metadata={"static": True})
    operands: tuple[int, ...] = field(metadata={"static": True})

    @property
    def by_lines(self) -> bool:
        """Says whether it is of a function of one value, passed by a multiplication."""
        return getattr(self.through, "func", None) is _past_lines

    def __call__(self, a: Array) -> Passed:
        """Passes a row, or several."""
        return self.through(a) if a.ndim == self.rank else jax.vmap(self.through)(a)


class Charged(NamedTuple):
    """How a row passes a node whose value is off.

    Attributes:
        step: how it passes the node.
        error: by how much the value may be off; with a leading axis where ways differ.
    """

    step: Step
    error: Array

    @property
    def operands(self) -> tuple[int, ...]:
        """Nodes."""
        return self.step.operands

    def __call__(self, a: Array) -> Passed:
        """Passes a row, or several."""
        passed = self.step(a)
        return passed._replace(lost=passed.lost + charges(a, self.error, self.step.rank))


class Ways(NamedTuple):
    """How a row passes a nonlinearity in several ways at once: it becomes several rows.

    Attributes:
        steps: of the same operands; with a leading axis over the ways.
        number: of them.
    """

    steps: Step
    number: int

    @property
    def operands(self) -> tuple[int, ...]:
        """Nodes."""
        return self.steps.operands

    def __call__(self, a: Array) -> Passed:
        """Passes a row, or as many as there are ways, each its own."""
        own = None if a.ndim == self.steps.rank else 0
        return jax.vmap(lambda step, a: step(a), (0, own))(self.steps, a)

    def only(self, way: int) -> Step:
        """One of them."""
        return jax.tree.map(lambda leaf: leaf[way], self.steps)

    def last(self, number: int) -> "Step | Ways":
        """The last of them."""
        if number == 1:
            return self.only(-1)
        return Ways(jax.tree.map(lambda leaf: leaf[-number:], self.steps), number)

    def spread(self, own: tuple[int, int], shape: tuple[int, int]) -> "Ways":
        """Repeated along either axis of the ways, of which there are two, where its own has one."""

        def leaf(v: Array) -> Array:
            grid = v.reshape(*own, *v.shape[1:])
            return jnp.broadcast_to(grid, (*shape, *v.shape[1:])).reshape(-1, *v.shape[1:])

        return self if own == shape else Ways(jax.tree.map(leaf, self.steps), math.prod(shape))


class Apart(NamedTuple):
    """As `Ways`, by steps that are not stacked: they share what is too large to be repeated.

    Attributes:
        steps: one for each way.
    """

    steps: tuple[Step, ...]

    @property
    def operands(self) -> tuple[int, ...]:
        """Nodes."""
        return self.steps[0].operands

    @property
    def number(self) -> int:
        """How many ways there are."""
        return len(self.steps)

    def __call__(self, a: Array) -> Passed:
        """Passes a row, or as many as there are ways, each its own."""
        single = a.ndim == self.steps[0].rank
        found = (step(a if single else a[i]) for i, step in enumerate(self.steps))
        return jax.tree.map(lambda *v: jnp.stack(v), *found)

    def only(self, way: int) -> Step:
        """One of them."""
        return self.steps[way]

    def last(self, number: int) -> "Step | Apart":
        """The last of them."""
        return self.only(-1) if number == 1 else Apart(self.steps[-number:])

    def spread(self, own: tuple[int, int], shape: tuple[int, int]) -> "Apart":
        """As `Ways.spread`."""
        grid = np.broadcast_to(np.arange(self.number).reshape(own), shape)
        return Apart(tuple(self.steps[way] for way in grid.reshape(-1)))


AnyStep: TypeAlias = Step | Charged | Ways | Apart
"""Of one node, in one way or in several."""


class Steps(NamedTuple):
    """How rows pass a graph; where a node is not here, a row stops.

    Attributes:
        affine: the nodes that rows of both signs pass alike.
        relaxed: the nonlinearities; all of those that are passed in several ways, in as many.
        slack: what a row allows for at the node where it begins (`rounding.Errors.carried`).
        floors: what it allows for at every node it comes to: scalars.

    What is allowed for has a leading axis where it differs from way to way.
    """

    affine: Mapping[int, AnyStep]
    relaxed: Mapping[int, AnyStep] = {}
    slack: Mapping[int, Array] = {}
    floors: Mapping[int, Array] = {}

    def and_relaxed(self, more: Mapping[int, AnyStep]) -> "Steps":
        """With steps for more nonlinearities."""
        return self._replace(relaxed={**self.relaxed, **more})

    def each(self) -> "list[Steps]":
        """One way at a time."""
        counts = {step.number for step in self.relaxed.values() if isinstance(step, Ways | Apart)}

        def only(step: AnyStep, way: int) -> AnyStep:
            return step.only(way) if isinstance(step, Ways | Apart) else step

        return [
            self._replace(relaxed={i: only(step, way) for i, step in self.relaxed.items()})
            for way in range(max(counts, default=1))
        ]


def pull_back(row: Row, steps: Steps, until: Collection[int] = ()) -> Row:
    """A row passed back node by node, last to first, to the frontier.

    Args:
        row: where it stands.
        steps: how to pass each node; where a node is not among them, the row ends on it.
        until: nodes at the first of which it stops, and waits.
    """
    waiting, ended = dict(row.coefficients), {}
    offset, lost = row.offset, row.lost
    floors: list[Array] = []
    for index in range(max(waiting, default=-1), -1, -1):
        if index not in waiting:
            continue
        if index in until:
            break
        coefficients = waiting.pop(index)
        if index in steps.floors:
            floors.append(steps.floors[index])
        step = steps.affine.get(index, steps.relaxed.get(index))
        if step is None:
            ended[index] = coefficients
            continue
        passed, gained, less = step(coefficients)
        offset, lost = offset + gained, lost + less
        for operand, more in zip(step.operands, passed, strict=True):
            waiting[operand] = waiting[operand] + more if operand in waiting else more
    if floors:  # the same for all rows: one sum
        lost = lost + jnp.stack(jnp.broadcast_arrays(*floors)).sum(0)
    return Row({**ended, **waiting}, offset, lost)


def start(target: int, row: Array, steps: Steps) -> Row:
    """`<row, value of target>`, not passed back at all.

    Args:
        target: index of the node.
        row: the shape of its value.
        steps: how to pass each node.
    """
    zero = jnp.zeros((), row.dtype)
    slack = steps.slack.get(target)
    lost = zero if slack is None else charges(row, slack, row.ndim)
    return Row({target: row}, zero, lost)


def linear_rows(target: int, row: Array, steps: Steps) -> tuple[Row, Row]:
    """The linear bounds of `<row, value of target>`, and of its negative, both from below."""
    exact = pull_back(start(target, row, steps), steps, steps.relaxed)
    return pull_back(exact, steps), pull_back(negative(exact), steps)


def negative(row: Row) -> Row:
    """The bound from below of the negated form, where a row is exact."""
    return Row({i: -a for i, a in row.coefficients.items()}, -row.offset, row.lost)


def row_box(target: int, row: Array, steps: Steps, sets: Sets, at_once: bool) -> Box:
    """Bounds on `<row, value of target>`.

    Args:
        target: index of the node.
        row: the shape of its value.
        steps: how to pass each node.
        sets: for each node, what to concretise over where a row ends there.
        at_once: whether both ends are computed as one, of a program of half the size; else XLA
            drops the end that nobody asks for.
    """
    exact = pull_back(start(target, row, steps), steps, steps.relaxed)
    if not any(i in steps.relaxed for i in exact.coefficients):
        return _extremes_of(exact, sets)

    def lower(row: Row) -> Array:
        return least(pull_back(row, steps), sets)

    if at_once:
        low, high = jax.vmap(lambda sign: lower(signed(exact, sign)))(SIGNS)
    else:
        low, high = lower(exact), lower(negative(exact))
    return Box(low, -high)


def signed(row: Row, sign: Array) -> Row:
    """Gives a row that is exact, or its negative."""
    return Row({i: sign * a for i, a in row.coefficients.items()}, sign * row.offset, row.lost)


SIGNS: Any = np.array([1, -1], np.int8)
"""Those of a row and its negative, to be mapped over: by a stack, both would be written out."""


def row_bounds(
    graph: Graph,
    target: int,
    steps: Steps,
    sets: Sets,
    batch_size: int,
    at_once: bool = False,
) -> Box:
    """Bounds on each coordinate of a node, by one row each.

    Args:
        graph: the traced function.
        target: index of the node.
        steps: how to pass each node.
        sets: as `row_box`.
        batch_size: rows at once. Memory: batch_size times the widest value passed.
        at_once: as `row_box`.
    """
    node = graph.nodes[target]

    def one(row: Array) -> Box:
        return row_box(target, row, steps, sets, at_once)

    return shaped(map_rows(one, node, batch_size), node)


def shaped(box: Box, node: Node) -> Box:
    """The bounds of a node's coordinates, as of its value.

    A set of another dtype (the function casts) must not pass it on.
    """
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


def least(row: Row, sets: Sets) -> Array:
    """The least value of a linear bound over the sets it ends on: `a.c - |a|.r`, or the dual norm.

    Of two bounds the better. NaN of an overflow in a plane.
    """
    value = row.offset - row.lost
    for index, a in row.coefficients.items():

        def lowest(a: Array, region: Set = sets[index]) -> Array:
            return _extremes(a, region)[0]

        single = a.ndim == jnp.ndim(sets[index].center)
        value = value + (lowest(a) if single else jax.vmap(lowest)(a))
    if value.ndim == 0:
        return value
    return jnp.max(jnp.where(value < jnp.inf, value, -jnp.inf))


def concretize(lower: Row, upper: Row, sets: Sets) -> Box:
    """The extremes of two linear bounds, the second of the negated value, both from below."""
    return drop_nan(Box(least(lower, sets), -least(upper, sets)))


def _extremes_of(row: Row, sets: Sets) -> Box:
    """Both ends of a row that is exact."""
    lower, upper = row.offset - row.lost, row.offset + row.lost
    for index, a in row.coefficients.items():
        low, high = _extremes(a, sets[index])
        lower, upper = lower + low, upper + high
    box = Box(lower, upper)
    if lower.ndim == 0:
        return box
    box = drop_nan(box)
    return Box(box.lower.max(), box.upper.min())


def affine_steps(graph: Graph) -> dict[int, Step]:
    """How to pass each affine node."""
    return {i: _affine_step(graph, node) for i, node in enumerate(graph.nodes) if node.affine}


def charges(row: Array, error: Array, rank: int) -> Array:
    """`<|row|, error>`, of values of this rank; either with a leading axis where ways differ."""
    axes = tuple(0 if v.ndim > rank else None for v in (row, error))
    product = dot if axes == (None, None) else jax.vmap(dot, axes)
    return product(jnp.abs(row), error)


def planes_step(graph: Graph, index: int, planes: Planes) -> Step:
    """Passes a relaxed node: positive coefficients by the plane below, others by that above."""
    rank = len(graph.nodes[index].shape)
    if planes.lines is not None:
        return Step(Partial(_past_lines, planes.lines), rank, planes.operands)
    zeros = _zeros(graph, planes.operands)
    convolves = _convolves(graph.nodes[index])
    if planes.corner is not None:
        product, (corner, below, above) = graph.nodes[index].evaluate, planes.corner
        of_first = [
            _transposed(lambda v, end=end: product(v, end), zeros[:1], convolves)
            for end in (below, above)
        ]
        of_second = _transposed(lambda w: product(corner, w), zeros[1:], convolves)
        return Step(Partial(_past_corner, corner, of_second, *of_first), rank, planes.operands)
    below, above = (_transposed(f, zeros, convolves) for f in (planes.lower, planes.upper))
    return Step(Partial(_past_planes, below, above), rank, planes.operands)


def _past_lines(lines: Lines, a: Array) -> Passed:
    slopes = jnp.maximum(a, 0) * lines.lower_slope + jnp.minimum(a, 0) * lines.upper_slope
    return Passed((slopes,), weighed(a, lines.lower_offset, lines.upper_offset))


def _past_planes(below: Transposed, above: Transposed, a: Array) -> Passed:
    low, high = below.coefficients(jnp.maximum(a, 0)), above.coefficients(jnp.minimum(a, 0))
    passed = tuple(p + n for p, n in zip(low, high, strict=True))
    return Passed(passed, weighed(a, below.at_zero, above.at_zero))


def _past_corner(
    corner: Array, of_second: Transposed, below: Transposed, above: Transposed, a: Array
) -> Passed:
    (second,) = of_second.coefficients(a)
    (low,), (high,) = (
        below.coefficients(jnp.maximum(a, 0)),
        above.coefficients(jnp.minimum(a, 0)),
    )
    first = low + high
    return Passed((first, second), -jnp.sum(corner * first))


def weighed(a: Array, positive: Array, negative: Array) -> Array:
    """`<max(a, 0), positive> + <min(a, 0), negative>`.

    A sum and no product: XLA fuses it with what made `a`, which a product would have to write out.
    """
    return jnp.sum(jnp.where(a > 0, a * positive, a * negative))


def at_zero(graph: Graph, node: Node) -> Array:
    """Computes an affine operation's value at 0."""
    return node.evaluate(*node.fill(_zeros(graph, node.refs)))


def _affine_step(graph: Graph, node: Node) -> Step:
    """Passes an affine node: coefficients by its transpose, the offset by its value at 0."""
    transposed = _transposed(
        lambda *values: node.evaluate(*node.fill(values)),
        _zeros(graph, node.refs),
        _convolves(node),
    )

    def through(a: Array) -> Passed:
        offset = dot(a, transposed.at_zero) if node.has_constant else 0.0
        return Passed(transposed.coefficients(a), offset)

    return Step(through, len(node.shape), node.refs)


def _convolves(node: Node) -> bool:
    return node.op == "conv_general_dilated"


def _zeros(graph: Graph, operands: Sequence[int]) -> list[Array]:
    zeros = [jnp.zeros(graph.nodes[i].shape, graph.nodes[i].dtype) for i in operands]
    return varying(zeros, axes_of(graph.inputs))


def _transposed(f: Callable[..., Array], zeros: Sequence[Array], convolves: bool) -> Transposed:
    """An affine function's value at 0, and its transpose."""
    if not zeros:
        return Transposed(None, f(), frozenset(), False)
    axes = axes_of(zeros)
    at_zero, pullback = jax.vjp(lambda *values: varying(f(*values), axes), *zeros)
    return Transposed(pullback, at_zero, axes, convolves)


def _extremes(a: Array, region: Set) -> tuple[Array, Array]:
    """The smallest and the largest value of `<a, x>` over a set."""
    if isinstance(region, LpBall):
        middle, reach = dot(a, region.center), region.eps * dual_norm(a, region.p)
    else:
        middle, reach = dot(a, region.center), dot(jnp.abs(a), region.radius)
    return middle - reach, middle + reach


def dot(a: Array, b: Array) -> Array:
    """`<a, b>`, in full precision whatever a backend's default is."""
    return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST)
