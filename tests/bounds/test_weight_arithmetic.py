"""Outward rounding of what a network computes of its weights alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import UnsupportedPrimitiveError, bound, linear_bounds
from bnncert.bounds.arithmetic import Float
from bnncert.bounds.graph.constants import Rounded, around
from bnncert.bounds.tracing import trace
from bnncert.certify import decision
from bnncert.sets import Box, ball

pytestmark = pytest.mark.slow

METHODS = ("ibp", "forward", "crown-ibp", "crown")


def standardised(p, x):
    w = p - p.mean(1, keepdims=True)
    return jax.nn.relu(w / jnp.sqrt(jnp.square(w).mean(1, keepdims=True) + 1e-5) @ x)


def spectrally_normalised(p, x):
    v = jnp.ones(p.shape[1]) / p.shape[1]
    for _ in range(2):
        u = p @ v
        v = p.T @ (u / jnp.linalg.norm(u))
    return jnp.tanh(p / jnp.linalg.norm(v) @ x)


def low_rank(p, x):
    return jax.nn.relu((p + p[:, :2] @ p[:2]) @ x)


def batch_norm(p, x):
    mean, var, scale, bias = p[0, :4], jnp.square(p[1, :4]), p[2, :4], p[3, :4]
    y = p[:4] @ x
    return jax.nn.leaky_relu((y - mean) * (jax.lax.rsqrt(var + 1e-3) * scale) + bias, 0.1)


def divided(p, x):
    return jax.nn.relu(p @ x) / jax.nn.softplus(p.sum(1) / 7)


def clipped(p, x):
    low, high = p.mean(1), p.mean(1) + jnp.exp(p[:, 0] / 9)
    return jnp.clip(p @ x, low, high) + jnp.maximum(p @ x, p.sum(1) / 3)


def leaky(p, x):
    return jax.nn.leaky_relu(p @ x, jax.nn.sigmoid(p[:, 1])) + p.sum(1)


def gated(p, x):
    mixing = jax.nn.softmax(p, axis=1)
    return jnp.concatenate([mixing @ x, p.mean(1)]) * 3


def convolved(p, x):
    kernel = p[0, :3] / p[0, :3].sum()
    return jnp.convolve(jax.nn.silu(x), kernel, "same", precision="highest")


def selected(p, x):
    scaled = p / 3
    return jnp.where(scaled.mean(1) > 0, scaled @ x, -p @ x)


NETWORKS = {
    f.__name__: f
    for f in (
        standardised,
        spectrally_normalised,
        low_rank,
        batch_norm,
        divided,
        clipped,
        leaky,
        gated,
        convolved,
    )
}


def in_float64(f, *args):
    with jax.enable_x64(True):
        return np.asarray(f(*(jnp.asarray(np.float64(a)) for a in args)))


def reordered(f, p, x, rng):
    """The same network with the inputs, and so all sums over them, in another order."""
    order = rng.permutation(len(x))
    return f(p[:, order], x[order])


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_hold_for_weights_that_are_computed(name):
    """At points and small boxes: the values in float32, eager and compiled, and in float64."""
    f, rng = NETWORKS[name], np.random.default_rng(0)
    bounded = jax.jit(
        lambda p, region: [bound(partial(f, p), m, rounding="outward")(region) for m in METHODS]
    )
    for shift in (0.0, 300.0):
        p = np.float32(shift + rng.normal(size=(6, 5)))
        x = np.float32(rng.normal(size=5))
        for eps in (0.0, 0.01):
            region = Box(x - np.float32(eps), x + np.float32(eps))
            for method, box in zip(METHODS, bounded(p, region), strict=True):
                for point in (x, region.lower, region.upper):
                    values = [f(p, point), jax.jit(f)(p, point), in_float64(f, p, point)]
                    for value in np.asarray(values, np.float64):
                        assert (np.float64(box.lower) <= value).all(), (method, shift, eps)
                        assert (value <= np.float64(box.upper)).all(), (method, shift, eps)


def test_cancelling_weights_certify_no_class_that_exact_arithmetic_does_not_choose():
    """The other logit lies between what float32 computes and the exact value."""
    rng = np.random.default_rng(3)
    x = np.float32(rng.uniform(size=1024))

    def first(p, x):
        return (p - p.mean(1, keepdims=True)) @ x

    @jax.jit
    def certified(p, other):
        def apply(p, x):
            return jnp.concatenate([first(p, x), other[None]])

        return decision(apply, p[None], Box(x, x), method="ibp").robust

    for _ in range(20):
        p = np.float32(1e3 + 0.01 * rng.normal(size=(1, 1024)))
        exact, computed = in_float64(first, p, x), np.float64(first(p, x))
        assert np.abs(exact - computed).max() > 1e-4
        assert not certified(p, np.float32(0.5 * (exact + computed)[0]))


@pytest.mark.parametrize("rounding", ("nearest", "outward"))
def test_an_output_of_weights_alone_is_the_point_it_is_or_holds_what_may_be_computed(rounding):
    p = jnp.float32(1e4 + np.random.default_rng(0).normal(size=1000))
    f = lambda x: (x + 1, p - p.mean())  # noqa: E731
    _, box = bound(f, "ibp", rounding=rounding)(Box(jnp.zeros(1), jnp.ones(1)))
    exact = np.float64(p) - np.float64(p).mean()
    inside = (np.asarray(box.lower) <= exact) & (exact <= np.asarray(box.upper))
    assert inside.all() == (rounding == "outward")
    linear = linear_bounds(f, rounding=rounding)(Box(jnp.zeros(1), jnp.ones(1)))[1]
    np.testing.assert_array_equal(linear.lower.b, box.lower)
    np.testing.assert_array_equal(linear.upper.b, box.upper)


def constants_of(f, *sets):
    graph = trace(f, sets, {}, Float().tracking())
    return [c for node in graph.nodes for c in node.computed if c is not None]


REGION = Box(jnp.zeros(3), jnp.ones(3))
W = jnp.float32([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
I = np.arange(300, dtype=np.int16)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.where(jax.lax.map(lambda w: (w > 2).sum() > 1, W)[:, None], W, 0) @ x,
        lambda x: W[:, jnp.searchsorted(W[0], 1.5)] * x[:2],
        lambda x: W @ x,
        lambda x: W.T[:, 0] * x,
        lambda x: jnp.concatenate([W, -W])[1:] @ x,
        lambda x: jnp.where(W > 1.5, W, 0) @ x,
        lambda x: jnp.abs(W).max(0) * x,
        lambda x: W.astype(jnp.float32) @ x,
        lambda x: jnp.pad(W, ((0, 0), (1, 1)))[:, 1:4] @ x,
    ],
)
def test_moves_and_comparisons_of_weights_are_exact(f):
    assert constants_of(f, REGION) == []


def test_a_leaky_rectifier_at_a_zero_that_was_computed_is_refused():
    def f(x):
        zero = W.sum() - 18.0
        return jnp.where(x > zero, x, 0.1 * x)

    with pytest.raises(UnsupportedPrimitiveError):
        bound(f, "ibp", rounding="outward")(REGION)


def test_without_outward_rounding_constants_are_as_they_were():
    assert not any(n.computed for n in trace(lambda x: (W / 3) @ x, (REGION,), {}).nodes)


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda x: jax.scipy.special.erfinv(W / 9) @ x, "erf_inv"),
        (lambda x: jnp.where(W / 3 > 0.5, x, 0).sum(), "gt"),
        (lambda x: jnp.abs(jnp.fft.fft(W)) @ x, "convert_element_type"),
        (lambda x: (jnp.fft.fft(W) * 1j).real @ x, "convert_element_type"),
        (lambda x: jax.lax.map(lambda i: i / 10, jnp.arange(3)) * x, "scan"),
        (lambda x: jax.lax.cond(x[0] is None, lambda: 1.0, lambda: jnp.sqrt(2.0)) * x, "cond"),
        (lambda x: jnp.where(jax.lax.map(lambda w: w / 3 > 0.5, W), x, 0).sum(), "scan"),
        (lambda x: jnp.dot(I, I, preferred_element_type=jnp.float32) * x, "dot_general"),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, w: w / 3, W) @ x, "scan"),
    ],
)
def test_what_is_not_known_of_weights_is_refused_by_outward_rounding_alone(f, op):
    with pytest.raises(UnsupportedPrimitiveError, match=f"'{op}' on constants alone"):
        bound(f, "ibp", rounding="outward")(REGION)
    bound(f, "ibp")(REGION)


def test_a_case_chosen_by_computed_weights_may_be_either():
    def f(x):
        return (jnp.where(W.mean(1, keepdims=True) > 2, W, -W)) @ x

    box = bound(f, "ibp", rounding="outward")(ball(jnp.ones(3), 0.0))
    both = np.asarray([W.sum(1), -W.sum(1)], np.float64)
    assert (np.asarray(box.lower) <= both.min(0)).all()
    assert (np.asarray(box.upper) >= both.max(0)).all()


def test_gradients_reach_weights_through_what_is_computed_of_them():
    def width(p):
        box = bound(partial(standardised, p), "ibp", rounding="outward")(ball(jnp.ones(5), 0.1))
        return (box.upper - box.lower).sum()

    p = jnp.float32(np.random.default_rng(0).normal(size=(4, 5)))
    slopes = jax.grad(width)(p)
    assert np.isfinite(slopes).all() and (slopes != 0).any()


def test_a_constant_of_unknown_error_is_no_box():
    assert around(Rounded(jnp.ones(2), None, "sort", "")) is None
