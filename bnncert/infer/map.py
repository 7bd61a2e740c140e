"""Maximum a posteriori: one deterministic network, the baseline behind the same interface.

    maximise   log p(D | w) + prior_weight log p(w)

in nats, summed over the data; a minibatch of B data is scaled by N / B (B without the padding,
which may hold any finite values). Its posterior is a `Samples` of one member.

Source: MacKay, "A Practical Bayesian Framework for Backpropagation Networks", 1992; with the robust
likelihood, the certified training of Gowal et al. 2018.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from bnncert import prior as priors
from bnncert.infer._minibatch import Schedule, log_likelihoods
from bnncert.posterior import Samples
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Threat


class MAPState(NamedTuple):
    """The weights, the optimiser's state, and how many updates were made."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, "*members"]


class MAPInfo(NamedTuple):
    """What one update saw, before its step.

    Attributes:
        loss: the negative objective, nats summed over the data.
        log_likelihood: log p(D | w), estimated from the minibatch.
        log_prior: log p(w), unweighted.
    """

    loss: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    log_prior: Float[Array, ""]


def build(
    log_likelihood: LogLikelihood,
    prior: PyTree,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    prior_weight: float | Schedule = 1.0,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Maximum a posteriori as an `Algorithm`.

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, None for flat leaves.
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        prior_weight: of log p(w); 0 is maximum likelihood. Or a schedule of the step.
        prepare: `(params, x_batch) -> params`: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `Samples` of one member.

    Raises:
        ValueError: num_data < 1, a negative prior_weight.
    """
    if num_data < 1:
        raise ValueError(f"num_data = {num_data}: give the number of training data.")
    if not callable(prior_weight) and not prior_weight >= 0:
        raise ValueError(f"prior_weight = {prior_weight}: it must not be negative.")

    def init(key: Key, params: Params) -> MAPState:
        del key
        priors.check(prior, params)
        return MAPState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(key: Key, state: MAPState, batch: Batch, threat: Threat) -> tuple[MAPState, MAPInfo]:
        weight = prior_weight(state.step) if callable(prior_weight) else prior_weight
        negative = partial(objective, log_likelihood, prior, num_data, weight, prepare)
        (_, info), gradient = jax.value_and_grad(negative, has_aux=True)(
            state.params, key, batch, threat
        )
        step, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, step)
        return MAPState(params, opt_state, state.step + 1), info

    return Algorithm(
        init, update, lambda state: Samples(jax.tree.map(lambda v: v[None], state.params))
    )


def objective(
    log_likelihood: LogLikelihood,
    prior: PyTree,
    num_data: int,
    prior_weight: float | Float[Array, ""],
    prepare: Prepare | None,
    params: Params,
    key: Key,
    batch: Batch,
    threat: Threat,
) -> tuple[Float[Array, ""], MAPInfo]:
    """The negative log joint, estimated from a minibatch: nats summed over the data."""
    terms = log_likelihoods(log_likelihood, prepare, key, params, batch, threat)
    log_lik = num_data * terms.sum() / batch.mask.sum()
    log_prior = priors.log_prob(prior, params)
    loss = -log_lik - prior_weight * log_prior
    return loss, MAPInfo(loss, log_lik, log_prior)
