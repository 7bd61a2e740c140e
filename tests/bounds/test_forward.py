"""Forward linear bounds: exact on affine functions, hand-computed on a ReLU, inside IBP.

`test_reference.py` compares those of ReLU networks with an independent implementation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.sets import Box, LpBall

RNG = np.random.default_rng(0)
W, V, KERNEL = RNG.normal(size=(5, 6)), RNG.normal(size=(3, 5)), RNG.normal(size=(2, 2, 1, 2))
CENTER = RNG.normal(size=6)
SETS = ("box", "l1", "l2")


def region_of(name):
    center = jnp.asarray(CENTER)
    if name == "box":
        return Box(center - 0.3, center + jnp.linspace(0.0, 0.5, 6))
    return LpBall(center, jnp.asarray(0.7), int(name[1]))


def affine(x):
    """Many operations, one affine function: the same coordinates meet again and again."""
    y = W @ x - x[:5] + 1.0
    image = jax.lax.conv_general_dilated(
        jnp.pad(-2.0 * x, (0, 3)).reshape(1, 3, 3, 1),
        jnp.asarray(KERNEL),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.at[2].add(3.0) + jnp.flip(image.sum((0, 3)).reshape(-1)[:5])
    return V @ jnp.where(CENTER[:5] > 0, y, jnp.cumsum(x[::-1])[:5]) / -3.0


@pytest.mark.parametrize("name", SETS)
def test_an_affine_function_is_bounded_exactly(name, float64):
    region = region_of(name)
    rows, value = jax.jacobian(affine)(region.center), affine(region.center)
    if isinstance(region, Box):
        reach = np.abs(rows) @ region.radius
    else:
        dual = np.inf if region.p == 1 else 2
        reach = region.eps * np.linalg.norm(rows, dual, axis=1)
    found = bound(affine, "forward")(region)
    np.testing.assert_allclose(found.lower, value - reach, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.upper, value + reach, rtol=1e-12, atol=1e-12)


def test_a_relu_that_crosses_is_bounded_by_its_chord_and_the_nearer_slope(float64):
    """On [-1, 3] a relu lies in [x, 3 (x + 1) / 4]; minus x that is [0, 3/4 - x / 4], at most 1."""
    found = bound(lambda x: jax.nn.relu(x) - x, "forward")(Box(jnp.array([-1.0]), jnp.array([3.0])))
    np.testing.assert_allclose(found.lower, [0.0], atol=1e-12)
    np.testing.assert_allclose(found.upper, [1.0], atol=1e-12)


def test_a_max_whose_winner_is_sure_is_bounded_as_that(float64):
    """Here relu(x) + 5, between two lines of its own; the other operand's lines do not enter."""

    def f(x):
        return jnp.maximum(jax.nn.relu(x) + 5.0, jax.nn.relu(-x)) - x

    found = bound(f, "forward")(Box(jnp.array([-1.0]), jnp.array([3.0])))
    np.testing.assert_allclose(found.lower, [5.0], atol=1e-12)
    np.testing.assert_allclose(found.upper, [6.0], atol=1e-12)


def test_it_beats_intervals_where_values_cancel(float64):
    """tanh(Wx) - tanh(Wx + .1): intervals take each to be free of the other."""

    def f(x):
        return jnp.tanh(W @ x / 4) - jnp.tanh(W @ x / 4 + 0.1)

    forward, ibp = (bound(f, method)(region_of("box")) for method in ("forward", "ibp"))
    assert (forward.lower >= ibp.lower).all() and (forward.upper <= ibp.upper).all()
    assert forward.radius.sum() < 0.6 * ibp.radius.sum()


def test_each_set_keeps_its_own_coordinates(float64):
    """x - x is 0, x - y is not; several sets of several shapes."""
    x = Box(jnp.zeros(6), jnp.linspace(0.0, 0.5, 6))
    y = LpBall(jnp.ones((2, 3)), jnp.asarray(0.5), 2)

    def f(x, y):
        return {"zero": x - x, "both": x - y.reshape(-1), "sum": y.sum(0)}

    found = bound(f, "forward")(x, y)
    np.testing.assert_allclose(found["zero"].radius, 0.0, atol=1e-15)
    np.testing.assert_allclose(found["both"].radius, x.radius + 0.5, rtol=1e-12)
    np.testing.assert_allclose(found["sum"].radius, 0.5 * np.sqrt(2), rtol=1e-12)
