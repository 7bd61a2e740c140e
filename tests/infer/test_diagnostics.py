"""Diagnostics of chains whose agreement is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.infer import diagnostics

CHAINS, DRAWS = 3, 400
POINTS = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [2.0, 0.5]])
WEIGHTS = {"w": jax.random.normal(jax.random.key(0), (CHAINS * DRAWS, 2))}  # independent draws


def apply(params, x):
    return (params["w"] @ x)[None]


def test_of_independent_draws():
    """R-hat is near 1 and every draw counts, at every input."""
    found = diagnostics.of_predictions(apply, WEIGHTS, CHAINS, POINTS, link=lambda v: v)
    assert found.r_hat.shape == found.ess.shape == (4, 1)
    assert (abs(found.r_hat - 1) < 0.01).all()
    assert (found.ess > 0.7 * CHAINS * DRAWS).all()
    values = np.asarray(WEIGHTS["w"] @ POINTS.T).reshape(CHAINS, DRAWS, 4, 1)
    expected = diagnostics.of_values(values)
    np.testing.assert_allclose(found.r_hat, expected.r_hat, rtol=1e-3)
    np.testing.assert_allclose(found.ess, expected.ess, rtol=1e-2)


def test_correlated_draws_count_less():
    """Of an autoregression with coefficient a, (1 - a) / (1 + a) of the draws."""
    noise, values = np.random.default_rng(0).normal(size=(4, 5000)), np.zeros((4, 5000))
    for i in range(1, 5000):
        values[:, i] = 0.8 * values[:, i - 1] + noise[:, i]
    assert abs(diagnostics.of_values(values).ess / (4 * 5000) - 0.2 / 1.8) < 0.02


def test_chains_around_different_means_are_told_apart():
    values = np.asarray(WEIGHTS["w"]).reshape(CHAINS, DRAWS, 2)
    apart = diagnostics.of_values(values + 3 * np.arange(CHAINS)[:, None, None])
    assert (apart.r_hat > 2).all() and (apart.ess < 20).all()


def test_equal_draws_have_no_diagnostics():
    assert np.isnan(diagnostics.of_values(np.ones((2, 10))).r_hat)


def test_by_default_of_class_probabilities():
    """Of two classes the one is 1 minus the other, and as well known."""
    found = diagnostics.of_predictions(
        lambda params, x: jnp.append(apply(params, x), 0.0), WEIGHTS, CHAINS, POINTS
    )
    assert found.r_hat.shape == (4, 2)
    np.testing.assert_allclose(found.r_hat[:, 0], found.r_hat[:, 1], rtol=1e-3)


def test_bad_chains():
    with pytest.raises(ValueError, match="10 samples are not 3 chains"):
        diagnostics.of_predictions(apply, {"w": jnp.zeros((10, 2))}, 3, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="3 draws"):
        diagnostics.of_values(np.zeros((2, 3)))
