"""Variational inference with a guide of your own: any family of q that NumPyro can express.

    maximise   E_q[ log p(D | w) ]  -  kl_weight KL(q || p)
    KL(q || p)  ~  sum over sites of  KL(q_site || p_site), or log q(w) - log p(w) at the draw

A *guide* is a NumPyro program that samples every weight, with parameters of its own: the classes of
`numpyro.infer.autoguide`, a flow, or a program by hand. Of each site NumPyro takes the KL where it
knows one, and the difference of log-densities at the draw where it does not, which is unbiased and
noisier. The objective is `bnncert.infer.elbo`'s, by NumPyro's SVI; the families whose KL is closed
as a whole (`bnncert.infer.bbb`, `low_rank`) do without.

Source: Bingham et al., "Pyro: Deep Universal Probabilistic Programming", JMLR 2019 (guides);
Hoffman et al., "Stochastic Variational Inference", JMLR 2013.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jaxtyping import Array
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.initialization import init_to_sample, init_to_value
from numpyro.infer.svi import SVIState
from numpyro.optim import optax_to_numpyro

from bnncert import prior as priors
from bnncert.infer._minibatch import Schedule, check_settings, log_likelihoods
from bnncert.infer._variational import SVIInfo, Values
from bnncert.posterior import Samples
from bnncert.posterior.leaves import draw_keys
from bnncert.types import (
    Algorithm,
    Batch,
    Key,
    LogLikelihood,
    Params,
    Posterior,
    Prepare,
    Prior,
    Threat,
)

MakeGuide = Callable[..., Callable[[], Any]]
"""`(model, init_loc_fn=...) -> guide`: the classes of `numpyro.infer.autoguide` are such."""


def build(
    log_likelihood: LogLikelihood,
    prior: Prior,
    make: MakeGuide,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    posterior: Callable[[Values], Posterior] | None = None,
    num_draws: int = 100,
    kl_weight: float | Schedule = 1.0,
    num_particles: int = 1,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes variational inference over a guide of your own as an `Algorithm`.

        maximise   E_q[ log p(D | w) ] - kl_weight KL(q || p),    q what the guide samples

    Args:
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, None for leaves that are
            deterministic: these are trained by the likelihood alone.
        make: `make(model, init_loc_fn=...)` returns a NumPyro guide, a program without arguments.
            The classes of `numpyro.infer.autoguide` are such (not those that need the data:
            Laplace's), and `functools.partial` gives them options; for a program of your own:
            `lambda model, init_loc_fn: program`. It samples the site `bnncert.infer.guide.site
            (name)` for each random leaf. `init_loc_fn` starts it at the network's weights.
        num_data: N, the size of the training set.
        optimizer: from Optax; put clipping and schedules in its chain.
        posterior: from the values of the guide's parameters (those of deterministic leaves are
            under the leaf's name) to what is deployed, e.g. a `Gaussian`. Without it that is a
            `Samples` of draws, the same ones at the same state.
        num_draws: how many of these, >= 1.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step, > 0 at each.
        num_particles: draws of the weights for each update; they are vmapped.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is what `posterior` says.

    Raises:
        ValueError: num_data or num_draws < 1, a kl_weight that is not positive, a prior without a
            random leaf; from `init`, a guide that leaves out a random leaf.

    Cost: of a step beside the likelihood's, two runs of the guide with its densities. Memory: the
    guide's parameters, and the optimiser's multiple of these; num_draws networks for the posterior.

    Source: Bingham et al., JMLR 2019; Hoffman et al., JMLR 2013.

    Example:
        >>> import bnncert, jax.numpy as jnp
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> w, p = jnp.zeros(2), bnncert.prior.normal(jnp.zeros(2))
        >>> fit = bnncert.likelihood.robust_gaussian(lambda w, x: w @ x, noise_scale=1.0)
        >>> algorithm = build(
        ...     fit, p, AutoMultivariateNormal, num_data=9, optimizer=optax.adam(0.01), num_draws=5
        ... )
        >>> algorithm.posterior(algorithm.init(jax.random.key(0), w)).params.shape
        (5, 2)
    """
    check_settings(prior, num_data, kl_weight)
    if num_draws < 1:
        raise ValueError(f"num_draws = {num_draws}: draw at least one.")
    guide = _program(prior, make, posterior, num_draws)
    svi: Any = SVI(
        partial(_model, log_likelihood, prior, num_data, prepare),
        partial(_scaled, guide),
        optax_to_numpyro(optimizer),
        TraceMeanField_ELBO(num_particles),
    )
    # SVI learns what its parameters are in `init`, which a restored state never calls.
    svi.constrain_fn = guide.constrain
    weight = kl_weight if callable(kl_weight) else lambda step: kl_weight
    return Algorithm(
        partial(_init, svi, guide, prior, weight),
        partial(_update, svi, guide, prior, weight),
        partial(_posterior, svi, guide),
    )


def site(name: str) -> str:
    """Names a random leaf's site; the leaf's own name is that of its location.

    Args:
        name: of the leaf, as `bnncert.prior.names` gives it.

    Returns:
        The name under which a guide samples it.

    Example:
        >>> site("dense/kernel")
        'dense/kernel/weight'
    """
    return f"{name}/weight"


def prior_program(prior: Prior) -> None:
    """Samples the random leaves from the prior, as a NumPyro program: what a guide is made for.

    Args:
        prior: pytree of NumPyro distributions, None for deterministic leaves.

    Example:
        >>> from numpyro.handlers import seed, trace
        >>> prior = {"w": dist.Normal(0.0, 1.0), "b": None}
        >>> list(trace(seed(prior_program, 0)).get_trace(prior))
        ['w/weight']
    """
    for name, leaf in priors.sites(prior).items():
        numpyro.sample(site(name), leaf)


class _Guide(NamedTuple):
    """A NumPyro guide over the sites of `prior_program`.

    Attributes:
        check: `(key, params)`: raises unless it samples every random leaf.
        program: given one network's weights to start at, or None.
        constrain: from the numbers the optimiser moves to the values of the parameters.
        posterior: `(values, key) -> Posterior`; the key serves guides that can only be drawn from.
    """

    check: Callable[[Key, Params], None]
    program: Callable[[Params | None], None]
    constrain: Callable[[Values], Values]
    posterior: Callable[[Values, Key], Posterior]


def _program(
    prior: Prior,
    make: MakeGuide,
    posterior: Callable[[Values], Posterior] | None,
    num_draws: int,
) -> _Guide:
    """Makes the guide anew at each trace.

    Nothing is kept between calls but the values of its parameters: what an AutoGuide learns of the
    model, it learns again.
    """
    model = partial(prior_program, prior)

    def program(start: Params | None) -> None:
        located: Any = init_to_sample
        if start is not None:
            leaves = priors.named(start)
            located = init_to_value(values={site(n): leaves[n] for n in priors.sites(prior)})
        make(model, init_loc_fn=located)()

    def constrain(numbers: Values) -> Values:
        transforms = _transforms(partial(program, None))
        return {n: transforms[n](v) if n in transforms else v for n, v in numbers.items()}

    def draw(values: Values, key: Key) -> Samples:
        def one(key: Key) -> Values:
            substituted = numpyro.handlers.substitute(partial(program, None), data=values)
            seeded = numpyro.handlers.seed(substituted, key)
            trace = numpyro.handlers.trace(seeded).get_trace()
            return {name: trace[site(name)]["value"] for name in priors.sites(prior)}

        fixed = {
            name: _repeated(values[name], num_draws)
            for name, leaf in priors.named(prior).items()
            if leaf is None
        }
        drawn = jax.vmap(one)(draw_keys(key, num_draws))
        return Samples(priors.unflatten(prior, {**fixed, **drawn}))

    def check(key: Key, params: Params) -> None:
        seeded = numpyro.handlers.seed(partial(program, params), key)
        _check_sites(prior, numpyro.handlers.trace(seeded).get_trace())

    found = draw if posterior is None else lambda values, key: posterior(values)
    return _Guide(check, program, constrain, found)


def _init(
    svi: SVI, guide: _Guide, prior: Prior, weight: Callable[[Any], Any], key: Key, params: Params
) -> SVIState:
    priors.check(prior, params)
    guide.check(jax.random.fold_in(key, 1), params)
    return svi.init(key, start=params, kl_weight=weight(0))


def _update(
    svi: SVI,
    guide: _Guide,
    prior: Prior,
    weight: Callable[[Any], Any],
    key: Key,
    state: SVIState,
    batch: Batch,
    threat: Threat,
) -> tuple[SVIState, SVIInfo]:
    """Takes one step of the optimiser on the negative ELBO of a minibatch."""
    kl_weight = weight(state.optim_state[0])
    # The KL at the draws of the step: SVI makes them with the second of two keys.
    model, program = partial(prior_program, prior), partial(guide.program, None)
    kl = svi.loss.loss(jax.random.split(key)[1], svi.get_params(state), model, program)
    state, loss = svi.update(
        state._replace(rng_key=key), batch=batch, threat=threat, kl_weight=kl_weight
    )
    return state, SVIInfo(loss, kl_weight * kl - loss, kl)


def _posterior(svi: SVI, guide: _Guide, state: SVIState) -> Posterior:
    return guide.posterior(svi.get_params(state), state.rng_key)


def _model(
    log_likelihood: LogLikelihood,
    prior: Prior,
    num_data: int,
    prepare: Prepare | None,
    *,
    kl_weight: Any,
    start: Params | None = None,
    batch: Batch | None = None,
    threat: Threat | None = None,
) -> None:
    """Samples the prior over weights, with a minibatch's likelihood as a factor inside a plate."""
    values = {}
    initial = {} if start is None else priors.named(start)
    for name, leaf in priors.named(prior).items():
        if leaf is None:
            values[name] = numpyro.param(name, initial.get(name))
        else:
            with numpyro.handlers.scale(scale=kl_weight):
                values[name] = numpyro.sample(site(name), leaf)
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
    guide: _Guide,
    *,
    kl_weight: Any,
    start: Params | None = None,
    batch: Batch | None = None,
    threat: Threat | None = None,
) -> None:
    """Runs the guide, its densities weighted as the prior's are."""
    del batch, threat
    with numpyro.handlers.scale(scale=kl_weight):
        guide.program(start)


def _repeated(leaf: Array | None, num: int) -> Array | None:
    return None if leaf is None else jnp.broadcast_to(leaf, (num, *leaf.shape))


def _transforms(program: Callable[[], None]) -> dict[str, Any]:
    """Finds the map from the reals to the values of each parameter; only shapes are computed."""
    found: dict[str, Any] = {}

    def look(key: Key) -> Array:
        seeded = numpyro.handlers.seed(program, key)
        for name, here in numpyro.handlers.trace(seeded).get_trace().items():
            if here["type"] == "param":
                constraint = here["kwargs"].get("constraint", dist.constraints.real)
                found[name] = dist.biject_to(constraint)
        return jnp.zeros(())

    jax.eval_shape(look, jax.random.key(0))
    return found


def _check_sites(prior: Prior, trace: Mapping[str, Any]) -> None:
    """Raises ValueError unless a guide samples every random leaf, in its shape."""
    sampled = {name: here["value"] for name, here in trace.items() if here["type"] == "sample"}
    for name, leaf in priors.sites(prior).items():
        value = sampled.get(site(name))
        if value is None:
            raise ValueError(
                f"the guide does not sample {site(name)!r}, the site of leaf {name!r}: it samples "
                f"{list(sampled)}. Give it one site for each random leaf, as bnncert.infer.guide."
                "site names it"
            )
        if jnp.shape(value) != leaf.shape():
            raise ValueError(
                f"the guide's site {site(name)!r} has shape {jnp.shape(value)}, the leaf "
                f"{leaf.shape()}"
            )
