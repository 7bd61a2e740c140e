"""Operations that are affine in their bounded operands.

Three forms cover their intervals:

    order-preserving    reshape, sum, concatenate, ...: f([l, u]) = [f(l), f(u)]
    signed              negate, subtract, scale: the ends change places where the sign is negative
    mixing              y = W x + b over many coordinates: centre W c + b, radius |W| r

Each is exact for its own output where the coordinates of its operand are independent. `spreads`
says what an operation does to that independence, from which `merging.py` finds where op-by-op
intervals lose to one merged affine map. The backward pass needs no rule: it transposes `evaluate`.

`roundings` counts what a sum loses: how often one of its terms is rounded, on the way to a value
and, in the transpose, on the way to a coefficient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.graph.operands import Operand
from bnncert.bounds.ops.boxes import stacked, unstacked
from bnncert.bounds.ops.operation import Affine, Operation, Roundings, one_bounded
from bnncert.sets import Box

MIXING = ("dot_general", "conv_general_dilated")
"""Operations bounded by centre and radius."""


def _order_preserving(node: Node, *boxes: Box) -> Box:
    if node.op in SUMMING:  # others are fused with what comes next, as they are
        return unstacked(at_ends(node, *map(stacked, boxes)))
    lower = node.evaluate(*node.fill([box.lower for box in boxes]))
    upper = node.evaluate(*node.fill([box.upper for box in boxes]))
    return Box(lower, upper)


def at_ends(node: Node, *ends: Array) -> Array:
    """Evaluates an operation at several points, each on a leading axis."""
    return jax.vmap(lambda *values: node.evaluate(*node.fill(values)))(*ends)


def _negate(node: Node, box: Box) -> Box:
    return Box(node.evaluate(box.upper), node.evaluate(box.lower))


def _subtract(node: Node, *boxes: Box) -> Box:
    lowers, uppers = [box.lower for box in boxes], [box.upper for box in boxes]
    a_lower, b_lower = node.fill(lowers)
    a_upper, b_upper = node.fill(uppers)
    return Box(node.evaluate(a_lower, b_upper), node.evaluate(a_upper, b_lower))


def _scale(node: Node, box: Box) -> Box:
    a, b = node.evaluate(*node.fill([box.lower])), node.evaluate(*node.fill([box.upper]))
    return Box(jnp.minimum(a, b), jnp.maximum(a, b))


def magnitude(node: Node, *radii: Array) -> Array:
    """The linear part with every coefficient's magnitude: what radii grow by."""
    if node.op == "neg":
        return radii[0]
    if node.op == "sub":
        return sum(radii[1:], radii[0])
    if node.affine.scales:
        return node.evaluate(*_with_magnitudes(node).fill(radii))
    return linear(node, *radii)


def linear(node: Node, *values: Array) -> Array:
    """An affine operation without its constant: its derivative, which no large constant rounds."""
    if not node.has_constant:
        return node.evaluate(*node.fill(values))
    zeros = tuple(map(jnp.zeros_like, values))
    return jax.jvp(lambda *v: node.evaluate(*node.fill(v)), zeros, tuple(values))[1]


def constant_part(node: Node, *values: Array) -> Array:
    """The value of an affine operation at 0, for operands of these shapes."""
    return node.evaluate(*node.fill([jnp.zeros_like(v) for v in values]))


def constant_magnitude(node: Node, *values: Array) -> Array:
    """`constant_part` of the constants' magnitudes: the largest that a part of its sums can be."""
    return jnp.abs(constant_part(_with_magnitudes(node), *values))


def _with_magnitudes(node: Node) -> Node:
    return node._replace(operands=tuple(map(_without_sign, node.operands)))


def _without_sign(operand: Operand) -> Operand:
    """The magnitude of a constant that is no index and no mask."""
    if isinstance(operand, Ref) or not jnp.issubdtype(jnp.result_type(operand), jnp.floating):
        return operand
    return jnp.abs(operand)


def mix(node: Node, center: Array, radius: Array) -> Box:
    """Centre and radius: two products instead of the four of positive and negative parts."""
    middle, reach = node.evaluate(*node.fill([center])), magnitude(node, radius)
    return Box(middle - reach, middle + reach)


def _mix(node: Node, box: Box) -> Box:
    return mix(node, box.center, box.radius)


def _is_float(node: Node) -> bool:
    return jnp.issubdtype(node.dtype, jnp.floating)


def _bounded_only(*allowed: int) -> Callable[[Node], bool]:
    """Affine where no other operands are bounded: indices, masks and divisors are constant."""

    def applies(node: Node) -> bool:
        return all(i in allowed for i, o in enumerate(node.operands) if isinstance(o, Ref))

    return applies


def _cases_only(node: Node) -> bool:
    return not isinstance(node.operands[0], Ref)


def _always(forward: int, backward: int) -> Callable[[Graph, Node], Roundings]:
    return lambda graph, node: Roundings(forward, backward)


def _windows(graph: Graph, node: Node) -> Roundings:
    return Roundings(0, node.shape[0] - 1)


def _repeats(graph: Graph, node: Node) -> Roundings:
    largest = max((math.prod(graph.nodes[i].shape) for i in node.refs), default=1)
    return Roundings(0, max(0, -(-math.prod(node.shape) // max(largest, 1)) - 1))


def _gathers(graph: Graph, node: Node) -> Roundings:
    return Roundings(0, math.prod(node.shape))


def _sums_up(graph: Graph, node: Node) -> Roundings:
    largest = max((math.prod(graph.nodes[i].shape) for i in node.refs), default=1)
    return Roundings(max(1, largest // max(math.prod(node.shape), 1)), 0)


def _cumulates(graph: Graph, node: Node) -> Roundings:
    length = node.shape[node.params["axis"]]
    return Roundings(length, length)


def _sums_windows(graph: Graph, node: Node) -> Roundings:
    window = math.prod(node.params["window_dimensions"])
    return Roundings(window, window)


def _scatters(graph: Graph, node: Node) -> Roundings:
    return Roundings(math.prod(_shape(graph, node.operands[2])) + 1, 0)


def dot_roundings(graph: Graph, node: Node) -> Roundings:
    """Of a matrix product, of one bounded operand or two."""
    (contract, _), (batch, _) = node.params["dimension_numbers"]
    first, second = (_shape(graph, o) for o in node.operands)
    summed = math.prod(first[i] for i in contract)
    kept = summed * math.prod(first[i] for i in batch)
    frees = {0: math.prod(second) // max(kept, 1), 1: math.prod(first) // max(kept, 1)}
    places = [place for place, o in enumerate(node.operands) if isinstance(o, Ref)]
    return Roundings(max(summed, 1), max(1, *(frees[place] for place in places)))


def convolution_roundings(graph: Graph, node: Node) -> Roundings:
    """Of patches times kernel; backward, at most each tap of each feature for an image's pixel."""
    _, rhs, out = node.params["dimension_numbers"]
    kernel = _shape(graph, node.operands[1])
    features = kernel[rhs[0]]
    taps = math.prod(kernel) // max(features, 1)
    space = math.prod(kernel[i] for i in rhs[2:])
    groups = node.params["feature_group_count"]
    backward = space * features // groups
    if isinstance(node.operands[1], Ref):  # for a tap of the kernel: every position it was at
        positions = math.prod(node.shape[i] for i in (out[0], *out[2:]))
        backward = max(backward, positions)
    return Roundings(max(taps, 1), max(backward, 1))


def _shape(graph: Graph, operand: Operand) -> tuple[int, ...]:
    return graph.nodes[operand.index].shape if isinstance(operand, Ref) else jnp.shape(operand)


_MOVES, _ONCE, _SCALED = _always(0, 0), _always(1, 0), _always(3, 3)


def _record(
    name: str,
    interval: Any,
    applies: Callable[[Node], bool] | None,
    affine: Affine,
    roundings: Callable[[Graph, Node], Roundings],
) -> Operation:
    return Operation(name, "affine", interval, applies, affine=affine, roundings=roundings)


def _moves(
    names: str,
    applies: Callable[[Node], bool] | None = None,
    spreads: Any = "places",
    has_offset: bool = False,
    roundings: Callable[[Graph, Node], Roundings] = _MOVES,
) -> list[Operation]:
    """Records of operations that move values, or add them up: they preserve order."""
    affine = Affine(spreads, has_offset)
    return [_record(name, _order_preserving, applies, affine, roundings) for name in names.split()]


_SUM = Affine("adds", has_offset=True)
_SCALE = Affine("places", scales=True, negates=True)
_PRODUCT = Affine("mixes", scales=True, negates=True)

AFFINE_OPERATIONS: tuple[Operation, ...] = (
    *_moves("reshape transpose squeeze expand_dims rev slice split unstack"),
    *_moves("dynamic_slice", _bounded_only(0)),
    *_moves("convert_element_type", _is_float, roundings=_always(1, 1)),
    *_moves("stack concatenate", has_offset=True),
    *_moves("dynamic_update_slice", _bounded_only(0, 1), "adds", has_offset=True),
    *_moves("scatter", _bounded_only(0, 2), "adds", has_offset=True),
    *_moves("scatter-add", _bounded_only(0, 2), "mixes", True, _scatters),
    *_moves("pad", _bounded_only(0), has_offset=True),
    *_moves("select_n", _cases_only, has_offset=True),
    *_moves("tile broadcast_in_dim", spreads="repeats", roundings=_repeats),
    *_moves("windows", spreads="repeats", roundings=_windows),
    # The constant: what `mode="fill"` puts where an index lies outside.
    *_moves("gather", _bounded_only(0), "repeats", True, _gathers),
    *_moves("add add_any", spreads="adds", has_offset=True, roundings=_ONCE),
    _record("sub", _subtract, None, _SUM._replace(negates=True), _ONCE),
    _record("neg", _negate, None, Affine("places", negates=True), _MOVES),
    _record("mul", _scale, one_bounded, _SCALE, _SCALED),
    _record("div", _scale, _bounded_only(0), _SCALE, _SCALED),
    *_moves("reduce_sum", spreads="mixes", roundings=_sums_up),
    *_moves("cumsum", spreads="mixes", roundings=_cumulates),
    *_moves("reduce_window_sum", spreads="mixes", roundings=_sums_windows),
    _record("dot_general", _mix, one_bounded, _PRODUCT, dot_roundings),
    _record("conv_general_dilated", _mix, one_bounded, _PRODUCT, convolution_roundings),
)

AFFINE: Mapping[str, Any] = {operation.name: operation for operation in AFFINE_OPERATIONS}
"""By name, whatever is bounded; `Node.affine` says where it holds."""

SUMMING = frozenset(o.name for o in AFFINE_OPERATIONS if o.affine and o.affine.spreads == "mixes")
"""Operations that add up many terms."""

MOVING = frozenset(
    o.name for o in AFFINE_OPERATIONS if o.roundings in (_MOVES, _repeats, _windows, _gathers)
)
"""Operations that move values, each to one place or to several, and round nothing."""


def spreads(graph: Graph, node: Node) -> str:
    """`Affine.spreads` of an affine node; a broadcast to as many values places."""
    kept = all(math.prod(graph.nodes[i].shape) == math.prod(node.shape) for i in node.refs)
    if node.op == "broadcast_in_dim" and kept:
        return "places"
    return node.affine.spreads
