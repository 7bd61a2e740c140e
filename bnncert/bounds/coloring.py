"""Rows side by side: those whose cones do not meet are pulled back as one.

The *cone* of a coordinate of a node is what it depends on in the nodes before. In a network of
convolutions it is a window, and the windows of places far enough apart do not meet. The sum of
their unit rows is then one row, whose coefficients in each cone are those of one of them:

    (e_p + e_q)' J  =  e_p' J  in the cone of p,  e_q' J  in that of q,  0 elsewhere

Each nonlinearity acts on a coordinate by itself, so that this holds through relaxations as well.
What a row sums up (offsets, what it allows for rounding, extremes over a box) is summed cone by
cone: by a product with the matrix that says which coordinate is in which cone. So a convolution of
C channels and P places needs C K rows in place of C P, with K colours of places; cones of the same
place are alike for all channels.

Cones are those of the structure, of any weights: found where the function is traced, by pulling
ones back through the operations with ones for their constants. Where an operation is not known to
have them, or a set is no box, rows are pulled back one by one.

Source: Curtis, Powell and Reid, "On the estimation of sparse Jacobian matrices", 1974 (colours).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert._varying import axes_of
from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.ops.boxes import drop_nan
from bnncert.bounds.plan import Plan
from bnncert.bounds.rows import (
    SIGNS,
    Charged,
    Row,
    Step,
    Steps,
    Ways,
    at_zero,
    signed,
)
from bnncert.sets import Box, Set

_KNOWN = frozenset(
    "add add_any broadcast_in_dim concatenate conv_general_dilated convert_element_type div "
    "expand_dims mul neg pad reduce_sum reduce_window_sum reshape rev slice squeeze sub "
    "transpose".split()
)
"""Affine operations whose structure is that of ones in place of their constants."""

_MOST = 2**26
"""Places times coordinates of a node that cones are looked for in."""


class Coloring(NamedTuple):
    """Places of a node, parted into colours whose cones do not meet.

    Attributes:
        axis: of the node's value, along which all coordinates of a place lie.
        places: for each colour, those of its cones, in the order of the other axes; shape
            (colours, most cones), filled up with a number that no place has.
        cones: for each node, the number of the cone that a coordinate is in, for each colour: -1
            for none; shape (colours, size of the node).
    """

    axis: int
    places: np.ndarray
    cones: Mapping[int, np.ndarray]


def coloring(plan: Plan, index: int) -> Coloring | None:
    """Finds colours for the coordinates of a node; None where they save less than half the rows."""
    node, size = plan.graph.nodes[index], math.prod(plan.graph.nodes[index].shape)
    if axes_of(plan.graph.inputs):  # inside `shard_map` nothing can be evaluated while it is traced
        return None
    if len(node.shape) < 2 or not any(n.op == "conv_general_dilated" for n in plan.graph.nodes):
        return None
    found = [_along(plan, index, axis) for axis in range(len(node.shape)) if node.shape[axis] > 1]
    rows = [len(c.places) * node.shape[c.axis] if c else size for c in found]
    if not rows or min(rows) > size // 2:
        return None
    return found[rows.index(min(rows))]


def colored_bounds(plan: Plan, index: int, steps: Steps) -> Box | None:
    """Bounds each coordinate of a node, by rows of several at once.

    Args:
        plan: of the function.
        index: of the node.
        steps: how to pass each node.

    Returns:
        The bounds; None where rows are not sparse, are passed by more than lines, or end on a ball.
    """
    passed = [_inner(step) for step in steps.relaxed.values()]
    if not all(isinstance(step, Step) and step.by_lines for step in passed):
        return None
    if not all(isinstance(region, Box) for region in plan.regions):
        return None
    colors = coloring(plan, index)
    if colors is None:
        return None
    affine = {i: s if isinstance(s, Charged) else plan.affine()[i] for i, s in steps.affine.items()}
    steps = steps._replace(affine=affine)
    node, axis = plan.graph.nodes[index], colors.axis
    most, channels = colors.places.shape[1], node.shape[axis]

    def one(of_nodes: Mapping[int, Array]) -> Box:
        masks = {
            i: (v[:, None] == jnp.arange(most)).astype(node.dtype) for i, v in of_nodes.items()
        }
        own = (of_nodes[index] >= 0).astype(node.dtype).reshape(node.shape)
        along = jnp.eye(channels, dtype=node.dtype)
        beside = [1] * len(node.shape)
        beside[axis] = channels

        def bounds(channel: Array) -> Box:
            pull = _Pull(plan.graph, steps, masks)
            row = own * channel.reshape(beside)
            exact = pull.back(pull.start(index, row), until_relaxed=True)

            def lower(sign: Array) -> Array:
                return pull.least(pull.back(signed(exact, sign)), plan.regions)

            low, high = jax.vmap(lower)(SIGNS)
            return Box(low, -high)

        if channels <= plan.batch_size:
            return jax.vmap(bounds)(along)
        return jax.lax.map(bounds, along, batch_size=plan.batch_size)

    cones = {i: jnp.asarray(v) for i, v in colors.cones.items()}
    box = jax.lax.map(one, cones)  # (colours, channels, cones)
    others = node.shape[:axis] + node.shape[axis + 1 :]
    order = np.argsort(colors.places.reshape(-1))[: math.prod(others)]

    def settled(end: Array) -> Array:
        found = jnp.moveaxis(end, 1, 2).reshape(-1, channels)[order]
        return jnp.moveaxis(found.reshape(*others, channels), -1, axis).astype(node.dtype)

    return drop_nan(Box(settled(box.lower), settled(box.upper)))


class _Pull(NamedTuple):
    """Pulls rows back side by side: as `rows.pull_back`, summed cone by cone.

    Attributes:
        graph: the traced function.
        steps: how to pass each node.
        masks: for each node, a matrix (its size, cones) of zeros and ones.
    """

    graph: Graph
    steps: Steps
    masks: Mapping[int, Array]

    def total(self, index: int, terms: Array) -> Array:
        """Sums terms of a node's coordinates, cone by cone; ways come first."""
        rank = len(self.graph.nodes[index].shape)
        flat = terms.reshape(*terms.shape[: terms.ndim - rank], -1)
        return jnp.matmul(flat, self.masks[index], precision=jax.lax.Precision.HIGHEST)

    def start(self, index: int, row: Array) -> Row:
        """Makes a row that is not pulled back at all."""
        zero = jnp.zeros(self.masks[index].shape[1], row.dtype)
        slack = self.steps.slack.get(index)
        return Row({index: row}, zero, zero if slack is None else self.total(index, row * slack))

    def back(self, row: Row, until_relaxed: bool = False) -> Row:
        """Pulls a row back to the sets, or to the first nonlinearity."""
        waiting, (_, offset, lost) = dict(row.coefficients), row
        ended: dict[int, Array] = {}
        for index in range(max(waiting, default=-1), -1, -1):
            if index not in waiting:
                continue
            if until_relaxed and index in self.steps.relaxed:
                break
            a = waiting.pop(index)
            if index in self.steps.floors:
                lost = lost + self.steps.floors[index][..., None]
            step = self.steps.affine.get(index, self.steps.relaxed.get(index))
            if step is None:
                ended[index] = a
                continue
            if isinstance(step, Charged):
                lost = lost + self.total(index, jnp.abs(a) * step.error)
            passed, terms = self._past(index, _inner(step), a)
            if terms is not None:
                offset = offset + self.total(index, terms)
            for operand, more in zip(step.operands, passed, strict=True):
                waiting[operand] = waiting[operand] + more if operand in waiting else more
        return Row({**ended, **waiting}, offset, lost)

    def _past(self, index: int, step: Any, a: Array) -> tuple[tuple[Array, ...], Array | None]:
        """Passes one node: the coefficients of its operands, and the terms of the offset."""
        if step.by_lines:  # with a leading axis where there are several
            lines = step.through.args[0]
            below, above = jnp.maximum(a, 0), jnp.minimum(a, 0)
            slopes = below * lines.lower_slope + above * lines.upper_slope
            return (slopes,), below * lines.lower_offset + above * lines.upper_offset
        node = self.graph.nodes[index]
        terms = a * at_zero(self.graph, node) if node.has_constant else None
        return step(a).coefficients, terms

    def least(self, row: Row, sets: tuple[Set, ...]) -> Array:
        """Finds the least value over the sets, for each cone; of several ways the best."""
        value = row.offset - row.lost
        for index, a in row.coefficients.items():
            region: Any = sets[index]  # a box
            value = value + self.total(index, a * region.center)
            value = value - self.total(index, jnp.abs(a) * region.radius)
        if value.ndim == 1:
            return value
        return jnp.max(jnp.where(value < jnp.inf, value, -jnp.inf), 0)


def _inner(step: Any) -> Any:
    """Gives the step itself, of one that is charged or that is one of several stacked."""
    if isinstance(step, Charged):
        return step.step
    return step.steps if isinstance(step, Ways) else step


def _along(plan: Plan, index: int, axis: int) -> Coloring | None:
    """Finds colours of the places whose coordinates lie along an axis."""
    node = plan.graph.nodes[index]
    places = math.prod(node.shape) // node.shape[axis]
    if places * max(math.prod(n.shape) for n in plan.graph.nodes[: index + 1]) > _MOST:
        return None
    others = node.shape[:axis] + node.shape[axis + 1 :]
    rows = np.eye(places, dtype=bool).reshape(places, *others)
    rows = np.broadcast_to(np.expand_dims(rows, axis + 1), (places, *node.shape))
    supports = _supports(plan.graph, index, rows)
    if supports is None:
        return None
    # 1. Each place takes the first colour whose cones it does not meet.
    most = places // 2  # more are no use
    taken: list[dict[int, np.ndarray]] = []
    colors: list[list[int]] = []
    for place in range(places):
        own = {i: support[place] for i, support in supports.items()}
        free = (
            c for c, cones in enumerate(taken) if not any((cones[i] & own[i]).any() for i in own)
        )
        color = next(free, len(taken))
        if color == len(taken):
            if color == most:
                return None
            taken.append({i: np.zeros_like(v) for i, v in own.items()})
            colors.append([])
        colors[color].append(place)
        for i, v in own.items():
            taken[color][i] |= v
    # 2. The cones of each colour are numbered.
    cones = {i: np.full((len(colors), v.shape[1]), -1, np.int16) for i, v in supports.items()}
    for color, members in enumerate(colors):
        for number, place in enumerate(members):
            for i, support in supports.items():
                cones[i][color, support[place]] = number
    widest = max(map(len, colors))
    table = np.full((len(colors), widest), places)
    for color, members in enumerate(colors):
        table[color, : len(members)] = members
    return Coloring(axis, table, cones)


def _supports(graph: Graph, index: int, rows: np.ndarray) -> dict[int, np.ndarray] | None:
    """Pulls rows of ones back: for each node, which of its coordinates each row depends on.

    None where an operation's structure is not known, or where all rows depend on all of a node.
    """
    found: dict[int, np.ndarray] = {index: rows}
    for i in range(index, -1, -1):
        if i not in found:
            continue
        node = graph.nodes[i]
        passed = _structure(graph, node, found[i])
        if passed is None:
            return None
        for operand, more in zip(node.refs, passed, strict=True):
            if more.all():
                return None
            found[operand] = found[operand] | more if operand in found else more
    return {i: v.reshape(len(v), -1) for i, v in found.items()}


def _structure(graph: Graph, node: Node, rows: np.ndarray) -> list[np.ndarray] | None:
    """Pulls rows of ones back through one operation."""
    if node.op == "input":
        return []
    if node.is_relaxed:
        elementwise = node.operation.lines is not None and len(node.refs) == 1
        return [rows] if elementwise and graph.nodes[node.refs[0]].shape == node.shape else None
    if node.op not in _KNOWN:
        return None
    with jax.ensure_compile_time_eval():
        zeros = [jnp.zeros(graph.nodes[i].shape, graph.nodes[i].dtype) for i in node.refs]
        ones = [
            o if isinstance(o, Ref) else jnp.ones(np.shape(o), jnp.result_type(o))
            for o in node.operands
        ]
        alike = node._replace(operands=tuple(ones))
        pullback = jax.vjp(lambda *values: alike.evaluate(*alike.fill(values)), *zeros)[1]
        passed = jax.vmap(pullback)(jnp.asarray(rows, node.dtype))
        return [np.asarray(p != 0) for p in passed]
