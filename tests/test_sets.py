"""Sets are pytrees that hold what they say, and bad ones are refused with a reason."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert._emptiness import is_valid, settled
from bnncert.bounds.ops.boxes import hull
from bnncert.sets import Box, LpBall, ball, check_set, is_set


@pytest.mark.smoke
def test_a_ball_of_the_maximum_norm_is_a_box():
    x = jnp.array([0.0, 0.5, 1.0])
    box = ball(x, 0.2)
    assert isinstance(box, Box)
    np.testing.assert_allclose(box.lower, x - 0.2)
    np.testing.assert_allclose(box.upper, x + 0.2)
    np.testing.assert_allclose(box.center, x, atol=1e-7)
    np.testing.assert_allclose(box.radius, 0.2, rtol=1e-6)


def test_clipping_intersects_with_the_range():
    x = jnp.array([0.05, 0.95, 0.5, 1.0, 0.0])
    box = ball(x, 0.1, clip=(0.0, 1.0))
    assert isinstance(box, Box)
    np.testing.assert_allclose(box.lower, [0.0, 0.85, 0.4, 0.9, 0.0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(box.upper, [0.15, 1.0, 0.6, 1.0, 0.1], rtol=1e-6)
    assert ((box.lower <= x) & (x <= box.upper)).all()


def test_a_center_outside_the_range_makes_an_empty_box_of_finite_ends_where_it_is_traced():
    box = jax.jit(lambda x: ball(x, 0.1, clip=(0.0, 1.0)))(jnp.array([0.5, 1.5, jnp.nan]))
    np.testing.assert_array_equal(box.lower[1:], 1.0)
    np.testing.assert_array_equal(box.upper[1:], 0.0)
    assert box.lower[0] < box.upper[0] and not is_valid(box)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_center_and_radius_hold_the_ends_at_every_magnitude(dtype):
    """Sums of ends overflow before the ends do; half widths are lost before the widths are."""
    kind = jnp.finfo(dtype)
    most, tiny = kind.max, kind.tiny
    ends = np.array([-most, most / 2, most, 0, tiny, 1.5 * tiny, 1, 1 + kind.eps, -3], dtype)
    low, high = (end.ravel() for end in np.meshgrid(ends, ends))
    low, high = np.minimum(low, high), np.maximum(low, high)
    for box in (Box(low, high), jax.jit(lambda b: b)(Box(low, high))):
        center, radius = (np.asarray(v).astype(np.float64) for v in (box.center, box.radius))
        assert np.isfinite(center).all() and np.isfinite(radius).all()
        reach = radius * (1 + float(kind.eps))  # but for its own rounding
        assert (center - reach <= low).all() and (high <= center + reach).all()
        np.testing.assert_array_equal(center[low == high], low[low == high])
        np.testing.assert_array_equal(radius > 0, low < high)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("p", [1, 2, jnp.inf])
def test_a_radius_is_not_lost_in_the_dtype_of_the_center(dtype, p):
    """Subnormal numbers, and what underflows to 0 in a narrower dtype, may be read as 0."""
    least = float(np.asarray(jnp.finfo(dtype).smallest_subnormal))
    for eps in (np.float32(least), np.asarray(least, dtype), np.float32(1e-9)):
        for make in (ball, jax.jit(ball, static_argnames="p")):
            box = hull(settled([make(jnp.zeros(2, dtype), jnp.asarray(eps), p=p)])[0][0])
            held = np.asarray(box.upper).astype(np.float64)
            assert (held >= float(eps) * (1 - float(jnp.finfo(dtype).eps))).all() and (
                np.asarray(box.lower) < 0
            ).all()


def test_subnormal_ends_are_moved_outward_but_points_stay():
    low, high = (np.array(v, np.float32) for v in ([1e-40, -1e-40, 0], [2e-40, 1e-40, 0]))
    box: Any = settled([Box(low, high)])[0][0]
    tiny = float(jnp.finfo(jnp.float32).tiny)
    np.testing.assert_array_equal(np.asarray(box.lower), np.array([0, -tiny, 0], np.float32))
    np.testing.assert_array_equal(np.asarray(box.upper), np.array([tiny, tiny, 0], np.float32))


def test_the_hull_of_a_ball_holds_it():
    center = jax.random.normal(jax.random.key(0), (200,)) * 10.0 ** jnp.linspace(-9, 9, 200)
    for eps in (0.0, 1e-3, 1.0, 3e7):
        eps = np.float32(eps)
        box = hull(LpBall(center, jnp.asarray(eps), 2))
        exact = np.asarray(center, np.float64)
        assert (np.asarray(box.lower, np.float64) <= exact - float(eps)).all()
        assert (np.asarray(box.upper, np.float64) >= exact + float(eps)).all()
    np.testing.assert_array_equal(hull(LpBall(center, 0.0, 2)).lower, center)


@pytest.mark.parametrize("p", [1, 2])
def test_other_norms_make_an_lp_ball(p):
    found = ball(jnp.zeros(3), 0.5, p=p)
    assert isinstance(found, LpBall) and found.p == p and found.eps == 0.5


def test_sets_pass_through_transformations():
    x = jnp.arange(6.0).reshape(2, 3)
    boxes = jax.jit(jax.vmap(lambda v, eps: ball(v, eps)))(x, jnp.array([0.1, 0.2]))
    assert isinstance(boxes, Box) and boxes.lower.shape == (2, 3)
    np.testing.assert_allclose(boxes.radius[:, 0], [0.1, 0.2], rtol=1e-5)
    balls = jax.vmap(lambda v: ball(v, 0.1, p=2))(x)
    assert isinstance(balls, LpBall) and balls.p == 2 and balls.eps.shape == (2,)
    radii = jax.vmap(lambda b: b.eps, in_axes=(LpBall(0, 0, 2),))(balls)  # pyright: ignore
    np.testing.assert_allclose(radii, 0.1, rtol=1e-6)
    slope = jax.grad(lambda b: jnp.sum(b.upper**2))(Box(jnp.ones(2), 3 * jnp.ones(2)))
    np.testing.assert_array_equal(slope.upper, [6.0, 6.0])
    assert is_set(slope) and not is_set(x)


def test_clip_is_differentiable_in_eps():
    def width(eps):
        box = ball(jnp.array([0.05, 0.5]), eps, clip=(0.0, 1.0))
        assert isinstance(box, Box)
        return jnp.sum(box.radius)

    np.testing.assert_allclose(jax.grad(width)(0.1), 0.5 + 1.0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ball(jnp.zeros(2), -0.1), ValueError, r"eps = -0\.1"),
        (lambda: ball(jnp.zeros(2), float("nan")), ValueError, "eps = nan"),
        (lambda: ball(jnp.zeros(2), float("inf")), ValueError, "finite"),
        (lambda: ball(jnp.zeros(2), 0.1, p=3), ValueError, "p = 3"),
        (lambda: ball(jnp.zeros(2), 0.1, p=2, clip=(0.0, 1.0)), ValueError, "clip"),
        (lambda: ball(jnp.zeros(2), 0.1, clip=(1.0, 0.0)), ValueError, "low < high"),
        (lambda: ball(jnp.full(2, 16.0), 0.1, clip=(0.0, 1.0)), ValueError, "16.0.*by 255"),
        (lambda: ball(jnp.array([0.5, jnp.nan]), 0.1), ValueError, "x holds NaN"),
        (lambda: check_set(Box(jnp.zeros(2, int), jnp.ones(2, int))), TypeError, "int32.*255"),
        (lambda: check_set(Box(jnp.zeros(2), jnp.ones(3))), ValueError, r"\(2,\).*\(3,\)"),
        (lambda: check_set(Box(jnp.ones(2), jnp.zeros(2))), ValueError, r"at \(0,\): 1\.0 > 0\.0"),
        (lambda: check_set(Box(jnp.array([0.0, jnp.nan]), jnp.ones(2))), ValueError, "NaN"),
        (lambda: check_set(Box(jnp.zeros(1), jnp.array([jnp.inf]))), ValueError, "infinite"),
        (lambda: check_set(LpBall(jnp.zeros(2), -1.0, 2)), ValueError, r"eps = -1\.0"),
        (lambda: check_set(LpBall(jnp.zeros(2), jnp.ones(2), 2)), ValueError, "jax.vmap"),
        (lambda: check_set(LpBall(jnp.zeros(2), 1.0, 5)), ValueError, "p = 5"),
        (lambda: check_set(LpBall(jnp.array([jnp.nan]), 1.0, 2)), ValueError, "center"),
    ],
)
def test_bad_sets_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_images_of_integers_are_refused():
    with pytest.raises(TypeError, match=r"uint8.*255"):
        ball(np.zeros((2, 2), np.uint8), 0.1)
