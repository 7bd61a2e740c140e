"""Noisy Adam: its curvature is that of single data, whatever the batch, as its docstring has it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import prior
from bnncert.infer import noisy_adam
from tests.infer.regression import problem, train


def fixed_point(here, batch_size):
    """E[h] = V (N - B) / (N - 1) + B m^2, both in expectation over q, by iteration."""
    num, h, mean = len(here.x), np.ones(3), here.mean()
    residuals = here.y - here.x @ mean
    for _ in range(1000):
        variances = here.scale(h) ** 2
        squares = residuals**2 + here.x**2 @ variances
        second = (here.x**2 * squares[:, None]).mean(0) / here.noise**4
        # the mean gradient: at the fixed point that of the prior, and what the draw adds
        first = (here.damping() * mean) ** 2 + here.curvature**2 @ variances
        expected = (second - first) * (num - batch_size) / (num - 1) + batch_size * first
        h = 0.5 * h + 0.5 * expected
    return h


@pytest.mark.parametrize("batch_size", [5, 20])
def test_converges_to_its_fixed_point_on_linear_regression(batch_size):
    here = problem(200)
    algorithm = noisy_adam.build(
        here.log_likelihood(),
        prior.normal(jnp.ones(3), here.prior_scale),
        num_data=len(here.x),
        optimizer=optax.sgd(optax.exponential_decay(0.1, 2_000, 0.1)),
    )
    q, precision = train(algorithm, here, batch_size, steps=8_000, keep=5_000)
    expected = here.scale(fixed_point(here, batch_size)) ** -2
    np.testing.assert_allclose(precision, expected, rtol=0.05)
    # within a few B / N of exact; without the factor B it would be off by that factor
    exact = here.scale(np.diag(here.curvature)) ** -2
    assert np.abs(expected / exact - 1).max() < 0.3
    assert (np.abs(q.loc - here.mean()) < 0.15 * here.scale(np.diag(here.curvature))).all()
