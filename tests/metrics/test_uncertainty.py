"""Entropies and mutual information: their identity, their extremes, their small values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import metrics


@pytest.fixture(scope="module")
def sample_probs():
    return jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(0), (7, 50, 4)))


def test_mutual_information_is_the_difference_of_the_entropies(sample_probs):
    difference = metrics.predictive_entropy(sample_probs) - metrics.expected_entropy(sample_probs)
    np.testing.assert_allclose(metrics.mutual_information(sample_probs), difference, atol=1e-6)
    assert (difference > 0.01).all()


def test_entropies_at_their_extremes():
    uniform, certain = jnp.full((3, 1, 8), 1 / 8), jax.nn.one_hot(jnp.zeros((3, 1), int), 8)
    np.testing.assert_allclose(metrics.predictive_entropy(uniform), np.log(8), rtol=1e-6)
    assert metrics.predictive_entropy(certain) == 0
    # Certain samples that all disagree: everything the predictive does not know is information.
    disagreeing = jnp.eye(8)[:, None, :]
    np.testing.assert_allclose(metrics.mutual_information(disagreeing), np.log(8), rtol=1e-6)
    assert metrics.expected_entropy(disagreeing) == 0


def test_mutual_information_is_never_negative_and_keeps_small_values():
    """Nearly equal samples, where the difference of two float32 entropies is rounding noise."""
    p, shift = 0.3, 1e-4
    sample_probs = jnp.array([[[p + shift, 1 - p - shift]], [[p - shift, 1 - p + shift]]])
    second_order = shift**2 / (2 * p * (1 - p))
    np.testing.assert_allclose(metrics.mutual_information(sample_probs), second_order, rtol=0.3)
    same = jnp.tile(jax.nn.softmax(jax.random.normal(jax.random.key(2), (1, 200, 10))), (9, 1, 1))
    information = metrics.mutual_information(same)
    assert (information >= 0).all() and (information < 1e-6).all()


def test_mutual_information_survives_probabilities_near_the_smallest_number():
    tiny = jnp.finfo(jnp.float32).tiny
    sample_probs = jnp.array([[[1.0, tiny]], [[1.0, 0.0]], [[1.0, 0.0]]])
    assert 0 <= metrics.mutual_information(sample_probs) < 1e-6
