"""Moments of max(z, 0) for a Gaussian z, rounded to the safe side.

    R(m, s)  = E max(m + s Z, 0)   = m Phi(m/s) + s phi(m/s)
    R2(m, s) = E max(m + s Z, 0)^2 = (m^2 + s^2) Phi(m/s) + m s phi(m/s),       Z ~ N(0, 1)

Both increase in m and in s >= 0; R is convex in (m, s), of slope at most 1 in m, phi(0) in s.
Computed in floating point, of unit roundoff u, they are off by less than

    64 u (s + max(m, 0))    and    64 u (s + max(m, 0))^2

as t phi(t), t^2 phi(t) and, for t < 0, t Phi(t) and t^2 Phi(t) are less than 1, which is what
rounding m / s costs; the constant is tested against float64. Functions named `_below` and `_above`
have given way by it.
"""

import math

import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

PEAK = 0.39894229
"""More than phi(0) = 1 / sqrt(2 pi), 0.398942280..., also in float32."""


def mean_below(m: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes E max(z, 0) = m Phi(m/s) + s phi(m/s), rounded down.

    Args:
        m: mean of z.
        s: its standard deviation, >= 0.

    Returns:
        No more than R(m, s), elementwise.

    Example:
        >>> f"{float(mean_below(jnp.zeros(()), jnp.ones(()))):.4f}"     # 1 / sqrt(2 pi)
        '0.3989'
    """
    least = jnp.maximum(m, 0.0)
    return jnp.maximum(_mean(m, s) - _unit(m) * (s + least), least)


def mean_above(m: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes E max(z, 0) = m Phi(m/s) + s phi(m/s), rounded up.

    Args:
        m: mean of z.
        s: its standard deviation, >= 0.

    Returns:
        No less than R(m, s), elementwise.

    Example:
        >>> f"{float(mean_above(jnp.ones(()), jnp.zeros(()))):.4f}"
        '1.0000'
    """
    return _mean(m, s) + _unit(m) * (s + jnp.maximum(m, 0.0))


def square_above(m: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes E max(z, 0)^2 = (m^2 + s^2) Phi(m/s) + m s phi(m/s), rounded up.

    Args:
        m: mean of z.
        s: its standard deviation, >= 0.

    Returns:
        No less than R2(m, s), elementwise.

    Example:
        >>> f"{float(square_above(jnp.zeros(()), jnp.ones(()))):.4f}"
        '0.5000'
    """
    t = m / _divisor(s)
    value = (m * m + s * s) * ndtr(t) + m * s * _density(t)
    return jnp.maximum(value, 0.0) + _unit(m) * jnp.square(s + jnp.maximum(m, 0.0))


def _mean(m: Array, s: Array) -> Array:
    t = m / _divisor(s)
    return m * ndtr(t) + s * _density(t)


def _density(t: Array) -> Array:
    t = jnp.clip(t, -40.0, 40.0)  # its square stays finite
    return jnp.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _divisor(s: Array) -> Array:
    return jnp.maximum(s, jnp.finfo(s.dtype).tiny)


def _unit(value: Array) -> float:
    return 32.0 * float(jnp.finfo(value.dtype).eps)
