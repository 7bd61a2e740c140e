"""Calibration errors against closed forms and netcal, bins of both kinds, and the temperature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from bnncert import metrics


@pytest.fixture(scope="module")
def sample_probs():
    return jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(0), (7, 50, 4)))


@pytest.fixture(scope="module")
def labels():
    return jax.random.randint(jax.random.key(1), (50,), 0, 4)


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


def numpy_problem(num: int = 500, classes: int = 5):
    """Over-confident predictions, float64, by NumPy alone: another program can make them too."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num, classes)) * 1.5
    exp = np.exp(logits)
    labels = np.array([rng.choice(classes, p=row) for row in exp / exp.sum(1, keepdims=True)])
    sharp = np.exp(2.0 * logits)
    return sharp / sharp.sum(1, keepdims=True), labels


NETCAL = {
    10: (0.1634000906186825, 0.24623109993252223),
    15: (0.16921276323060724, 0.32134588118199964),
    30: (0.1755821746800927, 0.33978421396884495),
}
"""Bins -> ECE, MCE."""


def test_bins_of_equal_mass_hold_equally_many_in_the_order_of_confidence(sample_probs, labels):
    probs = sample_probs.mean(axis=0)
    bins = metrics.reliability(probs, labels, num_bins=10, equal_mass=True)
    assert bins.count.tolist() == [5] * 10
    assert metrics.reliability(probs, labels, 15, equal_mass=True).count.sum() == 50
    ordered = np.sort(probs.max(axis=-1)).reshape(10, 5)
    np.testing.assert_allclose(bins.confidence, ordered.mean(1), rtol=1e-6)
    right = np.asarray(probs.argmax(axis=-1) == labels)[np.argsort(probs.max(axis=-1))]
    np.testing.assert_allclose(bins.accuracy, right.reshape(10, 5).mean(1), rtol=1e-6)
    expected = np.abs(right.reshape(10, 5).mean(1) - ordered.mean(1))
    found = metrics.ece(probs, labels, 10, equal_mass=True)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-5)
    found = metrics.mce(probs, labels, 10, equal_mass=True)
    np.testing.assert_allclose(found, expected.max(), rtol=1e-5)


def test_more_bins_than_data_leave_some_empty():
    probs, labels = jnp.array([[0.9, 0.1], [0.6, 0.4]]), jnp.array([0, 1])
    bins = metrics.reliability(probs, labels, num_bins=5, equal_mass=True)
    assert sorted(bins.count.tolist()) == [0, 0, 0, 1, 1]
    np.testing.assert_allclose(metrics.mce(probs, labels, 5, equal_mass=True), 0.6, rtol=1e-6)


def test_mce_is_the_worst_bin_and_never_below_the_mean():
    probs, labels = numpy_problem()
    probs, labels = jnp.asarray(probs, jnp.float32), jnp.asarray(labels)
    for equal_mass in (False, True):
        bins = metrics.reliability(probs, labels, equal_mass=equal_mass)
        gaps = jnp.abs(bins.accuracy - bins.confidence)
        worst = metrics.mce(probs, labels, equal_mass=equal_mass)
        assert worst == gaps.max()
        assert worst >= metrics.ece(probs, labels, equal_mass=equal_mass)


def test_errors_agree_with_netcal():
    """Constants of netcal 1.4.0, computed once of the same arrays by:

    from netcal.metrics import ECE, MCE
    ECE(bins=15).measure(*numpy_problem()), MCE(bins=15).measure(*numpy_problem())
    # (0.16921276323060724, 0.32134588118199964)
    """
    probs, labels = numpy_problem()
    probs, labels = jnp.asarray(probs, jnp.float32), jnp.asarray(labels)
    for num_bins, (expected, worst) in NETCAL.items():
        np.testing.assert_allclose(metrics.ece(probs, labels, num_bins), expected, rtol=1e-4)
        np.testing.assert_allclose(metrics.mce(probs, labels, num_bins), worst, rtol=1e-4)


def test_the_temperature_is_where_the_nll_is_least():
    """Logits too large by 2: against SciPy's bounded search in float64, and T near 2."""
    probs, labels = numpy_problem(2000)
    logits = np.log(probs)

    def loss(t):
        z = logits / t
        return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels])

    best: Any = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8})
    found = metrics.fit_temperature(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    labels = jnp.asarray(labels)
    np.testing.assert_allclose(found, best.x, rtol=1e-3)
    np.testing.assert_allclose(found, 2.0, rtol=0.1)
    # it repairs what it was fitted for, and leaves the ranking alone
    scaled = jax.nn.softmax(jnp.asarray(logits, jnp.float32) / found)
    before, after = (metrics.ece(jnp.asarray(p, jnp.float32), labels) for p in (probs, scaled))
    assert after < before / 2
    # of a shift and a common factor it knows what it should
    moved = jnp.asarray(10 * logits + 3, jnp.float32)
    np.testing.assert_allclose(metrics.fit_temperature(moved, labels), 10 * best.x, rtol=1e-2)


def test_a_temperature_without_a_best_one_stays_in_its_range():
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
    right = metrics.fit_temperature(logits, jnp.array([0, 1]))
    wrong = metrics.fit_temperature(logits, jnp.array([1, 0]), steps=100)
    assert 0.0099 < right < 1 and 1 < wrong < 101
    with pytest.raises(ValueError, match="steps must be at least 1"):
        metrics.fit_temperature(logits, jnp.array([0, 1]), steps=0)
