"""Scores against closed forms, identities between them, and their edges."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from sklearn.metrics import log_loss

from bnncert import metrics


@pytest.fixture(scope="module")
def sample_probs():
    return jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(0), (7, 50, 4)))


@pytest.fixture(scope="module")
def labels():
    return jax.random.randint(jax.random.key(1), (50,), 0, 4)


def test_nll_agrees_with_scikit_learn_and_with_its_own_log_form(sample_probs, labels):
    probs = sample_probs.mean(axis=0)
    exact = np.asarray(probs, np.float64)
    expected = log_loss(labels, exact / exact.sum(axis=1, keepdims=True), labels=range(4))
    np.testing.assert_allclose(metrics.nll(probs, labels), expected, rtol=1e-5)
    from_log = metrics.nll(jnp.log(probs), labels, from_log=True)
    np.testing.assert_allclose(from_log, expected, rtol=1e-5)


def test_nll_of_an_impossible_label_is_large_and_finite_and_exact_from_logs():
    labels = jnp.array([1])
    value, grad = jax.value_and_grad(metrics.nll)(jnp.array([[1.0, 0.0]]), labels)
    assert 87 < value < 88 and jnp.isfinite(grad).all()
    log_probs = jnp.array([[0.0, -500.0]])
    assert metrics.nll(log_probs, labels, from_log=True) == 500


def test_brier_of_uniform_certain_and_wrong_predictions():
    labels = jnp.arange(4)
    np.testing.assert_allclose(metrics.brier(jnp.full((4, 4), 0.25), labels), 0.75, rtol=1e-6)
    assert metrics.brier(jnp.eye(4), labels) == 0
    assert metrics.brier(jnp.roll(jnp.eye(4), 1, axis=1), labels) == 2


def test_brier_and_nll_are_proper():
    """In expectation over labels drawn from p, both are smallest when p is what is predicted."""
    p = jnp.array([0.6, 0.3, 0.1])
    labels = jnp.repeat(jnp.arange(3), jnp.array([6, 3, 1]), total_repeat_length=10)

    for score in (metrics.brier, metrics.nll):

        def expected(logits, score=score):
            return score(jnp.tile(jax.nn.softmax(logits), (10, 1)), labels)

        assert jnp.abs(jax.grad(expected)(jnp.log(p))).max() < 1e-6
        assert expected(jnp.log(p)) < expected(jnp.log(p) + jnp.array([0.1, 0.0, 0.0]))


def test_metrics_are_the_same_under_jit(sample_probs, labels):
    probs = sample_probs.mean(axis=0)
    for score in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece):
        np.testing.assert_allclose(jax.jit(score)(probs, labels), score(probs, labels), rtol=1e-6)
    bins = jax.jit(metrics.reliability, static_argnums=2)(probs, labels, 15)
    np.testing.assert_array_equal(bins.count, metrics.reliability(probs, labels).count)


@pytest.fixture
def unchecked():
    """What a user meets: outside these tests nothing checks the annotations first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_inputs_are_named(unchecked):
    probs = jnp.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2, got a label 3"):
        metrics.accuracy(probs, jnp.array([0, 3]))
    with pytest.raises(ValueError, match="got a label -1"):
        metrics.nll(probs, jnp.array([0, -1]))
    with pytest.raises(ValueError, match=r"\(5, 2, 3\).*average per-sample"):
        metrics.brier(jnp.full((5, 2, 3), 1 / 3), jnp.array([0, 1]))
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        metrics.ece(probs, jnp.array([0, 1]), num_bins=0)
