"""IVON: its estimate is the Hessian's, h + d stays positive, conjugate models come out exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import prior
from bnncert.infer import _natural_gradient as natural_gradient
from bnncert.infer import ivon
from bnncert.types import Batch
from tests.infer.regression import PLAIN, problem, train


def test_prices_estimate_is_the_hessian_in_expectation():
    """Of a function with cubes: the Hessian depends on the weights, and its mean over q counts."""
    here = jnp.array([0.3, -0.8])

    def loglik(key, params, x, y, threat):
        return -(x * params**3 + 2 * params**2).sum() + 0 * y

    estimates = []

    def estimate(draw):
        estimates.append(ivon.price(draw)[""])
        return ivon.price(draw)

    algorithm = natural_gradient.build(
        estimate,
        ivon.riemannian(0.9),
        loglik,
        prior.normal(here, 1.0),
        num_data=10,
        optimizer=optax.sgd(0.1),
        initial_scale=0.5,
        num_particles=1,
    )
    state = algorithm.init(jax.random.key(0), here)
    data = Batch(jnp.full((1, 2), 0.4), jnp.zeros(1), jnp.ones(1))

    def one(key):
        estimates.clear()
        algorithm.update(key, state, data, PLAIN)
        return estimates[0]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 50_000))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - (6 * 0.4 * here + 4)) < 6 * error).all()


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9999])
def test_precision_stays_positive(beta2):
    """h + d -> (h + d)(1 + r + r^2 / 2), at least (h + d) / 2; h = e is a fixed point."""
    rng = np.random.default_rng(0)
    h, d = jnp.float32(10 ** rng.uniform(-6, 3, (2, 10_000)))
    e = jnp.float32(rng.choice([-1, 1], 10_000) * 10 ** rng.uniform(-6, 6, 10_000))
    new = ivon.riemannian(beta2)(h, e, d)
    assert (new + d >= 0.5 * (h + d) * (1 - 1e-4)).all()
    assert (new != beta2 * h + (1 - beta2) * e).any()
    np.testing.assert_allclose(ivon.riemannian(beta2)(h, h, d), h, rtol=1e-5)


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_reaches_the_exact_precision_on_linear_regression(kl_weight):
    here = problem()
    algorithm = ivon.build(
        here.log_likelihood(),
        prior.normal(jnp.ones(3), here.prior_scale),
        num_data=len(here.x),
        kl_weight=kl_weight,
        optimizer=optax.sgd(optax.exponential_decay(0.1, 2_000, 0.1)),
        beta2=0.999,
        num_particles=4,
    )
    q, precision = train(algorithm, here, batch_size=25, steps=10_000, keep=8_000)
    exact = here.scale(np.diag(here.curvature), kl_weight)
    np.testing.assert_allclose(precision, exact**-2, rtol=0.04)
    assert (np.abs(q.loc - here.mean(kl_weight)) < 0.15 * exact).all()
