"""Smooth functions: value, derivative, where each is convex, its least value, and its rounding.

Derivatives are written so that they keep their digits in the tails: a slope is multiplied by the
width of an interval, which may be large.

    tanh' = 4 s(2x) s(-2x)                  with s the logistic function
    gelu  = x P(x)                          gelu'  = P(x) + x p(x), with the normal cdf and density
    gelu (tanh) = x s(2 g)                  with g = sqrt(2 / pi) (x + 0.044715 x^3)
    silu  = x s(x)                          silu'  = s(x) (1 + x s(-x))
    logaddexp = log(e^x + e^c)              its derivative is s(x - c)
    mish  = x tanh(softplus(x))

The minima of gelu, silu and mish were computed in float64 and are rounded down here. Functions
with a singular end (log, 1/x, x^p) are in `powers.py`, sin and cos in `waves.py`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.ops.curves import Curve
from bnncert.bounds.ops.elementwise import by_formula, elementwise, hull, increasing, valley
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.ops.operation import Operation, Parameter, Rounding, parameter_of

# Inflections; those of gelu, silu and mish to the last digit of float64.
_GELU = math.sqrt(2)
_GELU_TANH = 1.4185040087908285
_SILU = 2.3993572805154675
_MISH = (-2.256376396360793, 1.4905711794854282)


def _logistic_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _tanh_slope(x: Array) -> Array:
    return 4 * _logistic_slope(2 * x)


def _gelu(x: Array) -> Array:
    return x * _normal_cdf(x)


def _gelu_slope(x: Array) -> Array:
    return _normal_cdf(x) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * jax.lax.erfc(-x / math.sqrt(2))


def _gelu_tanh_angle(x: Array) -> Array:
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


def _gelu_tanh(x: Array) -> Array:
    return x * jax.nn.sigmoid(_gelu_tanh_angle(x))


def _gelu_tanh_slope(x: Array) -> Array:
    near = jnp.clip(x, -40, 40)  # beyond, s(g) s(-g) is 0, and the cube may overflow
    angle = _gelu_tanh_angle(near)
    turn = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * near * near)
    return jax.nn.sigmoid(angle) + near * turn * _logistic_slope(angle)


def _silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


def _silu_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * (1 + x * jax.nn.sigmoid(-x))


def _mish(x: Array) -> Array:
    return x * jnp.tanh(jax.nn.softplus(x))


def _mish_slope(x: Array) -> Array:
    inner = jax.nn.softplus(x)
    return jnp.tanh(inner) + x * jax.nn.sigmoid(x) * _tanh_slope(inner)


def _hard_silu(x: Array) -> Array:
    return x * jnp.clip(x + 3, 0, 6) / 6


def _hard_silu_slope(x: Array) -> Array:
    inside = (2 * x + 3) / 6
    return jnp.where(x < -3, 0, jnp.where(x > 3, 1, inside))


def _cbrt(x: Array) -> Array:
    return jnp.where(x == 0, 0, jnp.cbrt(jnp.where(x == 0, 1, x)))  # with a finite derivative at 0


def _cbrt_slope(x: Array) -> Array:
    info = jnp.finfo(x.dtype)
    least = float(info.smallest_subnormal if x.dtype == jnp.float16 else info.tiny)
    size = jnp.maximum(jnp.abs(x), least)  # at 0 it is infinite

    def slope(size: Array) -> Array:
        inverse = 1 / jnp.cbrt(size)
        return inverse * (inverse / 3)

    # Its own derivative, size^(-5/3), overflows before it does.
    near = jax.lax.stop_gradient(slope(size))
    return jnp.where(size < least**0.55, near, slope(jnp.maximum(size, least**0.55)))


def _asinh_slope(x: Array) -> Array:
    # 1 / sqrt(1 + x^2), without the overflow of x^2
    size = jnp.maximum(jnp.abs(x), 1)
    return 1 / (size * jnp.sqrt((1 / size) ** 2 + (x / size) ** 2))


def _atan_slope(x: Array) -> Array:
    slope = _asinh_slope(x)
    return slope * slope


def _soft_sign_slope(x: Array) -> Array:
    return (1 / (1 + jnp.abs(x))) ** 2


def _celu(alpha: ArrayLike) -> Curve:
    def value(x: Array) -> Array:
        return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0) / alpha))

    def slope(x: Array) -> Array:
        return jnp.where(x > 0, 1, jnp.exp(jnp.minimum(x, 0) / alpha))

    return Curve(value, slope)


def _squareplus(b: ArrayLike) -> Curve:
    def root(x: Array) -> Array:
        return jnp.hypot(x, jnp.sqrt(b))

    def value(x: Array) -> Array:
        return jnp.where(x >= 0, x + root(x), b / (root(x) + jnp.abs(x))) / 2

    def slope(x: Array) -> Array:
        return value(x) / root(x)

    return Curve(value, slope)


def _logaddexp(c: ArrayLike) -> Curve:
    return Curve(lambda x: jnp.logaddexp(x, c), lambda x: jax.nn.sigmoid(x - c))


def _erf_slope(x: Array) -> Array:
    return 2 / math.sqrt(math.pi) * jnp.exp(-x * x)


def _s_shaped(value: Callable, slope: Callable) -> Callable[[], Curve]:
    return lambda: Curve(value, slope, end=0.0)


def _humped(value: Callable, slope: Callable, start: float, end: float) -> Callable[[], Curve]:
    return lambda: Curve(value, slope, start, end)


def _convex(value: Callable, slope: Callable) -> Callable[[], Curve]:
    return lambda: Curve(value, slope)


def _grows(name: str, curve: Callable[..., Curve], rounding: Rounding, **more: Any) -> Operation:
    return elementwise(name, rounding, interval=increasing, increases=True, curve=curve, **more)


def _dips(
    name: str, curve: Callable[..., Curve], curvature: float, at: float, least: float, **more: Any
) -> Operation:
    """X times a factor that vanishes far to the left, and is 1 far to the right."""
    rounding = Rounding(absolute=more.pop("absolute", 4.0), curvature=curvature)
    humped = rounding._replace(humped=more.pop("humped", True))
    rule = more.pop("interval", valley(at, least))
    return elementwise(name, humped, interval=rule, curve=curve, variants=2, **more)


_GELU_TANH_CURVE = _humped(_gelu_tanh, _gelu_tanh_slope, -_GELU_TANH, _GELU_TANH)

SMOOTH: tuple[Operation, ...] = (
    _grows(
        "softplus",
        _convex(jax.nn.softplus, jax.nn.sigmoid),
        Rounding(absolute=4.0, curvature=0.25),
        function=jax.nn.softplus,
    ),
    elementwise(
        "square",
        Rounding(curvature=2.0),
        interval=valley(0.0, 0.0),
        curve=_convex(jnp.square, lambda x: 2 * x),
    ),
    elementwise(
        "squareplus",
        # (x + sqrt(x^2 + b)) / 2 cancels where x is negative
        Rounding(
            absolute=4.0,
            operand=4.0,
            curvature=lambda node, box, free: 0.5 / jnp.sqrt(parameter_of(node)),
        ),
        interval=by_formula(increasing, _squareplus),
        increases=True,
        curve=_squareplus,
        function=jax.nn.squareplus,
        parameter=Parameter("add", 4.0, 1e-6),
    ),
    # max(a, b) + log1p(exp(-|a - b|)): the very formula of softplus, and v e^-v < 0.4 keeps the
    # rounding of the difference small.
    _grows("logaddexp", _logaddexp, Rounding(absolute=4.0, curvature=0.25, constants="moves")),
    _grows(
        "log_sigmoid",
        lambda: Curve(jax.nn.log_sigmoid, lambda x: jax.nn.sigmoid(-x), math.inf, -math.inf),
        Rounding(absolute=4.0, curvature=0.25),
        function=jax.nn.log_sigmoid,
    ),
    _grows(
        "celu",
        _celu,
        Rounding(
            errors=lambda node, boxes: (16.0, 4.0 * jnp.maximum(1, jnp.abs(parameter_of(node)))),
            absolute=4.0,
            curvature=lambda node, box, free: 1 / parameter_of(node),
        ),
        function=jax.nn.celu,
        parameter=Parameter("div", 1.0, 1e-6),
    ),
    _grows("tanh", _s_shaped(jnp.tanh, _tanh_slope), Rounding(absolute=4.0, curvature=0.77)),
    _grows(
        "logistic",
        _s_shaped(jax.nn.sigmoid, _logistic_slope),
        Rounding(absolute=4.0, curvature=0.1),
    ),
    _grows("erf", _s_shaped(jax.lax.erf, _erf_slope), Rounding(absolute=4.0, curvature=0.97)),
    elementwise(
        "erfc",
        Rounding(192.0, slope=(192.0, 4.0), curvature=0.97),
        interval=hull,
        curve=lambda: Curve(jax.lax.erfc, lambda x: -_erf_slope(x), start=0.0),
    ),
    _grows("atan", _s_shaped(jnp.arctan, _atan_slope), Rounding(absolute=4.0, curvature=0.65)),
    _grows("asinh", _s_shaped(jnp.arcsinh, _asinh_slope), Rounding(curvature=0.39)),
    _grows(
        "soft_sign",
        _s_shaped(jax.nn.soft_sign, _soft_sign_slope),
        Rounding(curvature=2.0),
        function=jax.nn.soft_sign,
    ),
    # Its slope is infinite at 0: rounded outward, its interval encloses it.
    _grows("cbrt", _s_shaped(_cbrt, _cbrt_slope), Rounding(planes="interval")),
    elementwise("sinh", Rounding(64.0, 4.0), interval=increasing, increases=True),
    elementwise(
        "cosh",
        Rounding(
            64.0, slope=(64.0, 4.0), curvature=lambda node, box, free: jnp.cosh(magnitude(box))
        ),
        interval=valley(0.0, 1.0),
        curve=_convex(jnp.cosh, jnp.sinh),
    ),
    _dips(
        "gelu",
        _humped(_gelu, _gelu_slope, -_GELU, _GELU),
        0.8,
        -0.7517915246935646,
        -0.16997120747990372,
        function=partial(jax.nn.gelu, approximate=False),
    ),
    _dips(
        "gelu_tanh",
        _GELU_TANH_CURVE,
        0.81,
        -0.7524614220710163,
        -0.1700407505712541,
        absolute=32.0,
        # by the formula that does not cancel where x is negative
        interval=by_formula(valley(-0.7524614220710163, -0.1700407505712541), _GELU_TANH_CURVE),
        function=partial(jax.nn.gelu, approximate=True),
    ),
    _dips(
        "silu",
        _humped(_silu, _silu_slope, -_SILU, _SILU),
        0.5,
        -1.2784645427610741,
        -0.2784645427610739,
        function=jax.nn.silu,
    ),
    _dips(
        "mish",
        _humped(_mish, _mish_slope, *_MISH),
        0.65,
        -1.1924312145154952,
        -0.3088434130172506,
        function=jax.nn.mish,
    ),
    _dips(
        "hard_silu",
        _humped(_hard_silu, _hard_silu_slope, -3.0, 3.0),
        0.34,
        -1.5,
        -0.375,
        humped=False,  # it is 0 to the left of -3
        function=jax.nn.hard_silu,
    ),
)

CURVES: Mapping[str, Callable[..., Curve]] = {o.name: o.curve for o in SMOOTH if o.curve}
"""By name: `(*constants) -> Curve`."""
