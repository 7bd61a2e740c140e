"""Priors as pytrees of NumPyro distributions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax.scipy import stats

from bnncert import prior as priors


@pytest.fixture
def params():
    return {
        "dense": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.arange(2.0)},
        "scale": jnp.array(2.0),
        "step": jnp.array(7),
    }


def kernels(name):
    return name.endswith("kernel")


def test_names_follow_the_tree_and_leave_integers_out(params):
    assert priors.names(priors.normal(params, 0.1)) == ("dense/bias", "dense/kernel", "scale")
    assert priors.names(priors.normal(params, 0.1, where=kernels)) == ("dense/kernel",)


def test_names_serve_other_containers():
    tree = [jnp.zeros(2), (jnp.zeros(1), None)]
    assert priors.names(priors.normal(tree)) == ("0", "1/0")


def test_log_prob_is_the_sum_over_the_random_weights_only(params):
    prior = priors.normal(params, 0.3, where=lambda name: name != "scale")
    expected = sum(
        stats.norm.logpdf(leaf, 0.0, 0.3).sum() for leaf in jax.tree.leaves(params["dense"])
    )
    np.testing.assert_allclose(priors.log_prob(prior, params), expected, rtol=1e-6)
    gradient = jax.grad(lambda s: priors.log_prob(prior, params | {"scale": s}))(2.0)
    assert gradient == 0


def test_log_prob_of_a_mixed_prior(params):
    prior = {
        "dense": {
            "kernel": dist.Laplace(0.0, 1.0).expand((3, 2)),  # event_dim 0: summed all the same
            "bias": dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
        },
        "scale": dist.LogNormal(0.0, 1.0),
        "step": None,
    }
    expected = (
        6 * stats.laplace.logpdf(0.5)
        + stats.norm.logpdf(params["dense"]["bias"]).sum()
        + stats.norm.logpdf(jnp.log(2.0))
        - jnp.log(2.0)
    )
    np.testing.assert_allclose(priors.log_prob(prior, params), expected, rtol=1e-6)
    assert priors.names(prior) == ("dense/bias", "dense/kernel", "scale")


def test_sample_keeps_deterministic_leaves_and_draws_the_others_independently(params):
    params = {"a": jnp.zeros(4000), "b": jnp.zeros(4000), "fixed": jnp.arange(3.0)}
    prior = priors.normal(params, 0.5, where=lambda name: name != "fixed")
    draw = priors.sample(jax.random.key(0), prior, params)
    np.testing.assert_array_equal(draw["fixed"], params["fixed"])
    for name in ("a", "b"):  # 4,000 draws: standard errors .008 and .006
        assert abs(draw[name].mean()) < 0.04 and abs(draw[name].std() - 0.5) < 0.03
    assert abs(jnp.corrcoef(draw["a"], draw["b"])[0, 1]) < 0.08


def test_sample_keeps_structure_shapes_and_dtypes(params):
    params["dense"]["bias"] = params["dense"]["bias"].astype(jnp.bfloat16)
    draw = jax.jit(priors.sample)(jax.random.key(1), priors.normal(params, 1.0), params)
    assert jax.tree.structure(draw) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), draw) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    assert draw["step"] == 7


def test_replace_puts_sites_back(params):
    new = priors.replace(params, {"dense/bias": jnp.full(2, 9.0)})
    np.testing.assert_array_equal(new["dense"]["bias"], 9.0)
    np.testing.assert_array_equal(new["dense"]["kernel"], params["dense"]["kernel"])
    assert jax.tree.structure(new) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"no leaf named \['dense/bais'\]"):
        priors.replace(params, {"dense/bais": jnp.zeros(2)})


def test_a_scale_may_be_traced(params):
    def density(scale):
        return priors.log_prob(priors.normal(params, scale, where=kernels), params)

    # d/ds sum log N(w; 0, s^2) = sum w^2 / s^3 - n / s, at w = 1/2, s = 1, n = 6
    np.testing.assert_allclose(jax.jit(jax.grad(density))(1.0), 6 * 0.25 - 6, rtol=1e-6)


def test_a_shape_mismatch_names_the_leaf_and_both_shapes(params):
    prior = priors.normal(params, 1.0)
    prior["dense"]["kernel"] = dist.Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"'dense/kernel' has shape \(\).*\(3, 2\).*expand"):
        priors.log_prob(prior, params)


def test_a_structure_mismatch_names_the_leaves(params):
    prior = priors.normal(params, 1.0)
    del prior["scale"]
    with pytest.raises(ValueError, match=r"only the params have \['scale'\]"):
        priors.sample(jax.random.key(0), prior, params)


def test_a_prior_over_an_absent_leaf_is_an_error():
    with pytest.raises(ValueError, match="'w' has a prior, but the params hold None"):
        priors.check({"w": dist.Normal(0.0, 1.0)}, {"w": None})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_scale_is_an_error(params, scale):
    with pytest.raises(ValueError, match="positive and finite, got"):
        priors.normal(params, scale)


def test_a_prior_without_a_random_leaf_is_an_error(params):
    with pytest.raises(ValueError, match=r"no leaf is random.*dense/kernel"):
        priors.normal(params, where=lambda name: False)


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
        priors.normal({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})


# --- what is no weight ----------------------------------------------------------------------------

X = jnp.array([0.3, -0.2])
KEY = jax.random.key(0)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.BatchNorm(use_running_average=True)(linen.Dense(4)(x)))


class Own(nnx.BatchStat):
    """Statistics of a layer of the user's own."""


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout, self.own = nnx.Dropout(0.5, rngs=rngs), Own(jnp.ones(4))


def equinox():
    made = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    norm, state = made(2, "batch", mode="batch")
    return {"net": eqx.filter(norm, eqx.is_inexact_array), "state": state}


WITH_STATE = {
    "linen": (lambda: Linen().init(KEY, X), 6),
    "linen, inside another": (lambda: {"encoder": Linen().init(KEY, X)}, 6),
    "nnx": (lambda: nnx.split(Nnx(nnx.Rngs(0)))[1], 4),
    "nnx, a pytree of its own": (lambda: nnx.state(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), 2),
    "equinox": (equinox, 2),
    "equinox, without its state apart": (
        lambda: eqx.filter(eqx.nn.BatchNorm(2, "batch", mode="batch"), eqx.is_array), 2
    ),
    "keys and counters": (
        lambda: {"w": X, "key": KEY, "old": jax.random.PRNGKey(0), "n": jnp.int32(3)}, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_STATE)
def test_running_statistics_counters_and_keys_are_deterministic(name):
    make, count = WITH_STATE[name]
    params = make()
    prior = priors.normal(params, 0.1)
    assert len(priors.names(prior)) == count, priors.names(prior)
    priors.check(prior, params)
    draw = priors.named(priors.sample(KEY, prior, params))
    for leaf, before in priors.named(params).items():
        if leaf not in priors.names(prior) and before is not None:
            assert draw[leaf] is before


def test_statistics_of_ones_own_are_chosen_by_path():
    params = {"w": X, "running": {"mean": X}}
    prior = priors.normal(params, where=lambda name: not name.startswith("running/"))
    assert priors.names(prior) == ("w",)
