"""Noisy Adam: the natural-gradient step, its curvature the squared gradient of the minibatch.

    h  =  B (mean of the B gradients of a minibatch)^2               (elementwise)

no more than Adam computes. The factor B is what implementations tend to leave out: for a minibatch
drawn without replacement from N data, with m the mean and V the variance of all N gradients,

    E[ (minibatch mean)^2 ]  =  m^2 + V (N - B) / (B (N - 1)),
    E[ h ]                   =  V (N - B) / (N - 1) + B m^2.

The square alone misses the squared gradients of single data, V + m^2, by a factor of B, and the
posterior would be sqrt(B) times too wide. With the factor, h is VOGN's up to a share of about B /
N: V is counted (B - 1) / (N - 1) short, and m, at the fixed point the gradient of the prior and
what the draw of the weights adds, of order sqrt(h / N), is counted B times. A full batch (B = N)
loses V altogether: `num_data` should exceed the batch many times over.

Source: Zhang et al., "Noisy Natural Gradient as Variational Inference", ICML 2018, algorithm 1 (no
square root of the curvature, in contrast to Adam).
"""

import jax
import jax.numpy as jnp
import optax

from bnncert.infer import _natural_gradient
from bnncert.infer._minibatch import Schedule
from bnncert.infer._natural_gradient import Draw, Leaves
from bnncert.types import Algorithm, LogLikelihood, Prepare, Prior


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    beta2: float = 0.999,
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    beta1: float = 0.9,
    num_particles: int = 1,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes noisy Adam as an `Algorithm`.

        h <- beta2 h + (1 - beta2) B (minibatch mean of grad -log p(y | x, w))^2,    w ~ q
        loc <- loc - a (g + d (loc - mu)) / (h + d),    scale^2 = kl_weight / (N (h + d))

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions, normal; None for deterministic leaves.
        num_data: N, the size of the training set; several times a minibatch.
        optimizer: from Optax, given the natural gradient, in units of the weights, e.g.
            `optax.sgd(0.1)` with a schedule; 1 would be Newton's step.
        beta2: decay of the running mean of the curvature, in [0, 1).
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

    Source: Zhang et al., ICML 2018, algorithm 1.

    Example:
        >>> import jax
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> method = build(fit, prior.normal(w), num_data=40, optimizer=optax.sgd(0.1))
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> print(method.posterior(state).scale.round(3))
        [0.354 0.354]
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> bool(jnp.all(method.posterior(state).loc < w))              # towards 1 = w_0 + w_1
        True
    """
    return _natural_gradient.build(
        squared_minibatch_gradient,
        _natural_gradient.moving_average(beta2),
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


def squared_minibatch_gradient(draw: Draw) -> Leaves:
    """Estimates the curvature by B (minibatch mean)^2, with B the data without the padding.

    Args:
        draw: what the minibatch says at one draw of the weights.

    Returns:
        The estimate, by name of the random leaf.
    """
    size = draw.batch.mask.sum()
    return jax.tree.map(lambda g: size * jnp.square(g), draw.gradient)
