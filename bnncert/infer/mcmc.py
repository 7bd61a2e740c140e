"""Hamiltonian Monte Carlo and NUTS on all the data, by NumPyro.

    U(w) = -log p(w) - (1 / kl_weight) log p(D | w)        (nats, summed over weights and data)

is the potential (`bnncert.infer._potential`): Markov chains have the density exp(-U), that is
p(w) p(D | w)^(1 / kl_weight), as their limit, without the bias of a step size. HMC moves along

    dw/dt = M^-1 r,   dr/dt = -grad U(w),   r ~ N(0, M)

by leapfrog steps and accepts the end with probability min(1, exp(-change of U + r' M^-1 r / 2));
NUTS chooses the length of the trajectory. Step size and mass matrix M adapt during the warm-up.

A step is as short as the narrowest direction asks for, in the metric of M. Where a short warm-up
cannot learn M, for there are many weights, give it the deviations of a variational posterior.

`bnncert.infer.diagnostics` says whether chains agree.

Source: Neal, "MCMC Using Hamiltonian Dynamics", 2011; Hoffman & Gelman, "The No-U-Turn Sampler",
JMLR 2014.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from numpyro.infer import HMC, MCMC, NUTS

from bnncert import prior as priors
from bnncert.infer._minibatch import check_support
from bnncert.infer._potential import pad, potential
from bnncert.infer._progress import follow
from bnncert.posterior import Samples
from bnncert.sets import is_concrete
from bnncert.types import Batch, Key, LogLikelihood, Params, Posterior, Prepare, Prior, Threat


class Sampler(NamedTuple):
    """A method that needs all the data at once.

    Attributes:
        sample: `(key, params, data, threat) -> (Samples, MCMCInfo)`, as `build` describes.
    """

    sample: Callable[[Key, Any, Batch, Threat], tuple[Samples, "MCMCInfo"]]


class MCMCInfo(NamedTuple):
    """What the chains did after the warm-up, at the draws that were kept.

    Attributes:
        divergences: draws whose energy went astray: where there are any, mistrust the samples.
        acceptance: mean probability of acceptance, over all draws after the warm-up.
        step_size: of the leapfrog, as the warm-up left it.
        num_steps: leapfrog steps of each draw; for NUTS a tree of depth ceil(log2(num_steps + 1)).
        potential: U at each draw, nats.
    """

    divergences: Int[Array, " chains"]
    acceptance: Float[Array, " chains"]
    step_size: Float[Array, " chains"]
    num_steps: Int[Array, "chains draws"]
    potential: Float[Array, "chains draws"]


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_warmup: int,
    num_samples: int,
    num_chains: int = 1,
    kernel: str = "nuts",
    kl_weight: float = 1.0,
    max_tree_depth: int = 10,
    num_steps: int | None = None,
    trajectory_length: float | None = None,
    target_accept: float = 0.8,
    step_size: float = 0.1,
    dense_mass: bool = False,
    adapt_mass: bool = True,
    scales: Any = None,
    thinning: int = 1,
    batch_size: int = 1024,
    progress_bar: bool = False,
    prepare: Prepare | None = None,
) -> Sampler:
    """Makes HMC or NUTS as a `Sampler`; alone they are `bnncert.infer.hmc` and `nuts`.

        U(w) = -log p(w) - (1 / kl_weight) log p(D | w)
        dw/dt = M^-1 r,    dr/dt = -grad U(w),    r ~ N(0, M)

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, on unbounded supports;
            None for leaves that keep the values they have.
        num_warmup: draws of each chain that adapt and are discarded, >= 0.
        num_samples: draws of each chain that are kept.
        num_chains: run side by side, vectorised.
        kernel: "nuts" or "hmc".
        kl_weight: of the prior, > 0; 1 is Bayes.
        max_tree_depth: NUTS takes at most 2^max_tree_depth - 1 leapfrog steps a draw. In vectorised
            chains, all wait for the longest.
        num_steps: leapfrog steps a draw, for "hmc".
        trajectory_length: step size times number of steps, for "hmc", in its place.
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
        `Sampler(sample)`, with `sample(key, params, data, threat) -> (Samples, MCMCInfo)`:

        - `params` are one network, at which all chains start; or stacked ones, one for each chain;
          or a posterior that starts are drawn from. Deterministic leaves have one value in all.
        - `data` is all of it, a `Batch`: what its mask leaves out adds nothing.
        - the samples are num_chains * num_samples members, all of the first chain before those of
          the second; deterministic leaves are repeated. States of a Markov chain are correlated.

    Raises:
        ValueError: a number out of its range, an unknown kernel, options of the other kernel; a
            prior without a random leaf or with a bounded support; from `sample`, params that do not
            match the prior or the number of chains.

    Cost: (num_warmup + thinning num_samples) trajectories of full-batch gradients, in chunks of
    `batch_size` data. Memory: the samples, and the activations of num_chains * batch_size data.

    Source: Neal, 2011, section 3.2; Hoffman and Gelman, JMLR 2014, algorithm 6.

    Example:
        >>> from bnncert import likelihood
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> sampler = build(
        ...     fit, priors.normal(jnp.zeros(2)), num_warmup=5, num_samples=3, max_tree_depth=3
        ... )
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> sampler.sample(jax.random.key(0), jnp.zeros(2), data, Threat(0.0, 1.0))[0].num_samples
        3
    """
    _check(prior, kernel, kl_weight, num_steps, trajectory_length, target_accept, step_size)
    for name, value, least in (
        ("num_warmup", num_warmup, 0),
        ("num_samples", num_samples, 1),
        ("num_chains", num_chains, 1),
        ("max_tree_depth", max_tree_depth, 1),
        ("num_steps", 1 if num_steps is None else num_steps, 1),
        ("thinning", thinning, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} = {value}: it must be at least {least}.")
    options: dict[str, Any] = {
        "step_size": step_size,
        "target_accept_prob": target_accept,
        "dense_mass": dense_mass,
        "adapt_mass_matrix": adapt_mass,
        "kinetic_fn": kinetic_energy,
    }
    if scales is not None:
        options["inverse_mass_matrix"] = _variances(prior, scales, dense_mass)
    if kernel == "nuts":
        make = partial(NUTS, max_tree_depth=max_tree_depth, **options)
    else:
        make = partial(HMC, num_steps=num_steps, trajectory_length=trajectory_length, **options)
    energy = partial(
        potential,
        log_likelihood,
        prior,
        kl_weight=kl_weight,
        prepare=prepare,
        batch_size=batch_size,
    )
    run = partial(
        _run,
        prior,
        energy,
        make,
        num_chains,
        {
            "num_warmup": num_warmup,
            "num_samples": thinning * num_samples,
            "thinning": thinning,
        },
    )
    total = num_warmup + thinning * num_samples
    run = follow(run, total) if progress_bar else jax.jit(run)
    return Sampler(partial(_sample, prior, num_chains, batch_size, run))


def kinetic_energy(inverse_mass: Array, momentum: Params) -> Float[Array, ""]:
    """Computes the energy of the momentum r, r' M^-1 r / 2, in nats.

    NumPyro's ends in a dot product, off by whole nats over 10^5 weights in float32, and not
    by the same at the next step: proposals are rejected for it, however short the steps.

    Args:
        inverse_mass: M^-1, or its diagonal.
        momentum: r, a pytree.

    Returns:
        A scalar.

    Example:
        >>> float(kinetic_energy(jnp.array([1.0, 2.0]), {"w": jnp.array([2.0, 1.0])}))
        3.0
    """
    flat = ravel_pytree(momentum)[0]
    if inverse_mass.ndim == 1:
        velocity = inverse_mass * flat
    else:
        velocity = jnp.matmul(inverse_mass, flat, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(velocity * flat)


def _sample(
    prior: Prior,
    num_chains: int,
    batch_size: int,
    run: Callable[..., tuple[Params, MCMCInfo]],
    key: Key,
    params: Any,
    data: Batch,
    threat: Threat,
) -> tuple[Samples, MCMCInfo]:
    start_key, likelihood_key, chain_key = jax.random.split(key, 3)
    starts, params = _starts(prior, num_chains, start_key, params)
    if data.mask.shape[0] > batch_size:
        data = pad(data, batch_size)  # once, not at every step
    samples, info = run(likelihood_key, chain_key, starts, params, data, threat)
    return Samples(samples), info


def _starts(
    prior: Prior, num_chains: int, key: Key, params: Any
) -> tuple[dict[str, Array], Params]:
    """Stacks the random leaves of every chain; gives one network with the deterministic ones."""
    if isinstance(params, Posterior):
        params = params.sample(key, num_chains)
    leaves, sites = priors.named(params), priors.sites(prior)
    stacked = all(
        name in leaves and jnp.shape(leaves[name]) == (num_chains, *leaf.shape())
        for name, leaf in sites.items()
    )
    if not stacked:
        try:
            priors.check(prior, params)
        except ValueError as error:
            error.add_note(f"(params may also be stacked, one for each of {num_chains} chains)")
            raise
        return {
            name: jnp.broadcast_to(leaves[name], (num_chains, *leaf.shape()))
            for name, leaf in sites.items()
        }, params
    one: Any = jax.tree.map(lambda leaf: leaf[0], params)
    priors.check(prior, one)
    for name, leaf in leaves.items():
        if name in sites or leaf is None or not is_concrete(leaf):
            continue
        if bool((leaf != leaf[0]).any()):
            raise ValueError(
                f"leaf {name!r} has no prior and differs between the starts: the chains would "
                "sample from different posteriors. Give it one value."
            )
    return {name: leaves[name] for name in sites}, one


def _run(
    prior: Prior,
    energy: Callable[..., Array],
    make: Callable[..., HMC],
    num_chains: int,
    settings: dict[str, Any],
    likelihood_key: Key,
    chain_key: Key,
    starts: dict[str, Array],
    params: Params,
    data: Batch,
    threat: Threat,
    watch: Callable[[HMC], HMC] = lambda kernel: kernel,
) -> tuple[Params, MCMCInfo]:
    """Makes one run, and so one compile: NumPyro's own caches end with its objects."""
    types = {name: leaf.dtype for name, leaf in starts.items()}

    def weights(values: dict[str, Array]) -> Params:
        return priors.replace(params, {n: v.astype(types[n]) for n, v in values.items()})

    def of_values(values: dict[str, Array]) -> Array:
        return energy(likelihood_key, weights(values), data, threat).astype(float)

    # NumPyro computes in the default type
    positions = {name: leaf.astype(float) for name, leaf in starts.items()}
    if num_chains == 1:
        positions = {name: leaf[0] for name, leaf in positions.items()}
    chains = MCMC(
        watch(make(potential_fn=of_values)),
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
        **settings,
    )
    fields = ("mean_accept_prob", "num_steps", "potential_energy", "adapt_state.step_size")
    chains.run(chain_key, init_params=positions, extra_fields=fields)
    draws: Any = chains.get_samples()  # chain after chain
    extra = chains.get_extra_fields(group_by_chain=True)
    info = MCMCInfo(
        extra["diverging"].sum(1),
        extra["mean_accept_prob"][:, -1],
        extra["adapt_state.step_size"][:, -1],
        extra["num_steps"],
        extra["potential_energy"],
    )
    total = jax.tree.leaves(draws)[0].shape[0]
    repeated = jax.tree.map(lambda v: jnp.broadcast_to(v, (total, *jnp.shape(v))), params)
    return priors.replace(repeated, {n: v.astype(types[n]) for n, v in draws.items()}), info


def _variances(prior: Prior, scales: Any, dense: bool) -> Array:
    """Lays out the inverse of M in the order of NumPyro's flat vectors."""
    priors.check(prior, scales)
    leaves = priors.named(scales)
    for name in priors.names(prior):
        if not bool((leaves[name] > 0).all()):
            raise ValueError(
                f"scales: leaf {name!r} has a deviation of {float(jnp.min(leaves[name])):g}; "
                "they must all be positive."
            )
    flat = ravel_pytree({n: jnp.square(leaves[n]).astype(float) for n in priors.names(prior)})[0]
    return jnp.diag(flat) if dense else flat


def _check(
    prior: Prior,
    kernel: str,
    kl_weight: float,
    num_steps: int | None,
    trajectory_length: float | None,
    target_accept: float,
    step_size: float,
) -> None:
    if not priors.sites(prior):
        raise ValueError("the prior has no random leaf: use bnncert.infer.map.")
    check_support(prior)
    if kernel not in ("nuts", "hmc"):
        raise ValueError(f"kernel = {kernel!r}: there are 'nuts' and 'hmc'.")
    given = (num_steps is not None) + (trajectory_length is not None)
    if given != (kernel == "hmc"):
        raise ValueError(
            f"num_steps = {num_steps}, trajectory_length = {trajectory_length}: 'hmc' needs one of "
            f"the two, 'nuts' neither; the kernel is {kernel!r}."
        )
    for name, value, most in (
        ("kl_weight", kl_weight, math.inf),
        ("trajectory_length", trajectory_length, math.inf),
        ("target_accept", target_accept, 1.0),
        ("step_size", step_size, math.inf),
    ):
        if value is not None and not 0 < value < most:
            raise ValueError(f"{name} = {value}: it must be positive and below {most}.")
