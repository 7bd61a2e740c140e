"""Guides: the families of q(w) that variational inference searches, as NumPyro programs.

    mean-field   q(w) = prod_i N(w_i; loc_i, scale_i^2)
    low-rank     q(w) = N(w; loc, diag(scale^2) + D D^T),   D of K columns
    any other    a NumPyro guide: a program that samples every weight, with parameters of its own

The first two have KL(q || p) in closed form for normal priors: mean-field by NumPyro's table (so
also for all else that it holds), low-rank by the determinant lemma, a Cholesky factor of size K.
Of any other guide, NumPyro takes the KL site by site where it knows one, and log q - log p at the
draw where it does not.

Source: Blundell et al., ICML 2015 (mean-field); Tomczak et al., "Efficient Low Rank Gaussian
Variational Inference for Neural Networks", NeurIPS 2020 (low-rank); Bingham et al., "Pyro", JMLR
2019 (guides).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, PyTree
from numpyro.infer.initialization import init_to_sample, init_to_value

from bnncert import prior as priors
from bnncert.infer.minibatch import initial_scales
from bnncert.posterior import LowRank, MeanField, Samples
from bnncert.posterior.leaves import draw_keys
from bnncert.types import Key, Params, Posterior

Values = dict[str, Any]
"""The parameters of a guide, and the deterministic leaves, by name; None where params hold None."""

Start = tuple[Params, Values]
"""The network's weights, and what else the guide's parameters start from."""

MakeGuide = Callable[..., Callable[[], Any]]
"""`(model, init_loc_fn=...) -> guide`: the classes of `numpyro.infer.autoguide` are such."""


class Guide(NamedTuple):
    """A family of q.

    Attributes:
        start: `(key, params) -> Start`.
        program: of NumPyro, given a `Start` or None; samples `site(name)` for each random leaf.
        constrain: from the numbers the optimiser moves to the values of the parameters.
        posterior: `(values, key) -> Posterior`; the key serves guides that can only be drawn from.
        joint: the program accounts for all of KL(q || p) by itself.
        closed: the posterior's own `kl` is exact.
    """

    start: Callable[[Key, Params], Start]
    program: Callable[[Start | None], None]
    constrain: Callable[[Values], Values]
    posterior: Callable[[Values, Key], Posterior]
    joint: bool = False
    closed: bool = True


def site(name: str) -> str:
    """The name of a random leaf's site; the leaf's own name is that of its location."""
    return f"{name}/weight"


def prior_program(prior: PyTree) -> None:
    """The prior over the random leaves, as a NumPyro program: the model a guide is made for."""
    for name, leaf in priors.sites(prior).items():
        numpyro.sample(site(name), leaf)


def mean_field(prior: PyTree, initial_scale: float) -> Guide:
    """Independent normals; scales by their logarithm."""

    def start(key: Key, params: Params) -> Start:
        del key
        scales = initial_scales(prior, params, initial_scale)
        return params, {name: jnp.log(v) for name, v in scales.items()}

    def program(start: Start | None) -> None:
        locs, scales = ({}, {}) if start is None else (priors.named(start[0]), start[1])
        for name, leaf in priors.sites(prior).items():
            loc = numpyro.param(name, locs.get(name))
            log_scale = numpyro.param(_scale(name), scales.get(name))
            normal = dist.Normal(loc, jnp.exp(jnp.asarray(log_scale)))
            numpyro.sample(site(name), normal.to_event(leaf.event_dim))

    def posterior(values: Values, key: Key) -> MeanField:
        del key
        return MeanField(priors.unflatten(prior, values), _by_leaf(prior, values, _exp_scale))

    return Guide(start, program, partial(dict), posterior)


def low_rank(prior: PyTree, initial_scale: float, rank: int) -> Guide:
    """Diagonal plus K shared factors, over all random leaves; half of the variance each, at first.

    The factors start at random: at zero they have no gradient but noise.
    """

    def start(key: Key, params: Params) -> Start:
        scales = initial_scales(prior, params, initial_scale)
        values = {_scale(name): jnp.log(v / 2**0.5) for name, v in scales.items()}
        for k, (name, v) in zip(jax.random.split(key, len(scales)), scales.items(), strict=True):
            normal = jax.random.normal(k, (rank, *v.shape), v.dtype)
            values[_deviations(name)] = v * normal / (2 * rank) ** 0.5
        return params, values

    def program(start: Start | None) -> None:
        values = {} if start is None else {**priors.named(start[0]), **start[1]}
        for name, leaf in priors.named(prior).items():
            parts = [name] if leaf is None else [name, _scale(name), _deviations(name)]
            values |= {part: numpyro.param(part, values.get(part)) for part in parts}
        key = numpyro.prng_key()
        assert key is not None  # SVI seeds the guide
        q = posterior(values, key)
        weights = priors.named(jax.tree.map(lambda draw: draw[0], q.sample(key, 1)))
        for name, leaf in priors.sites(prior).items():
            # Densities of single leaves have no part in it: the KL is that of all at once.
            point = dist.Delta(weights[name], event_dim=leaf.event_dim)
            numpyro.sample(site(name), point.mask(False))
        numpyro.factor("(kl)", q.kl(prior))

    def posterior(values: Values, key: Key) -> LowRank:
        del key
        return LowRank(
            priors.unflatten(prior, values),
            _by_leaf(prior, values, _exp_scale),
            _by_leaf(prior, values, lambda values, name: values[_deviations(name)]),
        )

    return Guide(start, program, partial(dict), posterior, joint=True)


def custom(
    prior: PyTree,
    make: MakeGuide,
    posterior: Callable[[Values], Posterior] | None,
    num_draws: int,
) -> Guide:
    """Any NumPyro guide over the sites of `prior_program`.

    It is made anew at each trace, so that nothing is kept between calls but the values of its
    parameters: what an AutoGuide learns of the model, it learns again.
    """
    model = partial(prior_program, prior)

    def program(start: Start | None) -> None:
        located: Any = init_to_sample
        if start is not None:
            leaves = priors.named(start[0])
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

    def start(key: Key, params: Params) -> Start:
        seeded = numpyro.handlers.seed(partial(program, (params, {})), key)
        _check_sites(prior, numpyro.handlers.trace(seeded).get_trace())
        return params, {}

    found = draw if posterior is None else lambda values, key: posterior(values)
    return Guide(start, program, constrain, found, closed=False)


def _repeated(leaf: Array | None, num: int) -> Array | None:
    return None if leaf is None else jnp.broadcast_to(leaf, (num, *leaf.shape))


def _transforms(program: Callable[[], None]) -> dict[str, Any]:
    """The map from the reals to the values of each parameter; only shapes are computed."""
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


def _check_sites(prior: PyTree, trace: Mapping[str, Any]) -> None:
    """Raise unless a guide samples every random leaf, in its shape."""
    sampled = {name: here["value"] for name, here in trace.items() if here["type"] == "sample"}
    for name, leaf in priors.sites(prior).items():
        value = sampled.get(site(name))
        if value is None:
            raise ValueError(
                f"the guide does not sample {site(name)!r}, the site of leaf {name!r}: it samples "
                f"{list(sampled)}. Give it one site for each random leaf, as bnncert.infer.guides."
                "site names it"
            )
        if jnp.shape(value) != leaf.shape():
            raise ValueError(
                f"the guide's site {site(name)!r} has shape {jnp.shape(value)}, the leaf "
                f"{leaf.shape()}"
            )


def _by_leaf(prior: PyTree, values: Values, read: Callable[[Values, str], Array]) -> Any:
    """A tree with what is read for each random leaf, and None for the deterministic ones."""
    return priors.unflatten(
        prior,
        {n: None if leaf is None else read(values, n) for n, leaf in priors.named(prior).items()},
    )


def _exp_scale(values: Values, name: str) -> Array:
    return jnp.exp(values[_scale(name)])


def _scale(name: str) -> str:
    return f"{name}/log_scale"


def _deviations(name: str) -> str:
    return f"{name}/deviations"
