"""The mixture of the clean likelihood and the worst ones at random radii, inside the logarithm.

    p_rob = M_power( p_clean, p_worst(eps_1), ..., p_worst(eps_K);  weights lam, (1 - lam)/K, ... )

`bnncert.likelihood` says why.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert.sets import check_radius, is_concrete
from bnncert.types import Key, Threat


def continuous_threat(
    key: Key, radius: dist.Distribution, num_radii: int, power: float | Array = 0.0
) -> Threat:
    """Draws K radii from a continuous p_eps (Exponential, Rayleigh, Uniform, ...).

        p_rob = E_eps[ p_worst(eps) ]  ~  (1/K) sum_k p_worst(eps_k)     (power 1)

    Args:
        key: random key.
        radius: NumPyro distribution of a scalar radius >= 0, in the units of the input.
        num_radii: K, the number of radii; the cost of the likelihood grows with it.
        power: of the mixture.

    Returns:
        A `Threat` with `eps` of shape (K,) and lam = 0.

    Raises:
        ValueError: for a distribution of vectors or of negative radii, or num_radii < 1.

    Source: Wicker et al., AISTATS 2021, section 4.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> continuous_threat(jax.random.key(0), dist.Uniform(0.0, 0.1), 4).eps.shape
        (4,)
    """
    if num_radii < 1:
        raise ValueError(f"num_radii = {num_radii}: draw at least one radius.")
    if radius.batch_shape or radius.event_shape:
        raise ValueError(
            f"radius has shape {radius.batch_shape + radius.event_shape}: give a distribution of "
            "scalars."
        )
    eps = jnp.asarray(radius.sample(key, (num_radii,)))
    if is_concrete(eps) and bool((eps < 0).any()):
        raise ValueError(
            f"radius drew {eps}: radii must not be negative (a Normal? use a HalfNormal)."
        )
    return Threat(eps, jnp.zeros(()), jnp.asarray(power, eps.dtype))


def mixture(clean: Array, worsts: Array, threat: Threat) -> Array:
    """Computes log M_power of one clean and K worst likelihoods, in nats.

    Args:
        clean: log-likelihood at the input.
        worsts: at each radius, shape (K,).
        threat: lam and power, which are not differentiated.

    Raises:
        ValueError: lam or power out of [0, 1], where they are known.
    """
    for name, value in (("lam", threat.lam), ("power", threat.power)):
        # NumPy: under `jit`, JAX would stage a comparison of known numbers too.
        if is_concrete(value) and not 0 <= np.asarray(value) <= 1:
            raise ValueError(f"threat.{name} = {value}: it must be in [0, 1].")
    lam, power = jax.lax.stop_gradient((jnp.asarray(threat.lam), jnp.asarray(threat.power)))
    count = worsts.shape[0]
    worsts = jnp.where(lam < 1, worsts, clean)  # -inf does not count either
    weights = jnp.concatenate([lam[None], jnp.full((count,), (1 - lam) / count)])
    logs = jnp.concatenate([clean[None], worsts])
    return log_power_mean(logs, weights, power)


def per_radius(worst: Callable[[Array], Array], threat: Threat) -> Array:
    """Stacks the worst case at each radius, shape (K,); one radius costs no extra axis.

    Args:
        worst: `eps -> ` the worst case there.
        threat: the radii.

    Raises:
        ValueError: radii of more than one axis, or negative ones.
    """
    eps = jnp.asarray(threat.eps)
    if eps.ndim > 1:
        raise ValueError(f"threat.eps has shape {eps.shape}: give one radius, or K of shape (K,).")
    check_radius(threat.eps, "threat.eps")
    # At lam = 1 no worst case counts: an overflow there must not reach the gradient as 0 * inf.
    eps = jnp.where(jnp.asarray(threat.lam) < 1, eps, jnp.zeros_like(eps))
    return worst(eps)[None] if eps.ndim == 0 else jax.vmap(worst)(eps)


def log_power_mean(
    logs: Float[Array, " n"], weights: Float[Array, " n"], power: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Computes the logarithm of a weighted power mean from the logarithms of its terms.

        log ( sum_i w_i p_i^power )^(1/power);    at power 0  sum_i w_i log p_i

    Stable for every power in [0, 1]: through log1p and expm1 where the sum is near 1 (a small
    power, or nearly all weight on the largest), elsewhere as a log-sum-exp.

    Args:
        logs: log p_i, in nats.
        weights: non-negative, of sum 1.
        power: 0 geometric, 1 arithmetic.

    Returns:
        A scalar, nats.

    Example:
        >>> import jax.numpy as jnp
        >>> logs, weights = jnp.log(jnp.array([1.0, 0.25])), jnp.array([0.5, 0.5])
        >>> [f"{jnp.exp(log_power_mean(logs, weights, power)):.3f}" for power in (0.0, 1.0)]
        ['0.500', '0.625']
    """
    top = jax.lax.stop_gradient(jnp.max(logs))
    below = logs - top
    geometric = jnp.sum(weights * below)
    safe = jnp.where(power > 0, power, 1.0)
    scaled = safe * below
    excess = jnp.sum(weights * jnp.expm1(scaled))  # of the sum over 1, in [-1, 0]
    near = excess > -0.5
    # Each branch sees harmless values where the other is taken: no NaN reaches a gradient.
    by_log1p = jnp.log1p(jnp.where(near, excess, 0.0))
    gone = jnp.max(jnp.where(weights > 0, logs, -jnp.inf)) == -jnp.inf  # a mean of zeros
    by_sum = jax.nn.logsumexp(jnp.where(near | gone, 0.0, scaled), b=weights)
    mean = jnp.where(near, by_log1p, jnp.where(gone, -jnp.inf, by_sum)) / safe
    return top + jnp.where(power > 0, mean, geometric)
