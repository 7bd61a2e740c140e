"""Functions of one value: their intervals by the shape they have, and lines that surely enclose.

    increasing    h([l, u]) = [h(l), h(u)]
    hull          monotone, either way: the two ends in order
    valley        one minimum: the larger of the two ends above; below their smaller, or the minimum
                  where [l, u] contains it
    pole          monotone on either side of 0: no bound where [l, u] contains it

`elementwise` makes the record of a function from such a rule, and from its lines or its curve.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Graph, Node, Ref
from bnncert.bounds.ops import curves
from bnncert.bounds.ops.affine import at_ends
from bnncert.bounds.ops.boxes import sides, stacked, unstacked
from bnncert.bounds.ops.extremes import (
    least,
    off_overflow,
    off_subnormal,
    off_underflow,
)
from bnncert.bounds.ops.lines import DEFAULT, Choice, Lines, finite, with_finite_gradients
from bnncert.bounds.ops.operation import (
    IntervalRule,
    LinesRule,
    Operation,
    Parameter,
    Relaxation,
    Rounding,
    of_one_value,
)
from bnncert.bounds.ops.planes import Planes, from_lines
from bnncert.sets import Box


def elementwise(
    name: str,
    rounding: Rounding | None,
    *,
    interval: IntervalRule,
    increases: bool = False,
    curve: Callable[..., curves.Curve] | None = None,
    lines: LinesRule | None = None,
    initial: Callable[..., Choice] | None = None,
    kinked: bool = False,
    variants: int = 1,
    parameters: tuple[str, ...] = (),
    function: Callable[..., Any] | None = None,
    parameter: Parameter | None = None,
) -> Operation:
    """The record of a function of one value.

    Args:
        name: of the primitive, or of the function.
        rounding: what it is off by; None: not known.
        interval: its interval rule, for ends that are usual numbers.
        increases: whether it grows.
        curve: `(*constants) -> Curve`, where it has one.
        lines: other lines than those of the curve; without either, its interval encloses it.
        initial: as `Operation`; of a curve, that curve's.
        kinked: whether the lines have closed forms.
        variants: how many default lines there are.
        parameters: of the node that its lines take.
        function: what it is recognised as.
        parameter: of that function.
    """
    if curve is not None and lines is None:
        lines = _lines_of(curve)
    if curve is not None and initial is None:
        initial = _initial_of(curve)
    operation = Operation(
        name,
        "elementwise",
        guarded(interval, rounding or Rounding()),
        of_one_value,
        lines=lines,
        initial=initial,
        kinked=kinked,
        variants=variants,
        parameters=parameters,
        rounding=rounding,
        function=function,
        parameter=parameter,
        increasing=increases,
        curve=curve,
    )
    return operation if lines is None else relaxed_by_lines(operation)


def relaxed_by_lines(operation: Operation) -> Operation:
    """An operation with lines, relaxed by them."""

    def planes(graph: Graph, index: int, boxes: Sequence[Box], choice: Choice) -> Planes:
        node = graph.nodes[index]
        (operand,) = node.refs
        value = boxes[index] if index < len(boxes) else None
        lines = enclosing_lines(operation, node, boxes[operand], choice, value)
        return from_lines(operand, lines)

    def start(graph: Graph, index: int, boxes: Sequence[Box]) -> Choice | None:
        node = graph.nodes[index]
        ends = _ends(node, boxes[node.refs[0]])
        initial = operation.initial
        return None if initial is None else initial(*ends, *_constants(operation, node))

    relaxation = Relaxation(planes, start, operation.variants)
    return operation._replace(relaxation=relaxation)


def guarded(rule: IntervalRule, rounding: Rounding) -> IntervalRule:
    """An interval rule that allows for under- and overflow (`extremes`)."""

    def interval(node: Node, *operands: Box) -> Box:
        box = rule(node, *map(off_subnormal, operands))
        if rounding.exact:
            return box
        return off_overflow(off_underflow(box, rounding.humped), *operands)

    return interval


def increasing(node: Node, *boxes: Box) -> Box:
    """Evaluated at the lower ends, and at the upper ends."""
    return unstacked(at_ends(node, *map(stacked, boxes)))


def hull(node: Node, box: Box) -> Box:
    """Of a monotone function, either way."""
    a, b = vars(increasing(node, box)).values()
    return Box(jnp.minimum(a, b), jnp.maximum(a, b))


def valley(at: float, value: float) -> IntervalRule:
    """Decreasing left of `at`, where it has this value, and increasing right of it."""

    def rule(node: Node, box: Box) -> Box:
        ends = hull(node, box)
        inside = (box.lower <= at) & (at <= box.upper)
        bottom = value - abs(value) * float(jnp.finfo(node.dtype).eps)
        return Box(jnp.where(inside, bottom, ends.lower), ends.upper)

    return rule


def by_formula(rule: IntervalRule, curve: Callable[..., curves.Curve]) -> IntervalRule:
    """By the formula of a curve, which loses fewer digits than the network's own."""

    def by_curve(node: Node, box: Box) -> Box:
        value = curve(*node.operands[1:]).value
        return rule(node._replace(evaluate=lambda x, *constants: value(x)), box)

    return by_curve


def with_candidate_at_zero(node: Node, box: Box) -> Box:
    """Of a function whose one kink is 0: increasing left of it, or decreasing."""
    ends = hull(node, box)
    kink = node.evaluate(*node.fill([jnp.clip(jnp.zeros_like(box.lower), box.lower, box.upper)]))
    return Box(jnp.minimum(ends.lower, kink), jnp.maximum(ends.upper, kink))


def where_defined(rule: IntervalRule, defined: Callable[[Node, Box], Array]) -> IntervalRule:
    """No bound where a function is not defined on all of the interval."""

    def within(node: Node, box: Box) -> Box:
        known = defined(node, box)
        safe = Box(jnp.where(known, box.lower, 1), jnp.where(known, box.upper, 1))
        found = rule(node, safe)
        return Box(jnp.where(known, found.lower, -jnp.inf), jnp.where(known, found.upper, jnp.inf))

    return within


def enclosing_lines(
    operation: Operation, node: Node, operand: Box, choice: Choice, value: Box | None = None
) -> Lines:
    """Lines around a function of one value that enclose it whatever was lost in computing them.

    Where what they are computed from over- or underflows, they are those of slope 0 at the ends of
    the function's interval: where a line is not finite, where a slope that may have lost digits to
    underflow meets an operand so large that they count, where a line of a curve is not on its side
    of it at an end of the operand's box, and where that box reaches to a quarter of the largest
    number, beyond which its width, its middle and multiples of either may overflow.

    Args:
        operation: with lines.
        node: that applies it.
        operand: the box of what it is applied to.
        choice: which lines.
        value: the box of its value; None: not known yet.
    """
    assert operation.lines is not None
    ends = stacked(off_subnormal(Box(*_ends(node, operand))))
    signs = sides(1.0, -1.0, like=ends)
    size = jnp.maximum(jnp.abs(ends[0]), jnp.abs(ends[1]))
    # 1. The lines, where the box is not so large that they would overflow.
    usual = size <= 0.25 * float(jnp.finfo(node.dtype).max)
    inside = with_finite_gradients(*_chosen(usual, ends, jnp.ones_like(ends)))
    found = operation.lines(*inside, *_constants(operation, node), choice=choice)
    # 2. Both as lines from below: that above, of the negated function. Constants beside them.
    value = operation.interval(node, operand) if value is None else value
    lower, low, upper, high = found
    both = jnp.stack(jnp.broadcast_arrays(lower, -upper, low, -high))
    (slope, offset), constant = both.reshape(2, 2, *both.shape[1:]), signs * stacked(value)
    # 3. Piecewise linear functions have closed forms, which lose nothing but to the range; those of
    # a leaky ReLU cancel where its slope is steep.
    points = () if operation.kinked else zip(ends, at_ends(node, ends), strict=True)
    holds = _holds(slope, offset, size, [(x, signs * v) for x, v in points])
    # A line that is what would take its place may keep its gradient.
    holds |= (slope == 0) & (offset == constant)
    below, above = _either(usual & holds, slope, offset, constant)
    return Lines(*below, *(-above))


def _chosen(condition: Array, first: Array, second: Array) -> Array:
    """Chooses one of two by a sum: an elementwise result is copied into all that use it."""
    both = jnp.stack([condition, ~condition]), jnp.stack([first, second], 1)
    return jnp.where(both[0], both[1], 0).sum(1)


def _either(line: Array, slope: Array, offset: Array, constant: Array) -> Array:
    """Slope and offset, or 0 and the constant, of each side: (2 sides, 2, *shape).

    By one selection: by two, a compiler would decide twice, and may round what it decides by
    otherwise. And by a sum: compilers compute an elementwise result again in each row that uses it,
    but no sum.
    """
    flat = jnp.stack([jnp.zeros_like(constant), constant], 1)
    choices = jnp.stack([jnp.stack([slope, offset], 1), flat])
    chosen = jnp.stack([line, ~line])[:, :, None]
    return jnp.where(chosen, choices, 0).sum(0)


def _holds(
    slope: Array, offset: Array, size: Array, points: Iterable[tuple[Array, Array]]
) -> Array:
    """Says whether lines are below a function, as far as values at points and the range tell."""
    eps, lost = float(jnp.finfo(size.dtype).eps), 8 * least(size.dtype)
    terms = jnp.abs(slope) * size + jnp.abs(offset)
    # An underflow of the slope counts by the operand, one of the operand by the slope.
    reach = jnp.where(jnp.abs(slope) * eps < lost, size, 0) + jnp.abs(slope)
    holds = jnp.isfinite(terms) & (lost * (1 + reach) <= eps * terms)
    for x, value in points:
        holds &= ~(slope * x + offset - value > 16 * eps * (terms + jnp.abs(value)))
    return holds


def _ends(node: Node, box: Box) -> tuple[Array, Array]:
    return jnp.broadcast_to(box.lower, node.shape), jnp.broadcast_to(box.upper, node.shape)


def _lines_of(curve: Callable[..., curves.Curve]) -> LinesRule:
    def rule(l: Array, u: Array, *constants: Any, choice: Choice = DEFAULT) -> Lines:
        return finite(curves.lines(curve(*constants), l, u, choice))

    return rule


def _initial_of(curve: Callable[..., curves.Curve]) -> Callable[..., Choice]:
    return lambda l, u, *constants: curves.fractions(curve(*constants), l, u)


def _constants(operation: Operation, node: Node) -> list[Any]:
    """What lines take after the ends: constant operands, then parameters."""
    constants = [o for o in node.operands if not isinstance(o, Ref)]
    return constants + [node.params[name] for name in operation.parameters]
