"""Interval rules of operations that are affine in their bounded operands.

Three forms cover them:

    order-preserving    reshape, sum, concatenate, ...: f([l, u]) = [f(l), f(u)]
    signed              negate, subtract, scale: the ends change places where the sign is negative
    mixing              y = W x + b over many coordinates: centre W c + b, radius |W| r

Each is exact for its own output where the coordinates of its operand are independent. `spreads`
says what an operation does to that independence, from which `interval.py` finds where op-by-op
intervals lose to one merged affine map. The backward pass needs no rule: it transposes `evaluate`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.sets import Box


class AffineRule(NamedTuple):
    """How an affine operation acts on intervals.

    Attributes:
        interval: `(node, *boxes of the bounded operands) -> Box`.
        applies: whether a node is affine, given which of its operands are bounded.
        spreads: "places": each coordinate of an operand goes to at most one of the value, alone;
            "repeats": to several; "adds": as "places", operands meeting elementwise;
            "mixes": a coordinate of the value sums many of one operand.
        has_offset: whether constant operands may add a constant (else f(0) = 0).
    """

    interval: Callable[..., Box]
    applies: Callable[[Node], bool]
    spreads: Literal["places", "repeats", "adds", "mixes"]
    has_offset: bool = False


MIXING = ("dot_general", "conv_general_dilated")
"""Operations bounded by centre and radius."""

SCALING = ("mul", "div", *MIXING)
"""Operations with coefficients of their own."""

SIGNED = ("neg", "sub", *SCALING)
"""Operations some coefficient of which may be negative."""


def _order_preserving(node: Node, *boxes: Box) -> Box:
    lower = node.evaluate(*node.fill([box.lower for box in boxes]))
    upper = node.evaluate(*node.fill([box.upper for box in boxes]))
    return Box(lower, upper)


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
    if node.op in SCALING:
        return node.evaluate(*_with_magnitudes(node).fill(radii))
    return linear(node, *radii)


def linear(node: Node, *values: Array) -> Array:
    """An affine operation without its constant: its derivative, which no large constant rounds."""
    if not has_constant(node):
        return node.evaluate(*node.fill(values))
    zeros = tuple(map(jnp.zeros_like, values))
    return jax.jvp(lambda *v: node.evaluate(*node.fill(v)), zeros, tuple(values))[1]


def has_constant(node: Node) -> bool:
    """Whether an affine operation may have a value other than 0 at 0."""
    return AFFINE[node.op].has_offset and len(node.refs) < len(node.operands)


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


def _any_operand(node: Node) -> bool:
    return True


def _one_operand(node: Node) -> bool:
    return len(node.refs) == 1


def _bounded_only(*allowed: int) -> Callable[[Node], bool]:
    """Affine where no other operands are bounded: indices, masks and divisors are constant."""

    def applies(node: Node) -> bool:
        return all(i in allowed for i, o in enumerate(node.operands) if isinstance(o, Ref))

    return applies


def _cases_only(node: Node) -> bool:
    return not isinstance(node.operands[0], Ref)


def _rule(interval: Any, applies: Any, spreads: Any, has_offset: bool = False) -> AffineRule:
    return AffineRule(interval, applies, spreads, has_offset)


AFFINE: dict[str, AffineRule] = {
    "reshape": _rule(_order_preserving, _any_operand, "places"),
    "transpose": _rule(_order_preserving, _any_operand, "places"),
    "squeeze": _rule(_order_preserving, _any_operand, "places"),
    "expand_dims": _rule(_order_preserving, _any_operand, "places"),
    "rev": _rule(_order_preserving, _any_operand, "places"),
    "slice": _rule(_order_preserving, _any_operand, "places"),
    "split": _rule(_order_preserving, _any_operand, "places"),
    "dynamic_slice": _rule(_order_preserving, _bounded_only(0), "places"),
    "convert_element_type": _rule(_order_preserving, _is_float, "places"),
    "unstack": _rule(_order_preserving, _any_operand, "places"),
    "stack": _rule(_order_preserving, _any_operand, "places", has_offset=True),
    "concatenate": _rule(_order_preserving, _any_operand, "places", has_offset=True),
    "dynamic_update_slice": _rule(_order_preserving, _bounded_only(0, 1), "adds", has_offset=True),
    "scatter": _rule(_order_preserving, _bounded_only(0, 2), "adds", has_offset=True),
    "scatter-add": _rule(_order_preserving, _bounded_only(0, 2), "mixes", has_offset=True),
    "pad": _rule(_order_preserving, _bounded_only(0), "places", has_offset=True),
    "select_n": _rule(_order_preserving, _cases_only, "places", has_offset=True),
    "tile": _rule(_order_preserving, _any_operand, "repeats"),
    "windows": _rule(_order_preserving, _any_operand, "repeats"),
    "broadcast_in_dim": _rule(_order_preserving, _any_operand, "repeats"),
    # The constant: what `mode="fill"` puts where an index lies outside.
    "gather": _rule(_order_preserving, _bounded_only(0), "repeats", has_offset=True),
    "add": _rule(_order_preserving, _any_operand, "adds", has_offset=True),
    "add_any": _rule(_order_preserving, _any_operand, "adds", has_offset=True),
    "sub": _rule(_subtract, _any_operand, "adds", has_offset=True),
    "neg": _rule(_negate, _any_operand, "places"),
    "mul": _rule(_scale, _one_operand, "places"),
    "div": _rule(_scale, _bounded_only(0), "places"),
    "reduce_sum": _rule(_order_preserving, _any_operand, "mixes"),
    "cumsum": _rule(_order_preserving, _any_operand, "mixes"),
    "reduce_window_sum": _rule(_order_preserving, _any_operand, "mixes"),
    "dot_general": _rule(_mix, _one_operand, "mixes"),
    "conv_general_dilated": _rule(_mix, _one_operand, "mixes"),
}
