"""IVON: the natural-gradient step with the Hessian itself, estimated without second derivatives.

By Price's theorem (integration by parts), for w = loc + offset drawn from q,

    E_q[ diagonal Hessian ]  =  E_q[ gradient(w) offset / scale^2 ],

which costs no more than the gradient. The estimate may be negative; a correction of second order in
the step, from the geometry of positive precisions, keeps h + d > 0:

    h  <-  beta2 h + (1 - beta2) e + (1 - beta2)^2 (h - e)^2 / (2 (h + d)),     e: the estimate

(with r = (1 - beta2)(e - h) / (h + d), the new h + d is (h + d)(1 + r + r^2 / 2) > 0). Its fixed
point is the optimum of the ELBO over mean-field normals: in a conjugate model the exact diagonal
precision, up to the correction's bias, of relative size (1 - beta2) Var(e) / (2 (h + d)^2).

The noise of the minibatch enters e divided by the scale, Var(e) ~ Var(gradient) / scale^2, so that
both this bias and the variance of h are about

    (1 - beta2) N / (2 B kl_weight)

relative to h: the colder the posterior, the longer h has to be averaged. Where a run is too short
for that, h comes out too large, that is the posterior too narrow.

Source: Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
algorithm 1; the correction from Lin et al., "Handling the Positive-Definite Constraint in the
Bayesian Learning Rule", ICML 2020.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnncert.infer import _natural_gradient
from bnncert.infer._minibatch import Schedule
from bnncert.infer._natural_gradient import Draw, Leaves, Smooth
from bnncert.types import Algorithm, LogLikelihood, Prepare, Prior


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    beta2: float = 0.9995,
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    beta1: float = 0.9,
    num_particles: int = 1,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes IVON as an `Algorithm`.

        h <- beta2 h + (1 - beta2) e + (1 - beta2)^2 (h - e)^2 / (2 (h + d)),    e = g noise/scale
        loc <- loc - a (g + d (loc - mu)) / (h + d),    scale^2 = kl_weight / (N (h + d))

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions, normal; None for deterministic leaves.
        num_data: N, the size of the training set.
        optimizer: from Optax, given the natural gradient, in units of the weights, e.g.
            `optax.sgd(0.1)` with a schedule; 1 would be Newton's step.
        beta2: decay of the running mean of the curvature, in [0, 1); close to 1, because a single
            estimate is noisy.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf; never above the prior's.
        beta1: decay of the running mean of gradients, in [0, 1).
        num_particles: draws of the weights for each update; they are vmapped.
        deterministic: optimiser of the leaves without a prior, given the gradient of the negative
            log-likelihood, nats summed over the data; needed where there are any.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`.

    Raises:
        ValueError: a number out of its range, deterministic leaves without an optimiser.
        NotImplementedError: a prior that is not normal, naming the leaf.

    Cost: of a step, num_particles forward and backward passes, and O(P) for P random weights.
    Memory: 3 P, and the optimiser's.

    Source: Shen et al., ICML 2024, algorithm 1.

    Example:
        >>> import jax
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> method = build(fit, prior.normal(w), num_data=4, optimizer=optax.sgd(0.1))
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> print(method.posterior(state).scale.round(3))
        [0.354 0.354]
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> bool(jnp.all(method.posterior(state).loc < w))              # towards 1 = w_0 + w_1
        True
    """
    return _natural_gradient.build(
        price,
        riemannian(beta2),
        log_likelihood,
        prior,
        num_data=num_data,
        optimizer=optimizer,
        kl_weight=kl_weight,
        initial_scale=initial_scale,
        beta1=beta1,
        num_particles=num_particles,
        deterministic=deterministic,
        prepare=prepare,
    )


def price(draw: Draw) -> Leaves:
    """Estimates E_q[diagonal Hessian] without bias, by Price: gradient offset / scale^2.

    Args:
        draw: what a minibatch says at one draw of the weights.

    Returns:
        The estimate, by name of the random leaf.

    Cost: O(P) for P random weights.

    Source: Price's theorem; Shen et al., ICML 2024, algorithm 1.
    """
    return {
        name: gradient * draw.offset[name] / jnp.square(draw.scale[name])
        for name, gradient in draw.gradient.items()
    }


def riemannian(beta2: float) -> Smooth:
    """Makes the running mean of the curvature that stays above -d.

        h <- beta2 h + (1 - beta2) e + (1 - beta2)^2 (h - e)^2 / (2 (h + d))

    Args:
        beta2: decay, in [0, 1).

    Returns:
        `(h, estimate, d) -> h`.

    Raises:
        ValueError: a decay out of its range.

    Source: Lin et al., ICML 2020.

    Example:
        >>> smooth = riemannian(beta2=0.5)
        >>> h, e, d = jnp.array([1.0, -3.0, 1.0])                       # e alone would be below -d
        >>> smooth(h, e, d).item() > -1.0
        True
    """
    _natural_gradient.check_decay("beta2", beta2)
    rate = 1 - beta2

    def smooth(h: Array, estimate: Array, damping: Array) -> Array:
        correction = jnp.square(rate * (h - estimate)) / (2 * (h + damping))
        return beta2 * h + rate * estimate + correction

    return smooth
