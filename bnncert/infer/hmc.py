"""Hamiltonian Monte Carlo on all the data, with trajectories of a fixed length.

    U(w)   =  -log p(w) - (1 / kl_weight) log p(D | w)       (nats, summed over weights and data)
    dw/dt  =  M^-1 r,    dr/dt = -grad U(w),    r ~ N(0, M) anew at each draw

in leapfrog steps; the end of a trajectory is accepted with probability min(1, exp(-change of
U + r' M^-1 r / 2)), so that the chain's limit is exp(-U) without the bias of a step size. What to
choose is the length: too short a trajectory is a random walk, too long a one comes back.
`bnncert.infer.nuts` chooses it by itself.

Source: Neal, "MCMC Using Hamiltonian Dynamics", 2011; the chains are those of `bnncert.infer.mcmc`.
"""

from typing import Any

from bnncert.infer import mcmc
from bnncert.types import LogLikelihood, Prepare, Prior


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_warmup: int,
    num_samples: int,
    num_steps: int | None = None,
    trajectory_length: float | None = None,
    num_chains: int = 1,
    kl_weight: float = 1.0,
    target_accept: float = 0.8,
    step_size: float = 0.1,
    dense_mass: bool = False,
    adapt_mass: bool = True,
    scales: Any = None,
    thinning: int = 1,
    batch_size: int = 1024,
    progress_bar: bool = False,
    prepare: Prepare | None = None,
) -> mcmc.Sampler:
    """Makes Hamiltonian Monte Carlo as a `Sampler`.

        U(w) = -log p(w) - (1 / kl_weight) log p(D | w)
        dw/dt = M^-1 r,    dr/dt = -grad U(w)

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, on unbounded supports;
            None for leaves that keep the values they have.
        num_warmup: draws of each chain that adapt and are discarded, >= 0.
        num_samples: draws of each chain that are kept.
        num_steps: leapfrog steps a draw, >= 1.
        trajectory_length: step size times number of steps, in its place: give one of the two.
        num_chains: run side by side, vectorised.
        kl_weight: of the prior, > 0; 1 is Bayes.
        target_accept: mean probability of acceptance that the step size is adapted to, in (0, 1).
        step_size: that the adaptation starts at, and, without a warm-up, stays at.
        dense_mass: M with all covariances, (number of weights)^2 numbers, or only its diagonal.
        adapt_mass: whether M adapts; it stays as it starts otherwise.
        scales: deviations that the weights are expected to have, > 0, with the params' structure,
            e.g. `posterior.moments()[1]`: M starts as diag(1 / scales^2). None: the identity.
        thinning: keep every so many draws.
        batch_size: data evaluated at once.
        progress_bar: shows one, of draws. Every call compiles anew then; without, calls with the
            same shapes share one compile.
        prepare: `(params, x) -> params` with all the inputs, padding too: e.g. batch-norm
            statistics.

    Returns:
        A `bnncert.infer.mcmc.Sampler`, with `sample(key, params, data, threat) -> (Samples, info)`:
        from one network, stacked ones (one for each chain) or a posterior that starts are drawn
        from, and all of the data as one `Batch`. The samples are num_chains * num_samples members,
        chain after chain; states of a Markov chain are correlated.

    Raises:
        ValueError: a number out of its range; a prior without a random leaf or with a bounded
            support; from `sample`, params that do not match the prior or the number of chains.

    Cost: (num_warmup + thinning num_samples) num_steps full-batch gradients, in chunks of
    `batch_size` data. Memory: the samples, and the activations of num_chains * batch_size data.

    Source: Neal, 2011, section 3.2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.zeros(2)
        >>> sampler = build(fit, prior.normal(w), num_warmup=5, num_samples=3, num_steps=2)
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> samples, info = sampler.sample(jax.random.key(0), w, data, Threat(0.0, 1.0))
        >>> samples.params.shape, info.num_steps.shape
        ((3, 2), (1, 3))
    """
    return mcmc.build(
        log_likelihood,
        prior,
        kernel="hmc",
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_steps=num_steps,
        trajectory_length=trajectory_length,
        num_chains=num_chains,
        kl_weight=kl_weight,
        target_accept=target_accept,
        step_size=step_size,
        dense_mass=dense_mass,
        adapt_mass=adapt_mass,
        scales=scales,
        thinning=thinning,
        batch_size=batch_size,
        progress_bar=progress_bar,
        prepare=prepare,
    )
