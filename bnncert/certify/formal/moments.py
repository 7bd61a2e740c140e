"""What is known of the random values in a network whose weights are Gaussian: means and spreads.

No weight is truncated. Operation by operation, with h the values of one layer and "the past" the
weights of the layers before it, what is known of a random value v, for all inputs x of a set at
once, is

    mean        lower <= E v <= upper
    own         >= E Var(v_i | past);  given the past, coordinates are independent
    shared      >= the standard deviation of E[v_i | past]; coordinates correlate in any way

so that |m . v - E m . v|_2 <= sqrt(sum m^2 own) + sum |m| shared for any m, by Minkowski. A product
z = W h with weights W ~ N(M, S^2), independent of h, has

    E z = M E h,    own = S^2 E h^2,    shared = the above, with m a row of M
    z | h  ~  N( M h, s(h)^2 ),   s(h)^2 = S^2 h^2

where s is a norm of h, so that sd s(h) <= |S (h - E h)|_2 =: wobble. With R the mean of a rectified
Gaussian (`bnncert.certify.formal.rectified`), convex and increasing in s, Jensen's inequality gives

    E max(z, 0)  >=  R(M E h, s(E h))
    E max(z, 0)  <=  R(E z, sqrt(own)) + shared / 2 + phi(0) wobble / 2
    E max(z, 0)  <=  (E z + sqrt(E[z]^2 + own + shared^2)) / 2

the second because max(a + b, 0) <= max(a, 0) + max(b, 0). In the first layer nothing is lost:
shared and wobble are 0. max(., 0) has slope 1 at most, so its own is at most that of z, and its
shared at most shared + phi(0) wobble. Weights that several outputs use (convolutions) leave them
dependent: all of their deviation is counted as shared.

What is computed gives way by its own rounding: sums of n products by (n + 16) machine epsilons of
their magnitudes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.ops import interval
from bnncert.bounds.ops.affine import MIXING, constant_magnitude, magnitude
from bnncert.bounds.ops.boxes import hull
from bnncert.bounds.propagate import Domain, propagate
from bnncert.certify.formal import rectified
from bnncert.sets import Box, is_concrete

PRODUCTS = (*MIXING, "mul")
"""Operations of a value and weights."""


class Value(NamedTuple):
    """What is known of a random value; the module says of what.

    Attributes:
        mean: a `Box`.
        own: a variance.
        shared: a standard deviation.
        floor: at most s(E past)^2, where `gaussian`.
        wobble: at least the deviation of s(past), where `gaussian`.
        gaussian: given the past, each coordinate is.
        independent: given the past, coordinates are.
        fixed: the past is not random.
        leaves: the random inputs of the graph that the value depends on.
        weights: it is a posterior's leaf, perhaps rearranged.
    """

    mean: Box
    own: Array
    shared: Array
    floor: Array
    wobble: Array
    gaussian: bool
    independent: bool
    fixed: bool
    leaves: frozenset[int]
    weights: bool = False


def moments(graph: Graph, scales: Sequence[Array]) -> list[Value]:
    """Computes what is known of each node of a traced network.

    Args:
        graph: of the network over `Box`es of one point, the means of its random leaves, and then
            the set of inputs.
        scales: the leaves' standard deviations, in their order.

    Returns:
        A `Value` for each node.

    Raises:
        UnsupportedPrimitiveError: an operation on random values without a rule.
    """

    def start(index: int) -> Value:
        if index < len(scales):
            return _leaf(index, graph.inputs[index], jnp.asarray(scales[index]))
        return _constant(hull(graph.inputs[index]))

    def apply(index: int, values: list[Value]) -> Value:
        node = graph.nodes[index]
        return _step(node, [values[i] for i in node.refs])

    return propagate(graph, Domain(start, apply))[0]


def _leaf(index: int, point: Any, scale: Array) -> Value:
    variance = jnp.square(jnp.broadcast_to(scale, point.lower.shape).astype(point.lower.dtype))
    known = _constant(point)
    return known._replace(
        own=variance, floor=variance, gaussian=True, leaves=frozenset({index}), weights=True
    )


def _constant(box: Box) -> Value:
    zero = jnp.zeros_like(box.lower)
    return Value(box, zero, zero, zero, zero, True, True, True, frozenset())


def _step(node: Node, operands: list[Value]) -> Value:
    """Computes what is known of a node from what is known of its bounded operands."""
    if len(operands) == 2:
        a, b = operands
        if a.leaves & b.leaves:
            raise _no_rule(node, "Both operands depend on the same weights.")
        if node.op in PRODUCTS:
            if b.weights and not a.weights:
                return _product(node, a, b, 1)
            if a.weights and not b.weights:
                return _product(node, b, a, 0)
        if node.op in ("add", "add_any", "sub"):
            return _sum(node, a, b)
    elif node.op == "max" and _is_zero(node):
        return _rectified(operands[0])
    elif len(operands) == 1 and node.affine is not None:
        if _coarsens(node, operands[0]):
            raise _no_rule(
                node,
                f"The cast from {operands[0].own.dtype} to {node.dtype} rounds: an expectation "
                "bound is for a network in one format. Cast the params and the set instead.",
            )
        return _affine(node, operands[0])
    raise _no_rule(node)


def _coarsens(node: Node, v: Value) -> bool:
    """Says whether a node casts values to a format that does not hold all of them."""
    own, new = jnp.finfo(v.own.dtype), jnp.finfo(node.dtype)
    return new.nmant < own.nmant or new.minexp > own.minexp or new.maxexp < own.maxexp


def _product(node: Node, h: Value, w: Value, place: int) -> Value:
    """Multiplies a value by independent Gaussian weights, which are operand `place`."""
    if node.op in MIXING and not w.independent:
        raise _no_rule(node, "One output meets a weight more than once.")

    def product(a: Array, b: Array) -> Array:
        return node.evaluate(*((a, b) if place else (b, a)))

    # 1. Sizes of the factors: M about its center, h about its own.
    h = settled(h)
    m, variance = w.mean.center, w.own
    length, once = _uses(node, m, 1 - place)
    unit = unit_error(m, length)
    center, radius = h.mean.center, h.mean.radius
    size = jnp.abs(m) + w.mean.radius
    furthest = jnp.maximum(jnp.abs(h.mean.lower), jnp.abs(h.mean.upper))
    nearest = jnp.maximum(jnp.maximum(h.mean.lower, -h.mean.upper), 0.0)
    # 2. The mean, M E h, and what it may be off by, rounding included.
    middle = product(center, m)
    reach = product(radius, size) + product(furthest, w.mean.radius)
    reach = reach + unit * (product(jnp.abs(center), size) + reach)
    # 3. The deviations: E h^2 = (E h)^2 + second, and Minkowski for the past.
    second = h.own + jnp.square(h.shared)
    shared = jnp.sqrt(product(h.own, jnp.square(size))) + product(h.shared, size)
    return Value(
        Box(middle - reach, middle + reach),
        (1 + unit) * product(second + jnp.square(furthest), variance),
        (1 + unit) * shared,
        _less(unit) * product(jnp.square(nearest), variance),
        (1 + unit) * jnp.sqrt(product(second, variance)),
        gaussian=True,
        independent=w.independent and once,
        fixed=not h.leaves,
        leaves=h.leaves | w.leaves,
    )


def _uses(node: Node, m: Array, side: int) -> tuple[int, bool]:
    """Counts the weights that one output sums; says whether each weight is in one output alone."""
    if node.op == "mul":
        return 1, True
    if node.op == "dot_general":
        contracted = node.params["dimension_numbers"][0][1 - side]
        length = math.prod(m.shape[axis] for axis in contracted)
        return length, math.prod(node.shape) * length == math.prod(m.shape)
    return math.prod(m.shape), False


def settled(v: Value) -> Value:
    """Counts all deviation as shared, where coordinates are not independent given the past.

    Args:
        v: what is known of a value.

    Returns:
        The same with nothing own there.
    """
    if v.independent:
        return v
    unit = unit_error(v.own, 2)
    shared = (1 + unit) * jnp.sqrt(v.own + jnp.square(v.shared))
    return v._replace(own=jnp.zeros_like(v.own), shared=shared)


def _sum(node: Node, a: Value, b: Value) -> Value:
    """Adds or subtracts independent values of one shape."""
    mean = interval(node, a.mean, b.mean)
    unit = unit_error(mean.lower, 2)
    slack = unit * jnp.maximum(jnp.abs(mean.lower), jnp.abs(mean.upper))
    return Value(
        Box(mean.lower - slack, mean.upper + slack),
        (1 + unit) * (a.own + b.own),
        (1 + unit) * jnp.hypot(a.shared, b.shared),
        _less(unit) * (a.floor + b.floor),
        (1 + unit) * jnp.hypot(a.wobble, b.wobble),
        a.gaussian and b.gaussian,
        a.independent and b.independent,
        a.fixed and b.fixed,
        a.leaves | b.leaves,
    )


def _affine(node: Node, v: Value) -> Value:
    """Applies an operation that is affine in its one random operand, the others constant."""
    rule: Any = node.affine
    mean = interval(node, v.mean)
    length = 2
    if rule.spreads == "mixes":  # constants that are added on the way are terms as well
        constants = (jnp.size(o) for o in node.operands if not isinstance(o, Ref))
        length = math.prod(v.own.shape) + (sum(constants) if node.has_constant else 0)
    unit = unit_error(mean.lower, length)
    reach = magnitude(node, jnp.maximum(jnp.abs(v.mean.lower), jnp.abs(v.mean.upper)))
    rearranged = rule.spreads in ("places", "repeats") and node.op not in ("mul", "div")
    if not rearranged:
        slack = unit * (reach + jnp.maximum(jnp.abs(mean.lower), jnp.abs(mean.upper)))
        if node.has_constant:
            slack = slack + unit * constant_magnitude(node, v.own)
        mean = Box(mean.lower - slack, mean.upper + slack)
    else:
        unit = 0.0

    def scaled(deviation: Array) -> Array:
        return (1 + unit) * magnitude(node, deviation)

    if rule.spreads == "mixes":  # in whatever way its terms depend on each other
        everything = scaled(jnp.sqrt(v.own) + v.shared)
        still = _constant(mean)
        return still._replace(
            shared=everything, gaussian=False, independent=False, fixed=False, leaves=v.leaves
        )
    repeats = rule.spreads == "repeats"
    return v._replace(
        mean=mean,
        own=jnp.square(scaled(jnp.sqrt(v.own))),
        shared=scaled(v.shared),
        floor=_less(4 * unit) * jnp.square(magnitude(node, jnp.sqrt(v.floor))),
        wobble=scaled(v.wobble),
        independent=v.independent and not repeats,
    )


def _rectified(z: Value) -> Value:
    """Computes what is known of max(z, 0), by the three inequalities of the module."""
    lower, upper = z.mean.lower, z.mean.upper
    unit = unit_error(lower, 2)
    spread = (1 + unit) * jnp.sqrt(z.own)
    total = jnp.square(spread) + jnp.square(z.shared)
    most = 0.5 * (upper + jnp.sqrt(jnp.square(upper) + total))
    most = most + unit * (jnp.abs(upper) + jnp.sqrt(total))
    own, shared = z.own, z.shared
    least = jnp.maximum(lower, 0.0)
    if z.gaussian:
        given = rectified.mean_above(upper, spread) + 0.5 * (z.shared + rectified.PEAK * z.wobble)
        most = jnp.minimum(most, (1 + unit) * given)
        least = rectified.mean_below(lower, _less(unit) * jnp.sqrt(z.floor))
        shared = (1 + unit) * (z.shared + rectified.PEAK * z.wobble)
        if z.fixed:  # the variance increases with the mean
            at_most = rectified.mean_below(upper, _less(unit) * jnp.sqrt(z.floor))
            second = rectified.square_above(upper, spread)
            own = jnp.minimum(own, second - _less(unit) * jnp.square(at_most))
    else:  # nothing is known of its form
        shared, own = (1 + unit) * jnp.sqrt(total), jnp.zeros_like(own)
    rest = _constant(Box(least, jnp.maximum(most, least)))
    return settled(
        rest._replace(
            own=own,
            shared=shared,
            gaussian=False,
            independent=z.independent,
            fixed=False,
            leaves=z.leaves,
        )
    )


def _is_zero(node: Node) -> bool:
    """Says whether the other operand of a maximum is 0."""
    constants = [o for o in node.operands if not isinstance(o, Ref)]
    return all(is_concrete(c) and not np.any(np.asarray(c)) for c in constants)


def unit_error(value: Array, terms: int) -> float:
    """Computes the relative error of a sum of so many products.

    Args:
        value: of the sum's dtype.
        terms: how many.

    Returns:
        (terms + 16) machine epsilons.
    """
    return (terms + 16) * float(jnp.finfo(value.dtype).eps)


def _less(unit: float) -> float:
    """Computes 1 - unit, or 0: in a coarse format a long sum is known to nothing."""
    return max(1.0 - unit, 0.0)


_KNOWN = "Known are dense and convolutional layers, ReLU, and affine operations with constants."


def _no_rule(node: Node, hint: str = _KNOWN) -> UnsupportedPrimitiveError:
    source = node.source or "a line inside JAX"
    return UnsupportedPrimitiveError(
        f"no expectation bound for '{node.op}' on random values, called at {source}. {hint}"
    )
