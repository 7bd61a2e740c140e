"""VOGN: its estimates are unbiased, and it converges where its docstring says."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import likelihood, prior
from bnncert.infer import _natural_gradient as natural_gradient
from bnncert.infer import vogn
from bnncert.types import Batch, Threat
from tests.infer.regression import problem, train

WIDTH, CLASSES, BATCH = 3, 3, 5
keys = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(keys[0], (CLASSES, WIDTH))}
X = jax.random.uniform(keys[1], (BATCH, WIDTH))
Y = jax.random.randint(keys[2], (BATCH,), 0, CLASSES)
MASK = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])
THREAT = Threat(jnp.float32(0.1), jnp.float32(0.4), jnp.float32(0.0))


def linear(params, x):
    return jnp.tanh(params["w"] @ x)


LOGLIK = likelihood.robust_categorical(linear)


def caught() -> natural_gradient.Draw:
    """The draw that an estimate is given, at weights that are as good as the location."""
    draws = []

    def estimate(draw):
        draws.append(draw)
        return draw.scale

    algorithm = natural_gradient.build(
        estimate,
        natural_gradient.moving_average(0.9),
        LOGLIK,
        prior.normal(PARAMS, 1.0),
        num_data=50,
        optimizer=optax.sgd(0.1),
        initial_scale=1e-6,
    )
    algorithm.update(keys[0], algorithm.init(keys[0], PARAMS), Batch(X, Y, MASK), THREAT)
    return draws[0]


def every_sign(shape):
    """All sign vectors: the expectation over them is a mean."""
    signs = itertools.product((-1.0, 1.0), repeat=int(np.prod(shape)))
    return jnp.array(list(signs), jnp.float32).reshape(-1, *shape)


def test_random_signs_are_unbiased_for_the_sum_of_squares(monkeypatch):
    """Each vector of signs in turn stands for the random one: the expectation is exact."""

    @jax.jit
    def over_all_signs():
        draw = caught()

        def one(signs):
            monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: signs)
            return vogn.squared_gradients(draw, keys[0])["w"]

        return jax.vmap(one)(every_sign((BATCH,))).mean(0), draw.gradient["w"]

    expected = 0.0
    gradients = jax.vmap(jax.grad(lambda p, x, y: LOGLIK(keys[0], p, x, y, THREAT)), (None, 0, 0))
    for gradient, kept in zip(gradients(PARAMS, X, Y)["w"], MASK, strict=True):
        expected += kept * gradient**2 / MASK.sum()
    found, mean = over_all_signs()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)
    assert np.abs(mean**2 / expected - 1).min() > 0.05  # it is not the mean's square


def gauss_newton_by_hand(loglik):
    expected = 0.0
    for x, y, kept in zip(X, Y, MASK, strict=True):

        def outputs(w, x=x, y=y):
            return loglik.outputs(keys[0], {"w": w}, x, y, THREAT)

        jacobian = jax.jacobian(outputs)(PARAMS["w"]).reshape(-1, CLASSES * WIDTH)
        hessian = jax.hessian(lambda o, y=y: -loglik.log_prob(o, y, THREAT))(outputs(PARAMS["w"]))
        assert np.linalg.eigvalsh(hessian).min() > -1e-6  # the geometric mixture is concave
        expected += kept * np.diag(jacobian.T @ hessian @ jacobian) / MASK.sum()
    return np.reshape(expected, (CLASSES, WIDTH))


def test_gauss_newton_by_signs_is_unbiased():
    @jax.jit
    def estimates(keys):
        return jax.vmap(partial(vogn.gauss_newton, LOGLIK, caught()))(keys)["w"]

    draws = estimates(jax.random.split(keys[1], 20_000))
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - gauss_newton_by_hand(LOGLIK)) < 6 * error + 1e-6).all()


def fixed_point(here, kl_weight=1.0):
    """The curvature of the docstring's equations, by iteration."""
    h, residuals = np.ones(3), here.y - here.x @ here.mean(kl_weight)
    for _ in range(1000):
        squares = residuals**2 + here.x**2 @ here.scale(h, kl_weight) ** 2
        h = 0.5 * h + 0.5 * (here.x**2 * squares[:, None]).mean(0) / here.noise**4
    return h


@pytest.mark.parametrize("curvature", ["squared-gradients", "gauss-newton"])
def test_converges_to_its_fixed_point_on_linear_regression(curvature):
    """Squared gradients: that of the docstring, 28% off the exact one. Gauss-Newton: exact."""
    here, kl_weight = problem(), 0.5
    algorithm = vogn.build(
        here.log_likelihood(),
        prior.normal(jnp.ones(3), here.prior_scale),
        num_data=len(here.x),
        kl_weight=kl_weight,
        optimizer=optax.sgd(optax.exponential_decay(0.1, 2_000, 0.1)),
        curvature=curvature,
    )
    q, precision = train(algorithm, here, batch_size=10, steps=8_000, keep=5_000)
    exact = here.scale(np.diag(here.curvature), kl_weight)
    expected = here.scale(fixed_point(here, kl_weight), kl_weight)
    assert np.abs((exact / expected) ** 2 - 1).max() > 0.25  # they can be told apart
    wanted = exact if curvature == "gauss-newton" else expected
    np.testing.assert_allclose(precision, wanted**-2, rtol=0.04)
    assert (np.abs(q.loc - here.mean(kl_weight)) < 0.15 * exact).all()


def test_more_probes_are_less_noisy():
    @partial(jax.jit, static_argnums=0)
    def spread(num_probes):
        draw = caught()

        def one(key):
            estimate = vogn.squared_gradients
            return vogn.over_probes(estimate, num_probes, draw._replace(key=key))["w"]

        return jax.vmap(one)(jax.random.split(keys[2], 200)).std(0).mean()

    assert 3 < spread(1) / spread(16) < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes = 0"),
        ({"curvature": "hessian"}, "curvature = 'hessian'"),
        ({"curvature": "gauss-newton"}, "Composed"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        vogn.build(
            lambda key, params, x, y, threat: jnp.float32(0),
            prior.normal(PARAMS, 1.0),
            num_data=5,
            optimizer=optax.sgd(0.1),
            **options,
        )
