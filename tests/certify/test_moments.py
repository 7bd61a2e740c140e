"""Expectation bounds: quadrature for one and two random weights, draws for deeper networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import UnsupportedPrimitiveError
from bnncert.certify import expectation
from bnncert.posterior import LowRank, MeanField
from bnncert.sets import Box, LpBall, ball

KEY = jax.random.key(0)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def encloses(found, outputs, probabilities, atol):
    """Whether the boxes hold values at points of the set, along the leading axis."""
    for box, values in ((found.outputs, outputs), (found.probabilities, probabilities)):
        assert (np.asarray(box.lower) <= values + atol).all()
        assert (values - atol <= np.asarray(box.upper)).all()


# --- by quadrature: two hidden units, two random weights, one input -------------------------------


def plain(params, x):
    return params["v"] @ jax.nn.relu(params["w"] @ x + params["b"]) + params["c"]


@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_exact_expectations_lie_inside(scale, eps, float64):
    """w and one v of `plain` are random; others have a deviation of nearly 0. The gap is small."""
    loc = {
        "w": jnp.array([[1.2], [-0.7]]),
        "b": jnp.array([0.1, 0.3]),
        "v": jnp.array([[1.5, 1.0], [-0.8, 0.5], [0.3, -1.0]]),
        "c": jnp.array([0.0, 0.2, -0.1]),
    }
    deviation = {"w": jnp.array([[scale], [1e-9]]), "b": None, "c": None,
                 "v": jnp.full((3, 2), 1e-9).at[0, 0].set(0.5 * scale)}  # fmt: skip
    found = expectation(plain, MeanField(loc, deviation), ball(jnp.array([0.6]), eps))
    w, v = 1.2 + scale * NODES[:, None], 1.5 + 0.5 * scale * NODES
    xs = 0.6 + eps * np.linspace(-1, 1, 21)
    first = np.maximum(w * xs[:, None, None] + 0.1, 0)
    second = np.maximum(-0.7 * xs + 0.3, 0)[:, None, None]
    logits = np.stack(np.broadcast_arrays(
        v * first + second, -0.8 * first + 0.5 * second + 0.2, 0.3 * first - second - 0.1
    ), -1)  # fmt: skip
    weight = (WEIGHTS[:, None] * WEIGHTS)[..., None]
    mean = (weight * logits).sum((1, 2))
    # the kink of the ReLU is all that the quadrature does not integrate exactly
    encloses(found, mean, (weight * softmax(logits)).sum((1, 2)), atol=0.01 * scale)
    deviations = np.sqrt((weight * logits**2).sum((1, 2)) - mean**2)
    assert (deviations <= np.asarray(found.deviation) + 0.01 * scale).all()
    if eps == 0:  # nothing is lost in the means of one hidden layer, and little in the spread
        np.testing.assert_allclose(found.outputs.lower, found.outputs.upper, atol=1e-8)
        assert (np.asarray(found.deviation) <= 1.1 * deviations.max(0) + 1e-8).all()
    if scale == 0.05:
        gap = found.probabilities.lower - (weight * softmax(logits)).sum((1, 2)).min(0)
        assert float(jnp.abs(gap).max()) < (0.01 if eps == 0 else 0.3)


# --- by draws -------------------------------------------------------------------------------------

IMAGE = (5, 5, 1)


def deep(params, x):
    for layer in params["hidden"]:
        x = jax.nn.relu(layer["w"] @ x + layer["b"])
    return params["out"] @ x


def convolved(params, x):
    """Two convolutions with biases, a pooled sum, a dense layer; and constants on the way."""
    x = (x - 0.4) / 0.5
    for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
        x = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]
        x = jax.nn.relu(x + bias)
    pooled = x.reshape(-1, x.shape[-1]).sum(0) / 25
    return 2.0 * (params["out"] @ pooled)


def with_margins(params, x):
    """A constant matrix after the last layer, and no ReLU before it."""
    return jnp.array([[1.0, -1.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, -2.0]]) @ deep(params, x)


def dense_params(rng, sizes):
    pairs = list(itertools.pairwise(sizes))
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)  # noqa: E731
    hidden = [{"w": normal(b, a), "b": normal(b)} for a, b in pairs[:-1]]
    return {"hidden": hidden, "out": 2 * normal(sizes[-1], sizes[-2])}


def conv_params(rng, _):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)  # noqa: E731
    return {
        "kernels": [normal(3, 3, 1, 3), normal(2, 2, 3, 2)],
        "biases": [normal(3), normal(2)],
        "out": normal(3, 2),
    }


NETWORKS = {
    "linear": (deep, dense_params, (3, 3)),
    "shallow": (deep, dense_params, (3, 8, 3)),
    "deep": (deep, dense_params, (3, 8, 6, 3)),
    "deeper": (deep, dense_params, (3, 6, 6, 6, 3)),
    "margins": (with_margins, dense_params, (3, 8, 3)),
    "convolved": (convolved, conv_params, IMAGE),
}
DRAWS = 60_000


@pytest.mark.parametrize("scale", [0.03, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_monte_carlo_estimates_lie_inside(name, scale):
    """Within five standard errors, at the centre, at random points and at corners."""
    apply, params, size = NETWORKS[name]
    rng = np.random.default_rng(3)
    loc = params(rng, size)
    posterior = MeanField(loc, jax.tree.map(lambda v: scale * (0.1 + jnp.abs(v)), loc))
    shape = size if len(size) == 3 and size == IMAGE else (size[0],)
    x = jnp.asarray(rng.uniform(size=shape), jnp.float32)
    for eps in (0.0, 0.1):
        found = jax.jit(lambda x, e=eps: expectation(apply, posterior, ball(x, e)))(x)
        unit = np.stack([np.zeros(shape), rng.uniform(-1, 1, shape), rng.choice([-1, 1], shape)])
        points = jnp.asarray(np.asarray(x) + 0.999 * eps * unit, jnp.float32)
        draws = posterior.sample(KEY, DRAWS)
        outputs = jax.vmap(lambda p: jax.vmap(lambda w: apply(w, p))(draws))(points)  # noqa: B023
        outputs = np.asarray(outputs, np.float64)
        probabilities = softmax(outputs)
        errors = 5 * max(outputs.std(1).max(), probabilities.std(1).max()) / np.sqrt(DRAWS)
        encloses(found, outputs.mean(1), probabilities.mean(1), atol=errors)
        assert (outputs.std(1) <= 1.03 * np.asarray(found.deviation)).all()
        if (
            scale == 0.03 and eps == 0 and name not in ("deeper", "convolved")
        ):  # and are of use there
            width = np.asarray(found.outputs.upper - found.outputs.lower)
            assert (width <= 0.2 * outputs.std(1)[0] + 1e-3).all()
            assert float(found.probabilities.lower.sum()) > 0.9
        if name in ("linear", "shallow") and eps == 0:
            assert (np.asarray(found.deviation) <= 1.03 * outputs.std(1)[0]).all()


def test_a_point_mass_over_a_point_is_the_network():
    params = dense_params(np.random.default_rng(0), (3, 8, 6, 3))
    posterior = MeanField(params, jax.tree.map(lambda v: jnp.full_like(v, 1e-12), params))
    x = jnp.array([0.2, -0.4, 0.9])
    found = expectation(deep, posterior, Box(x, x))
    logits = deep(params, x)
    for end in (found.outputs.lower, found.outputs.upper):
        np.testing.assert_allclose(end, logits, atol=1e-4)
    # pairs of classes, not all at once
    assert (found.probabilities.upper - found.probabilities.lower < 0.02).all()


def test_an_input_that_skips_the_last_layer():
    """Differences of outputs depend on it too, not at the centre of the set alone."""

    def skipping(params, x):
        return deep(params, x) + 20.0 * x

    params = dense_params(np.random.default_rng(0), (3, 8, 3))
    posterior = MeanField(params, jax.tree.map(lambda v: jnp.full_like(v, 1e-9), params))
    found = expectation(skipping, posterior, ball(jnp.zeros(3), 0.1))
    corners = 0.1 * jnp.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    outputs = np.asarray(jax.vmap(lambda x: skipping(params, x))(corners), np.float64)
    encloses(found, outputs, softmax(outputs), atol=1e-6)


def test_vmap_equals_a_loop_and_balls_lie_in_their_boxes():
    params = dense_params(np.random.default_rng(0), (3, 8, 3))
    posterior = MeanField(params, jax.tree.map(lambda v: 0.1 * jnp.ones_like(v), params))
    xs = jax.random.uniform(KEY, (4, 3))
    many = jax.vmap(lambda x: expectation(deep, posterior, ball(x, 0.1)))(xs)
    for i, x in enumerate(xs):
        one = expectation(deep, posterior, ball(x, 0.1))
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
        inner = expectation(deep, posterior, LpBall(x, jnp.float32(0.1), 2))
        assert (inner.probabilities.lower >= one.probabilities.lower - 1e-6).all()


def test_a_bayesian_last_layer_on_a_fixed_body():
    params = dense_params(np.random.default_rng(0), (3, 8, 3))
    scale = {"hidden": [{"w": None, "b": None}], "out": 0.2 * jnp.ones_like(params["out"])}
    x = jnp.array([0.2, -0.4, 0.9])
    found = expectation(deep, MeanField(params, scale), ball(x, 0.0))
    h = jax.nn.relu(params["hidden"][0]["w"] @ x + params["hidden"][0]["b"])
    np.testing.assert_allclose(found.outputs.lower, params["out"] @ h, atol=1e-4)
    np.testing.assert_allclose(found.deviation, 0.2 * jnp.linalg.norm(h), rtol=1e-3)


SUMMANDS = np.random.default_rng(2).normal(size=1000).astype(np.float32) * 1e4
CANCELLING = {
    "scatter-add": lambda v: v.at[0].add(1e4),
    "scatter-add there and back": lambda v: v.at[0].add(1e4).at[0].add(-1e4),
    "scatter-add, all to one place": lambda v: v.at[jnp.zeros(2000, int)].add(
        np.concatenate([SUMMANDS, -SUMMANDS])
    ),
    "scatter, twice to one place": lambda v: v.at[jnp.array([0, 0])].set(
        np.array([1e4, 3.0], np.float32)
    ),
    "add": lambda v: (v + 1e4) - 1e4,
    "subtract": lambda v: 1e4 - v,
    "divide": lambda v: v / 3.0 * 7.0,
    "concatenate": lambda v: jnp.concatenate([v, np.full(1, 1e4, np.float32)]),
    "gather": lambda v: v.at[jnp.array([0, 2, 7])].get(mode="fill", fill_value=1e4),
    "pad": lambda v: jnp.pad(v, 1, constant_values=1e4),
    "sum": lambda v: (
        jnp.stack([v, np.full(3, 1e4, np.float32), np.full(3, -1e4, np.float32)])
        .reshape(3, 3)
        .sum(0)
    ),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_no_constant_hides_what_is_random(name):
    """Against float64: what a large constant rounds away is not taken for certain."""
    f = CANCELLING[name]
    loc, scale = (
        np.array([1.001, -0.3, 0.0007], np.float32),
        np.array([1e-3, 2e-5, 3e-4], np.float32),
    )
    found = expectation(lambda w, x: f(w * x), MeanField(jnp.array(loc), jnp.array(scale)),
                        Box(jnp.ones(3), jnp.ones(3)))  # fmt: skip
    with jax.enable_x64(True):
        mean = np.asarray(f(jnp.asarray(loc, jnp.float64)))
        slopes = np.asarray(jax.jacfwd(f)(jnp.asarray(loc, jnp.float64)))
    deviation = np.sqrt(np.square(slopes) @ np.square(scale.astype(np.float64)))
    assert (np.asarray(found.deviation, np.float64) >= deviation * (1 - 1e-6)).all()
    encloses(found, mean, softmax(mean), atol=0.0)


def test_a_cast_that_rounds_is_refused():
    """E f is 1.001, and in bfloat16 it is 1."""
    posterior = MeanField(jnp.array([1.001]), jnp.array([0.1]))
    x_set = Box(jnp.ones(1), jnp.ones(1))
    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(
            UnsupportedPrimitiveError, match=r"cast from float32 to .*float16 rounds"
        ):
            expectation(lambda w, x, d=dtype: (w * x).astype(d), posterior, x_set)
    coarse = MeanField(jnp.array([1.0], jnp.bfloat16), jnp.array([0.1], jnp.bfloat16))
    x_set = Box(jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16))
    found = expectation(lambda w, x: (w * x).astype(jnp.float32), coarse, x_set)
    assert found.outputs.lower <= 1.0 <= found.outputs.upper


def test_what_cannot_be_bounded_says_so():
    x_set = ball(jnp.ones(2), 0.1)
    w = {"w": jnp.ones((2, 2))}
    posterior = MeanField(w, {"w": jnp.ones((2, 2))})
    with pytest.raises(UnsupportedPrimitiveError, match="depend on the same weights"):
        expectation(lambda p, x: p["w"] @ jax.nn.relu(p["w"] @ x), posterior, x_set)
    with pytest.raises(UnsupportedPrimitiveError, match=r"'tanh'.*test_moments"):
        expectation(lambda p, x: jnp.tanh(p["w"] @ x), posterior, x_set)
    repeated = MeanField({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    with pytest.raises(UnsupportedPrimitiveError, match="meets a weight more than once"):
        expectation(lambda p, x: jnp.broadcast_to(p["w"][:, None], (2, 2)) @ x, repeated, x_set)
    with pytest.raises(ValueError, match=r"its value has shape \(\)"):
        expectation(lambda p, x: (p["w"] @ x).sum(), posterior, x_set)
    with pytest.raises(TypeError, match=r"LowRank.*certify\.statistical"):
        low_rank = LowRank(w, w, {"w": jnp.ones((1, 2, 2))})
        expectation(lambda p, x: p["w"] @ x, low_rank, x_set)
    with pytest.raises(TypeError, match="set"):
        expectation(lambda p, x: p["w"] @ x, posterior, jnp.ones(2))  # pyright: ignore[reportArgumentType]


def test_arithmetic_on_weights_that_are_not_random_is_refused():
    """Its rounding would count: 1e4 + w - 1e4 is w in real arithmetic, and 0 in float32."""
    region = Box(jnp.ones(2), jnp.ones(2))
    posterior = MeanField(
        {"w": jnp.ones((2, 2)), "b": jnp.full(2, 1e-4)}, {"w": jnp.full((2, 2), 0.1), "b": None}
    )

    def apply(p, x):
        return p["w"] @ x + ((p["b"] + 1e4) - 1e4)

    with pytest.raises(UnsupportedPrimitiveError, match="Compute it before"):
        expectation(apply, posterior, region)
    expectation(lambda p, x: p["w"] @ x + p["b"], posterior, region)
