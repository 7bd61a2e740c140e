"""Smooth functions by name: value, derivative, and where they are convex (`CURVES`).

Derivatives are written so that they keep their digits in the tails: a slope is multiplied by the
width of an interval, which may be large.

    tanh' = 4 s(2x) s(-2x)                  with s the logistic function
    gelu  = x P(x)                          gelu'  = P(x) + x p(x), with the normal cdf and density
    gelu (tanh) = x s(2 g)                  with g = sqrt(2 / pi) (x + 0.044715 x^3)
    silu  = x s(x)                          silu'  = s(x) (1 + x s(-x))
    logaddexp = log(e^x + e^c)              its derivative is s(x - c)
    mish  = x tanh(softplus(x))
    elu   = x, or a (e^x - 1) for x <= 0    convex for a <= 1; else see `hinges.py`

Functions with a singular end (log, 1/x, x^p) are in `powers.py`, sin and cos in `waves.py`.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from bnncert.bounds.relaxations.curves import Curve

# Inflections; those of gelu, silu and mish to the last digit of float64.
_GELU = math.sqrt(2)
_GELU_TANH = 1.4185040087908285
_SILU = 2.3993572805154675
_MISH = (-2.256376396360793, 1.4905711794854282)
_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)


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


def _elu(alpha: ArrayLike, scale: float = 1.0) -> Curve:
    def value(x: Array) -> Array:
        return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))

    def slope(x: Array) -> Array:
        return scale * jnp.where(x > 0, 1, alpha * jnp.exp(jnp.minimum(x, 0)))

    return Curve(value, slope, end=jnp.where(jnp.asarray(alpha) <= 1, jnp.inf, 0.0))


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


CURVES: Mapping[str, Callable[..., Curve]] = {
    "softplus": _convex(jax.nn.softplus, jax.nn.sigmoid),
    "square": _convex(jnp.square, lambda x: 2 * x),
    "squareplus": _squareplus,
    "logaddexp": _logaddexp,
    "log_sigmoid": lambda: Curve(
        jax.nn.log_sigmoid, lambda x: jax.nn.sigmoid(-x), math.inf, -math.inf
    ),
    "elu": _elu,
    "selu": lambda: _elu(*reversed(_SELU)),
    "celu": _celu,
    "tanh": _s_shaped(jnp.tanh, _tanh_slope),
    "logistic": _s_shaped(jax.nn.sigmoid, _logistic_slope),
    "erf": _s_shaped(jax.lax.erf, _erf_slope),
    "erfc": lambda: Curve(jax.lax.erfc, lambda x: -_erf_slope(x), start=0.0),
    "atan": _s_shaped(jnp.arctan, _atan_slope),
    "asinh": _s_shaped(jnp.arcsinh, _asinh_slope),
    "soft_sign": _s_shaped(jax.nn.soft_sign, _soft_sign_slope),
    "cbrt": _s_shaped(_cbrt, _cbrt_slope),
    "gelu": _humped(_gelu, _gelu_slope, -_GELU, _GELU),
    "gelu_tanh": _humped(_gelu_tanh, _gelu_tanh_slope, -_GELU_TANH, _GELU_TANH),
    "silu": _humped(_silu, _silu_slope, -_SILU, _SILU),
    "mish": _humped(_mish, _mish_slope, *_MISH),
    "hard_silu": _humped(_hard_silu, _hard_silu_slope, -3.0, 3.0),
}
"""By name: `(*constants) -> Curve`."""
