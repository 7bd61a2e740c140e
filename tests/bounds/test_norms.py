"""The first sum over a ball: its exact box by norms of rows, in real and in rounded arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.norms import first_sums
from bnncert.bounds.tracing import trace
from bnncert.sets import LpBall

RNG = np.random.default_rng(5)
KERNEL, W, SCALE = (RNG.normal(size=shape) for shape in ((2, 3, 2, 3), (4, 60), (2,)))


def convolve(x, padding, **dilations):
    kernel = jnp.asarray(KERNEL, x.dtype)
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (1, 2) if "lhs_dilation" not in dilations else (1, 1)
    return jax.lax.conv_general_dilated(
        x[None], kernel, strides, padding, dimension_numbers=numbers, **dilations
    )


SUMS = {
    "dense": lambda x: jnp.asarray(W, x.dtype) @ x.reshape(-1),
    "scaled": lambda x: (x[::-1] * jnp.asarray(SCALE, x.dtype) - 0.3).reshape(-1) @ W.T,
    "rows": lambda x: x @ jnp.asarray(W[:, :2].T, x.dtype),
    "batched": lambda x: jnp.einsum(
        "hwc,hkc->khw", x, jnp.asarray(W[:, :40].reshape(5, 4, 8)[..., :2])
    ),
    "axes": lambda x: x.sum((0, 2)) + 1.0,
    "strided": lambda x: convolve(x / 3.0, ((1, 0), (2, 1))),
    "dilated": lambda x: convolve(-x, "VALID", rhs_dilation=(2, 1)),
    "transposed": lambda x: convolve(x, ((1, 1), (1, 2)), lhs_dilation=(2, 3)),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_box_is_the_dual_norm_of_each_row(name, float64):
    f, center = SUMS[name], jnp.asarray(RNG.normal(size=(5, 6, 2)))

    def all_boxes(center):
        return [
            bound(f, "ibp", rounding=r)(LpBall(center, 0.3, p)) for p in (1, 2) for r in ROUNDED
        ]

    assert first_sums(trace(f, (LpBall(center, 0.3, 2),), {}))
    value, rows = f(center), jax.jacobian(f)(center).reshape(*f(center).shape, -1)
    found = jax.jit(all_boxes)(center)
    for order, boxes in zip((np.inf, 2), (found[:2], found[2:]), strict=True):
        reach = 0.3 * np.linalg.norm(rows, ord=order, axis=-1)
        for box in boxes:
            np.testing.assert_allclose(box.upper, value + reach, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(box.lower, value - reach, rtol=1e-10, atol=1e-10)


ROUNDED = ("nearest", "outward")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_outward_boxes_hold_exactly(size):
    """The extreme points in fractions, and what float32 makes of them; constants of all sizes."""
    bounded = jax.jit(
        lambda w, b, ball: bound(lambda x: w @ (3.3 * x) + b, "ibp", rounding="outward")(ball)
    )
    rng = np.random.default_rng(size)
    for power in (-15, 0, 15):
        w = jnp.asarray(rng.normal(size=(6, size)) * 10.0**power, jnp.float32)
        center = jnp.asarray(1e3 * rng.normal(size=size), jnp.float32)
        b = -w @ (3.3 * center)
        eps = jnp.float32(1e-4)
        for p in (1, 2):
            box = bounded(w, b, LpBall(center, eps, p))
            for i in range(6):
                exact = [Fraction(float(v)) * Fraction(float(jnp.float32(3.3))) for v in w[i]]
                middle = sum(a * Fraction(float(c)) for a, c in zip(exact, center, strict=True))
                middle += Fraction(float(b[i]))
                square = sum(a * a for a in exact) * Fraction(float(eps)) ** 2
                if p == 1:
                    square = max(a * a for a in exact) * Fraction(float(eps)) ** 2
                for end, sign in ((box.upper[i], 1), (box.lower[i], -1)):
                    past = sign * (Fraction(float(end)) - middle)
                    assert past >= 0 and past * past >= square


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_are_finite_where_rows_are_zero(p):
    def width(w):
        box = bound(lambda x: w @ x, "ibp")(LpBall(jnp.ones(3), jnp.float32(0.1), p))
        return jnp.sum(box.upper - box.lower)

    slopes = jax.grad(width)(jnp.asarray([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]]))
    assert jnp.isfinite(slopes).all()
