"""The discrete measure: which members are drawn, and what their probability is."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bnncert import prior as priors
from bnncert.posterior import Samples, stack


@pytest.fixture
def samples():
    return Samples(stack([{"w": jnp.full(3, float(i)), "b": jnp.ones(())} for i in range(5)]))


def test_samples_are_drawn_without_replacement_and_all_of_them_as_stored(samples):
    everything = samples.sample(jax.random.key(0), 5)
    np.testing.assert_array_equal(everything["w"], samples.params["w"])
    drawn = jax.vmap(lambda key: samples.sample(key, 2)["w"][:, 0])(
        jax.random.split(jax.random.key(1), 2000)
    )
    assert (drawn[:, 0] < drawn[:, 1]).all()
    frequency = jnp.bincount(drawn.ravel().astype(int), length=5) / 4000
    np.testing.assert_allclose(frequency, 0.2, atol=0.035)  # five standard errors


def test_samples_refuse_more_members_than_they_hold(samples):
    with pytest.raises(ValueError, match="draw 6 different members from 5"):
        samples.sample(jax.random.key(0), 6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        samples.sample(jax.random.key(0), 0)


def test_samples_log_prob_is_the_log_fraction_of_equal_members(samples):
    member = {"w": jnp.full(3, 2.0), "b": jnp.ones(())}
    np.testing.assert_allclose(samples.log_prob(member), np.log(1 / 5), rtol=1e-6)
    assert samples.log_prob(member | {"b": jnp.zeros(())}) == -jnp.inf
    twice = Samples(stack([member, member, member | {"b": jnp.zeros(())}]))
    np.testing.assert_allclose(twice.log_prob(member), np.log(2 / 3), rtol=1e-6)


def test_samples_have_no_finite_kl_to_a_density(samples):
    member = jax.tree.map(lambda leaf: leaf[0], samples.params)
    assert samples.kl(priors.normal(member, 1.0)) == jnp.inf
    assert samples.kl({"w": None, "b": None}) == 0
    with pytest.raises(ValueError, match=r"'w' has shape \(5, 3\).*\(3,\)"):
        samples.kl({"w": dist.Normal(0.0, 1.0).expand((5, 3)), "b": None})


def test_stack_is_the_inverse_of_indexing(samples):
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], samples.params) for i in range(5)]
    np.testing.assert_array_equal(stack(members)["w"], samples.params["w"])
    assert samples.num_samples == 5
    with pytest.raises(ValueError, match="empty list"):
        stack([])
