"""Networks that multiply in less than float32: bounds allow for it, or refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bnncert.bounds import Float, UnsupportedPrimitiveError, bound
from bnncert.bounds.graph import precision
from bnncert.sets import Box, ball

METHODS = ("ibp", "forward", "crown-ibp", "crown")
BITS = {"tensorfloat32": 10, "bfloat16": 7}
"""Of the fraction."""


def rounded_to(bits, v):
    """A float32 rounded to fewer bits of fraction, to nearest."""
    words = np.asarray(v, np.float32).view(np.uint32).astype(np.uint64)
    drop = 23 - bits
    return ((words + (1 << (drop - 1))) >> drop << drop).astype(np.uint32).view(np.float32)


def network(params, x, asked=None):
    first, second = params
    hidden = jax.nn.relu(jnp.dot(first, x, precision=asked))
    return jnp.dot(second, hidden, precision=asked)


def in_less(bits, params, x):
    """The network with the factors of its products rounded."""
    first, second = (np.float64(rounded_to(bits, w)) for w in params)
    hidden = np.float32(first @ rounded_to(bits, x))
    return second @ rounded_to(bits, np.maximum(hidden, 0))


def random_network(seed):
    rng = np.random.default_rng(seed)
    params = [np.float32(rng.normal(size=s)) for s in ((6, 5), (3, 6))]
    return params, np.float32(rng.uniform(0.5, 1, size=5))


ASKING = {
    "tensorfloat32": ("tensorfloat32", lax.Precision.HIGH, lax.DotAlgorithmPreset.TF32_TF32_F32),
    "bfloat16": ("bfloat16", lax.Precision.DEFAULT, lax.DotAlgorithmPreset.BF16_BF16_F32),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ASKING)
def test_bounds_allow_for_factors_in_the_format_that_is_asked_for(name, method):
    params, _ = random_network(0)
    exact = jax.jit(bound(partial(network, params, asked="float32"), method, rounding="outward"))
    coarse = jax.jit(
        bound(partial(network, params, asked=ASKING[name][0]), method, rounding="outward")
    )
    cut = 0
    for seed in range(50):
        _, x = random_network(seed)
        value = in_less(BITS[name], params, x)
        box, narrow = coarse(Box(x, x)), exact(Box(x, x))
        assert (np.asarray(box.lower) <= value).all() and (value <= np.asarray(box.upper)).all()
        cut += ((value < narrow.lower) | (value > narrow.upper)).any()
        width = 40 * 2.0 ** -BITS[name] * np.abs(value).max() + 40 * 2.0 ** -BITS[name]
        assert (box.upper - box.lower < width).all()
    assert cut > 25  # what float32 computes is not what the network computes


@pytest.mark.parametrize("name", ASKING)
def test_every_way_of_asking_for_less_is_seen(name):
    params, x = random_network(1)

    def width(asked):
        box = bound(partial(network, params, asked=asked), "ibp", rounding="outward")(Box(x, x))
        return (box.upper - box.lower).max()

    widths = [width(asked) for asked in ASKING[name]]
    with jax.default_matmul_precision(name):
        widths.append(width(None))
    assert max(widths) == min(widths) > 50 * width(None)
    assert width("highest") == width(None)


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", "float32"), ("gpu", "tensorfloat32"), ("tpu", "bfloat16")]
)
def test_what_is_not_asked_for_is_left_to_the_backend(platform, name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert precision.factors(None, platform) == name
    params, x = random_network(2)
    assert precision.asked_of(partial(network, params), x) == name
    assert precision.asked_of(partial(network, params, asked="highest"), x) == "float32"
    assert precision.asked_of(partial(network, params, asked="bfloat16"), x) == "bfloat16"
    box = bound(partial(network, params), "ibp", rounding="outward")(Box(x, x))
    unit = precision.FACTOR_UNITS[name] or 2.0**-24
    assert (box.upper - box.lower > unit * np.abs(network(params, x)).min()).all()


def test_products_inside_calls_loops_and_branches_are_seen():
    def f(x):
        return lax.fori_loop(0, 3, lambda i, v: jnp.dot(x, v, precision="bfloat16"), x)

    def g(x):
        return lax.cond(x.sum() > 0, jax.jit(f), lambda v: v, x)

    assert precision.asked_of(g, jnp.eye(2)) == "bfloat16"
    assert precision.asked_of(lambda x: x + 1, jnp.eye(2)) == "float32"


def test_float64_is_never_computed_in_less(float64):
    f = lambda x: jnp.dot(x, x, precision="bfloat16")  # noqa: E731
    assert precision.asked_of(f, jnp.eye(2)) == "float32"
    box = bound(lambda x: f(x[:, None] * jnp.ones(3)), "ibp", rounding="outward")(
        ball(jnp.ones(3), 0.0)
    )
    assert (box.upper - box.lower < 1e-12).all()


def test_formats_of_smaller_range_are_refused_and_a_unit_roundoff_is_the_way_out():
    params, x = random_network(3)
    f = partial(network, params, asked=lax.DotAlgorithmPreset.F16_F16_F32)
    with pytest.raises(UnsupportedPrimitiveError, match=r"F16_F16_F32.*unit_roundoff"):
        bound(f, "ibp", rounding="outward")(Box(x, x))
    box = bound(f, "ibp", rounding=Float(2.0**-11))(Box(x, x))
    assert (box.upper - box.lower > 2.0**-11).all()


def test_a_coarser_unit_roundoff_covers_the_factors():
    params, x = random_network(4)
    widths = []
    for asked in ("highest", "tensorfloat32"):
        f = partial(network, params, asked=asked)
        box = bound(f, "ibp", rounding=Float(2.0**-8))(Box(x, x))
        widths.append(box.upper - box.lower)
    np.testing.assert_array_equal(*widths)
