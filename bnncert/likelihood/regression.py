"""The log-likelihood of regression with Gaussian noise, robust by bounds on the mean."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array

from bnncert.bounds import bound
from bnncert.bounds.methods import Method
from bnncert.likelihood.mixture import mixture, per_radius
from bnncert.likelihood.parts import Composed
from bnncert.sets import Box, ball
from bnncert.types import Apply, Key, Params, Threat


def robust_gaussian(
    apply: Apply,
    *,
    noise_scale: float,
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
) -> Composed:
    """Makes the certified robust log-likelihood of regression, y ~ N(f(w, x), noise_scale^2).

        p_worst(eps) = N( max(|u - y|, |y - l|); 0, noise_scale^2 ),   l <= f(w, x') <= u

    The worst case puts the mean at the end of its interval that is farther from y.

    Args:
        apply: `(params, x) -> mean`, any shape, for one example.
        noise_scale: standard deviation of the noise, in the units of y.
        method: of the bounds, as for `bnncert.bound`.
        clip: `(low, high)`: the adversary stays in this range of values.

    Returns:
        `loglik(key, params, x, y, threat)` in nats, summed over the outputs.

    Raises:
        ValueError: a noise scale that is not positive.

    Cost: one clean evaluation and K bounds (`bnncert.bound`).

    Source: Wicker et al., AISTATS 2021, section 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loglik = robust_gaussian(lambda w, x: w * x, noise_scale=1.0)
        >>> datum = jnp.ones(1), jnp.ones(1), jnp.ones(1)  # the mean is right, and off by 0.5
        >>> for lam in (1.0, 0.0):
        ...     print(f"{loglik(jax.random.key(0), *datum, Threat(0.5, lam)):.4f}")
        -0.9189
        -1.0439
    """
    if not noise_scale > 0:
        raise ValueError(f"noise_scale = {noise_scale}: a standard deviation must be positive.")
    bounded = bound(apply, method)

    def outputs(key: Key, params: Params, x: Array, y: Array, threat: Threat) -> Array:
        del key

        def worst(eps: Array) -> Array:
            mean: Box = bounded(params, ball(x, jax.lax.stop_gradient(eps), clip=clip))
            return jnp.maximum(jnp.abs(mean.upper - y), jnp.abs(y - mean.lower)).reshape(-1)

        errors = (apply(params, x) - y).reshape(-1)
        return jnp.concatenate([errors, per_radius(worst, threat).reshape(-1)])

    def log_prob(errors: Array, y: Array, threat: Threat) -> Array:
        del y  # the errors are from it already
        rows = errors.reshape(1 + jnp.size(threat.eps), -1)
        each = dist.Normal(0.0, noise_scale).log_prob(rows).sum(1)
        return mixture(each[0], each[1:], threat)

    return Composed(outputs, log_prob)
