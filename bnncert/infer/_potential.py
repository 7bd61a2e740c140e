"""The energy that full-batch samplers move in, in chunks of data.

    U(w) = -log p(w) - (1 / kl_weight) log p(D | w)        (nats, summed over weights and data)

so that exp(-U) is proportional to p(w) p(D | w)^(1 / kl_weight). For its gradient to belong to it,
U has to be one function: a log-likelihood that uses its key, such as an attack with random starts,
is given the same key at every evaluation of a run.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.infer._minibatch import log_likelihoods
from bnncert.types import Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat


def potential(
    log_likelihood: LogLikelihood,
    prior: Prior,
    key: Key,
    params: Params,
    data: Batch,
    threat: Threat,
    *,
    kl_weight: float = 1.0,
    prepare: Prepare | None = None,
    batch_size: int = 1024,
) -> Float[Array, ""]:
    """Computes U(w) = -log p(w) - (1 / kl_weight) log p(D | w), in nats.

    Args:
        log_likelihood: of one datum.
        prior: distributions, and None.
        key: of the likelihood; the same one makes it the same function.
        params: one network's weights.
        data: all of it; padding, by the mask, adds nothing.
        threat: what the error model guards against.
        kl_weight: of the prior, > 0.
        prepare: `(params, x) -> params`, applied first, or None.
        batch_size: data evaluated at once, also in the gradient, which evaluates them twice.

    Returns:
        A scalar, summed over weights and data.
    """
    prepared = params if prepare is None else prepare(params, data.x)

    def chunk(inputs: tuple[Array, Batch]) -> Array:
        number, rows = inputs
        own = jax.random.fold_in(key, number)
        return log_likelihoods(log_likelihood, None, own, prepared, rows, threat).sum()

    if data.mask.shape[0] <= batch_size:
        log_lik = chunk((jnp.asarray(0), data))
    else:
        # without the checkpoint the gradient would keep the activations of every chunk
        chunks = jax.tree.map(
            lambda v: v.reshape(-1, batch_size, *v.shape[1:]), pad(data, batch_size)
        )
        numbers = jnp.arange(chunks.mask.shape[0])
        log_lik = jax.lax.map(jax.checkpoint(chunk), (numbers, chunks)).sum()
    return -log_lik / kl_weight - priors.log_prob(prior, params)


def pad(data: Batch, batch_size: int) -> Batch:
    """Pads data to a multiple of `batch_size`, by the first datum under a mask of 0."""
    missing = -data.mask.shape[0] % batch_size
    if not missing:
        return data
    x, y = (jnp.concatenate([v, jnp.repeat(v[:1], missing, axis=0)]) for v in (data.x, data.y))
    return Batch(x, y, jnp.concatenate([data.mask, jnp.zeros_like(data.mask[:1]).repeat(missing)]))
