"""Bayes by Backprop and its kin: variational inference over a family of q, by NumPyro's SVI.

    maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p)

in nats, summed over the data. A minibatch of B data stands for all N: its log-likelihood is scaled
by N / B (B without the padding, which may hold any finite values). One draw of the weights serves a
whole minibatch: behind the bounds on an input set must stand one network, which rules out local
reparameterisation. A `kl_weight` below 1 tempers the posterior; report it.

The family is a *guide* (`bnncert.infer.guides`): independent normals, Bayes by Backprop itself; a
normal of covariance diagonal plus low rank; or any other NumPyro guide. The KL of the first two is
in closed form.

q starts at given weights, a network's own initialisation, with small scales: bounds widen with the
posterior's noise (a layer adds about .8 fan_in scale), and NumPyro's default start, uniform in +-2,
ruins a certificate.

Source: Blundell et al., "Weight Uncertainty in Neural Networks", ICML 2015; with the robust
likelihood, Wicker et al., AISTATS 2021, section 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpyro
import optax
from jaxtyping import Array, Float, PyTree
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.svi import SVIState
from numpyro.optim import optax_to_numpyro

from bnncert import prior as priors
from bnncert.infer import guides
from bnncert.infer.guides import Guide, MakeGuide
from bnncert.infer.minibatch import Schedule, check_settings, log_likelihoods
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Posterior, Prepare, Threat


class SVIInfo(NamedTuple):
    """What one update saw, before its step.

    Attributes:
        loss: the negative ELBO, nats summed over the data.
        log_likelihood: E_q[log p(D | w)], estimated from the minibatch and the draws.
        kl: KL(q || p), unweighted; of a guide handed in, as its draws estimate it.
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
    kl_weight: float | Schedule = 1.0,
    guide: str | MakeGuide = "mean-field",
    rank: int = 10,
    posterior: Callable[[dict[str, Array]], Posterior] | None = None,
    num_draws: int = 100,
    initial_scale: float = 0.1,
    num_particles: int = 1,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Variational inference as an `Algorithm`.

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone. For mean-field NumPyro must
            know the KL to it from a normal (in practice: it is normal); for low-rank it is normal.
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step, > 0 at each.
        guide: "mean-field", "low-rank", or `make(model, init_loc_fn=...)` that returns a NumPyro
            guide, a program without arguments. The classes of `numpyro.infer.autoguide` are such
            (not those that need the data: Laplace's), and `functools.partial` gives them options;
            for a program of your own: `lambda model, init_loc_fn: program`. It samples the site
            `bnncert.infer.guides.site(name)` for each random leaf.
        rank: K, shared factors of the low-rank guide, >= 1.
        posterior: for a guide handed in: from the values of its parameters (those of deterministic
            leaves are under the leaf's name) to what is deployed, e.g. a `Gaussian`. Without it
            that is a `Samples` of draws, the same ones at the same state.
        num_draws: how many of these, >= 1.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf (of the smallest of the others, for leaves that start at zero). A guide handed in
            has its own; `init_loc_fn` starts it at the network's weights.
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`, a `LowRank`, or what
        `posterior` says.

    Raises:
        ValueError: num_data, rank or num_draws < 1, a kl_weight or an initial_scale that is not
            positive, a prior without a random leaf, an unknown guide, `posterior` for a known one;
            from `init`, a guide that leaves out a random leaf.

    Cost: of a step beside the likelihood's, O(P) for mean-field, O(P K^2) for low-rank; memory 2 P
    and (K + 2) P, for P random weights, and the optimiser's multiple of these.

    Example:
        >>> import bnncert, jax.numpy as jnp
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> w = jnp.zeros(2)
        >>> fit = bnncert.likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> algorithm = build(
        ...     fit, bnncert.prior.normal(w), num_data=9, optimizer=optax.adam(0.01),
        ...     guide=AutoMultivariateNormal, num_draws=5,
        ... )
        >>> algorithm.posterior(algorithm.init(jax.random.key(0), w)).params.shape
        (5, 2)
    """
    check_settings(prior, num_data, kl_weight, initial_scale)
    family = _guide(prior, guide, rank, posterior, num_draws, initial_scale)
    svi: Any = SVI(
        partial(_model, log_likelihood, prior, num_data, prepare, family.joint),
        partial(_scaled, family),
        optax_to_numpyro(optimizer),
        TraceMeanField_ELBO(num_particles),
    )
    # SVI learns what its parameters are in `init`, which a restored state never calls.
    svi.constrain_fn = family.constrain
    weight = kl_weight if callable(kl_weight) else lambda step: kl_weight
    return Algorithm(
        partial(_init, svi, family, prior, weight),
        partial(_update, svi, family, prior, weight),
        partial(_posterior, svi, family),
    )


def _guide(
    prior: PyTree,
    guide: str | MakeGuide,
    rank: int,
    posterior: Callable[[dict[str, Array]], Posterior] | None,
    num_draws: int,
    initial_scale: float,
) -> Guide:
    if callable(guide):
        if num_draws < 1:
            raise ValueError(f"num_draws = {num_draws}: draw at least one.")
        return guides.custom(prior, guide, posterior, num_draws)
    if posterior is not None:
        raise ValueError(f"posterior= is for a guide of your own; that of {guide!r} is known.")
    if guide == "mean-field":
        return guides.mean_field(prior, initial_scale)
    if guide == "low-rank":
        if rank < 1:
            raise ValueError(f'rank = {rank}: take 1 or more factors, or guide="mean-field".')
        priors.normal_parameters(prior)  # raises if one is not normal
        return guides.low_rank(prior, initial_scale, rank)
    raise ValueError(
        f'guide = {guide!r}: it is "mean-field", "low-rank", or a function that makes a NumPyro '
        "guide, e.g. numpyro.infer.autoguide.AutoMultivariateNormal."
    )


def _init(
    svi: SVI, guide: Guide, prior: PyTree, weight: Callable[[Any], Any], key: Key, params: Params
) -> SVIState:
    priors.check(prior, params)
    start = guide.start(jax.random.fold_in(key, 1), params)
    return svi.init(key, start=start, kl_weight=weight(0))


def _update(
    svi: SVI,
    guide: Guide,
    prior: PyTree,
    weight: Callable[[Any], Any],
    key: Key,
    state: SVIState,
    batch: Batch,
    threat: Threat,
) -> tuple[SVIState, SVIInfo]:
    """One step of the optimiser on the negative ELBO of a minibatch."""
    kl_weight = weight(state.optim_state[0])
    if guide.closed:
        kl = guide.posterior(svi.get_params(state), state.rng_key).kl(prior)
    else:
        # The same draws: SVI makes them with the second of two keys.
        model, program = partial(guides.prior_program, prior), partial(guide.program, None)
        values, drawn = svi.get_params(state), jax.random.split(key)[1]
        kl = svi.loss.loss(drawn, values, model, program)
    state, loss = svi.update(
        state._replace(rng_key=key), batch=batch, threat=threat, kl_weight=kl_weight
    )
    return state, SVIInfo(loss, kl_weight * kl - loss, kl)


def _posterior(svi: SVI, guide: Guide, state: SVIState) -> Posterior:
    return guide.posterior(svi.get_params(state), state.rng_key)


def _model(
    log_likelihood: LogLikelihood,
    prior: PyTree,
    num_data: int,
    prepare: Prepare | None,
    joint: bool,
    *,
    kl_weight: Any,
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
                hidden = leaf.mask(False) if joint else leaf  # the guide has the whole KL
                values[name] = numpyro.sample(guides.site(name), hidden)
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


def _scaled(
    guide: Guide,
    *,
    kl_weight: Any,
    start: Any = None,
    batch: Batch | None = None,
    threat: Threat | None = None,
) -> None:
    """The guide, its densities weighted as the prior's are."""
    del batch, threat
    with numpyro.handlers.scale(scale=kl_weight):
        guide.program(start)
