"""Bayes by Backprop: mean-field variational inference, by NumPyro's SVI.

    maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p),    q(w) = prod_i N(w_i; loc_i, scale_i^2)

in nats, summed over the data. A minibatch of B data stands for all N: its log-likelihood is scaled
by N / B (B without the padding, which may hold any finite values). One draw of the weights serves a
whole minibatch: behind the bounds on an input set must stand one network, which rules out local
reparameterisation. The KL is in closed form. A `kl_weight` below 1 tempers the posterior; report
it.

q starts at given weights, a network's own initialisation, with small scales: bounds widen with the
posterior's noise (a layer adds about .8 fan_in scale), and NumPyro's default start, uniform in +-2,
ruins a certificate.

Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015; with the robust
likelihood, Wicker et al., AISTATS 2021, section 5.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jaxtyping import Array, Float, PyTree
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.svi import SVIState
from numpyro.optim import optax_to_numpyro

from bnncert import prior as priors
from bnncert.infer.minibatch import check_settings, initial_scales, log_likelihoods
from bnncert.posterior import MeanField
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Threat


class SVIInfo(NamedTuple):
    """What one update saw, before its step.

    Attributes:
        loss: the negative ELBO, nats summed over the data.
        log_likelihood: E_q[log p(D | w)], estimated from the minibatch and one draw.
        kl: KL(q || p), unweighted.
    """

    loss: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    kl: Float[Array, ""]


def build(
    log_likelihood: LogLikelihood,
    prior: PyTree,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float = 1.0,
    initial_scale: float = 0.1,
    num_particles: int = 1,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Bayes by Backprop as an `Algorithm`.

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone. NumPyro must know the KL to it
            from a normal (in practice: it is normal).
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf (of the smallest of the others, for leaves that start at zero).
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`.

    Raises:
        ValueError: num_data < 1, a kl_weight or an initial_scale that is not positive, a prior
            without a random leaf.
    """
    check_settings(prior, num_data, kl_weight, initial_scale)
    svi = SVI(
        partial(_model, log_likelihood, prior, num_data, kl_weight, prepare),
        partial(_guide, prior, kl_weight),
        optax_to_numpyro(optimizer),
        TraceMeanField_ELBO(num_particles),
    )
    # All parameters are unconstrained. SVI learns so in `init`, which a restored state never calls.
    svi.constrain_fn = partial(dict)
    return Algorithm(
        partial(_init, svi, prior, initial_scale),
        partial(_update, svi, prior, kl_weight),
        partial(_posterior, svi, prior),
    )


def _init(svi: SVI, prior: PyTree, initial_scale: float, key: Key, params: Params) -> SVIState:
    priors.check(prior, params)
    scales = initial_scales(prior, params, initial_scale)
    return svi.init(key, start=(params, {name: jnp.log(v) for name, v in scales.items()}))


def _update(
    svi: SVI,
    prior: PyTree,
    kl_weight: float,
    key: Key,
    state: SVIState,
    batch: Batch,
    threat: Threat,
) -> tuple[SVIState, SVIInfo]:
    """One step of the optimiser on the negative ELBO of a minibatch."""
    kl = _posterior(svi, prior, state).kl(prior)
    state, loss = svi.update(state._replace(rng_key=key), batch=batch, threat=threat)
    return state, SVIInfo(loss, kl_weight * kl - loss, kl)


def _posterior(svi: SVI, prior: PyTree, state: SVIState) -> MeanField:
    values = svi.get_params(state)
    scale = {
        name: None if leaf is None else jnp.exp(values[_scale(name)])
        for name, leaf in priors.named(prior).items()
    }
    return MeanField(priors.unflatten(prior, values), priors.unflatten(prior, scale))


def _model(
    log_likelihood: LogLikelihood,
    prior: PyTree,
    num_data: int,
    kl_weight: float,
    prepare: Prepare | None,
    start: Any = None,
    batch: Batch | None = None,
    threat: Threat | None = None,
) -> None:
    """The prior over weights, and the likelihood of a minibatch as a factor inside a plate."""
    values = {}
    initial = {} if start is None else priors.named(start[0])
    for name, leaf in priors.named(prior).items():
        if leaf is None:
            values[name] = numpyro.param(name, initial.get(name))
        else:
            with numpyro.handlers.scale(scale=kl_weight):
                values[name] = numpyro.sample(_site(name), leaf)
    if batch is None or threat is None:
        return
    key = numpyro.prng_key()
    assert key is not None  # SVI seeds the model
    params = priors.unflatten(prior, values)
    terms = log_likelihoods(log_likelihood, prepare, key, params, batch, threat)
    size = num_data / batch.mask.sum()
    # Parentheses: a leaf may be called "data".
    with numpyro.handlers.scale(scale=size), numpyro.plate("(data)", terms.shape[0]):
        numpyro.factor("(log_likelihood)", terms)


def _guide(
    prior: PyTree,
    kl_weight: float,
    start: Any = None,
    batch: Batch | None = None,
    threat: Threat | None = None,
) -> None:
    """The mean-field normal; scales by their logarithm."""
    del batch, threat
    locs, scales = ({}, {}) if start is None else (priors.named(start[0]), start[1])
    for name, leaf in priors.sites(prior).items():
        loc = numpyro.param(name, locs.get(name))
        log_scale = numpyro.param(_scale(name), scales.get(name))
        with numpyro.handlers.scale(scale=kl_weight):
            normal = dist.Normal(loc, jnp.exp(jnp.asarray(log_scale)))
            numpyro.sample(_site(name), normal.to_event(leaf.event_dim))


def _site(name: str) -> str:
    """The latent site of a leaf; its location is the parameter of the leaf's own name."""
    return f"{name}/weight"


def _scale(name: str) -> str:
    return f"{name}/log_scale"
