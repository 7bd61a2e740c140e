"""Full covariance over some leaves: draws, density and KL are the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bnncert import prior as priors
from bnncert.posterior import Gaussian, MeanField
from tests.posterior import dense

LAST = ("last/bias", "last/kernel")
SIZE = 6


@pytest.fixture
def gaussian():
    loc = {
        "first": jnp.array([7.0, 8.0]),
        "last": {"bias": jnp.array([0.5, -1.0]), "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])},
    }
    factor = 0.4 * np.random.default_rng(0).normal(size=(SIZE, SIZE))
    tril = np.linalg.cholesky(factor @ factor.T + 0.1 * np.eye(SIZE))
    return Gaussian(loc, jnp.float32(tril), LAST)


def moments(q):
    mean = dense.flat(q.loc["last"], ("bias", "kernel"))
    tril = np.asarray(q.scale_tril, np.float64)
    return mean, tril @ tril.T


def test_draws_have_the_stated_covariance_across_leaves(gaussian):
    draws = jax.jit(gaussian.sample, static_argnums=1)(jax.random.key(0), 20_000)
    last = draws["last"]
    vectors = np.concatenate([last["bias"], last["kernel"].reshape(-1, 4)], axis=1)
    dense.check_moments(np.float64(vectors), *moments(gaussian))
    np.testing.assert_array_equal(draws["first"], np.tile([7.0, 8.0], (20_000, 1)))


def test_more_draws_extend_fewer(gaussian):
    few, many = (gaussian.sample(jax.random.key(1), n)["last"]["kernel"] for n in (3, 8))
    np.testing.assert_allclose(few, many[:3], rtol=1e-6)


def test_log_prob_is_the_dense_density(gaussian):
    params = jax.tree.map(lambda leaf: leaf + 0.3, gaussian.loc)
    x = dense.flat(params["last"], ("bias", "kernel"))
    expected = dense.log_density(x, *moments(gaussian))
    np.testing.assert_allclose(jax.jit(gaussian.log_prob)(params), expected, rtol=1e-4)


def test_kl_is_the_dense_kl(gaussian):
    prior = priors.normal(gaussian.loc, 1.3, where=lambda name: name in LAST)
    expected = dense.kl_to_normal(*moments(gaussian), 1.3)
    np.testing.assert_allclose(gaussian.kl(prior), expected, rtol=1e-5)
    itself = Gaussian(jax.tree.map(jnp.zeros_like, gaussian.loc), 1.3 * jnp.eye(SIZE), LAST)
    np.testing.assert_allclose(itself.kl(prior), 0.0, atol=1e-5)


def test_a_diagonal_factor_is_mean_field(gaussian):
    scale = jax.tree.map(lambda leaf: 0.1 * (1 + jnp.abs(leaf)), gaussian.loc["last"])
    mean_field = MeanField(gaussian.loc, {"first": None, "last": scale})
    tril = jnp.diag(jnp.float32(dense.flat(scale, ("bias", "kernel"))))
    q = Gaussian(gaussian.loc, tril, LAST)
    prior = priors.normal(q.loc, 0.8, where=lambda name: name in LAST)
    np.testing.assert_allclose(q.kl(prior), mean_field.kl(prior), rtol=1e-5)
    np.testing.assert_allclose(q.log_prob(q.loc), mean_field.log_prob(q.loc), rtol=1e-5)
    for ours, theirs in zip(q.moments(), mean_field.moments(), strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_allclose, ours, theirs)


def test_it_passes_through_transformations(gaussian):
    """Names are static: a stack of Gaussians has a leading axis on the arrays alone."""
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), gaussian)
    found = jax.vmap(lambda q: q.log_prob(gaussian.loc))(two)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, gaussian)
    expected = [gaussian.log_prob(gaussian.loc), doubled.log_prob(gaussian.loc)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bad_fields(gaussian):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"no leaf named \['nowhere'\]"):
        Gaussian(gaussian.loc, gaussian.scale_tril, ("nowhere",)).sample(key, 1)
    with pytest.raises(ValueError, match=r"shape \(6, 6\), but the leaves .* hold 2 weights"):
        Gaussian(gaussian.loc, gaussian.scale_tril, ("first",)).sample(key, 1)
    prior = priors.normal(gaussian.loc, 1.0, where=lambda name: name == "first")
    with pytest.raises(ValueError, match=r"only the prior is in \['first'\]"):
        gaussian.kl(prior)
    cauchy = dist.Cauchy(jnp.zeros(2), 1.0)
    kernel = dist.Normal(0.0, 1.0).expand((2, 2))
    with pytest.raises(NotImplementedError, match="'last/bias' is a Cauchy"):
        gaussian.kl({"first": None, "last": {"bias": cauchy, "kernel": kernel}})
