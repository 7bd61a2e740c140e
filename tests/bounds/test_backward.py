"""Backward rows: Jacobians of affine functions, chunks, and concretisation by the dual norm."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import CROWN, bound, linear_bounds
from bnncert.bounds.methods import method_of
from bnncert.bounds.ops import LOWER_SLOPES
from bnncert.bounds.rows import Row, concretize
from bnncert.sets import Box, LpBall, ball
from tests.bounds import networks
from tests.bounds.networks import KINDS


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("name", ["mlp", "l2-image"])
def test_chunked_rows_equal_all_at_once(name, batch_size, float64):
    params, args = networks.sample(name, jnp.float64)
    whole = networks.boxes(name)(params, args)["crown"]
    f = partial(KINDS[name].apply, networks.member(params, 0))
    found = jax.jit(bound(f, "crown", batch_size=batch_size))(*networks.member(args, 0))
    np.testing.assert_allclose(found.lower, whole.lower[0], rtol=1e-12)
    np.testing.assert_allclose(found.upper, whole.upper[0], rtol=1e-12)


def test_chunked_rows_under_vmap(float64):
    params, args = networks.sample("mlp", jnp.float64)
    f = partial(KINDS["mlp"].apply, networks.member(params, 0))
    for transformed in (bound, linear_bounds):
        few, all_ = (jax.vmap(transformed(f, batch_size=n))(*args) for n in (2, 100))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), few, all_)


def test_linear_bounds_of_an_affine_function_are_its_jacobian(float64):
    params, args = networks.sample("affine", jnp.float64)
    f = partial(KINDS["affine"].apply, networks.member(params, 0))
    (x,) = networks.member(args, 0)
    found = linear_bounds(f)(x)
    for side in found:
        np.testing.assert_allclose(side.A[0], jax.jacobian(f)(x.center), atol=1e-12)
        np.testing.assert_allclose(side.b, f(jnp.zeros(4)), atol=1e-12)


@pytest.mark.parametrize("name", ["leaky", "tanh", "shapes", "several", "weights-and-input"])
def test_linear_functions_enclose_the_network(name, float64):
    """At random points, with the structure of the Jacobian: output tree by set tree."""
    params, args = networks.member(networks.sample(name, jnp.float64), 0)
    f = partial(KINDS[name].apply, params)
    found = jax.jit(linear_bounds(f))(*args)
    points = networks.starts(np.random.default_rng(3), args, 200)
    is_linear = lambda v: type(v).__name__ == "LinearBounds"  # noqa: E731
    values = jax.tree.leaves(jax.vmap(lambda p: f(*p))(points))
    for value, lines in zip(values, jax.tree.leaves(found, is_leaf=is_linear), strict=True):
        sides = []
        for side in lines:
            assert jax.tree.structure(side.A) == jax.tree.structure(points)
            parts = zip(jax.tree.leaves(side.A), jax.tree.leaves(points), strict=True)
            total = side.b[None]
            for a, x in parts:
                rank = x.ndim - 1
                axes = (list(range(a.ndim - rank, a.ndim)), list(range(1, rank + 1)))
                total = total + np.moveaxis(np.tensordot(a, x, axes=axes), -1, 0)
            sides.append(total)
        scale = 1e-10 * (1 + np.abs(value).max())
        assert (sides[0] <= value + scale).all() and (value <= sides[1] + scale).all()


def test_linear_bounds_concretise_to_the_crown_box(float64):
    """Where nothing was intersected the two are the same bound."""
    f = lambda x: jax.nn.relu(x @ jnp.array([[1.0, -2.0], [0.5, 1.0]]))  # noqa: E731
    box = Box(jnp.array([-1.0, -0.5]), jnp.array([1.0, 1.5]))
    lines, expected = linear_bounds(f)(box), bound(f, "crown")(box)
    upper = lines.upper.A[0] @ box.center + jnp.abs(lines.upper.A[0]) @ box.radius + lines.upper.b
    np.testing.assert_allclose(upper, expected.upper, rtol=1e-12)


@pytest.mark.parametrize("lower_slope", LOWER_SLOPES)
def test_every_lower_slope_is_sound(lower_slope, float64):
    params, args = networks.member(networks.sample("clipped", jnp.float64), 0)
    f = partial(KINDS["clipped"].apply, params)
    box = jax.jit(bound(f, CROWN(lower_slope)))(*args)
    points = networks.starts(np.random.default_rng(3), args, 500)
    values = jax.vmap(f)(*points)
    assert (box.lower <= values + 1e-12).all() and (values <= box.upper + 1e-12).all()


@pytest.mark.parametrize("region", [1, 2, np.inf])
def test_concretisation_is_the_dual_norm(region, float64):
    a = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    center, eps = jnp.arange(6.0).reshape(2, 3), 0.5
    ball_ = LpBall(center, eps, region) if region != np.inf else Box(center - eps, center + eps)
    norm = {1: jnp.abs(a).max(), 2: jnp.sqrt((a**2).sum()), np.inf: jnp.abs(a).sum()}[region]
    one, zero = jnp.ones(()), jnp.zeros(())
    below, above = Row({0: a}, one, zero), Row({0: -2 * a}, -3 * one, zero)
    box = concretize(below, above, [ball_])
    np.testing.assert_allclose(box.lower, jnp.vdot(a, center) - eps * norm + 1.0, rtol=1e-12)
    np.testing.assert_allclose(
        box.upper, 2 * jnp.vdot(a, center) + 2 * eps * norm + 3.0, rtol=1e-12
    )


def test_the_dual_norm_of_zero_has_a_finite_gradient():
    def width(w, p):
        return jnp.sum(bound(lambda x: w @ x, "crown")(ball(jnp.ones(3), 0.1, p=p)).radius)

    for p in (1, 2):
        slope = jax.grad(width)(jnp.zeros((2, 3)), p)
        assert bool(jnp.isfinite(slope).all())


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_max_of_two_knows_their_difference(rounding, float64):
    """a - b is bounded as a value of its own: where its sign is sure, max(a, b) is exact."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    box = Box(-jnp.ones(3), jnp.ones(3))

    def extrema(x):
        y = w @ x
        one, two = jnp.maximum(y, y[::-1] + 40.0), jnp.minimum(y, 0.5 * y + jnp.sum(x) - 40.0)
        return one, two, y + jnp.maximum(y + 1.0, 3.0 * y), jnp.minimum(y, 3.0 - 2.0 * y)

    def expected(x):
        y = w @ x
        one, two = y[::-1] + 40.0, 0.5 * y + jnp.sum(x) - 40.0
        return one, two, 2 * y + 1 + jax.nn.relu(2.0 * y - 1), y - jax.nn.relu(3.0 * y - 3.0)

    boxes = (jax.jit(bound(f, "crown", rounding=rounding))(box) for f in (extrema, expected))
    for a, b in zip(*map(jax.tree.leaves, boxes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_logaddexp_knows_the_difference_of_its_operands(rounding, float64):
    """logaddexp(a, b) = b + softplus(a - b)."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    box = Box(-jnp.ones(3), jnp.ones(3))

    def found(x):
        y = w @ x
        return y + jnp.logaddexp(y + 1.0, 3.0 * y), jnp.logaddexp(y, y + 4.0), jnp.logaddexp(2.0, y)

    def expected(x):
        y = w @ x
        sure = y + np.logaddexp(0.0, 4.0)
        return 2.0 * y + 1.0 + jax.nn.softplus(2.0 * y - 1.0), sure, 2.0 + jax.nn.softplus(y - 2.0)

    boxes = (jax.jit(bound(f, "crown", rounding=rounding))(box) for f in (found, expected))
    for a, b in zip(*map(jax.tree.leaves, boxes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@cache
def extremum_of_layers(method, lower_slope):
    """Bounds of a network of minima, and of the same written by maxima, of its mirrored values."""

    def network(extremum):
        def apply(params, x):
            w, v, w2, v2, last = params
            x = extremum(w @ x, v @ x)
            return last @ extremum(w2 @ x, jnp.tanh(v2 @ x))

        return apply

    networks_ = network(jnp.minimum), network(lambda a, b: -jnp.maximum(-a, -b))
    both = [bound(f, replace(method_of(method), lower_slope=lower_slope)) for f in networks_]
    return jax.jit(lambda params, box: [g(params, box) for g in both])


@pytest.mark.parametrize(
    ("method", "lower_slope"),
    [
        *((method, "adaptive") for method in ("forward", "crown")),
        *(("crown-ibp", slope) for slope in LOWER_SLOPES),
    ],
)
def test_a_min_is_the_mirror_of_a_max(method, lower_slope, float64):
    """Where their difference reaches as far on either side of 0, too: around 0, in one layer."""
    rng = np.random.default_rng(5)
    run = extremum_of_layers(method, lower_slope)
    for center in (0.0, 0.4):
        params = [rng.normal(size=s) / 2 for s in ((5, 3), (5, 3), (5, 5), (5, 5), (3, 5))]
        minima, mirrored = run(params, Box(center - 0.5 * jnp.ones(3), center + 0.5 * jnp.ones(3)))
        np.testing.assert_allclose(minima.lower, mirrored.lower, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(minima.upper, mirrored.upper, rtol=1e-9, atol=1e-12)
