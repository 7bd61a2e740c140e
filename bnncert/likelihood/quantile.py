"""Log-likelihoods of a Gaussian posterior itself, by bounds linear in its weights: no draws.

    m = E - depth L,    what a linear form of the outputs is above but for a share of Phi(-depth)

is in the place of the bound at one draw (`bnncert.gaussian.margins`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array

from bnncert import gaussian
from bnncert.bounds.methods import Method
from bnncert.likelihood.mixture import mixture, per_radius
from bnncert.likelihood.parts import OfPosterior
from bnncert.outputs import watched
from bnncert.sets import Box, Set, ball
from bnncert.types import Apply, Threat


def quantile_categorical(
    apply: Apply,
    *,
    depth: float = 3.0,
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
    delta: float = 1e-3,
) -> OfPosterior:
    """Makes the robust log-likelihood of a Gaussian posterior itself, which nothing is drawn for.

        log M_power( p(0), p(eps_1), ..., p(eps_K) ),    p(eps) = 1 / (1 + sum_{j != y} exp -m_j)

    with m_j = E_j - depth L_j, which the margin f_y - f_j lies above over the whole ball for a
    share of Phi(depth) of the posterior, or more, but for delta (`bnncert.gaussian.margins`). So
    where all m_j are positive, all margins are for a share of 1 - delta - (C - 1) Phi(-depth) at
    least. p(0) is of the ball of radius 0: the input.

    What is trained by it is certified as a whole (`bnncert.certify.safety`), without the noise of
    draws. It is no expected log-likelihood: what follows is a generalised posterior.

    Args:
        apply: `(params, x) -> logits (C,)` for one example; one logit z of two classes is (0, z).
        depth: how many Lipschitz constants below its mean a margin is taken at, >= 0.
        method: as for `bnncert.gaussian.margins`: "ibp" costs some 4 evaluations of the network.
        clip: `(low, high)`: the adversary stays in this range of values.
        delta: as for `bnncert.gaussian.margins`.

    Returns:
        An `OfPosterior` of a `bnncert.posterior.MeanField`, `LowRank` or `Gaussian`, with
        `threat.eps` of shape () or (K,); for `bnncert.infer.bbb`, `low_rank` and `elbo`.

    Raises:
        ValueError: a negative depth; when called: other outputs, or as `bnncert.gaussian.margins`.
        TypeError: when called with another posterior.

    Cost: 1 + K times `bnncert.gaussian.margins`.

    Source: Wicker et al., AISTATS 2021, section 4 (the mixture), with a bound of the posterior in
    the place of one of a draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> loglik = quantile_categorical(lambda w, x: w @ x)
        >>> x, y, threat = jnp.array([1.0, 0.0]), jnp.array(0), Threat(0.1, lam=0.0)
        >>> for scale in (1e-6, 0.1):                        # the margin is 0.8 at the mean
        ...     q = MeanField(jnp.eye(2), jnp.full((2, 2), scale))
        ...     print(f"{loglik(jax.random.key(0), q, x, y, threat):.4f}")
        -0.3711
        -0.5411
    """
    _check_depth(depth)
    network = watched(apply, "logits")

    def log_prob(q: Any, x: Array, y: Array, threat: Threat) -> Array:
        gaussian.leaves_of(q)  # raises for another posterior
        (classes,) = jax.eval_shape(network, q.loc, x).shape
        unit = jnp.eye(classes, dtype=jnp.result_type(x))
        rows = unit[y] - unit, jnp.zeros(classes, unit.dtype)

        def at(region: Set) -> Array:
            found = gaussian.margins(
                network, q, region, *rows, method=method, rounding="nearest", delta=delta
            )
            low = found.mean - depth * found.lipschitz
            return -jax.nn.logsumexp(jnp.where(jnp.arange(classes) == y, 0.0, -low))

        def worst(eps: Array) -> Array:
            return at(ball(x, jax.lax.stop_gradient(eps), clip=clip))

        return mixture(at(Box(x, x)), per_radius(worst, threat), threat)

    return OfPosterior(log_prob)


def quantile_gaussian(
    apply: Apply,
    *,
    noise_scale: float,
    depth: float = 3.0,
    method: str | Method = "ibp",
    clip: tuple[float, float] | None = None,
    delta: float = 1e-3,
) -> OfPosterior:
    """Makes the robust log-likelihood of regression of a Gaussian posterior itself, without draws.

        log M_power( p(0), p(eps_1), ..., p(eps_K) ),   p(eps) = N( max(|u - y|, |y - l|); 0, s^2 )

    with l = E - depth L from below and u alike from above: over the whole ball the mean f(w, x')
    leaves [l, u] on one side for a share of Phi(-depth) of the posterior at most, but for delta.

    Args:
        apply: `(params, x) -> mean`, any shape, for one example.
        noise_scale: s, the standard deviation of the noise, in the units of y.
        depth: as for `quantile_categorical`.
        method: as for `bnncert.gaussian.margins`.
        clip: `(low, high)`: the adversary stays in this range of values.
        delta: as for `bnncert.gaussian.margins`.

    Returns:
        As `quantile_categorical`, in nats, summed over the outputs.

    Raises:
        ValueError: a negative depth, a noise scale that is not positive; when called, as
            `bnncert.gaussian.margins`.
        TypeError: when called with another posterior.

    Cost: 1 + K times `bnncert.gaussian.margins`, of two rows an output.

    Source: Wicker et al., AISTATS 2021, section 4 (the mixture), with a bound of the posterior in
    the place of one of a draw.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert.posterior import MeanField
        >>> loglik = quantile_gaussian(lambda w, x: w * x, noise_scale=1.0)
        >>> datum, threat = (jnp.ones(1), jnp.ones(1)), Threat(0.5, lam=0.0)
        >>> for scale in (1e-6, 0.1):                        # the mean is right, and off by 0.5
        ...     q = MeanField(jnp.ones(1), jnp.full(1, scale))
        ...     print(f"{loglik(jax.random.key(0), q, *datum, threat):.4f}")
        -1.0439
        -1.3702
    """
    _check_depth(depth)
    if not 0 < noise_scale < math.inf:
        raise ValueError(
            f"noise_scale = {noise_scale}: a standard deviation must be positive and finite."
        )

    def log_prob(q: Any, x: Array, y: Array, threat: Threat) -> Array:
        gaussian.leaves_of(q)  # raises for another posterior
        target, shape = jnp.ravel(y), jax.eval_shape(apply, q.loc, x).shape
        if target.size != math.prod(shape):
            raise ValueError(f"y has the shape {jnp.shape(y)}, and the network's mean {shape}.")
        unit = jnp.eye(target.size, dtype=jnp.result_type(x))
        rows = jnp.concatenate([unit, -unit]), jnp.concatenate([-target, target])

        def at(region: Set) -> Array:
            found = gaussian.margins(
                apply, q, region, *rows, method=method, rounding="nearest", delta=delta
            )
            low = found.mean - depth * found.lipschitz  # of f - y, and of y - f
            farthest = jnp.maximum(-low[: target.size], -low[target.size :])
            return dist.Normal(0.0, noise_scale).log_prob(farthest).sum()

        def worst(eps: Array) -> Array:
            return at(ball(x, jax.lax.stop_gradient(eps), clip=clip))

        return mixture(at(Box(x, x)), per_radius(worst, threat), threat)

    return OfPosterior(log_prob)


def _check_depth(depth: float) -> None:
    if not 0 <= depth < math.inf:
        raise ValueError(f"depth = {depth}: give a finite number that is not negative, e.g. 3.")
