"""Expected softmax from bounds linear in the weights: quadrature, draws, and the other method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.certify import expectation
from bnncert.certify.formal.expected_softmax import _least_softmax
from bnncert.posterior import LowRank, MeanField
from bnncert.sets import Box, ball

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_exact_expectations_lie_inside(scale, eps):
    """Logits (w x, 0, 0.2 - w x), one random weight: the expectation is a sum over nodes."""
    posterior = MeanField({"w": jnp.array([1.5])}, {"w": jnp.array([scale])})

    def apply(params, x):
        y = params["w"] * x
        return jnp.concatenate([y, jnp.zeros(1), 0.2 - y])

    found = expectation(apply, posterior, ball(jnp.array([0.8]), eps), method="linear")
    w = 1.5 + scale * NODES[:, None]
    x = 0.8 + eps * np.linspace(-1, 1, 31)
    logits = np.stack(np.broadcast_arrays(w * x, 0.0, 0.2 - w * x), -1)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    exact = (WEIGHTS[:, None, None] * softmax).sum(0)
    box = found.probabilities
    assert (box.lower <= exact.min(0) + 1e-6).all()
    assert (exact.max(0) - 1e-6 <= box.upper).all()
    assert (found.outputs.lower == -np.inf).all() and (found.deviation == np.inf).all()
    if scale == 0.05 and eps == 0:
        assert box.lower[0] > exact[0, 0] - 0.04


def deep(params, x):
    h = jnp.tanh(params["w1"] @ x)
    return params["w2"] @ jax.nn.gelu(h)


def small_posterior(scale):
    keys = jax.random.split(jax.random.key(0))
    loc = {
        "w1": jax.random.normal(keys[0], (6, 4)) / 2,
        "w2": jax.random.normal(keys[1], (3, 6)),
    }
    return MeanField(loc, jax.tree.map(lambda v: jnp.full_like(v, scale), loc))


@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_no_point_of_the_set_is_outside_in_expectation(scale):
    """Twenty thousand draws at corners: the mean is off by less than 5 standard errors."""
    posterior = small_posterior(scale)
    x, eps = jnp.array([0.5, -0.3, 0.8, 0.1]), 0.05
    box = expectation(deep, posterior, ball(x, eps), method="linear").probabilities
    corners = x + eps * (2.0 * jax.random.bernoulli(jax.random.key(1), 0.5, (8, 4)) - 1)
    samples = posterior.sample(jax.random.key(2), 20_000)
    drawn = jax.jit(jax.vmap(lambda x: jax.vmap(lambda p: jax.nn.softmax(deep(p, x)))(samples)))(
        corners
    )
    mean, error = drawn.mean(1), 5 * drawn.std(1) / 20_000**0.5
    assert (box.lower <= mean + error).all() and (mean - error <= box.upper).all()
    assert (box.upper - box.lower < 1 - 1e-3).all()


def test_both_methods_are_intersected_and_one_program_maps():
    posterior = MeanField({"w": jnp.array([[2.0], [-2.0]])}, {"w": jnp.full((2, 1), 0.1)})

    def apply(params, x):
        return jax.nn.relu(params["w"] @ x)

    def found(x, method):
        return expectation(apply, posterior, ball(x, 0.2), method=method)

    xs = jnp.array([[1.0], [0.5]])
    moments, linear, both, listed = (
        jax.jit(jax.vmap(lambda x, m=method: found(x, m)))(xs)
        for method in ("moments", "linear", ("linear", "moments"), ["moments"])
    )
    lower = jnp.maximum(moments.probabilities.lower, linear.probabilities.lower)
    np.testing.assert_allclose(both.probabilities.lower, lower, rtol=1e-6)
    np.testing.assert_allclose(both.outputs.lower, moments.outputs.lower, rtol=1e-6)
    assert (listed.probabilities.lower == moments.probabilities.lower).all()
    one = found(xs[0], "linear")
    np.testing.assert_allclose(one.probabilities.lower, linear.probabilities.lower[0], rtol=1e-5)


def test_correlated_weights_are_bounded_too():
    """Two weights that move together: logits w1 x and w2 x, whose difference does not move."""
    loc = {"w": jnp.array([1.0, -1.0])}
    together = LowRank(loc, {"w": jnp.full(2, 0.01)}, {"w": jnp.full((1, 2), 1.0)})
    apart = MeanField(loc, {"w": jnp.full(2, 1.0)})
    point = Box(jnp.ones(1), jnp.ones(1))

    def lower(q):
        found = expectation(lambda p, x: p["w"] * x, q, point, method="linear")
        return float(found.probabilities.lower[0])

    assert 0.87 < lower(together) < 0.881  # sigma(2) = .8808
    assert lower(apart) < 0.8


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_formats_are_summed_in_float32(dtype):
    means, spreads = jnp.array([[9.0]], dtype), jnp.array([[1e-3]], dtype)
    found = _least_softmax(means, spreads, 1e-3)
    assert 0.99 < float(found[0]) <= 1 / (1 + np.exp(-9.0)) - 1e-3


def test_wrong_arguments_name_the_way_out():
    posterior, point = small_posterior(0.1), ball(jnp.ones(4), 0.1)
    with pytest.raises(ValueError, match="method = 'crown': choose one of 'moments', 'linear'"):
        expectation(deep, posterior, point, method="crown")
    with pytest.raises(ValueError, match=r"method = \(\)"):
        expectation(deep, posterior, point, method=())
    with pytest.raises(ValueError, match=r"one of each class; its value has shape \(1,\)"):
        expectation(lambda p, x: deep(p, x)[:1], posterior, point, method="linear")
