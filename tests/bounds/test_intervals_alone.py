"""Operations that are bounded by their interval alone: exact, and open where they are undefined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import UnsupportedPrimitiveError, bound
from bnncert.sets import Box

KEY = jax.random.key(0)
CENTER = jnp.array([0.4, -0.3, 0.1, 0.6])
BOX = Box(CENTER - 0.25, CENTER + 0.25)
FUNCTIONS = {
    "sort": jnp.sort,
    "top_k": lambda x: jax.lax.top_k(x, 2)[0],
    "middle": lambda x: jnp.sort(x)[1:3].mean(),
    "reduce_prod": lambda x: jnp.prod(x.reshape(2, 2), axis=0),
    "product of all": jnp.prod,
    "cumprod": jnp.cumprod,
    "backwards": lambda x: jax.lax.cumprod(x, reverse=True),
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atanh": jnp.arctanh,
    "acosh": lambda x: jnp.arccosh(x + 2),
    "erf_inv": jax.scipy.special.erfinv,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_intervals_hold_all_values_and_are_reached(name):
    """At random points and at corners, where what is monotone or multilinear has its extremes."""
    f = FUNCTIONS[name]
    signs = jnp.stack(jnp.meshgrid(*[jnp.array([-1.0, 1.0])] * 4), -1).reshape(-1, 4)
    points = CENTER + 0.25 * jnp.concatenate(
        [signs, jax.random.uniform(KEY, (500, 4), minval=-1.0, maxval=1.0)]
    )
    values = jax.vmap(f)(points)
    for method in ("ibp", "crown"):
        box = bound(f, method)(BOX)
        assert (values >= box.lower - 1e-5).all() and (values <= box.upper + 1e-5).all()
        np.testing.assert_allclose(box.lower, values.min(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(box.upper, values.max(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "lower", "upper"),
    [
        ("tan", 1.5, 1.6),
        ("tan", -2.0, 2.0),
        ("tan", 0.0, 100.0),
        ("tan", 1e6, 1e6 + 0.1),
        ("asin", 0.9, 1.1),
        ("acos", -1.1, 0.0),
        ("atanh", 0.5, 1.0),
        ("acosh", -1.5, 0.0),
        ("erf_inv", -1.0, 0.0),
    ],
)
def test_where_a_function_is_not_defined_there_is_no_bound(name, lower, upper):
    box = bound(FUNCTIONS[name], "ibp")(Box(jnp.full(4, lower), jnp.full(4, upper)))
    assert (box.lower == -jnp.inf).all() and (box.upper == jnp.inf).all()


@pytest.mark.parametrize("turns", [-300, -1, 0, 7, 900])
def test_the_tangent_between_its_poles(turns):
    """Each branch, up to a hair of its poles, in the arithmetic of float32."""
    middle = np.float32(turns * np.pi)
    for reach in (0.1, 1.0, 1.5):
        box = bound(jnp.tan, "ibp")(Box(jnp.array([middle - reach]), jnp.array([middle + reach])))
        values = jnp.tan(jnp.linspace(middle - reach, middle + reach, 1001))
        assert reach > 1 or bool(jnp.isfinite(box.lower[0]) & jnp.isfinite(box.upper[0]))
        assert box.lower[0] <= values.min() + 1e-3 * jnp.abs(values).max()
        assert box.upper[0] >= values.max() - 1e-3 * jnp.abs(values).max()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
def test_products_of_huge_and_tiny_numbers_hold_the_truth(order):
    """1e-30 1e-30 1e30 1e30 is 1 in any order, whatever is lost on the way."""
    factors = jnp.array([1e-30, 1e-30, 1e30, 1e30], jnp.float32)[jnp.array(order)]
    for f in (jnp.prod, lambda x: jnp.cumprod(x)[-1]):
        box = bound(f, "ibp")(Box(factors, factors))
        assert box.lower <= 1 <= box.upper


def test_order_statistics_are_exact_in_floating_point():
    for f in (FUNCTIONS["sort"], FUNCTIONS["top_k"]):
        nearest, outward = (bound(f, "ibp", rounding=r)(BOX) for r in ("nearest", "outward"))
        np.testing.assert_array_equal(nearest.lower, outward.lower)


@pytest.mark.parametrize("name", ["tan", "reduce_prod", "cumprod", "erf_inv"])
def test_rounding_that_is_not_known_is_refused(name):
    with pytest.raises(UnsupportedPrimitiveError, match="round"):
        bound(FUNCTIONS[name], "ibp", rounding="outward")(BOX)


def test_what_is_sorted_along_is_refused():
    with pytest.raises(UnsupportedPrimitiveError, match=r"num_keys.*change places"):
        bound(lambda x: CENTER[jnp.argsort(x)] * x, "ibp")(BOX)
    with pytest.raises(UnsupportedPrimitiveError, match="compare the values themselves"):
        bound(lambda x: CENTER[jax.lax.top_k(x, 1)[1]], "ibp")(BOX)


def test_what_only_looks_at_values_is_passed_over():
    def f(x):
        jax.debug.print("{x}", x=x)
        return 2 * x

    box = bound(f, "ibp")(BOX)
    np.testing.assert_allclose(box.upper, 2 * BOX.upper)
