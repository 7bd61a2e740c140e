"""The relaxation of one node on the boxes of its operands: which of the families it belongs to."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.interval import input_sets, intersect
from bnncert.bounds.relaxations import (
    FREE,
    KINKS,
    LINES,
    PARAMETERS,
    TWO_VARIANTS,
    Choice,
    Lines,
    Planes,
    from_lines,
    has_lines,
    initial_choice,
    products,
    reductions,
    with_finite_gradients,
)
from bnncert.bounds.rules import BILINEAR, affine_rule, interval
from bnncert.bounds.rules.extremes import least, magnitude, off_subnormal
from bnncert.bounds.rules.reductions import from_last, to_last
from bnncert.sets import Box


def is_relaxed(node: Node) -> bool:
    """Whether a node is neither a set nor affine in what is bounded."""
    return bool(node.refs) and affine_rule(node) is None


def relax(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
    """Planes that enclose a node on the boxes of its operands: its own, else its interval.

    Args:
        graph: the traced function.
        index: of the node.
        boxes: of all nodes before it.
        choice: which of the valid planes.
    """
    node = graph.nodes[index]
    if _is_product(node):
        return _product(graph, node, boxes, choice)
    if _is_pair(node):
        return _pair(node, boxes, choice)
    if node.op in REDUCTION_PLANES:
        return _reduction(node, boxes[node.refs[0]], choice)
    if has_lines(node):
        return from_lines(node.refs[0], lines(node, boxes[node.refs[0]], choice))
    values = interval(node, *(boxes[i] for i in node.refs))
    return Planes((), lambda: values.lower, lambda: values.upper)


def lines(node: Node, operand: Box, choice: Choice) -> Lines:
    """Lines around a function of one value.

    Where what they are computed from over- or underflows, they are those of slope 0 at the ends of
    the function's interval: where a line is not finite, where a slope that may have lost digits to
    underflow meets an operand so large that they count, where a line of a curve is not on its side
    of it at an end of the operand's box, and where that box reaches to a quarter of the largest
    number, beyond which its width, its middle and multiples of either may overflow.
    """
    l, u = _ends(node, off_subnormal(operand))
    size = magnitude(Box(l, u))
    usual = size <= 0.25 * float(jnp.finfo(node.dtype).max)
    inside = with_finite_gradients(jnp.where(usual, l, 1), jnp.where(usual, u, 1))
    found = LINES[node.op](*inside, *_constants(node), choice=choice)
    values = interval(node, Box(l, u))
    # Piecewise linear functions have closed forms, which lose nothing but to the range; those of a
    # leaky ReLU cancel where its slope is steep.
    ends = () if node.op in KINKS and node.op != "leaky_relu" else (l, u)
    at_ends = [(end, node.evaluate(*node.fill([end]))) for end in ends]
    below = _holds(found.lower_slope, found.lower_offset, size, at_ends)
    below |= _is_constant(found.lower_slope, found.lower_offset, values.lower)
    mirrored = [(end, -value) for end, value in at_ends]
    above = _holds(-found.upper_slope, -found.upper_offset, size, mirrored)
    above |= _is_constant(found.upper_slope, found.upper_offset, values.upper)
    return Lines(
        *_either(usual & below, found.lower_slope, found.lower_offset, values.lower),
        *_either(usual & above, found.upper_slope, found.upper_offset, values.upper),
    )


def _is_constant(slope: Array, offset: Array, constant: Array) -> Array:
    """Whether a line is what would take its place, and so may keep its gradient."""
    return (slope == 0) & (offset == constant)


def _either(line: Array, slope: Array, offset: Array, constant: Array) -> Array:
    """Slope and offset, or 0 and the constant, by one selection of both.

    By two, a compiler would decide twice, and may round what it decides by otherwise. And a sum:
    compilers compute an elementwise result again in each row that uses it, but no sum.
    """
    slope, offset, constant = jnp.broadcast_arrays(slope, offset, constant)
    flat = jnp.stack([jnp.zeros_like(constant), constant])
    chosen = jnp.stack([line, ~line])[:, None]
    return jnp.where(chosen, jnp.stack([jnp.stack([slope, offset]), flat]), 0).sum(0)


def _holds(
    slope: Array, offset: Array, size: Array, at_ends: Sequence[tuple[Array, Array]]
) -> Array:
    """Whether a line is below a function, as far as its values at ends and the range say."""
    eps, lost = float(jnp.finfo(size.dtype).eps), 8 * least(size.dtype)
    terms = jnp.abs(slope) * size + jnp.abs(offset)
    # An underflow of the slope counts by the operand, one of the operand by the slope.
    reach = jnp.where(jnp.abs(slope) * eps < lost, size, 0) + jnp.abs(slope)
    holds = jnp.isfinite(terms) & (lost * (1 + reach) <= eps * terms)
    for end, value in at_ends:
        holds &= ~(slope * end + offset - value > 16 * eps * (terms + jnp.abs(value)))
    return holds


def has_variants(graph: Graph, index: int) -> bool:
    """Whether a node has two defaults, neither of which is always the better."""
    node = graph.nodes[index]
    if _is_product(node):
        return _weight(graph, node) is None
    return (node.op in TWO_VARIANTS and has_lines(node)) or node.op in REDUCTION_PLANES


def free_choice(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
    """Where an optimisation of a node's planes may start; None where it has but one choice."""
    node = graph.nodes[index]
    if _is_product(node):
        if _weight(graph, node) is not None:
            return None
        half = jnp.full(graph.nodes[node.refs[0]].shape, 0.5, node.dtype)
        return Choice(half, half)
    if _is_pair(node):
        op, *constants = PAIRS[node.op]
        return Choice(initial_choice(op, *_pair_ends(node, boxes), *constants).lower, None)
    if node.op == "softmax":
        return _softmax_choice(node, boxes[node.refs[0]])
    if node.op in FREE and has_lines(node):
        return initial_choice(node.op, *_ends(node, boxes[node.refs[0]]), *_constants(node))
    return None


def _is_product(node: Node) -> bool:
    return node.op in BILINEAR and len(node.refs) == 2


def _is_pair(node: Node) -> bool:
    return node.op in PAIRS and len(node.refs) > 1


def _ends(node: Node, box: Box) -> tuple[Array, Array]:
    return jnp.broadcast_to(box.lower, node.shape), jnp.broadcast_to(box.upper, node.shape)


def _constants(node: Node) -> list:
    """What a rule takes after the ends: constant operands, then parameters."""
    constants = [o for o in node.operands if not isinstance(o, Ref)]
    return constants + [node.params[name] for name in PARAMETERS.get(node.op, ())]


def _product(graph: Graph, node: Node, boxes: Sequence[Box], choice: Choice) -> Planes:
    first, second = node.refs
    weight = _weight(graph, node)
    if weight is None:
        return products.mccormick(
            node.evaluate, (first, second), boxes[first], boxes[second], choice
        )
    if weight == 1:
        return products.eliminate(node.evaluate, first, boxes[first], boxes[second])
    return products.eliminate(lambda x, w: node.evaluate(w, x), second, boxes[second], boxes[first])


def _weight(graph: Graph, node: Node) -> int | None:
    """Which operand is a weight, that no other operand depends on; of two, the larger.

    Of equal ones that of more axes: the matrix (1, n) beside a vector. A convolution of two
    computed values eliminates its kernel.
    """
    reach = input_sets(graph)
    first, second = node.refs
    weights = [
        place
        for place, (own, other) in enumerate(((first, second), (second, first)))
        if _is_moved_input(graph, own) and not reach[own] & reach[other]
    ]
    if node.op == "conv_general_dilated" and not weights:
        return 1

    def size(place: int) -> tuple[int, int, int]:
        shape = graph.nodes[node.refs[place]].shape
        return math.prod(shape), len(shape), place

    return max(weights, key=size, default=None)


def _is_moved_input(graph: Graph, index: int) -> bool:
    """Whether a value is that of a set itself, at most scaled, moved and repeated."""
    node = graph.nodes[index]
    if not node.refs:
        return True
    rule = affine_rule(node)
    moves = rule is not None and rule.spreads in ("places", "repeats") and len(node.refs) == 1
    return moves and _is_moved_input(graph, node.refs[0])


def _pair_ends(node: Node, boxes: Sequence[Box]) -> tuple[Array, Array]:
    """The range of a - b, which the relu of max(a, b) is of; for a min, that of b - a."""
    a, b, difference = (boxes[i] for i in node.refs)
    box = intersect(difference, Box(a.lower - b.upper, a.upper - b.lower))
    l, u = with_finite_gradients(*_ends(node, box))
    return (-u, -l) if node.op == "min" else (l, u)


def _pair(node: Node, boxes: Sequence[Box], choice: Choice) -> Planes:
    """max(a, b) = b + relu(a - b), and with a line s v + o of relu: s a + (1 - s) b + o.

    Sums of a and b with weights of one sign: b + s (a - b), passed operation by operation, would
    meet b twice. min(a, b) = -max(-a, -b); logaddexp(a, b) = b + softplus(a - b).
    """
    op, *constants = PAIRS[node.op]
    lines = LINES[op](*_pair_ends(node, boxes), *constants, choice=choice)
    sign = -1 if node.op == "min" else 1

    def plane(slope: Array, offset: Array) -> Callable[[Array, Array], Array]:
        return lambda a, b: slope * a + (1 - slope) * b + sign * offset

    below = plane(lines.lower_slope, lines.lower_offset)
    above = plane(lines.upper_slope, lines.upper_offset)
    return Planes(node.refs[:2], *((below, above) if sign > 0 else (above, below)))


def _reduction(node: Node, box: Box, choice: Choice) -> Planes:
    """A reduction brought to the last axis, and back where the axis stays."""
    axes = tuple(map(int, node.params["axes"]))
    last = partial(to_last, axes=axes)
    lower_fraction, upper_fraction = jax.tree.map(last, (choice.lower, choice.upper))
    choice = choice._replace(lower=lower_fraction, upper=upper_fraction)
    rule = REDUCTION_PLANES[node.op]
    if "repeats" in node.params:
        rule = partial(rule, repeats=last(jnp.asarray(node.params["repeats"])))
    lower, upper = rule(Box(last(box.lower), last(box.upper)), choice)
    keeps = node.op in ("softmax", "log_softmax")

    def back(v: Array) -> Array:
        return from_last(v, node.shape, axes) if keeps else v.reshape(node.shape)

    return Planes(node.refs, lambda v: back(lower(last(v))), lambda v: back(upper(last(v))))


def _softmax_choice(node: Node, box: Box) -> Choice:
    axes = tuple(map(int, node.params["axes"]))
    odds = reductions.log_odds(Box(to_last(box.lower, axes), to_last(box.upper, axes)))
    start = initial_choice("logistic", odds.lower, odds.upper)
    fractions = jax.tree.map(lambda t: from_last(t, node.shape, axes), (start.lower, start.upper))
    return Choice(*fractions)


def _minimum(x: Box, choice: Choice, repeats: Array | None = None) -> reductions.Pair:
    lower, upper = reductions.maximum(Box(-x.upper, -x.lower), choice, repeats)
    return (lambda v: -upper(-v)), (lambda v: -lower(-v))


REDUCTION_PLANES: Mapping[str, Callable[..., reductions.Pair]] = {
    "reduce_max": reductions.maximum,
    "reduce_min": _minimum,
    "logsumexp": reductions.logsumexp,
    "log_softmax": reductions.log_softmax,
    "softmax": reductions.softmax,
}

PAIRS: Mapping[str, tuple[Any, ...]] = {
    "max": ("max", 0.0),
    "min": ("max", 0.0),
    "logaddexp": ("softplus",),
}
"""Functions of two values, and what is left of each: a function of their difference."""
