"""Bounds equal those of an independent implementation (auto_LiRPA, float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound, linear_bounds
from bnncert.sets import Box, ball

LAYERS = (0, 2, 4, 6)
RELU_CASES = ("mlp_relu_eps0.05", "mlp_relu_l2", "cnn_plain")
CASES = (*RELU_CASES, "mlp_tanh_eps0.05")
ATOL = 1e-9


@pytest.fixture(scope="module")
def nets(reference):
    return np.load(reference / "nets.npz")


@pytest.fixture(scope="module")
def bounds(reference):
    return np.load(reference / "bounds.npz")


def mlp(weight, net, activation, depth):
    """The network before its nonlinearity number `depth`, or whole."""

    def f(x):
        for i, layer in enumerate(LAYERS):
            x = weight(f"{net}/{layer}.weight") @ x + weight(f"{net}/{layer}.bias")
            if i == depth or i == len(LAYERS) - 1:
                return x
            x = activation(x)
        raise AssertionError(depth)

    return f


def cnn(weight, depth):
    def f(x):
        x = x[None]
        for i, (layer, stride) in enumerate((("c1", 1), ("c2", 2))):
            x = jax.lax.conv_general_dilated(
                x,
                weight(f"cnn_plain/{layer}.weight"),
                (stride, stride),
                ((1, 1), (1, 1)),
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
            )
            x = x + weight(f"cnn_plain/{layer}.bias")[:, None, None]
            if i == depth:
                return x[0]
            x = jax.nn.relu(x)
        return weight("cnn_plain/fc.weight") @ x.reshape(-1) + weight("cnn_plain/fc.bias")

    return f


def network(nets, case, depth=-1):
    def weight(name):
        return jnp.asarray(nets[name], jnp.float64)

    if case == "cnn_plain":
        return cnn(weight, depth)
    activation = jnp.tanh if "tanh" in case else jax.nn.relu
    return mlp(weight, "mlp_tanh" if "tanh" in case else "mlp_relu", activation, depth)


def over_ball(transformed, bounds, case):
    """A bound at every example of a case, over its ball."""
    p = 2 if bounds[f"{case}/norm"] == 2 else jnp.inf
    eps = float(bounds[f"{case}/eps"])
    g = jax.jit(jax.vmap(lambda x: transformed(ball(x, eps, p=p))))
    return g(jnp.asarray(bounds[f"{case}/x"], jnp.float64))


@pytest.mark.parametrize("case", CASES)
def test_the_networks_are_the_same(case, nets, bounds, float64):
    y = jax.vmap(network(nets, case))(jnp.asarray(bounds[f"{case}/x"], jnp.float64))
    np.testing.assert_allclose(y, bounds[f"{case}/y"], atol=1e-12)


# Ours are intersected with those of the methods below.
BELOW = {
    "ibp": ["IBP"],
    "forward": ["IBP", "forward"],
    "crown-ibp": ["IBP", "CROWN-IBP"],
    "crown": ["IBP", "CROWN-IBP", "CROWN"],
}


@pytest.mark.parametrize("method", BELOW)
@pytest.mark.parametrize("case", RELU_CASES)
def test_boxes_of_relu_networks_are_equal(case, method, nets, bounds, float64):
    found = over_ball(bound(network(nets, case), method), bounds, case)
    names = BELOW[method]
    lower = np.max([bounds[f"{case}/{name}/lb"] for name in names], axis=0)
    upper = np.min([bounds[f"{case}/{name}/ub"] for name in names], axis=0)
    np.testing.assert_allclose(found.lower, lower, atol=ATOL, rtol=0)
    np.testing.assert_allclose(found.upper, upper, atol=ATOL, rtol=0)


def test_boxes_of_a_tanh_network(nets, bounds, float64):
    """Tangents of the reference come from a grid: ours are exact, and so mostly tighter."""
    case = "mlp_tanh_eps0.05"
    methods = ("ibp", "forward", "crown-ibp", "crown")
    found = (over_ball(bound(network(nets, case), m), bounds, case) for m in methods)
    ibp, forward, low, crown = found
    np.testing.assert_allclose(ibp.lower, bounds[f"{case}/IBP/lb"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(ibp.upper, bounds[f"{case}/IBP/ub"], atol=ATOL, rtol=0)
    assert (low.lower >= bounds[f"{case}/CROWN-IBP/lb"] - ATOL).all()
    assert (low.upper <= bounds[f"{case}/CROWN-IBP/ub"] + ATOL).all()
    for box, name in ((crown, "CROWN"), (forward, "forward")):
        assert (box.lower >= bounds[f"{case}/{name}/lb"] - 3e-4).all()
        assert (box.upper <= bounds[f"{case}/{name}/ub"] + 3e-4).all()
        assert box.radius.sum() < 0.5 * np.sum(
            bounds[f"{case}/{name}/ub"] - bounds[f"{case}/{name}/lb"]
        )


@pytest.mark.parametrize("case", CASES)
def test_optimised_boxes_are_as_tight(case, nets, bounds, float64):
    """Within 3% of the reference's widths, output by output (50 steps in both)."""
    found = over_ball(bound(network(nets, case), "alpha-crown"), bounds, case)
    width = bounds[f"{case}/alpha-CROWN/ub"] - bounds[f"{case}/alpha-CROWN/lb"]
    assert (2 * found.radius <= 1.03 * width).all()
    assert (found.lower <= bounds[f"{case}/sampled_min"] + 1e-12).all()
    assert (found.upper >= bounds[f"{case}/sampled_max"] - 1e-12).all()


@pytest.mark.parametrize("case", CASES)
def test_attained_values_lie_inside(case, nets, bounds, float64):
    found = over_ball(bound(network(nets, case), "crown"), bounds, case)
    assert (found.lower <= bounds[f"{case}/sampled_min"] + 1e-12).all()
    assert (found.upper >= bounds[f"{case}/sampled_max"] - 1e-12).all()


@pytest.mark.parametrize("case", RELU_CASES)
def test_linear_functions_are_equal(case, nets, bounds, float64):
    found = over_ball(linear_bounds(network(nets, case)), bounds, case)
    pairs = ((found.lower, "lA", "lbias"), (found.upper, "uA", "ubias"))
    for side, matrix, bias in pairs:
        expected = bounds[f"{case}/CROWN/{matrix}"]
        np.testing.assert_allclose(side.A[0], expected, atol=ATOL, rtol=0)
        np.testing.assert_allclose(side.b, bounds[f"{case}/CROWN/{bias}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["mlp_relu_eps0.05", "mlp_relu_l2", "cnn_plain"])
def test_boxes_before_each_relu_are_equal(case, nets, bounds, float64):
    """The intermediate bounds are those of the network cut there."""
    for k in range(2 if case == "cnn_plain" else 3):
        cut = network(nets, case, depth=k)
        for method, name in (("ibp", "IBP"), ("crown", "CROWN")):
            found = over_ball(bound(cut, method), bounds, case)
            lower, upper = (bounds[f"{case}/{name}/pre{k}/{side}"] for side in ("lb", "ub"))
            if name == "CROWN":  # ours are intersected with the methods below
                below = over_ball(bound(cut, "crown-ibp"), bounds, case)
                lower, upper = np.maximum(lower, below.lower), np.minimum(upper, below.upper)
            np.testing.assert_allclose(found.lower, lower, atol=ATOL, rtol=0)
            np.testing.assert_allclose(found.upper, upper, atol=ATOL, rtol=0)


def test_weight_boxes(nets, bounds, float64):
    """Intervals are equal; eliminating weights by their chord is tighter than the reference."""
    case, layers = "input_and_weight", (0, 2, 4)
    reach, eps = float(bounds[f"{case}/w_eps"]), float(bounds[f"{case}/eps"])
    loc = {i: jnp.asarray(nets[f"mlp_w/{i}.weight"], jnp.float64) for i in layers}
    bias = {i: jnp.asarray(nets[f"mlp_w/{i}.bias"], jnp.float64) for i in layers}

    def f(weights, x):
        for i in layers:
            x = weights[i] @ x + bias[i]
            x = jax.nn.relu(x) if i < layers[-1] else x
        return x

    x = jnp.asarray(bounds[f"{case}/x"], jnp.float64)
    np.testing.assert_allclose(jax.vmap(lambda v: f(loc, v))(x), bounds[f"{case}/y"], atol=1e-12)
    regions = {i: Box(w - reach, w + reach) for i, w in loc.items()}
    found = {
        m: jax.jit(jax.vmap(lambda v, m=m: bound(f, m)(regions, ball(v, eps))))(x)
        for m in ("ibp", "crown-ibp", "crown")
    }
    np.testing.assert_allclose(found["ibp"].lower, bounds[f"{case}/IBP/lb"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(found["ibp"].upper, bounds[f"{case}/IBP/ub"], atol=ATOL, rtol=0)
    for method in ("crown-ibp", "crown"):
        lower, upper = (bounds[f"{case}/{method.upper()}/{side}"] for side in ("lb", "ub"))
        assert (found[method].lower >= lower - ATOL).all(), method
        assert (found[method].upper <= upper + ATOL).all(), method
    assert (found["crown"].lower <= bounds[f"{case}/sampled_min"]).all()
    assert (found["crown"].upper >= bounds[f"{case}/sampled_max"]).all()
