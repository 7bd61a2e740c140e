"""SWA-Gaussian: a Gaussian fitted to the iterates of an optimiser at a constant learning rate.

After training, the steps of MAP go on around the mode. Of the iterates w_1, ..., w_n collected so
far, SWAG keeps the mean, the mean square and the last K deviations from the running mean:

    m1 = mean_i w_i,   m2 = mean_i w_i^2,   D_i = w_i - mean_{j <= i} w_j
    q(w) = N(w; m1, 1/2 diag(m2 - m1^2) + 1/(2 (K - 1)) sum_{last K} D_i D_i^T)        (equation 1)

*What that covariance is.* On a quadratic loss with Hessian A, in nats summed over the data, steps
w' = w - h (A (w - w*) + xi) with gradient noise xi of covariance C are an AR(1) process, whose
stationary covariance S solves

    S = (I - h A) S (I - h A) + h^2 C,     that is     A S + S A - h A S A = h C,

for small h the Lyapunov equation A S + S A = h C of Mandt et al. In expectation over a long run
SWAG's covariance is then (diag(S) + K/(K - 1) S) / 2. It is linear in the learning rate and in the
gradient noise (C ~ N^2 / B times the covariance of one datum's gradient, for minibatches of B): a
*local* scale, and the posterior's A^-1 only if h C = 2 I. `scale` widens or narrows it. Full
batches at convergence leave no spread at all; a schedule should hold a constant rate from `start`.

m2 - m1^2 is accumulated as a mean of squared differences (Welford), the same number without its
cancellation, which in float32 would drown a spread below 3e-4 of a weight.

Source: Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019,
algorithm 1; Mandt, Hoffman and Blei, "Stochastic Gradient Descent as Approximate Bayesian
Inference", JMLR 2017, section 3; Welford, Technometrics 1962.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bnncert import prior as priors
from bnncert.infer import map as maximum
from bnncert.infer._minibatch import Schedule, check_settings
from bnncert.posterior import LowRank, MeanField
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat

TINY = 1e-30
"""Least variance, in the weights' unit squared, as in the authors' code: densities divide by it."""


class SWAGState(NamedTuple):
    """The state of SWAG: that of the optimiser, and what was collected of its iterates.

    Attributes:
        map: weights and optimiser, as for MAP.
        step: steps taken.
        num_collected: iterates folded in, n.
        mean: of the collected weights, every leaf.
        variance: m2 - m1^2, None for deterministic leaves.
        deviations: the last K, in a ring: leaves (K, ...), zeros at first; None for deterministic.
    """

    map: maximum.MAPState
    step: Int[Array, "*members"]
    num_collected: Int[Array, "*members"]
    mean: Params
    variance: Params
    deviations: Params


class SWAGInfo(NamedTuple):
    """What one update of SWAG saw, before its step, and how much is collected after it.

    Attributes:
        loss: the negative objective of MAP, nats summed over the data.
        log_likelihood: log p(D | w), estimated from the minibatch.
        log_prior: log p(w), unweighted.
        num_collected: iterates folded in so far; a posterior needs at least two.
    """

    loss: Float[Array, "*members"]
    log_likelihood: Float[Array, "*members"]
    log_prior: Float[Array, "*members"]
    num_collected: Int[Array, "*members"]


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float | Schedule = 1.0,
    start: int = 0,
    every: int = 1,
    rank: int = 20,
    scale: float = 1.0,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes SWA-Gaussian as an `Algorithm`.

        q(w) = N(w; m1, 1/2 diag(m2 - m1^2) + 1/(2 (K - 1)) sum_{last K} D_i D_i^T)
        m1 = mean_i w_i,    m2 = mean_i w_i^2,    D_i = w_i - mean_{j <= i} w_j

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure. Leaves with None are
            trained by the likelihood alone, averaged like all others, and deterministic after.
        num_data: N, the size of the training set.
        optimizer: from Optax; of constant learning rate from `start` on, or a cyclic one.
        kl_weight: of log p(w) against log p(D | w), > 0. It moves the mode; the spread is that of
            the iterates whatever it is. Or a schedule of the step, constant from `start` on.
        start: the number of the first step whose result is collected; steps count from 0.
        every: steps from one collected iterate to the next: usually an epoch's.
        rank: K, deviations kept, >= 2; or 0, for a diagonal covariance.
        scale: multiplies all standard deviations of the posterior; 1 is the paper's equation.
        prepare: `(params, x_batch) -> params`: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`. The posterior is a `LowRank`; for rank 0 a `MeanField`
        of scale^2 diag(m2 - m1^2), SWAG-Diagonal. Before anything is collected it is a point at
        the current weights (standard deviations of 1e-15), after one iterate a point there, and
        with n < K it uses the n deviations there are, K = n: always finite, and a fair picture of
        the iterates only once n is well above K.

    Raises:
        ValueError: num_data < 1, a kl_weight or a scale that is not positive, start < 0, every < 1,
            a rank of 1 (its covariance divides by K - 1) or less than 0, no random leaf.

    Cost: a step of MAP; memory (K + 2) params beside its own.

    Source: Maddox et al., NeurIPS 2019, algorithm 1.

    Example:
        >>> from bnncert import likelihood, prior
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.zeros(2)
        >>> method = build(fit, prior.normal(w), num_data=4, optimizer=optax.sgd(0.01), rank=3)
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> int(info.num_collected), method.posterior(state).rank
        (1, 3)
    """
    check_settings(prior, num_data, kl_weight)
    if start < 0 or every < 1:
        raise ValueError(
            f"start = {start}, every = {every}: collect from a step >= 0 on, every 1 or more steps."
        )
    if rank < 0 or rank == 1:
        raise ValueError(
            f"rank = {rank}: the covariance of K deviations divides by K - 1; take 2 or more, or 0 "
            "for a diagonal covariance."
        )
    if not scale > 0:
        raise ValueError(f"scale = {scale}: it must be positive; 1 is the paper's.")
    inner = maximum.build(
        log_likelihood,
        prior,
        num_data=num_data,
        optimizer=optimizer,
        prior_weight=kl_weight,
        prepare=prepare,
    )
    return Algorithm(
        partial(_init, inner, prior, rank),
        partial(_update, inner, start, every, rank),
        partial(_posterior, rank, scale),
    )


def _init(inner: Algorithm, prior: Prior, rank: int, key: Key, params: Params) -> SWAGState:
    state = inner.init(key, params)
    leaves, random = priors.named(params), priors.sites(prior)

    def zeros(*leading: int) -> Params:
        values = {
            name: jnp.zeros((*leading, *jnp.shape(leaf)), jnp.result_type(leaf))
            if name in random
            else None
            for name, leaf in leaves.items()
        }
        return priors.unflatten(prior, values)

    step, count = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers: donatable
    return SWAGState(state, step, count, jax.tree.map(jnp.zeros_like, params), zeros(), zeros(rank))


def _update(
    inner: Algorithm,
    start: int,
    every: int,
    rank: int,
    key: Key,
    state: SWAGState,
    batch: Batch,
    threat: Threat,
) -> tuple[SWAGState, SWAGInfo]:
    """Takes one step of MAP, and folds its result into the moments if its turn has come."""
    # 1. A step of MAP, and whether its result is collected.
    new, info = inner.update(key, state.map, batch, threat)
    collect = (state.step >= start) & ((state.step - start) % every == 0)
    count = state.num_collected + collect
    share = jnp.where(collect, 1 / jnp.maximum(count, 1), 0.0)

    # 2. The running mean and, by Welford, the mean squared difference from it.
    mean = jax.tree.map(lambda m, w: m + share.astype(m.dtype) * (w - m), state.mean, new.params)

    def fold(v: Array | None, before: Array, after: Array, w: Array) -> Array | None:
        if v is None:
            return None
        return v + share.astype(v.dtype) * ((w - before) * (w - after) - v)

    # 3. The deviation from the running mean, in place of the oldest of K.
    def push(ring: Array | None, m: Array, w: Array) -> Array | None:
        if ring is None or not rank:
            return ring
        row = (count - 1) % rank
        return ring.at[row].set(jnp.where(collect, w - m, ring[row]))  # O(params), not O(K params)

    variance = jax.tree.map(
        fold, state.variance, state.mean, mean, new.params, is_leaf=priors.is_leaf
    )
    deviations = jax.tree.map(push, state.deviations, mean, new.params, is_leaf=priors.is_leaf)
    state = SWAGState(new, state.step + 1, count, mean, variance, deviations)
    return state, SWAGInfo(info.loss, info.log_likelihood, info.log_prior, count)


def _posterior(rank: int, scale: float, state: SWAGState) -> LowRank | MeanField:
    count = state.num_collected
    loc = jax.tree.map(lambda m, w: jnp.where(count > 0, m, w), state.mean, state.map.params)
    # In sd: the square of a small one would underflow.
    deviation = jax.tree.map(lambda v: scale * jnp.sqrt(jnp.maximum(v, TINY)), state.variance)
    if not rank:
        return MeanField(loc, deviation)
    half = jax.tree.map(lambda s: s / jnp.sqrt(2.0).astype(s.dtype), deviation)
    divisor = jnp.sqrt(2.0 * jnp.maximum(jnp.minimum(count, rank) - 1, 1))
    columns = jax.tree.map(lambda d: scale * d / divisor.astype(d.dtype), state.deviations)
    return LowRank(loc, half, columns)
