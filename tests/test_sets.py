"""Sets are pytrees that hold what they say, and bad ones are refused with a reason."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_clipping_keeps_the_range_and_the_center():
    """The nominal input stays in the set even where it lies outside the range."""
    x = jnp.array([0.05, 0.95, 0.5, 1.5, -0.5])
    box = ball(x, 0.1, clip=(0.0, 1.0))
    assert isinstance(box, Box)
    np.testing.assert_allclose(box.lower, [0.0, 0.85, 0.4, 1.4, -0.5], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(box.upper, [0.15, 1.0, 0.6, 1.5, -0.4], rtol=1e-6)
    assert ((box.lower <= x) & (x <= box.upper)).all()


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
