"""One number for the width of a posterior of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.posterior import Gaussian, LowRank, MeanField, Mixture, Samples, spread, stack


@pytest.fixture
def mean_field():
    return MeanField(
        loc={"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([4.0, 5.0])},
        scale={"kernel": jnp.array([[0.1, 0.2], [0.3, 0.4]]), "bias": None},
    )


@pytest.fixture
def samples():
    return Samples(stack([{"w": jnp.full(3, float(i)), "b": jnp.ones(())} for i in range(5)]))


def test_spread_is_the_ratio_of_medians_over_random_leaves(mean_field):
    # sds .1 .2 .3 .4 over |loc| .5 1 2 3: the bias, fixed, is left out
    np.testing.assert_allclose(spread(mean_field), 0.25 / 1.5, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(spread)(mean_field), 0.25 / 1.5, rtol=1e-6)
    fixed = MeanField(mean_field.loc, {"kernel": None, "bias": None})
    assert spread(fixed) == 0


def test_spread_of_samples_nears_that_of_their_source(mean_field, samples):
    drawn = Samples(mean_field.sample(jax.random.key(4), 4000))
    np.testing.assert_allclose(spread(drawn), spread(mean_field), rtol=0.05)
    # 0..4: deviation sqrt(2.5), mean 2; the constant b is left out
    np.testing.assert_allclose(spread(samples), np.sqrt(2.5) / 2, rtol=1e-6)
    assert spread(Samples(mean_field.sample(jax.random.key(5), 1))) == 0


def test_spread_of_each_kind_is_that_of_its_draws(mean_field):
    loc, scale = mean_field.loc, mean_field.scale
    columns = {"kernel": jnp.stack([0.2 * loc["kernel"], jnp.ones((2, 2))]), "bias": None}
    factor = jnp.diag(scale["kernel"].ravel()) + jnp.tril(jnp.full((4, 4), 0.1))
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), mean_field)
    # one bias for both: it stays deterministic
    two = MeanField(two.loc | {"bias": jnp.ones((2, 2))}, two.scale)
    for q in (LowRank(loc, scale, columns), Gaussian(loc, factor, ("kernel",)), Mixture(two)):
        drawn = Samples(jax.jit(q.sample, static_argnums=1)(jax.random.key(4), 4000))
        np.testing.assert_allclose(spread(drawn), spread(q), rtol=0.05)
        np.testing.assert_allclose(jax.jit(spread)(q), spread(q), rtol=1e-6)
