"""Exponentials, logarithms and powers: functions that overflow, or have a singular end at 0.

    exp, 2^x, e^x - 1    convex; where the exponential is too large for a line, the interval above
    log, log(1 + x)      concave on x > 0 (x > -1); no bound below where [l, u] reaches beyond
    sqrt                 concave on x >= 0
    rsqrt, 1/x, x^-n     convex on x > 0; no bound where [l, u] touches the pole; for x < 0 mirrored
    x^n                  convex for even n; for odd n convex where x >= 0
    x^p                  on x > 0 (p > 0: x >= 0): concave for 0 < p < 1, else convex

No bound: slope 0 and an infinite offset.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from bnncert.bounds.relaxations import curves
from bnncert.bounds.relaxations.curves import Curve, Elementwise
from bnncert.bounds.relaxations.lines import DEFAULT, Choice, Lines, mirrored, negated, swapped

NOWHERE = (math.inf, -math.inf)
"""Where a concave function is convex."""


def finite(lines: Lines) -> Lines:
    """No bound where a line is not finite."""
    below = jnp.isfinite(lines.lower_slope) & ~jnp.isnan(lines.lower_offset)
    above = jnp.isfinite(lines.upper_slope) & ~jnp.isnan(lines.upper_offset)
    return _limited(lines, below, above)


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


def integer_pow(l: Array, u: Array, exponent: int, choice: Choice = DEFAULT) -> Lines:
    """x^n for a Python integer n."""
    if exponent >= 0:
        found = curves.lines(integer_power(exponent), l, u, choice)
        # Tangents through the far end are compared there with the power.
        steepest = exponent * jax.lax.integer_pow(jnp.maximum(jnp.abs(l), jnp.abs(u)), exponent)
        known = jnp.isfinite(4 * steepest)
        return found if exponent % 2 == 0 else _limited(found, known, known)
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
    return _limited(at_zero, (p >= 0) | (l > 0), (p >= 0) | (l > 0))


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
    return _limited(lines, below, above if concave else below)


def _limited(lines: Lines, below: Array, above: Array) -> Lines:
    """The lines where they are known to enclose; elsewhere no bound."""
    return Lines(
        jnp.where(below, lines.lower_slope, 0),
        jnp.where(below, lines.lower_offset, -jnp.inf),
        jnp.where(above, lines.upper_slope, 0),
        jnp.where(above, lines.upper_offset, jnp.inf),
    )


def _where_choice(condition: Array, a: Choice, b: Choice) -> Choice:
    """Fractions by place; of two, one of which is None, the other's default is the middle."""

    def pick(x: Array | None, y: Array | None) -> Array | None:
        if x is None and y is None:
            return None
        return jnp.where(condition, 0.5 if x is None else x, 0.5 if y is None else y)

    return b._replace(lower=pick(a.lower, b.lower), upper=pick(a.upper, b.upper))


def _rate(name: str) -> float:
    return math.log(2) if name == "exp2" else 1.0


POWERS: Mapping[str, Callable[..., Lines]] = {
    "exp": lambda l, u, choice=DEFAULT: growing("exp", l, u, choice),
    "exp2": lambda l, u, choice=DEFAULT: growing("exp2", l, u, choice),
    "expm1": lambda l, u, choice=DEFAULT: growing("expm1", l, u, choice),
    "log": log,
    "log1p": log1p,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "reciprocal": reciprocal,
    "integer_pow": integer_pow,
    "pow": power,
}


def fractions(op: str, l: Array, u: Array, *constants: Any) -> Choice:
    """The fractions that give the default lines: the middle, but for a reach or an inflection."""
    if op in ("exp", "exp2", "expm1"):
        return curves.fractions(growth(op), l, u)
    if op == "integer_pow" and constants[0] >= 0:
        return curves.fractions(integer_power(constants[0]), l, u)
    half = jnp.full_like(l, 0.5)
    return Choice(half, half)
