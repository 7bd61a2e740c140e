"""Rules hold for JAX's own primitives, and for what these compute at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from bnncert._compiler.convolution import canonical
from bnncert.bounds import UnsupportedPrimitiveError, bound, linear_bounds
from bnncert.bounds.methods import METHODS as KINDS
from bnncert.sets import Box, LpBall
from tests.bounds.networks import in_few_steps

METHODS = tuple(KINDS)

pytestmark = pytest.mark.slow

BOX = Box(jnp.array([-1.0, -0.5, 0.2]), jnp.array([1.0, 0.5, 0.4]))


def stranger(name, function):
    """Another primitive of a known name."""
    primitive = core.Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(lambda x, **_: x)
    return primitive


@pytest.mark.parametrize("name", ["tanh", "stop_gradient", "gelu", "mul", "softplus", "jit"])
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_another_primitive_of_a_known_name_is_refused(name, method):
    own = stranger(name, lambda x, **_: -x)
    with pytest.raises(UnsupportedPrimitiveError, match=f"'{name}' is not JAX's own primitive"):
        bound(lambda x: own.bind(x), method)(BOX)


@pytest.mark.parametrize("name", ["dot_general", "gather", "jit", "conv_general_dilated"])
def test_on_constants_it_computes_what_it_is(name):
    own = stranger(name, lambda x: -x)
    found = bound(lambda x: x + own.bind(jnp.ones(3)), "crown")(BOX)
    np.testing.assert_allclose(found.lower, BOX.lower - 1)
    draws = bound(lambda x: x + own.bind(jax.random.normal(jax.random.key(0), (3,))), "crown")(BOX)
    assert jnp.isfinite(draws.lower).all()
    if name == "conv_general_dilated":
        np.testing.assert_allclose(canonical(lambda x: own.bind(x))(jnp.ones(2)), -jnp.ones(2))


def values(f, box, count=200):
    share = np.random.default_rng(0).uniform(-0.5, 1.5, (count, *jnp.shape(box.lower))).clip(0, 1)
    points = box.lower + share.astype(box.lower.dtype) * (box.upper - box.lower)
    return jax.jit(jax.vmap(f))(points)


def check(f, box, methods=METHODS[:-1]):
    """The bounds of all methods hold at points."""
    found, seen = {m: jax.jit(bound(f, m))(box) for m in methods}, values(f, box)
    for method, b in found.items():
        slack = 1e-5 * (1 + jnp.abs(seen).max()).astype(seen.dtype)
        assert (b.lower <= seen + slack).all() and (seen - slack <= b.upper).all(), method


# --- indices outside ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", [7, -7])
def test_a_scatter_that_breaks_its_promise_drops(method, index):
    """As XLA does; a gather clamps."""
    options = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
    at = np.array([0, index])

    def put(x):
        return jax.nn.relu(x).at[at].set(x[:2] + 3.0, **options)

    def add(x):
        return jax.nn.relu(x).at[at].add(x[:2] + 3.0, **options)

    def get(x):
        return jax.nn.relu(x.at[at].get(**options))

    def every(x):
        return put(x), add(x), get(x)

    for found, low, high in zip(
        jax.jit(bound(every, in_few_steps(method, 2)))(BOX),
        every(BOX.lower),
        every(BOX.upper),
        strict=True,
    ):
        np.testing.assert_allclose(found.lower, low, atol=1e-6)
        np.testing.assert_allclose(found.upper, high, atol=1e-6)


def test_indices_said_to_be_unique_may_repeat():
    """The transposes of JAX take them at their word, and would count an update twice."""
    for options in ({}, {"unique_indices": True, "indices_are_sorted": True}):
        check(lambda x, o=options: jax.nn.relu(x).at[np.array([1, 1])].set(x[1:], **o), BOX)


# --- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_padding_is_never_the_largest_value(sign, dtype, rounding):
    """Of values that a finite stand-in for -inf would exceed, too."""
    far = 0.9 * float(jnp.finfo(dtype).min)
    box = Box(jnp.array([far, far / 2, far], dtype), jnp.array([far, far / 2, far / 4], dtype))
    if sign < 0:
        box = Box(-box.upper, -box.lower)
    reduce, start = (lax.max, -jnp.inf) if sign > 0 else (lax.min, jnp.inf)

    def pool(x):
        return lax.reduce_window(x, start, reduce, (3,), (2,), "SAME")

    found = bound(pool, "ibp", rounding=rounding)(box)
    if rounding == "nearest":
        assert (found.lower == pool(box.lower)).all() and (found.upper == pool(box.upper)).all()
    assert (found.lower <= pool(box.lower)).all() and (found.upper >= pool(box.upper)).all()


def test_outward_bounds_of_padded_pooling_are_close():
    """No stand-in for -inf has errors of its own."""

    def f(x):
        h = lax.reduce_window(jnp.tanh(x), -jnp.inf, lax.max, (3,), (1,), "SAME")
        return jnp.stack([h.sum(), h[0] - h[1]])

    for method in ("ibp", "crown"):
        near, outward = (jax.jit(bound(f, method, rounding=r))(BOX) for r in ("nearest", "outward"))
        assert (outward.lower <= near.lower).all() and (near.upper <= outward.upper).all()
        np.testing.assert_allclose(outward.lower, near.lower, atol=1e-4)
        np.testing.assert_allclose(outward.upper, near.upper, atol=1e-4)


def test_a_window_with_one_entry_is_that_entry():
    """Its repetitions do not loosen the planes."""

    def f(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), ((0, 1),))[1:] - x[2:]

    found = bound(f, "crown-ibp")(BOX)
    np.testing.assert_allclose([found.lower, found.upper], 0.0, atol=1e-7)


# --- constants of another shape -------------------------------------------------------------------


SLOPES = np.array([0.1, 0.5, 2.0], np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_constants_may_have_more_values_than_x(shape, rounding):
    def every(x):
        found = [
            jax.nn.leaky_relu(x, SLOPES),
            jax.nn.elu(x, SLOPES),
            jax.nn.celu(x, SLOPES),
            jax.nn.squareplus(x, SLOPES),
            jnp.clip(x, -SLOPES, SLOPES),
            jnp.maximum(SLOPES, x) + jnp.minimum(x, SLOPES),
        ]
        if rounding == "nearest":  # it is not known how powers round
            found.append(jnp.power(x + 2.0, SLOPES))
        return jnp.stack([jnp.broadcast_to(v, (2, 3)) for v in found]).sum(2)

    box = Box(jnp.full(shape, -1.0), jnp.full(shape, 0.7))
    seen = values(every, box)
    for method in ("ibp", "forward", "crown"):
        found = jax.jit(bound(every, method, rounding=rounding))(box)
        assert (found.lower <= seen + 1e-5).all() and (seen <= found.upper + 1e-5).all(), method
        assert (found.upper - found.lower).max() < 20


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_products_of_a_narrow_format_are_summed_in_a_wider_one(method):
    """Their centres must not be rounded to the narrow one."""
    low = jnp.array([1.0, 2.0, 3.0], jnp.bfloat16)
    box = Box(low, jnp.nextafter(low, jnp.full(3, jnp.inf, jnp.bfloat16)))
    w = jnp.array([[1.0, -2.0, 0.5]], jnp.bfloat16)

    def f(x):
        return lax.dot_general(w, x, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    found = bound(f, method, rounding="outward")(box)
    corners = jnp.stack(
        [f(jnp.where(np.array(c), box.upper, box.lower)) for c in np.ndindex(2, 2, 2)]
    )
    assert found.lower.dtype == jnp.float32
    assert (found.lower <= corners.min(0)).all() and (corners.max(0) <= found.upper).all()


# --- what is returned where nothing is known ------------------------------------------------------


@pytest.mark.parametrize(
    "f", [jnp.log, lambda x: jnp.exp(200 * x), lambda x: jnp.exp(200 * x) - jnp.exp(201 * x)]
)
def test_linear_bounds_are_numbers_or_infinite(f):
    weight = jnp.array([[0.0, 1.0, 1.0], [1.0, 1.0, -1.0]])
    for method in ("crown-ibp", "crown"):
        found = linear_bounds(lambda x: weight @ f(x), method)(BOX)
        for side, unknown in ((found.lower, -jnp.inf), (found.upper, jnp.inf)):
            assert jnp.isfinite(side.A[0]).all()
            assert (jnp.isfinite(side.b) | (side.b == unknown)).all()


@pytest.mark.parametrize("method", METHODS[:-1])
def test_at_a_point_the_ends_are_the_value(method):
    weight = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])

    def f(x):
        return jax.nn.softmax(jnp.tanh(weight @ x) / (1 + x[0] ** 2)), jnp.array([1, 2])

    x = jnp.array([0.3, -0.2, 0.9])
    for point in (Box(x, x), LpBall(x, jnp.float32(0.0), 2)):
        found, constant = jax.jit(bound(f, method))(point)
        np.testing.assert_allclose(found.lower, f(x)[0], rtol=1e-5)
        np.testing.assert_allclose(found.upper, f(x)[0], rtol=1e-5)
        assert constant.lower.tolist() == constant.upper.tolist() == [1, 2]
