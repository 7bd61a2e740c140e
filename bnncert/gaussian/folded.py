"""The folded normal number |z|, z ~ N(m, t^2)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array


def folded_mean(mean: Array, variance: Array) -> Array:
    """Computes E |z|, z ~ N(m, t^2): t sqrt(2/pi) exp(-m^2 / 2 t^2) + m erf(m / t sqrt 2).

    Args:
        mean: any shape.
        variance: likewise; where it is 0, |mean|, and where it overflowed to NaN, infinite.

    Example:
        >>> f"{float(folded_mean(jnp.array(0.0), jnp.array(1.0))):.4f}"
        '0.7979'
    """
    random = variance > 0
    deviation = jnp.sqrt(jnp.where(random, variance, 1.0))
    ratio = mean / deviation
    found = deviation * math.sqrt(2 / math.pi) * jnp.exp(-0.5 * ratio**2)
    found = found + mean * jax.lax.erf(ratio / math.sqrt(2))
    found = jnp.where(random, found, jnp.abs(mean))
    return jnp.where(jnp.isnan(variance), jnp.inf, found)
