"""The losses against their formulas, and their gradients against those of the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.attack._losses import dlr, log_odds, targeted_dlr
from bnncert.attack._predictive import loss_ascent
from tests.attack.networks import linear, mlp, mlp_samples, predictive

LOG_PI = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.04, 0.01], [0.05, 0.6, 0.05, 0.2, 0.1]]))


def test_the_formulas_of_the_paper():
    for log_pi in LOG_PI:
        known = np.asarray(log_pi)
        top = np.sort(known)[::-1]
        for y in range(5):
            pi = np.exp(known[y])
            np.testing.assert_allclose(log_odds(log_pi, y), np.log((1 - pi) / pi), rtol=1e-4)
            best = np.delete(known, y).max()
            expected = -(known[y] - best) / (top[0] - top[2])
            np.testing.assert_allclose(dlr(log_pi, y), expected, rtol=1e-5)
            for t in set(range(5)) - {y}:
                expected = -(known[y] - known[t]) / (top[0] - (top[2] + top[3]) / 2)
                np.testing.assert_allclose(targeted_dlr(log_pi, y, t), expected, rtol=1e-5)


def test_shifts_do_not_matter_and_to_the_ratios_scales_do_not():
    log_pi = LOG_PI[0]
    target = partial(targeted_dlr, target=3)
    for loss in (log_odds, dlr, target):
        np.testing.assert_allclose(loss(log_pi + 7, y=1), loss(log_pi, y=1), rtol=1e-4)
    for loss in (dlr, target):
        np.testing.assert_allclose(loss(1e3 * log_pi, y=1), loss(log_pi, y=1), rtol=1e-4)


def test_few_classes_and_equal_ones():
    two, three = jnp.log(jnp.array([0.7, 0.3])), jnp.log(jnp.array([0.6, 0.3, 0.1]))
    np.testing.assert_allclose(dlr(two, 0), np.log(3 / 7), rtol=1e-5)
    np.testing.assert_allclose(targeted_dlr(two, 0, 1), np.log(3 / 7), rtol=1e-5)
    np.testing.assert_allclose(dlr(three, 0), -np.log(2) / np.log(6), rtol=1e-5)
    np.testing.assert_allclose(targeted_dlr(three, 0, 2), -1, rtol=1e-5)
    for loss in (dlr, partial(targeted_dlr, target=1)):
        value, slope = jax.value_and_grad(loss)(jnp.zeros(4), y=0)
        assert value == 0 and jnp.isfinite(slope).all()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_direction_is_the_gradient_of_the_loss_of_log_pi(batch_size):
    """Of five networks one by one, and two by two with one left over."""
    samples, xs = mlp_samples(classes=5), jax.random.uniform(jax.random.key(1), (3, 6))
    losses = (log_odds, dlr, partial(targeted_dlr, target=4))

    @jax.jit
    def both(x):
        log_pi = lambda x: jnp.log(predictive(mlp, samples, x))  # noqa: E731
        y = log_pi(x).argmax()  # DLR is flat where y is the third
        found = [loss_ascent(mlp, samples, x, y, partial(f, y=y), batch_size) for f in losses]
        return found, [jax.grad(lambda x, f=f: f(log_pi(x), y=y))(x) for f in losses], log_pi(x)

    for x in xs:
        found, expected, log_pi = both(x)
        for (log_probs, direction), gradient in zip(found, expected, strict=True):
            np.testing.assert_allclose(jax.nn.log_softmax(log_probs), log_pi, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(direction, gradient, rtol=1e-4, atol=1e-5)
            assert jnp.abs(gradient).max() > 1e-2


def test_steep_networks_mask_the_gradient_of_the_probability_and_not_these():
    """Logits times 1e3: pi_y is 1 in float32 and its gradient 0; DLR's is as without the factor."""
    w = jax.random.normal(jax.random.key(2), (1, 4, 6))
    plain = {"w": w, "b": jnp.array([[3.0, 0.0, 0.0, 0.0]])}
    steep = jax.tree.map(lambda leaf: 1e3 * leaf, plain)
    x = jnp.full(6, 0.1)
    np.testing.assert_array_equal(
        jax.grad(lambda x: -jnp.log(predictive(linear, steep, x)[0]))(x), 0
    )
    _, expected = loss_ascent(linear, plain, x, 0, partial(dlr, y=0), None)
    assert jnp.abs(expected).max() > 0.1
    for loss, tolerance in ((dlr, 1e-3), (partial(targeted_dlr, target=1), None), (log_odds, None)):
        _, found = loss_ascent(linear, steep, x, 0, partial(loss, y=0), None)
        assert jnp.isfinite(found).all() and jnp.abs(found).max() > 0.1
        if tolerance:
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_a_class_that_is_impossible_has_no_share():
    def apply(params, x):
        return jnp.concatenate([linear(params, x), jnp.array([-jnp.inf])])

    samples = {"w": jax.random.normal(jax.random.key(3), (3, 3, 6)), "b": jnp.zeros((3, 3))}
    _, direction = loss_ascent(apply, samples, jnp.full(6, 0.1), 0, partial(log_odds, y=0), None)
    _, expected = loss_ascent(linear, samples, jnp.full(6, 0.1), 0, partial(log_odds, y=0), None)
    np.testing.assert_allclose(direction, expected, rtol=1e-5, atol=1e-6)
