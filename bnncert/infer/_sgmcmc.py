"""Stochastic-gradient MCMC: SGLD, SGHMC, and both with cyclical step sizes.

    U(w) = -log p(w) - (1 / kl_weight) log p(D | w)        (nats; estimated from a minibatch)

is the potential of the target p(w) p(D | w)^(1 / kl_weight). With step size h, friction a in (0, 1]
and standard normal noise xi, one step is

    v  <-  (1 - a) v - (h / 2) grad U(w) + sqrt(a h) xi
    w  <-  w + v

This is SGHMC in its form with momentum, equation 15 of Chen et al. with learning rate h / 2 and no
estimate of the gradient's noise. At friction 1 no momentum is left, and it is SGLD,

    w  <-  w - (h / 2) grad U(w) + sqrt(h) xi.

No step is accepted or rejected, so the samples are biased. On a quadratic, U = c w^2 / 2, they are
stationary for h c < 4 (2 - a), with

    Var w = (1 + h s / (4 a)) / (c (1 - h c / (4 (2 - a)))),

s the variance of the minibatch's gradient: of order h on the exact 1 / c. Both factors are met in
practice: h must lie far below 4 over the largest curvature, and far below 4 a / s.

With a cycle of L steps, the step size is multiplied by (1 + cos(pi r)) / 2, r = (step mod L) / L.
The first part of a cycle explores, without noise; the rest samples.

Source: Welling & Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", ICML 2011;
Chen et al., "Stochastic Gradient Hamiltonian Monte Carlo", ICML 2014; Zhang et al., "Cyclical
Stochastic Gradient MCMC for Bayesian Deep Learning", ICLR 2020. The variance follows from the
moments of the recursion above.
"""

import math
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bnncert import prior as priors
from bnncert.infer._minibatch import (
    Schedule,
    check_settings,
    check_support,
    log_likelihoods,
)
from bnncert.posterior import Samples
from bnncert.sets import is_concrete
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat

Leaves = dict[str, Array]


class SGMCMCState(NamedTuple):
    """The state of SGLD or SGHMC: where the chain is, and what it has collected.

    Attributes:
        params: the current weights.
        momentum: v of the random leaves, by name; zero with SGLD until the first step.
        opt_state: of the optimiser of the deterministic leaves, or None.
        samples: stacked params, a ring of `num_samples` places: sample i (from 0) lies at place
            i mod num_samples. Places not yet written hold the weights the chain started at.
        collected: samples collected so far, those that were overwritten too.
        step: updates so far.
    """

    params: Params
    momentum: Leaves
    opt_state: Any
    samples: Params
    collected: Int[Array, ""]
    step: Int[Array, ""]


class SGMCMCInfo(NamedTuple):
    """What one update of SGLD or SGHMC saw, before its step.

    Attributes:
        loss: kl_weight U(w) = -log p(D | w) - kl_weight log p(w), nats summed over the data.
        log_likelihood: log p(D | w), estimated from the minibatch.
        log_prior: log p(w), unweighted.
        step_size: h, weights^2.
        kept: whether the weights after the step were collected.
    """

    loss: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    log_prior: Float[Array, ""]
    step_size: Float[Array, ""]
    kept: Bool[Array, ""]


class _Settings(NamedTuple):
    log_likelihood: LogLikelihood
    prior: Prior
    num_data: int
    step_size: Schedule
    friction: float
    kl_weight: float
    num_samples: int
    every: int
    burn_in: int
    cycle_length: int | None
    exploration: float
    deterministic: optax.GradientTransformation | None
    prepare: Prepare | None


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    step_size: float | Schedule,
    num_samples: int,
    friction: float | None = None,
    kl_weight: float = 1.0,
    every: int = 1,
    burn_in: int = 0,
    cycle_length: int | None = None,
    exploration: float = 0.8,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes SGLD or SGHMC as an `Algorithm`; alone they are `bnncert.infer.sgld` or `sghmc`.

        v <- (1 - a) v - (h / 2) grad U(w) + sqrt(a h) xi,    w <- w + v

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, on unbounded supports;
            None for deterministic leaves.
        num_data: N, the size of the training set.
        step_size: h > 0 in weights^2, the variance that SGLD's noise adds in one step; or a
            schedule of the step. Samples are not weighted by it.
        num_samples: how many samples are kept, the last ones: the memory of so many networks.
        friction: a in (0, 1], the share of the momentum that a step loses; None is SGLD, the same
            as 1.
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

    Source: Welling & Teh, ICML 2011, equation 4; Chen et al., ICML 2014, equation 15.

    Example:
        >>> from bnncert import likelihood
        >>> fit, w = likelihood.clean_categorical(lambda w, x: w @ x), jnp.zeros((2, 3))
        >>> method = build(fit, priors.normal(w), num_data=4, step_size=0.01, num_samples=5)
        >>> method.init(jax.random.key(0), w).samples.shape
        (5, 2, 3)
    """
    check_settings(prior, num_data, kl_weight)
    check_support(prior)
    if not callable(step_size) and not 0 < step_size < math.inf:
        raise ValueError(f"step_size = {step_size}: it must be positive and finite (weights^2).")
    if friction is not None and not 0 < friction <= 1:
        raise ValueError(f"friction = {friction}: it must be in (0, 1], or None for SGLD.")
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("every", every, 1),
        ("burn_in", burn_in, 0),
        ("cycle_length", 1 if cycle_length is None else cycle_length, 1),
    ):
        if value < least:
            raise ValueError(f"{name} = {value}: it must be at least {least}.")
    if not 0 <= exploration < 1:
        raise ValueError(f"exploration = {exploration}: it must be in [0, 1), e.g. 0.8.")
    if cycle_length is not None and not _first_sampling(exploration, cycle_length) < cycle_length:
        raise ValueError(
            f"a cycle of {cycle_length} steps has none left to sample with exploration = "
            f"{exploration}: make it longer, or explore less."
        )
    settings = _Settings(
        log_likelihood,
        prior,
        num_data,
        step_size if callable(step_size) else lambda step: jnp.asarray(step_size),
        1.0 if friction is None else friction,
        kl_weight,
        num_samples,
        every,
        burn_in,
        cycle_length,
        exploration,
        deterministic,
        prepare,
    )
    return Algorithm(
        partial(_init, settings), partial(_update, settings), partial(_posterior, settings)
    )


def potential(
    log_likelihood: LogLikelihood,
    prior: Prior,
    num_data: int,
    kl_weight: float,
    prepare: Prepare | None,
    params: Params,
    key: Key,
    batch: Batch,
    threat: Threat,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Estimates U(w) from a minibatch, in nats, with log p(D | w) and log p(w).

        U(w) ~ -(N/B) sum_{i in batch} log p(y_i | x_i, w) / kl_weight - log p(w)

    Args:
        log_likelihood: of one datum.
        prior: as for `build`.
        num_data: N.
        kl_weight: of the prior.
        prepare: as for `build`.
        params: the weights w.
        key: for what the likelihood draws.
        batch: a minibatch of B data.
        threat: the error model.

    Returns:
        U, and the pair (log p(D | w), log p(w)).
    """
    terms = log_likelihoods(log_likelihood, prepare, key, params, batch, threat)
    log_lik = num_data * terms.sum() / batch.mask.sum()
    log_prior = priors.log_prob(prior, params)
    return -log_lik / kl_weight - log_prior, (log_lik, log_prior)


def _init(settings: _Settings, key: Key, params: Params) -> SGMCMCState:
    del key
    priors.check(settings.prior, params)
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.result_type(v)), params)  # no weak types
    random, trained = _parts(settings.prior, params)
    if trained and settings.deterministic is None:
        raise ValueError(
            f"leaves {list(trained)} have no prior: give `deterministic`, an optimiser for them "
            "(optax.set_to_zero() leaves them as they are), or a prior."
        )
    return SGMCMCState(
        params,
        {name: jnp.zeros_like(leaf) for name, leaf in random.items()},
        None if settings.deterministic is None else settings.deterministic.init(trained),
        jax.tree.map(lambda v: jnp.repeat(v[None], settings.num_samples, axis=0), params),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def _update(
    settings: _Settings, key: Key, state: SGMCMCState, batch: Batch, threat: Threat
) -> tuple[SGMCMCState, SGMCMCInfo]:
    # 1. The gradient of U at the weights.
    likelihood_key, noise_key = jax.random.split(key)
    random, trained = _parts(settings.prior, state.params)

    def of_leaves(leaves: Leaves) -> Any:
        s, params = settings, priors.replace(state.params, leaves)
        function = partial(potential, s.log_likelihood, s.prior, s.num_data, s.kl_weight, s.prepare)
        return function(params, likelihood_key, batch, threat)

    (_, (log_lik, log_prior)), gradient = jax.value_and_grad(of_leaves, has_aux=True)(
        random | trained
    )
    # 2. Momentum, friction and, where the cycle samples, noise.
    step_size, sampling, kept = _phase(settings, state.step)
    noise_size = jnp.where(sampling, jnp.sqrt(settings.friction * step_size), 0.0)
    momentum = {}
    for leaf_key, name in zip(jax.random.split(noise_key, len(random)), random, strict=True):
        leaf, v = random[name], state.momentum[name]
        noise = jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
        h, size = (jnp.asarray(value, leaf.dtype) for value in (step_size, noise_size))
        momentum[name] = (1 - settings.friction) * v - h / 2 * gradient[name] + size * noise
    # 3. The step; leaves without a prior have an optimiser of their own.
    new = {name: leaf + momentum[name] for name, leaf in random.items()}
    opt_state = state.opt_state
    if settings.deterministic is not None:
        # -log p(D | w), as other methods train these leaves: U without its factor
        slopes = {name: settings.kl_weight * gradient[name] for name in trained}
        moves, opt_state = settings.deterministic.update(slopes, opt_state, trained)
        new.update(cast(Leaves, optax.apply_updates(trained, moves)))
    params = priors.replace(state.params, new)

    # 4. The weights after the step, if they are kept, in place of the oldest.
    place = state.collected % settings.num_samples
    samples = jax.tree.map(
        lambda ring, v: ring.at[place].set(jnp.where(kept, v, ring[place])),
        state.samples,
        params,
    )
    collected = state.collected + kept.astype(state.collected.dtype)
    loss = -log_lik - settings.kl_weight * log_prior
    return (
        SGMCMCState(params, momentum, opt_state, samples, collected, state.step + 1),
        SGMCMCInfo(loss, log_lik, log_prior, step_size, kept),
    )


def _phase(
    settings: _Settings, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
    """Says of a step (from 0) its size, if there is noise, and if the weights after it are kept."""
    step_size = jnp.asarray(settings.step_size(step))
    after = step - settings.burn_in
    if settings.cycle_length is None:
        kept = (after >= 0) & ((after + 1) % settings.every == 0)
        return step_size, jnp.asarray(True), kept
    length = settings.cycle_length
    within = step % length
    sampling = within >= _first_sampling(settings.exploration, length)
    kept = sampling & (after >= 0) & ((length - 1 - within) % settings.every == 0)
    return step_size * (1 + jnp.cos(jnp.pi * within / length)) / 2, sampling, kept


def _first_sampling(exploration: float, length: int) -> int:
    """Finds the first step of a cycle with noise."""
    return math.ceil(exploration * length - 1e-9)  # 0.7 * 10 is 7, not 7.000000000000001


def _posterior(settings: _Settings, state: SGMCMCState) -> Samples:
    if not is_concrete(state.collected) or jnp.ndim(state.collected):
        raise ValueError(
            "how many samples were collected is not known inside jit or vmap, or for many chains "
            "at once: call `posterior` outside, on one chain, or read `state.samples`."
        )
    count = int(state.collected)
    if count == 0:
        raise ValueError(
            f"nothing is collected after {int(state.step)} steps (burn_in = {settings.burn_in}, "
            f"every = {settings.every}, cycle_length = {settings.cycle_length}): update further."
        )
    held = min(count, settings.num_samples)
    order = (jnp.arange(held) + count - held) % settings.num_samples
    return Samples(jax.tree.map(lambda ring: ring[order], state.samples))


def _parts(prior: Prior, params: Params) -> tuple[Leaves, Leaves]:
    """Parts the leaves, by name: the random ones, and the deterministic ones that hold floats."""
    leaves, random = priors.named(params), priors.sites(prior)
    trained = {
        name: leaf
        for name, leaf in leaves.items()
        if name not in random and leaf is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    return {name: leaves[name] for name in random}, trained
