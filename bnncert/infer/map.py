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
from jaxtyping import Array, Float, Int

from bnncert import prior as priors
from bnncert.infer._minibatch import Schedule, log_likelihoods
from bnncert.posterior import Samples
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat


class MAPState(NamedTuple):
    """The state of MAP: where the optimisation is.

    Attributes:
        params: the weights.
        opt_state: of the optimiser.
        step: how many updates were made.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, "*members"]


class MAPInfo(NamedTuple):
    """What one update of MAP saw, before its step.

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
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    prior_weight: float | Schedule = 1.0,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes maximum a posteriori as an `Algorithm`.

        maximise   log p(D | w) + prior_weight log p(w)
          ~        (N/B) sum_{i in batch} log p(y_i | x_i, w) + prior_weight log p(w)

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
        ValueError: num_data < 1, a negative prior_weight; from `init`, params that do not match the
            prior.

    Cost: one gradient of a minibatch a step. Memory: the params, and the optimiser's multiple.

    Source: MacKay, 1992; with the robust likelihood, Gowal et al., 2018.

    Example:
        >>> from bnncert import likelihood
        >>> fit = likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> w = jnp.zeros(2)
        >>> method = build(fit, priors.normal(w), num_data=4, optimizer=optax.sgd(0.1))
        >>> data = Batch(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4))
        >>> state = method.init(jax.random.key(0), w)
        >>> state, info = method.update(jax.random.key(1), state, data, Threat(0.0, 1.0))
        >>> print(method.posterior(state).params)
        [[0.4 0.4]]
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
    prior: Prior,
    num_data: int,
    prior_weight: float | Float[Array, ""],
    prepare: Prepare | None,
    params: Params,
    key: Key,
    batch: Batch,
    threat: Threat,
) -> tuple[Float[Array, ""], MAPInfo]:
    """Estimates the negative log joint from a minibatch, in nats summed over the data.

        -(N/B) sum_{i in batch} log p(y_i | x_i, w) - prior_weight log p(w)

    Args:
        log_likelihood: of one datum.
        prior: as for `build`.
        num_data: N.
        prior_weight: of log p(w).
        prepare: as for `build`.
        params: the weights w.
        key: for what the likelihood draws.
        batch: a minibatch of B data.
        threat: the error model.

    Returns:
        The loss, and a `MAPInfo` with its parts.

    Example:
        >>> from bnncert import likelihood
        >>> fit, w = likelihood.clean_categorical(lambda w, x: w @ x), jnp.zeros((2, 3))
        >>> data = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), jnp.ones(4))
        >>> rest = jax.random.key(0), data, Threat(0.0)
        >>> loss, info = objective(fit, priors.normal(w), 4, 0.0, None, w, *rest)
        >>> print(f"{loss:.4f}")                                        # 4 log 2
        2.7726
    """
    terms = log_likelihoods(log_likelihood, prepare, key, params, batch, threat)
    log_lik = num_data * terms.sum() / batch.mask.sum()
    log_prior = priors.log_prob(prior, params)
    loss = -log_lik - prior_weight * log_prior
    return loss, MAPInfo(loss, log_lik, log_prior)
