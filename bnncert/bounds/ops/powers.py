"""Exponentials, logarithms and powers: functions that overflow, or have a singular end at 0.

    exp, 2^x, e^x - 1    convex; where the exponential is too large for a line, the interval above
    log, log(1 + x)      concave on x > 0 (x > -1); no bound below where [l, u] reaches beyond
    sqrt                 concave on x >= 0
    rsqrt, 1/x, x^-n     convex on x > 0; no bound where [l, u] touches the pole; for x < 0 mirrored
    x^n                  convex for even n; for odd n convex where x >= 0
    x^p                  on x > 0 (p > 0: x >= 0): concave for 0 < p < 1, else convex
    log Gamma(x)         convex on x > 0, least at 1.4616; no bound where [l, u] reaches beyond

No bound: slope 0 and an infinite offset.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from bnncert.bounds.graph import Node
from bnncert.bounds.ops import curves
from bnncert.bounds.ops.curves import Curve, Elementwise
from bnncert.bounds.ops.elementwise import (
    elementwise,
    hull,
    increasing,
    valley,
    where_defined,
)
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.ops.lines import (
    DEFAULT,
    Choice,
    Lines,
    finite,
    limited,
    mirrored,
    negated,
    swapped,
)
from bnncert.bounds.ops.operation import (
    Curvature,
    IntervalRule,
    LinesRule,
    Operation,
    Rounding,
    parameter_of,
)
from bnncert.sets import Box

NOWHERE = (math.inf, -math.inf)
"""Where a concave function is convex."""


def growth(name: str) -> Curve:
    """exp, exp2 or expm1; the default tangent is near l, which keeps it from falling far under."""
    functions: dict[str, tuple[Elementwise, Elementwise]] = {
        "exp": (jnp.exp, jnp.exp),
        "exp2": (jnp.exp2, lambda x: math.log(2) * jnp.exp2(x)),
        "expm1": (jnp.expm1, jnp.exp),
    }
    return Curve(*functions[name], reach=0.99 / _rate(name))


def growing(name: str, l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """The lines of `growth(name)`."""
    curve = growth(name)
    # Here e^x x, an offset, does not overflow yet.
    largest = 0.9 * math.log(float(jnp.finfo(l.dtype).max)) / _rate(name)
    lines = curves.lines(curve, jnp.minimum(l, largest), jnp.minimum(u, largest), choice)
    large = u > largest
    return lines._replace(
        upper_slope=jnp.where(large, 0, lines.upper_slope),
        upper_offset=jnp.where(large, curve.value(u), lines.upper_offset),
    )


def log(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """The logarithm."""
    return _beyond(Curve(jnp.log, lambda x: 1 / x, *NOWHERE), l, u, choice)


def log1p(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """log(1 + x)."""
    return _beyond(Curve(jnp.log1p, lambda x: 1 / (1 + x), *NOWHERE), l, u, choice, begins=-1.0)


def sqrt(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """The square root."""
    smallest = float(jnp.finfo(l.dtype).tiny)  # the derivative at 0 is infinite

    def value(x: Array) -> Array:
        return jnp.where(x > 0, jnp.sqrt(jnp.maximum(x, smallest)), 0)

    curve = Curve(value, lambda x: 0.5 * jax.lax.rsqrt(x), *NOWHERE)
    return _beyond(curve, l, u, choice, closed=True)


def rsqrt(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """1 / sqrt(x)."""
    return _beyond(Curve(jax.lax.rsqrt, lambda x: -0.5 * jax.lax.rsqrt(x) / x), l, u, choice)


def reciprocal(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """1 / x."""
    return integer_pow(l, u, -1, choice)


def lgamma(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
    """The logarithm of the gamma function; its derivative is the digamma function."""
    # Next to the pole its own derivative, 1 / x^2, overflows.
    near = float(jnp.finfo(l.dtype).tiny) ** 0.4

    def slope(x: Array) -> Array:
        usual = x > near
        there = jax.lax.stop_gradient(jax.lax.digamma(x))
        return jnp.where(usual, jax.lax.digamma(jnp.where(usual, x, 1)), there)

    return _beyond(Curve(jax.lax.lgamma, slope), l, u, choice)


def integer_pow(l: Array, u: Array, exponent: int, choice: Choice = DEFAULT) -> Lines:
    """x^n for a Python integer n."""
    if exponent >= 0:
        found = curves.lines(integer_power(exponent), l, u, choice)
        # Tangents through the far end are compared there with the power.
        steepest = exponent * jax.lax.integer_pow(jnp.maximum(jnp.abs(l), jnp.abs(u)), exponent)
        known = jnp.isfinite(4 * steepest)
        return found if exponent % 2 == 0 else limited(found, known, known)
    # h(-x) = h(x) for even n, -h(x) for odd n.
    odd, left = exponent % 2 == 1, u < 0
    near, far = jnp.where(left, -u, l), jnp.where(left, -l, u)
    turned = _where_choice(left, swapped(choice), choice) if odd else choice
    right = _beyond(integer_power(exponent), near, far, turned)
    reflected = negated(mirrored(right)) if odd else mirrored(right)
    lines = (jnp.where(left, a, b) for a, b in zip(reflected, right, strict=True))
    return Lines(*lines)


def integer_power(exponent: int) -> Curve:
    """x^n as a curve; for n < 0 on x > 0."""

    def slope(x: Array) -> Array:
        if exponent == 0:
            return jnp.zeros_like(x)
        return exponent * jax.lax.integer_pow(x, exponent - 1)

    start = 0.0 if exponent % 2 and exponent > 1 else -math.inf
    return Curve(lambda x: jax.lax.integer_pow(x, exponent), slope, start)


def power(l: Array, u: Array, exponent: ArrayLike, choice: Choice = DEFAULT) -> Lines:
    """x^p for a constant exponent."""
    smallest = float(jnp.finfo(l.dtype).tiny)
    p = jnp.asarray(exponent, l.dtype)

    def value(x: Array) -> Array:
        return jnp.where(x > 0, jnp.power(jnp.maximum(x, smallest), p), jnp.where(p == 0, 1, 0))

    def slope(x: Array) -> Array:
        return p * jnp.power(x, p - 1)

    curve = Curve(value, slope, *_where_power_is_convex(exponent))
    at_zero = _beyond(curve, l, u, choice, closed=True)
    return limited(at_zero, (p >= 0) | (l > 0), (p >= 0) | (l > 0))


def _where_power_is_convex(exponent: ArrayLike) -> tuple[curves.End, curves.End]:
    if not isinstance(exponent, Tracer):
        known = np.asarray(exponent)
        concave = (known > 0) & (known < 1)
        if concave.all():
            return NOWHERE
        if not concave.any():
            return -math.inf, math.inf
    p = jnp.asarray(exponent)
    concave = (p > 0) & (p < 1)
    return jnp.where(concave, jnp.inf, -jnp.inf), jnp.where(concave, -jnp.inf, jnp.inf)


def _beyond(
    curve: Curve,
    l: Array,
    u: Array,
    choice: Choice,
    begins: float = 0.0,
    closed: bool = False,
) -> Lines:
    """Lines of a function convex or concave on x > begins (closed: x >= begins).

    A tangent anywhere in the domain encloses it: where the interval begins at the singular point,
    it is taken next to it.
    """
    edge = begins + float(jnp.finfo(l.dtype).eps)
    below, above = (l >= begins, u >= begins) if closed else (l > begins, u > begins)
    low = jnp.where(below, l, edge)
    high = jnp.where(above, jnp.maximum(u, low), low)
    lines = curves.lines(curve._replace(edge=edge), low, high, choice)
    # A concave function has its upper line as far as the interval has points of the domain.
    concave = not isinstance(curve.start, Array) and curve.start == math.inf
    return limited(lines, below, above if concave else below)


def _where_choice(condition: Array, a: Choice, b: Choice) -> Choice:
    """Fractions by place; of two, one of which is None, the other's default is the middle."""

    def pick(x: Array | None, y: Array | None) -> Array | None:
        if x is None and y is None:
            return None
        return jnp.where(condition, 0.5 if x is None else x, 0.5 if y is None else y)

    return b._replace(lower=pick(a.lower, b.lower), upper=pick(a.upper, b.upper))


def _rate(name: str) -> float:
    return math.log(2) if name == "exp2" else 1.0


def _half(l: Array, u: Array, *constants: ArrayLike) -> Choice:
    """The fractions that give the default lines: the middle."""
    half = jnp.full_like(l, 0.5)
    return Choice(half, half)


def _initial_power(l: Array, u: Array, exponent: int) -> Choice:
    return curves.fractions(integer_power(exponent), l, u) if exponent >= 0 else _half(l, u)


def _finite(rule: LinesRule) -> LinesRule:
    def found(l: Array, u: Array, *constants: Any, choice: Choice = DEFAULT) -> Lines:
        return finite(rule(l, u, *constants, choice=choice))

    return found


def _is_positive(node: Node, box: Box) -> Array:
    return box.lower > 0


def _is_one_side(node: Node, box: Box) -> Array:
    """Whether an interval lies on either side of the pole."""
    return (box.lower > 0) | (box.upper < 0)


def _has_power(node: Node, box: Box) -> Array:
    """Whether x ** p is defined: at 0 itself where the exponent is not negative."""
    return (box.lower > 0) | ((box.lower == 0) & (parameter_of(node) >= 0))


def _integer_power_interval(node: Node, box: Box) -> Box:
    exponent: Any = node.params["y"]
    if exponent < 0:
        return where_defined(hull, _is_one_side)(node, box)
    return valley(0.0, 0.0)(node, box) if exponent and exponent % 2 == 0 else hull(node, box)


def _growth_curvature(rise: Callable[[Array], Array]) -> Curvature:
    """H'' of exponentials, or more."""

    def curvature(node: Node, box: Box, free: bool) -> ArrayLike:
        # The default tangent touches within 1 / ln 2 of the lower end (`growing`).
        return rise(box.upper if free else jnp.minimum(box.upper, box.lower + 1.5))

    return curvature


def _pole_curvature(at: float, exponent: float, factor: float) -> Curvature:
    """|h''| = c |x - a|^(p - 2)."""

    def curvature(node: Node, box: Box, free: bool) -> ArrayLike:
        return _power_curvature(exponent, factor, Box(box.lower - at, box.upper - at), free)

    return curvature


def _integer_power_curvature(node: Node, box: Box, free: bool) -> ArrayLike:
    exponent: Any = node.params["y"]
    return _power_curvature(float(exponent), float(abs(exponent * (exponent - 1))), box, free)


def _power_curvature(exponent: float, factor: float, box: Box, free: bool) -> ArrayLike:
    """Of x^p, the largest factor |x|^(p - 2), no nearer to a pole than the default tangents."""
    size = magnitude(box)
    if not factor:
        return 0.0
    if exponent >= 2:
        return factor * size ** (exponent - 2)
    near = jnp.minimum(jnp.abs(box.lower), jnp.abs(box.upper))
    return factor * (near if free else jnp.maximum(near, 0.49 * size)) ** (exponent - 2)


def _lgamma_curvature(node: Node, box: Box, free: bool) -> ArrayLike:
    """The trigamma function decreases, and is below 1 / x + 1 / x^2."""
    near = box.lower if free else jnp.maximum(box.lower, 0.49 * box.upper)
    return 1 / near + 1 / near**2


def _grows(name: str, rounding: Rounding) -> Operation:
    def lines(l: Array, u: Array, choice: Choice = DEFAULT) -> Lines:
        return growing(name, l, u, choice)

    return elementwise(
        name,
        rounding,
        interval=increasing,
        increases=True,
        curve=partial(growth, name),
        lines=_finite(lines),
    )


def _singular(
    name: str,
    rounding: Rounding | None,
    lines: LinesRule,
    interval: IntervalRule = increasing,
    **more: Any,
) -> Operation:
    more.setdefault("initial", _half)
    return elementwise(
        name,
        rounding,
        interval=interval,
        increases=interval is increasing,
        lines=_finite(lines),
        **more,
    )


POWERS: tuple[Operation, ...] = (
    _grows(
        "exp",
        Rounding(
            # a compiler multiplies exponentials by adding up their arguments
            errors=lambda node, boxes: (16.0 + 4.0 * magnitude(boxes[0]), 0.0),
            curvature=_growth_curvature(jnp.exp),
        ),
    ),
    _grows(
        "exp2",
        Rounding(160.0, slope=(160.0, 4.0), curvature=_growth_curvature(jnp.exp2)),
    ),
    _grows("expm1", Rounding(absolute=4.0, curvature=_growth_curvature(jnp.exp))),
    _singular("log", Rounding(curvature=_pole_curvature(0.0, 0.0, 1.0)), log),
    _singular("log1p", Rounding(curvature=_pole_curvature(-1.0, 0.0, 1.0)), log1p),
    _singular("sqrt", Rounding(curvature=_pole_curvature(0.0, 0.5, 0.25)), sqrt),
    _singular(
        "rsqrt",
        Rounding(curvature=_pole_curvature(0.0, -0.5, 0.75)),
        rsqrt,
        where_defined(hull, _is_positive),
    ),
    _singular(
        "reciprocal",
        Rounding(curvature=_pole_curvature(0.0, -1.0, 2.0)),
        reciprocal,
        where_defined(hull, _is_one_side),
    ),
    _singular(
        "integer_pow",
        Rounding(
            errors=lambda node, boxes: (4.0 * abs(node.params["y"]) + 4.0, 0.0),
            slope=lambda node: (4.0 * abs(node.params["y"]) + 8.0, 0.0),
            curvature=_integer_power_curvature,
        ),
        integer_pow,
        _integer_power_interval,
        initial=_initial_power,
        variants=2,
        parameters=("y",),
    ),
    _singular("pow", None, power, where_defined(hull, _has_power)),
    _singular(
        "lgamma",
        Rounding(absolute=80.0, slope=(64.0, 32.0), curvature=_lgamma_curvature),
        lgamma,
        where_defined(valley(1.4616321449683622, -0.12148629053584961), _is_positive),
    ),
)
