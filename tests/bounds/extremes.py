"""Elementwise functions in float64, and intervals of every magnitude that a format has."""

import jax.numpy as jnp
import numpy as np
from scipy import special

SELU = (1.0507009873554805, 1.6732632423543772)


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _tanh_of_softplus(x):
    """With e = e^x: (e^2 + 2 e) / (e^2 + 2 e + 2)."""
    e = np.exp(np.minimum(x, 40.0))
    return (e * e + 2 * e) / (e * e + 2 * e + 2)


def _squareplus(x, b):
    root = np.hypot(x, np.sqrt(b))
    return np.where(x >= 0, (x + root) / 2, 0.5 * b / (root + np.abs(x)))


def _elu(x, alpha):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _gelu_tanh(x):
    return x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def _positive(function):
    return lambda x, *constants: np.where(
        x > 0, function(np.where(x > 0, x, 1.0), *constants), np.nan
    )


EXACT = {
    "max": np.maximum,
    "min": np.minimum,
    "abs": np.abs,
    "clip": lambda x, a, b: np.minimum(np.maximum(x, a), b),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "leaky_relu": lambda x, a: np.where(x >= 0, x, a * x),
    "elu": _elu,
    "selu": lambda x: SELU[0] * _elu(x, SELU[1]),
    "celu": lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0) / a)),
    "squareplus": _squareplus,
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": _gelu_tanh,
    "softplus": _softplus,
    "log_sigmoid": lambda x: -_softplus(-x),
    "silu": lambda x: x * special.expit(x),
    "mish": lambda x: x * _tanh_of_softplus(x),
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "logistic": special.expit,
    "tanh": np.tanh,
    "erf": special.erf,
    "erfc": special.erfc,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "cbrt": np.cbrt,
    "sin": np.sin,
    "cos": np.cos,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "lgamma": _positive(special.gammaln),
    "log": _positive(np.log),
    "log1p": lambda x: np.where(x > -1, np.log1p(np.maximum(x, -1)), np.nan),
    "sqrt": lambda x: np.where(x >= 0, np.sqrt(np.abs(x)), np.nan),
    "rsqrt": _positive(lambda x: 1 / np.sqrt(x)),
    "reciprocal": lambda x: np.where(x == 0, np.nan, 1 / np.where(x == 0, 1, x)),
    "square": np.square,
    "integer_pow": lambda x, n: np.where(
        (x == 0) & (n < 0), np.nan, np.power(np.where(x == 0, 0.0 if n >= 0 else 1.0, x), float(n))
    ),
    "pow": lambda x, p: np.where(
        (x > 0) | ((x == 0) & (p >= 0)),
        np.power(np.where(x > 0, x, 0.0 if p >= 0 else 1.0), p),
        np.nan,
    ),
    "logaddexp": np.logaddexp,
    **{name: getattr(np, name) for name in ("sign", "floor", "ceil", "round")},
}
"""By operation: `(x, *constants)`, NaN where it is not defined."""


def intervals(dtype, count, seed=0):
    """Ends log-uniform from below the smallest normal number to the largest, 0, tight and wide."""
    rng = np.random.default_rng(seed)
    info = jnp.finfo(dtype)
    low, high = np.log2(float(info.tiny)) - 3, np.log2(float(info.max))

    def numbers():
        size = np.exp2(rng.uniform(low, high, count))
        near = rng.random(count) < 0.4  # where most functions bend
        size = np.where(near, np.exp2(rng.uniform(-7, 8, count)), size)
        size = np.where(rng.random(count) < 0.06, 0.0, size)
        size = np.where(rng.random(count) < 0.03, float(info.max), size)
        return size * rng.choice([-1, 1], count)

    a, b = numbers(), numbers()
    kind = rng.integers(0, 6, count)
    b = np.where(kind == 0, a, b)
    b = np.where(kind == 1, a * (1 + np.exp2(rng.uniform(-12, 3, count))), b)
    b = np.where(kind == 2, np.abs(b) * np.sign(a), b)
    limit = float(info.max)
    a, b = (np.asarray(jnp.asarray(np.clip(v, -limit, limit), dtype)) for v in (a, b))
    low = np.where(a.astype(np.float64) <= b.astype(np.float64), a, b)
    high = np.where(a.astype(np.float64) <= b.astype(np.float64), b, a)
    return low, high


def points(l, u, count=12, seed=1):
    """Of each interval, in float64: its ends, the middle, and others, some near an end or 0."""
    l, u = l.astype(np.float64), u.astype(np.float64)
    rng = np.random.default_rng(seed)
    share = np.concatenate([[0, 1, 0.5], rng.random(count)])[:, None]
    x = l + share * (u - l)
    near = 2.0 ** rng.uniform(-40, 0, (count, 1)) * (u - l)
    sized = 2.0 ** rng.uniform(-160, 1, (2 * count, 1)) * np.maximum(np.abs(l), np.abs(u))
    sized[::2] *= -1
    bend = np.broadcast_to(rng.normal(size=(count, 1)) * 3, (count, len(l)))
    return np.clip(np.concatenate([x, l + near, u - near, sized, bend]), l, u)
