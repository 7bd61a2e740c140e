import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.margins import all_margin_bounds, margin_bounds
from bnncert.sets import Box, ball

CLASSES = 4


def network(params, x):
    inner, outer = params
    return outer @ jax.nn.relu(inner @ x)


def against(logits, c):
    return logits - logits[c]


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.random.normal(keys[0], (6, 5)), jax.random.normal(keys[1], (CLASSES, 6))
    return params, ball(jax.random.normal(keys[2], (5,)), 0.1)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_rows_and_pairs_bound_the_same_margins(problem, method: str) -> None:
    params, region = problem
    every = all_margin_bounds(network, method)(params, region)
    assert every.lower.shape == (CLASSES, CLASSES)
    for c in range(CLASSES):
        box = margin_bounds(network, method)(params, region, jnp.asarray(c))
        direct = bound(lambda x, c=c: against(network(params, x), c), method)(region)
        for found in (box, Box(every.lower[c], every.upper[c])):
            np.testing.assert_allclose(found.lower, direct.lower, atol=1e-5)
            np.testing.assert_allclose(found.upper, direct.upper, atol=1e-5)
        assert float(box.lower[c]) == 0.0 == float(box.upper[c])


def test_margins_hold_at_points_and_beat_differences_of_logits(problem) -> None:
    params, region = problem
    every = all_margin_bounds(network, "ibp")(params, region)
    logits = bound(lambda x: network(params, x), "ibp")(region)
    apart = logits.upper[None, :] - logits.lower[:, None]
    assert jnp.all(every.upper <= apart + 1e-5) and jnp.any(every.upper < apart - 0.05)
    points = jax.random.uniform(
        jax.random.key(1), (2000, 5), minval=region.lower, maxval=region.upper
    )
    values = jax.vmap(lambda x: network(params, x))(points)
    margins = values[:, None, :] - values[:, :, None]
    assert jnp.all(margins <= every.upper + 1e-5) and jnp.all(margins >= every.lower - 1e-5)


def test_a_batch_of_classes(problem) -> None:
    params, region = problem
    bounded = margin_bounds(network, "ibp")
    batch = jax.vmap(lambda c: bounded(params, region, c))(jnp.arange(CLASSES))
    every = all_margin_bounds(network, "ibp")(params, region)
    np.testing.assert_array_equal(batch.upper, every.upper)


def test_overflow_leaves_the_class_itself_at_zero() -> None:
    def steep(params, x):
        return params @ jnp.exp(1000.0 * x)

    region = Box(jnp.zeros(2), jnp.ones(2))
    box = margin_bounds(steep, "crown-ibp")(jnp.eye(2), region, jnp.asarray(0))
    assert float(box.upper[0]) == 0.0 == float(box.lower[0]) and not jnp.isnan(box.upper).any()
