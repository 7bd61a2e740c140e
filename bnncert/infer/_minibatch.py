"""A minibatch stands for all the data: the log-likelihood every method is driven by.

    log p(D | w)  ~  (N / B) sum_{i in batch} log p(y_i | x_i, w)

in nats, unbiased for a batch drawn uniformly; B counts the data without the padding, which may hold
any finite values and adds nothing. One w stands behind the whole minibatch.

With a `kl_weight` kappa all methods aim at the same tempered posterior,

    p(w | D) ~ p(w) p(D | w)^(1 / kappa),

the minimiser over all q of  E_q[-log p(D | w)] + kappa KL(q || p); kappa = 1 is Bayes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.types import Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat

Schedule = Callable[[Array], Array]
"""Step number -> value, as Optax's schedules."""


def each_datum(
    function: Callable[[Key, Params, Array, Array, Threat], Array],
    prepare: Prepare | None,
    key: Key,
    params: Params,
    batch: Batch,
    threat: Threat,
) -> Array:
    """Evaluates a function of one datum, such as a log-likelihood, at each of a minibatch.

    Args:
        function: `(key, params, x, y, threat) -> array`.
        prepare: `(params, x_batch) -> params`, applied first, or None.
        key: split over the data.
        params: one network's weights.
        batch: the data.
        threat: what the error model guards against.

    Returns:
        The values, with the data as leading axis; padding has a value too.
    """
    prepared = params if prepare is None else prepare(params, batch.x)
    keys = jax.random.split(key, batch.mask.shape[0])
    each = jax.vmap(function, in_axes=(0, None, 0, 0, None))
    return each(keys, prepared, batch.x, batch.y, threat)


def log_likelihoods(
    log_likelihood: LogLikelihood,
    prepare: Prepare | None,
    key: Key,
    params: Params,
    batch: Batch,
    threat: Threat,
) -> Float[Array, " batch"]:
    """Evaluates the log-likelihood of each datum of a minibatch, in nats; 0 for padding.

    Its arguments are those of `each_datum`.
    """
    terms = each_datum(log_likelihood, prepare, key, params, batch, threat)
    return jnp.where(batch.mask > 0, batch.mask * terms, 0.0)


def check_settings(
    prior: Prior, num_data: int, kl_weight: float | Schedule, initial_scale: float = 0.1
) -> None:
    """Raises unless these can drive a method with a posterior over weights.

    Raises:
        ValueError: num_data < 1, a kl_weight that is not positive, an initial_scale that is not, a
            prior without a random leaf.
    """
    if num_data < 1:
        raise ValueError(f"num_data = {num_data}: give the number of training data.")
    if not callable(kl_weight) and not kl_weight > 0:
        raise ValueError(
            f"kl_weight = {kl_weight}: it must be positive (1 is the ELBO; without a prior the "
            "posterior is a point: bnncert.infer.map with prior_weight=0)."
        )
    if not initial_scale > 0:
        raise ValueError(f"initial_scale = {initial_scale}: it must be positive, e.g. 0.1.")
    if not priors.sites(prior):
        raise ValueError("the prior has no random leaf: use bnncert.infer.map.")


def check_support(prior: Prior) -> None:
    """Raises unless a sampler's steps stay inside the support of every distribution.

    Raises:
        ValueError: naming the leaf whose support is not all real numbers.
    """
    for name, leaf in priors.sites(prior).items():
        support: Any = leaf.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if support != dist.constraints.real:
            raise ValueError(
                f"the prior of leaf {name!r} has support {leaf.support}, which a step can leave: "
                "give a distribution on all real numbers."
            )


def initial_scales(prior: Prior, params: Params, relative: float) -> dict[str, Array]:
    """Chooses standard deviations to start from, by name, each of its leaf's shape.

    Args:
        prior: says which leaves are random.
        params: the weights a posterior starts at.
        relative: sd over the root mean square of the leaf (of the smallest of the others, for a
            leaf that starts at zero; of 1, if all do).
    """
    leaves = priors.named(params)
    sizes = {n: jnp.sqrt(jnp.mean(jnp.square(leaves[n]))) for n in priors.sites(prior)}
    known = jnp.stack(list(sizes.values()))
    smallest = jnp.min(jnp.where(known > 0, known, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1.0)
    return {
        name: jnp.full_like(leaves[name], relative * jnp.where(size > 0, size, smallest))
        for name, size in sizes.items()
    }
