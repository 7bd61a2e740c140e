"""An equal-weight mixture: its density, how its draws are shared out, its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import stats

from bnncert import prior as priors
from bnncert.posterior import Gaussian, LowRank, MeanField, Mixture

CENTERS = jnp.array([-20.0, 0.0, 20.0])  # far apart: a draw tells its member
KEYS = jax.random.split(jax.random.key(3), 400)


sample = jax.jit(lambda q, key, n: q.sample(key, n), static_argnums=2)


@pytest.fixture(scope="module")
def mixture():
    """Three mean fields over "w", each with a deterministic "b" of its own."""
    loc = {"w": CENTERS[:, None] + jnp.zeros((3, 2)), "b": jnp.arange(3.0)[:, None]}
    scale = {"w": jnp.array([0.5, 1.0, 1.5])[:, None] * jnp.ones((3, 2)), "b": None}
    return Mixture(MeanField(loc, scale))


@pytest.fixture(scope="module")
def many(mixture):
    return sample(mixture, jax.random.key(0), 12_000)


def members(draws):
    return jnp.argmin(jnp.abs(draws["w"][..., :1] - CENTERS), axis=-1)


def test_draws_are_shared_out_evenly(mixture):
    """Seven draws of three members: two rounds of all, and one that any of them may give."""
    draws = jax.jit(jax.vmap(lambda key: mixture.sample(key, 7)))(KEYS)
    whose = members(draws)
    np.testing.assert_array_equal(np.sort(whose[:, :3]), np.tile([0, 1, 2], (len(KEYS), 1)))
    np.testing.assert_array_equal(np.sort(whose[:, 3:6]), np.tile([0, 1, 2], (len(KEYS), 1)))
    np.testing.assert_array_equal(draws["b"][..., 0], whose)  # a draw is of one member
    # each draw is one from q: every place is equally often each member's (5 standard errors)
    frequency = jax.nn.one_hot(whose, 3).mean(axis=0)
    np.testing.assert_allclose(frequency, 1 / 3, atol=5 * np.sqrt(2 / 9 / len(KEYS)))


def test_draws_of_a_member_are_its_own(many):
    for k, scale in enumerate((0.5, 1.0, 1.5)):
        mine = np.asarray(many["w"])[np.asarray(members(many)) == k]
        assert len(mine) == 4000 and len(np.unique(mine, axis=0)) == 4000
        error = np.abs(mine.mean(axis=0) - np.asarray(CENTERS)[k])
        assert (error < 5 * scale / np.sqrt(4000)).all()
        np.testing.assert_allclose(mine.std(axis=0), scale, rtol=0.06)


def test_more_draws_extend_fewer(mixture, many):
    for n in (2, 4):  # fewer than there are members, and more
        np.testing.assert_array_equal(sample(mixture, jax.random.key(0), n)["w"], many["w"][:n])


def test_log_prob_is_that_of_the_mean_density(mixture):
    params = {"w": jnp.array([4.0, 5.5]), "b": jnp.zeros(1)}
    scales = jnp.array([0.5, 1.0, 1.5])
    densities = stats.norm.pdf(params["w"], CENTERS[:, None], scales[:, None]).prod(axis=1)
    np.testing.assert_allclose(mixture.log_prob(params), jnp.log(densities.mean()), rtol=1e-5)
    far = params | {"w": jnp.full(2, 1e3)}  # densities that underflow
    assert jnp.isfinite(mixture.log_prob(far))


def test_equal_members_are_one_of_them(mixture):
    one = jax.tree.map(lambda leaf: leaf[1], mixture.members)
    same = Mixture(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), one))
    params = {"w": jnp.array([0.3, -0.8]), "b": jnp.ones(1)}
    np.testing.assert_allclose(same.log_prob(params), one.log_prob(params), rtol=1e-6)
    for ours, theirs in zip(same.moments(), one.moments(), strict=True):
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)
    assert (same.moments()[1]["b"] == 0).all()


def test_moments_are_those_of_its_draws(mixture, many):
    mean, deviation = mixture.moments()
    np.testing.assert_allclose(mean["w"], 0.0, atol=1e-5)
    total = np.sqrt((0.25 + 1 + 2.25) / 3 + 800 / 3)
    np.testing.assert_allclose(deviation["w"], total, rtol=1e-6)
    np.testing.assert_allclose(deviation["b"], np.std([0, 1, 2]), rtol=1e-6)
    np.testing.assert_allclose(many["w"].std(axis=0), total, rtol=0.02)


def test_members_may_be_of_any_kind():
    loc = {"w": jnp.array([[0.0, 1.0], [2.0, 3.0]])}
    scale = {"w": jnp.full((2, 2), 0.5)}
    expected = Mixture(MeanField(loc, scale))
    low_rank = Mixture(LowRank(loc, scale, {"w": jnp.zeros((2, 3, 2))}))
    gaussian = Mixture(Gaussian(loc, jnp.stack([0.5 * jnp.eye(2)] * 2), ("w",)))
    params = {"w": jnp.array([0.7, 1.9])}
    for q in (low_rank, gaussian):
        np.testing.assert_allclose(q.log_prob(params), expected.log_prob(params), rtol=1e-5)
        draws = sample(q, jax.random.key(0), 4000)["w"]
        np.testing.assert_allclose(draws.mean(axis=0), [1.0, 2.0], atol=5 * 0.5 / np.sqrt(4000))


def test_kl_has_no_closed_form(mixture):
    prior = priors.normal({"w": jnp.zeros(2), "b": jnp.zeros(1)}, 1.0)
    with pytest.raises(NotImplementedError, match=r"no closed form.*over draws"):
        mixture.kl(prior)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mixture.sample(jax.random.key(0), 0)
