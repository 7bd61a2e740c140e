"""The factorised normal: moments of its draws, density and KL against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy import stats

from bnncert import prior as priors
from bnncert.posterior import MeanField


@pytest.fixture
def mean_field():
    return MeanField(
        loc={"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([4.0, 5.0])},
        scale={"kernel": jnp.array([[0.1, 0.2], [0.3, 0.4]]), "bias": None},
    )


def kernels(name):
    return name == "kernel"


def test_mean_field_draws_have_its_moments_and_repeat_deterministic_leaves(mean_field):
    draws = mean_field.sample(jax.random.key(0), 4000)
    scale = mean_field.scale["kernel"]
    error = jnp.abs(draws["kernel"].mean(axis=0) - mean_field.loc["kernel"])
    assert (error < 5 * scale / jnp.sqrt(4000)).all()
    np.testing.assert_allclose(draws["kernel"].std(axis=0), scale, rtol=0.06)
    np.testing.assert_array_equal(draws["bias"], np.tile([4.0, 5.0], (4000, 1)))


def test_more_draws_extend_fewer(mean_field):
    key = jax.random.key(1)
    few, many = mean_field.sample(key, 3), mean_field.sample(key, 8)
    np.testing.assert_array_equal(few["kernel"], many["kernel"][:3])
    other = mean_field.sample(jax.random.key(2), 3)
    assert (other["kernel"] != few["kernel"]).all()
    assert len(np.unique(np.asarray(many["kernel"]))) == many["kernel"].size


def test_mean_field_log_prob_is_that_of_its_normals(mean_field):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    expected = stats.norm.logpdf(
        params["kernel"], mean_field.loc["kernel"], mean_field.scale["kernel"]
    ).sum()
    np.testing.assert_allclose(mean_field.log_prob(params), expected, rtol=1e-6)


def test_kl_to_the_prior_itself_is_zero():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    q = MeanField(params, jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.7), params))
    np.testing.assert_allclose(q.kl(priors.normal(params, 0.7)), 0.0, atol=1e-6)


def test_kl_is_the_textbook_sum_over_weights(mean_field):
    loc, scale, s = mean_field.loc["kernel"], mean_field.scale["kernel"], 0.5
    expected = (jnp.log(s / scale) + (scale**2 + loc**2) / (2 * s**2) - 0.5).sum()
    prior = priors.normal(mean_field.loc, s, where=kernels)
    np.testing.assert_allclose(mean_field.kl(prior), expected, rtol=1e-6)
    # the same prior, not declared as one event
    loose = {"kernel": dist.Normal(0.0, s).expand((2, 2)), "bias": None}
    np.testing.assert_allclose(mean_field.kl(loose), expected, rtol=1e-6)


def test_kl_is_the_expected_difference_of_the_densities(mean_field):
    """Ties kl, sample, log_prob and the prior's log_prob together: 4,000 draws."""
    prior = priors.normal(mean_field.loc, 2.0, where=kernels)

    def difference(params):
        return mean_field.log_prob(params) - priors.log_prob(prior, params)

    values = jax.vmap(difference)(mean_field.sample(jax.random.key(3), 4000))
    standard_error = values.std() / jnp.sqrt(4000)
    assert abs(values.mean() - mean_field.kl(prior)) < 5 * standard_error


def test_kl_refuses_a_prior_on_other_leaves(mean_field):
    with pytest.raises(ValueError, match=r"only the prior is in \['bias'\]"):
        mean_field.kl(priors.normal(mean_field.loc, 1.0))
    other = priors.normal(mean_field.loc, 1.0, where=lambda name: name == "bias")
    with pytest.raises(ValueError, match=r"only the posterior is in \['kernel'\]"):
        mean_field.kl(other)


def test_mean_field_refuses_scales_of_another_structure():
    q = MeanField({"a": jnp.zeros(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"scale must have loc's structure.*\['a', 'b'\]"):
        q.sample(jax.random.key(0), 1)


def test_posteriors_pass_through_transformations(mean_field):
    prior = priors.normal(mean_field.loc, 0.5, where=kernels)
    gradient = jax.jit(jax.grad(lambda q: q.kl(prior)))(mean_field)
    assert isinstance(gradient, MeanField) and gradient.scale["bias"] is None
    np.testing.assert_allclose(gradient.loc["kernel"], mean_field.loc["kernel"] / 0.25, rtol=1e-5)
    np.testing.assert_array_equal(gradient.loc["bias"], 0.0)

    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), mean_field)
    kls = jax.vmap(lambda q: q.kl(prior))(several)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, mean_field)
    np.testing.assert_allclose(kls, [mean_field.kl(prior), doubled.kl(prior)], rtol=1e-6)
