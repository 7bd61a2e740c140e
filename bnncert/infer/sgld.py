"""Stochastic-gradient Langevin dynamics: gradient steps on minibatches, with as much noise.

    U(w)  =  -log p(w) - (1 / kl_weight) log p(D | w)        (nats; estimated from a minibatch)
    w     <-  w - (h / 2) grad U(w) + sqrt(h) xi,            xi ~ N(0, I)

No step is rejected, so the samples are biased, by order h: on a quadratic of curvature c, with s
the variance of the minibatch's gradient, Var w = (1 + h s / 4) / (c (1 - h c / 4)) in place of
1 / c. It is SGHMC at friction 1 (`bnncert.infer.sghmc`), and may run in cycles as well.

Source: Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", ICML 2011;
Zhang et al., "Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning", ICLR 2020.
"""

import optax

from bnncert.infer import _sgmcmc
from bnncert.infer._minibatch import Schedule
from bnncert.types import Algorithm, LogLikelihood, Prepare, Prior


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    step_size: float | Schedule,
    num_samples: int,
    kl_weight: float = 1.0,
    every: int = 1,
    burn_in: int = 0,
    cycle_length: int | None = None,
    exploration: float = 0.8,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes stochastic-gradient Langevin dynamics as an `Algorithm`.

        w <- w - (h / 2) grad U(w) + sqrt(h) xi,    U(w) = -log p(w) - (1/kl_weight) log p(D | w)

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, on unbounded supports;
            None for deterministic leaves.
        num_data: N, the size of the training set.
        step_size: h > 0 in weights^2, the variance that the noise adds in one step; or a
            schedule of the step. Samples are not weighted by it.
        num_samples: how many samples are kept, the last ones: the memory of so many networks.
        kl_weight: of the prior, > 0; 1 is Bayes.
        every: steps between two samples that are kept.
        burn_in: steps before the first that count for nothing.
        cycle_length: L, steps of a cycle; None has no cycles.
        exploration: share of a cycle without noise, in [0, 1). Of the rest, every `every`-th step
            is kept, counted back from the last one of the cycle.
        deterministic: optimiser of the leaves without a prior, by the gradient of
            -log p(D | w) in nats; needed where there are such leaves. `optax.set_to_zero()` leaves
            them as they are.
        prepare: `(params, x_batch) -> params`, applied to the weights: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`. The posterior is a `Samples` of the weights that were
        collected, oldest first: min(state.collected, num_samples) of them. It raises where there
        are none, and inside `jit` and `vmap`, where their number is not known: of vmapped chains
        read `state.samples` once all places are filled.

    Raises:
        ValueError: a number out of its range; a prior without a random leaf or with a bounded
            support; from `init`, deterministic leaves without an optimiser.

    Cost: one gradient of a minibatch a step. Memory: 2 + num_samples networks.

    Source: Welling and Teh, ICML 2011, equation 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.zeros(2)
        >>> method = build(fit, prior.normal(w), num_data=4, step_size=0.01, num_samples=3)
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> bool(info.kept), method.posterior(state).num_samples
        (True, 1)
    """
    return _sgmcmc.build(
        log_likelihood,
        prior,
        num_data=num_data,
        step_size=step_size,
        num_samples=num_samples,
        kl_weight=kl_weight,
        every=every,
        burn_in=burn_in,
        cycle_length=cycle_length,
        exploration=exploration,
        deterministic=deterministic,
        prepare=prepare,
    )
