"""The No-U-Turn Sampler on all the data: HMC that chooses the length of its trajectories.

    U(w)   =  -log p(w) - (1 / kl_weight) log p(D | w)       (nats, summed over weights and data)
    stop   when  (w+ - w-)' r- < 0  or  (w+ - w-)' r+ < 0

with w-, w+ the two ends of a trajectory, which is doubled forwards or backwards in time until it
turns back on itself, and r-, r+ the momenta there. A draw is taken from all of its points by their
energies, so that the chain's limit is exp(-U), as that of `bnncert.infer.hmc`.

Source: Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 2014; the chains are those of
`bnncert.infer.mcmc`.
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
    max_tree_depth: int = 10,
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
    """Makes the No-U-Turn Sampler as a `Sampler`.

        U(w) = -log p(w) - (1 / kl_weight) log p(D | w)
        stop when (w+ - w-)' r- < 0 or (w+ - w-)' r+ < 0

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, on unbounded supports;
            None for leaves that keep the values they have.
        num_warmup: draws of each chain that adapt and are discarded, >= 0.
        num_samples: draws of each chain that are kept.
        max_tree_depth: at most 2^max_tree_depth - 1 leapfrog steps are taken a draw. In vectorised
            chains, all wait for the longest.
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

    Cost: up to (num_warmup + thinning num_samples) 2^max_tree_depth full-batch gradients, in chunks
    of `batch_size` data. Memory: the samples, and the activations of num_chains * batch_size data.

    Source: Hoffman and Gelman, JMLR 2014, algorithm 6.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bnncert import likelihood, prior
        >>> from bnncert.types import Batch, Threat
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.zeros(2)
        >>> sampler = build(fit, prior.normal(w), num_warmup=5, num_samples=3, max_tree_depth=3)
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> samples, info = sampler.sample(jax.random.key(0), w, data, Threat(0.0, 1.0))
        >>> samples.params.shape, info.num_steps.shape
        ((3, 2), (1, 3))
    """
    return mcmc.build(
        log_likelihood,
        prior,
        kernel="nuts",
        num_warmup=num_warmup,
        num_samples=num_samples,
        max_tree_depth=max_tree_depth,
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
