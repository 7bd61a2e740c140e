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


def test_reliability_counts_every_datum_once_and_recovers_the_means(sample_probs, labels):
    probs = sample_probs.mean(axis=0)
    bins = metrics.reliability(probs, labels, num_bins=10)
    assert bins.count.sum() == 50
    weighted = (bins.count * bins.accuracy).sum() / 50
    np.testing.assert_allclose(weighted, metrics.accuracy(probs, labels), rtol=1e-6)
    mean_confidence = (bins.count * bins.confidence).sum() / 50
    np.testing.assert_allclose(mean_confidence, probs.max(axis=-1).mean(), rtol=1e-6)
    upper = jnp.arange(1, 11) / 10
    filled = bins.count > 0
    assert not filled.all()  # confidences below 1 / 4 do not exist
    assert ((bins.confidence <= upper) & (bins.confidence > upper - 0.1))[filled].all()
    assert (bins.confidence == 0)[~filled].all() and (bins.accuracy == 0)[~filled].all()


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    probs = jnp.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    bins = metrics.reliability(probs, jnp.zeros(3, int), num_bins=4)
    assert bins.count.tolist() == [0, 1, 1, 1]


def test_ece_is_the_gap_of_a_constant_confidence():
    """Confidence .8 with accuracy .6: the gap .2; with accuracy .8: none."""
    probs = jnp.tile(jnp.array([0.8, 0.2]), (10, 1))
    for right, gap in ((6, 0.2), (8, 0.0)):
        labels = (jnp.arange(10) >= right).astype(int)
        np.testing.assert_allclose(metrics.ece(probs, labels), gap, atol=1e-6)


def test_ece_with_one_bin_is_confidence_minus_accuracy(sample_probs, labels):
    probs = sample_probs.mean(axis=0)
    gap = jnp.abs(probs.max(axis=-1).mean() - metrics.accuracy(probs, labels))
    np.testing.assert_allclose(metrics.ece(probs, labels, num_bins=1), gap, rtol=1e-5)


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
