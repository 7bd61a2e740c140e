"""Diagonal plus low rank: the same numbers as the dense normal of that covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bnncert import prior as priors
from bnncert.posterior import LowRank, MeanField
from tests.posterior import dense

RANDOM = ("kernel", "last")  # in the order of the tree's leaves


@pytest.fixture
def low_rank():
    keys = jax.random.split(jax.random.key(7))
    return LowRank(
        loc={
            "kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
            "bias": jnp.array([4.0, 5.0]),
            "last": jnp.array([0.3]),
        },
        scale={
            "kernel": jnp.array([[0.1, 0.2], [0.3, 0.4]]),
            "bias": None,
            "last": jnp.array([0.5]),
        },
        deviations={
            "kernel": 0.5 * jax.random.normal(keys[0], (3, 2, 2)),
            "bias": None,
            "last": jax.random.normal(keys[1], (3, 1)),
        },
    )


def moments(q):
    """Mean and covariance by hand."""
    columns = np.stack(
        [
            dense.flat({n: q.deviations[n][k] for n in RANDOM}, RANDOM)
            for k in range(len(q.deviations["last"]))
        ]
    )
    scale = dense.flat(q.scale, RANDOM)
    return dense.flat(q.loc, RANDOM), np.diag(scale**2) + columns.T @ columns


def prior(q, scale=0.8):
    return priors.normal(q.loc, scale, where=lambda name: name != "bias")


def test_draws_have_the_stated_covariance_across_leaves(low_rank):
    draws = jax.jit(low_rank.sample, static_argnums=1)(jax.random.key(0), 20_000)
    vectors = np.concatenate([draws["kernel"].reshape(-1, 4), draws["last"]], axis=1)
    mean, covariance = moments(low_rank)
    assert np.abs(covariance[:4, 4]).max() > 0.1  # leaves share the factors
    dense.check_moments(np.float64(vectors), mean, covariance)
    np.testing.assert_array_equal(draws["bias"], np.tile([4.0, 5.0], (20_000, 1)))


def test_more_draws_extend_fewer(low_rank):
    few, many = (low_rank.sample(jax.random.key(1), n) for n in (3, 8))
    np.testing.assert_allclose(few["kernel"], many["kernel"][:3], rtol=1e-6)
    assert (low_rank.sample(jax.random.key(2), 3)["kernel"] != few["kernel"]).all()


def test_log_prob_is_the_dense_density(low_rank):
    params = jax.tree.map(lambda leaf: leaf + 0.7, low_rank.loc)
    expected = dense.log_density(dense.flat(params, RANDOM), *moments(low_rank))
    np.testing.assert_allclose(low_rank.log_prob(params), expected, rtol=1e-5)
    other = params | {"bias": jnp.zeros(2)}  # deterministic: not compared
    assert low_rank.log_prob(other) == low_rank.log_prob(params)


def test_kl_is_the_dense_kl(low_rank):
    mean, covariance = moments(low_rank)
    expected = dense.kl_to_normal(mean, covariance, 0.8)
    np.testing.assert_allclose(low_rank.kl(prior(low_rank)), expected, rtol=1e-5)
    # not centred, not declared as one event, another scale a leaf
    loose = {
        "kernel": dist.Normal(0.4, 0.5).expand((2, 2)),
        "bias": None,
        "last": dist.Normal(jnp.zeros(1), 1.5),
    }
    center = np.array([0.4] * 4 + [0.0])
    expected = dense.kl_to_normal(mean, covariance, [0.5] * 4 + [1.5], center)
    np.testing.assert_allclose(low_rank.kl(loose), expected, rtol=1e-5)


def test_without_deviations_it_is_mean_field(low_rank):
    """Factors of zeros, and no factor at all."""
    mean_field = MeanField(low_rank.loc, low_rank.scale)
    expected = mean_field.kl(prior(low_rank)), mean_field.log_prob(low_rank.loc)
    for rank in (2, 0):
        flat = jax.tree.map(lambda s, rank=rank: jnp.zeros((rank, *s.shape)), low_rank.scale)
        q = LowRank(low_rank.loc, low_rank.scale, flat)
        assert q.rank == rank
        found = q.kl(prior(q)), q.log_prob(q.loc)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        spread = q.sample(jax.random.key(0), 4000)["last"].std()
        np.testing.assert_allclose(spread, 0.5, rtol=0.06)


def test_kl_refuses_what_has_no_closed_form(low_rank):
    other = prior(low_rank) | {"last": dist.Laplace(jnp.zeros(1), 1.0)}
    with pytest.raises(NotImplementedError, match=r"'last' is a Laplace.*over draws"):
        low_rank.kl(other)
    with pytest.raises(ValueError, match=r"only the prior is in \['bias'\]"):
        low_rank.kl(priors.normal(low_rank.loc, 1.0))


def test_kl_can_be_descended(low_rank):
    """The gradient in the mean is that of loc^2 / (2 s^2), whatever the covariance."""
    gradient = jax.jit(jax.grad(lambda q: q.kl(prior(low_rank))))(low_rank)
    expected = low_rank.loc["kernel"] / 0.8**2
    np.testing.assert_allclose(gradient.loc["kernel"], expected, rtol=1e-5)
    assert (gradient.deviations["last"] != 0).all() and gradient.scale["bias"] is None


def test_bad_fields(low_rank):
    key = jax.random.key(0)
    half = low_rank.deviations | {"bias": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match="'bias' is deterministic in one of"):
        LowRank(low_rank.loc, low_rank.scale, half).sample(key, 1)
    wrong = low_rank.deviations | {"last": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match=r"'\w+' have shape \([23], .*K = [23]"):
        LowRank(low_rank.loc, low_rank.scale, wrong).log_prob(low_rank.loc)
    with pytest.raises(ValueError, match=r"deviations must have loc's structure.*\['bias'\]"):
        LowRank(low_rank.loc, low_rank.scale, {n: wrong[n] for n in RANDOM}).sample(key, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        low_rank.sample(key, 0)
