"""Operations of one's own: recognised where they are called, sound by what is promised of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert
from bnncert import Box, bound, operation
from bnncert.bounds import UnsupportedPrimitiveError
from bnncert.bounds.ops import ELEMENTWISE
from bnncert.testing import check_operation
from tests.bounds.test_relaxations import CASES

BOX = Box(jnp.array([-1.0, 0.3, -2.0]), jnp.array([0.5, 0.3, 1.5]))
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)


def arctan2(x):
    """Rises, by equations that compare: op by op there is no bound of it."""
    return jnp.where(x > 0, 2.0 * jnp.arctan(x), 2.0 * x)


@jax.custom_jvp
def searched(x):
    """The cube root of x + x^3, by a loop that no rule passes."""

    def halve(ends):
        low, high, steps = ends
        middle = 0.5 * (low + high)
        below = middle**3 < x + x**3
        return jnp.where(below, middle, low), jnp.where(below, high, middle), steps - 1

    reach = 2.0 + jnp.abs(x) * 2.0
    return jax.lax.while_loop(lambda ends: ends[2] > 0, halve, (-reach, reach, 40))[0]


searched.defjvps(lambda g, y, x: g * (1 + 3 * x * x) / (3 * y * y + 1e-9))


def network(h):
    return lambda x: h(x @ W) @ V


def encloses(f, box, found):
    x = jnp.asarray(RNG.uniform(size=(2000, 3)), jnp.float32)
    values = jax.vmap(f)(box.lower + x * (box.upper - box.lower))
    slack = 1e-5 * (1 + jnp.abs(values).max())
    return bool(((found.lower <= values + slack) & (values <= found.upper + slack)).all())


@pytest.mark.parametrize("method", ("ibp", "forward", "crown-ibp", "crown", "alpha-crown"))
def test_what_grows_is_bounded_by_its_ends_alone(method):
    own = operation(searched, increasing=True)
    f = network(searched)
    with pytest.raises(UnsupportedPrimitiveError, match=r"'(lt|gt|le|ge)'"):
        bound(f, method)(BOX)
    assert encloses(f, BOX, bound(f, method, operations=[own])(BOX))


@pytest.mark.parametrize("method", ("forward", "crown-ibp", "crown", "alpha-crown"))
def test_a_convex_function_has_lines_by_its_derivative(method):
    own = operation(lambda x: jnp.exp(0.3 * x) + x * x, convex=(-math.inf, math.inf), name="bowl")
    f = network(own.function)
    found, apart = (bound(f, method, operations=o)(BOX) for o in ([own], []))
    assert encloses(f, BOX, found)
    assert float((found.upper - found.lower).sum()) < float((apart.upper - apart.lower).sum())


def test_an_s_shape_is_as_tight_as_the_library_s_own():
    own = operation(lambda x: jnp.tanh(x), increasing=True, convex=(-math.inf, 0.0), name="my_tanh")
    for method in ("ibp", "crown"):
        mine = bound(network(own.function), method, operations=[own])(BOX)
        theirs = bound(network(jnp.tanh), method)(BOX)
        np.testing.assert_allclose(mine.lower, theirs.lower, atol=1e-5)
        np.testing.assert_allclose(mine.upper, theirs.upper, atol=1e-5)


def test_an_interval_reaches_to_the_least_value_and_no_further():
    def parabola(x):
        return x * x - 0.5 * x

    own = operation(parabola, convex=(-math.inf, math.inf))
    box = bound(parabola, "ibp", operations=[own])(Box(jnp.array(-1.0), jnp.array(2.0)))
    assert -0.0625 - 1e-4 <= float(box.lower) <= -0.0625
    assert 3.0 <= float(box.upper) <= 3.0 + 1e-4


def test_it_is_found_by_its_equations_and_not_by_its_name():
    own = operation(arctan2, increasing=True)

    def other(x):
        return jnp.where(x > 0, 2.0 * jnp.arctan(x), 3.0 * x)

    other.__name__ = "arctan2"
    with pytest.raises(UnsupportedPrimitiveError):
        bound(other, "ibp", operations=[own])(BOX)
    found = bound(jax.jit(arctan2), "ibp", operations=[own])(BOX)
    np.testing.assert_allclose(found.lower, arctan2(BOX.lower), rtol=1e-6)
    np.testing.assert_allclose(found.upper, arctan2(BOX.upper), rtol=1e-6)


def test_rounded_outward_it_needs_an_error():
    own = operation(arctan2, increasing=True)
    with pytest.raises(UnsupportedPrimitiveError, match="arctan2"):
        bound(network(arctan2), "crown", rounding="outward", operations=[own])(BOX)
    known = operation(arctan2, increasing=True, rounding=(32.0, 8.0))
    for method in ("ibp", "crown"):
        outward = bound(network(arctan2), method, rounding="outward", operations=[known])(BOX)
        nearest = bound(network(arctan2), method, operations=[own])(BOX)
        assert bool((outward.lower < nearest.lower).all() & (outward.upper > nearest.upper).all())
        assert bool((outward.upper - outward.lower < 1.01 * (nearest.upper - nearest.lower)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is promised"),
        ({"increasing": True, "name": "tanh"}, "another name"),
        ({"convex": (-1.0, 1.0)}, "infinite"),
        ({"convex": (-math.inf, 1.0), "rounding": (1.0, 1.0)}, "increasing"),
    ],
)
def test_a_promise_from_which_nothing_follows_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        operation(arctan2, **options)


def test_a_function_that_holds_arrays_is_refused():
    scales = jnp.arange(3.0) + 1

    def scaled(x):
        return jnp.sinh(x) * scales

    own = operation(scaled, increasing=True)
    with pytest.raises(ValueError, match="holds arrays"):
        bound(scaled, "ibp", operations=[own])(BOX)


def test_false_promises_are_found():
    with pytest.raises(AssertionError, match="outside of its interval"):
        check_operation(
            operation(lambda x: jnp.sin(x) + 1, increasing=True, name="wave"), -9.0, 9.0
        )
    hollow = operation(lambda x: -x * x, convex=(-math.inf, math.inf), name="hill")
    with pytest.raises(AssertionError, match="hill"):
        check_operation(hollow, -9.0, 9.0)
    with pytest.raises(ValueError, match="one value"):
        check_operation(hollow._replace(family="pair"))


RECORDS = {operation.name: operation for operation in ELEMENTWISE}


@pytest.mark.parametrize("name", ("max", "clip -0.4 0.9", "tanh", "gelu", "sin", "lgamma", "cosh"))
def test_the_library_s_own_pass_the_test_that_users_call(name):
    op, function, constants, (lowest, highest) = CASES[name]
    params = {"y": constants[0]} if op == "integer_pow" else {}
    check_operation(
        RECORDS[op],
        max(lowest, -50.0),
        min(highest, 50.0),
        function=lambda x, *_: function(x),
        constants=() if params else constants,
        params=params,
        count=2000,
    )


def test_it_stands_at_the_front_door():
    assert bnncert.operation is operation and bnncert.Operation is type(RECORDS["tanh"])
