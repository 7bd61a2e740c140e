"""Detection scores against scikit-learn, ties, and closed forms."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from bnncert import metrics

POSITIVE = jnp.round(jax.random.normal(jax.random.key(0), (300,)) + 1, 1)
NEGATIVE = jnp.round(jax.random.normal(jax.random.key(1), (200,)), 1)
TRUTH = np.r_[np.ones(300), np.zeros(200)]
SCORES = np.r_[POSITIVE, NEGATIVE]


def test_auroc_agrees_with_scikit_learn_ties_included():
    assert len(np.intersect1d(POSITIVE, NEGATIVE)) > 10
    expected = roc_auc_score(TRUTH, SCORES)
    np.testing.assert_allclose(metrics.auroc(POSITIVE, NEGATIVE), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.auroc(NEGATIVE, POSITIVE), 1 - expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.auroc(POSITIVE, POSITIVE), 0.5, rtol=1e-6)
    assert metrics.auroc(jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0])) == 1
    np.testing.assert_allclose(jax.jit(metrics.auroc)(POSITIVE, NEGATIVE), expected, rtol=1e-5)


def test_fpr_agrees_with_the_curve_of_scikit_learn():
    fpr, tpr, _ = roc_curve(TRUTH, SCORES, drop_intermediate=False)
    for least in (0.5, 0.8, 0.95, 1.0):
        expected = fpr[np.flatnonzero(tpr >= least - 1e-12)[0]]
        found = metrics.fpr_at_tpr(POSITIVE, NEGATIVE, least)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fpr_finds_as_many_as_it_says_and_no_more_than_it_must():
    """Of 20 positives, 95% are 19: the threshold is the second smallest."""
    positive = jnp.arange(20.0)
    assert metrics.fpr_at_tpr(positive, jnp.array([0.5, 1.0, 2.0, -1.0])) == 0.5


def test_the_likelihood_ratio_is_that_of_the_mean_confidences():
    inside = jnp.array([[0.9, 0.1], [0.3, 0.7]])
    outside = jnp.array([[0.5, 0.5]])
    np.testing.assert_allclose(metrics.likelihood_ratio(inside, outside), 0.8 / 0.5, rtol=1e-6)
    assert metrics.likelihood_ratio(inside, inside) == 1


@pytest.fixture
def unchecked():
    """What a user meets: outside these tests nothing checks the annotations first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_inputs_are_named(unchecked):
    empty = jnp.zeros(0)
    with pytest.raises(ValueError, match=r"negative has shape \(0,\)"):
        metrics.auroc(POSITIVE, empty)
    with pytest.raises(ValueError, match=r"positive has shape \(0,\)"):
        metrics.fpr_at_tpr(empty, NEGATIVE)
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\], got 0"):
        metrics.fpr_at_tpr(POSITIVE, NEGATIVE, 0.0)
    with pytest.raises(ValueError, match=r"outside has shape \(2, 3\)"):
        metrics.likelihood_ratio(jnp.ones((2, 2)), jnp.ones((2, 3)))
