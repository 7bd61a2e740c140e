"""Faults of earlier implementations, put in one by one: what checks the library finds each.

Every test states a property, sees it hold, puts the fault in, and sees the property fail. Faults in
weight boxes and their masses are in `tests/certify/test_safety.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import bound, certify, likelihood, prior
from bnncert.bounds.ops import LINES, OPERATIONS, affine, elementwise
from bnncert.certify.sampled import inequalities as confidence
from bnncert.infer import _natural_gradient as natural_gradient
from bnncert.infer import _potential as potential
from bnncert.infer import ivon, mcmc, svi
from bnncert.posterior import MeanField
from bnncert.sets import Box, ball
from bnncert.types import Batch, Threat

KEY = jax.random.key(0)


def encloses(f, region, method):
    """Whether a bound holds at points of the box, its corners among them, and is no NaN."""
    box = bound(f, method)(region)
    rng = np.random.default_rng(0)
    unit = np.concatenate([rng.uniform(0, 1, (200, *region.lower.shape)),
                           rng.integers(0, 2, (50, *region.lower.shape))])  # fmt: skip
    values = jax.vmap(f)(jnp.float32(region.lower + unit * (region.upper - region.lower)))
    slack = 1e-5 * (1 + jnp.abs(values).max())
    return bool((box.lower <= values + slack).all() and (values <= box.upper + slack).all())


def take_every_line(monkeypatch):
    """Without the look at a line's ends that comes before it is used."""
    monkeypatch.setattr(elementwise, "_holds", lambda slope, *rest: jnp.ones_like(slope, bool))


def with_lines(monkeypatch, op, rule):
    """An operation with other lines."""
    (operation,) = OPERATIONS[op]
    other = elementwise.relaxed_by_lines(operation._replace(lines=rule))
    monkeypatch.setitem(OPERATIONS, op, (other,))


def test_a_convolution_centred_at_twice_its_output(monkeypatch):
    kernel = jax.random.normal(KEY, (2, 1, 3, 3))
    here = ball(jax.random.uniform(KEY, (1, 1, 6, 6)), 0.01)
    convolved = lambda x: jax.lax.conv(x, kernel, (1, 1), "SAME")  # noqa: E731
    assert encloses(convolved, here, "ibp")
    mix = affine.mix
    monkeypatch.setattr(affine, "mix", lambda node, center, radius: mix(node, 2 * center, radius))
    assert not encloses(convolved, here, "ibp")


@pytest.mark.parametrize(
    ("op", "f", "method", "ends"),
    [
        ("integer_pow", lambda x: x**4, "crown", (-3.0, -1.0)),
        ("leaky_relu", jax.nn.leaky_relu, "forward", (-2.0, -1.0)),
    ],
)
def test_lines_that_are_unsound_where_the_sign_is_known(op, f, method, ends, monkeypatch):
    """Even powers as if they increased; a leaky ReLU as if it were the identity."""
    # between affine maps, so that linear bounds are all there is
    network = lambda x: jnp.array([[1.0, -1.0], [0.5, 2.0]]) @ f(x)  # noqa: E731
    region = Box(jnp.full(2, ends[0]), jnp.full(2, ends[1]))
    assert encloses(network, region, method)
    true = LINES[op]

    def faulty(l, u, *constants, choice):
        good = true(l, u, *constants, choice=choice)
        identity = (jnp.ones_like(l), jnp.zeros_like(l)) * 2
        known = (u < 0) | (l > 0)
        pairs = zip(identity, good, strict=True)
        return type(good)(*(jnp.where(known, bad, fine) for bad, fine in pairs))

    with_lines(monkeypatch, op, faulty)
    assert encloses(network, region, method)  # on the wrong side at an end, a line is not taken
    take_every_line(monkeypatch)
    assert not encloses(network, region, method)


@pytest.mark.parametrize(("op", "f"), [("tanh", jnp.tanh), ("softplus", jax.nn.softplus)])
def test_chords_of_no_width(op, f, monkeypatch):
    """A chord's slope is 0 / 0 at a point: of a NaN no bound is made, intervals are left."""
    region = Box(jnp.array([0.3, -1.0]), jnp.array([0.3, 1.0]))
    network = lambda x: f(x)[:1] + f(x[1:]) - f(1.0 * x[1:])  # noqa: E731
    width = lambda method: float(jnp.ptp(jnp.stack(  # noqa: E731
        jax.tree.leaves(bound(network, method)(region)))))  # fmt: skip
    assert width("crown") < 0.6 * width("ibp") < np.inf
    true = LINES[op]

    def faulty(l, u, *constants, choice):
        good = true(l, u, *constants, choice=choice)
        return jax.tree.map(lambda v: v * ((u - l) / (u - l)), good)

    with_lines(monkeypatch, op, faulty)
    assert width("crown") <= width("ibp")
    take_every_line(monkeypatch)
    assert width("crown") == pytest.approx(width("ibp"))


def test_a_slack_that_is_not_subtracted(monkeypatch):
    """24 draws, of networks that certify by a hair on average, certify nothing."""
    apply = lambda p, x: jnp.stack([p["w"] * x[0], jnp.zeros(())])  # noqa: E731
    q = MeanField({"w": jnp.asarray(0.3)}, {"w": jnp.asarray(1.0)})
    here = ball(jnp.ones(1), 0.0)

    def certified():
        found = certify.statistical(KEY, apply, q, here, num_samples=24, method="ibp")
        return bool(found.robust)

    assert not certified()
    monkeypatch.setattr(confidence, "slack", lambda draws, *rest: jnp.zeros(draws.shape[1:]))
    assert certified()


def linear(key, params, x, y, threat):
    """A regression's log-likelihood, with a worst case that the radius decides."""
    error = (
        jnp.abs(y - params["w"] @ x) + (1 - threat.lam) * threat.eps * jnp.abs(params["w"]).sum()
    )
    return -0.5 * error**2


W = {"w": jnp.array([0.5, -1.0])}
X = jax.random.normal(KEY, (12, 2))
DATA = Batch(X, X @ jnp.array([1.0, 2.0]), jnp.ones(12))


def threat(eps):
    return Threat(jnp.float32(eps), jnp.float32(0.0), jnp.float32(0.0))


def test_a_potential_without_the_robust_term(monkeypatch):
    def of_radius(eps):
        gradient = jax.grad(
            lambda p: mcmc.potential(linear, prior.normal(W, 1.0), KEY, p, DATA, threat(eps))
        )
        return gradient(W)["w"]

    def depends():
        return bool(jnp.abs(of_radius(0.5) - of_radius(0.0)).max() > 1e-3)

    assert depends()
    true = potential.log_likelihoods

    def plain(log_likelihood, *rest):
        return true(log_likelihood, *rest[:-1], threat(0.0))  # pyright: ignore[reportCallIssue]

    monkeypatch.setattr(potential, "log_likelihoods", plain)
    assert not depends()


def test_hmc_samples_that_are_all_one(monkeypatch):
    def distinct():
        sampler = mcmc.build(
            linear, prior.normal(W, 1.0), num_warmup=5, num_samples=4, kernel="hmc", num_steps=3
        )
        draws = np.asarray(sampler.sample(KEY, W, DATA, threat(0.1))[0].params["w"])
        return len(np.unique(draws, axis=0)) == len(draws)

    assert distinct()
    true = mcmc.MCMC.get_samples
    repeated = lambda self: jax.tree.map(lambda v: v[:1].repeat(len(v), 0), true(self))  # noqa: E731
    monkeypatch.setattr(mcmc.MCMC, "get_samples", repeated)
    assert not distinct()


def test_a_kl_that_is_averaged_and_a_number_of_data_that_is_fixed(monkeypatch):
    q = MeanField({"w": jnp.ones((3, 4))}, {"w": jnp.full((3, 4), 0.5)})
    target = prior.normal(q.loc, 1.0)

    def summed():
        each = 0.5 * (0.25 + 1.0 - 1.0) - jnp.log(0.5)
        return bool(jnp.isclose(q.kl(target), 12 * each, rtol=1e-5))

    def scaled():
        def fit(count):
            algorithm = svi.build(linear, prior.normal(W, 1.0), num_data=count,
                                  optimizer=optax.sgd(0.0))  # fmt: skip
            return algorithm.update(KEY, algorithm.init(KEY, W), DATA, threat(0.0))[1]

        losses = [float(-fit(count).log_likelihood) for count in (100, 200)]
        return bool(np.isclose(losses[1], 2 * losses[0], rtol=1e-3))

    assert summed() and scaled()
    true = MeanField.kl
    monkeypatch.setattr(MeanField, "kl", lambda self, p: true(self, p) / 12)
    assert not summed()


def test_a_precision_saved_as_a_deviation(monkeypatch):
    """Of 12 data with unit noise and 0 gradients' noise: sd = (sum x^2 + 1)^(-1/2)."""
    exact = 1 / jnp.sqrt((X**2).sum(0) + 1.0)

    def fitted():
        algorithm = ivon.build(
            linear, prior.normal(W, 1.0), num_data=12, optimizer=optax.sgd(0.1), beta2=0.9
        )
        state, _ = jax.lax.scan(
            lambda state, key: (algorithm.update(key, state, DATA, threat(0.0))[0], None),
            algorithm.init(KEY, W),
            jax.random.split(KEY, 600),
        )
        deviation: Any = algorithm.posterior(state).moments()[1]
        return bool(jnp.allclose(deviation["w"], exact, rtol=0.3))

    assert fitted()
    true = natural_gradient._scales

    def precisions(settings, state):
        return {name: 1 / jnp.square(scale) for name, scale in true(settings, state).items()}

    monkeypatch.setattr(natural_gradient, "_scales", precisions)
    assert not fitted()


def test_a_prior_scale_is_what_was_asked_for():
    """Not passed through a softplus, once or twice."""
    loc, scale = prior.normal_parameters(prior.normal(W, 0.1))
    np.testing.assert_allclose(scale["w"], 0.1)
    np.testing.assert_allclose(loc["w"], 0.0)


def test_the_mixture_is_of_probabilities_inside_the_logarithm():
    """A mixture of log-probabilities is the other error model; at power 1 it would be too low."""
    apply = lambda params, x: params["w"] * jnp.concatenate([x, -x])  # noqa: E731
    params, x, y = {"w": jnp.asarray(2.0)}, jnp.array([0.3]), jnp.asarray(0)
    terms = Threat(jnp.float32(0.2), jnp.float32(0.25), jnp.float32(1.0))
    found = likelihood.robust_categorical(apply)(KEY, params, x, y, terms)
    p = lambda v: jax.nn.softmax(apply(params, v))[0]  # noqa: E731
    inside = jnp.log(0.25 * p(x) + 0.75 * p(x - 0.2))
    outside = 0.25 * jnp.log(p(x)) + 0.75 * jnp.log(p(x - 0.2))
    np.testing.assert_allclose(found, inside, rtol=1e-5)
    assert abs(float(found - outside)) > 1e-3
