"""`bound` is a transformation: any arguments, any outputs, one compilation, clear errors."""

from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert.bounds
from bnncert.bounds import CROWN, AlphaCROWN, Forward, bound, crown, ibp, linear_bounds
from bnncert.bounds.arithmetic import arithmetic_of
from bnncert.bounds.methods import METHODS as KINDS
from bnncert.bounds.methods import linear_method_of, method_of
from bnncert.sets import Box, LpBall, ball

METHODS = tuple(KINDS)

W = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])
X = jnp.array([0.2, -0.4, 0.6])
every_method = pytest.mark.parametrize("method", METHODS)


def f(w, x):
    return jax.nn.relu(w @ x)


def equal(a, b):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), a, b)


@pytest.mark.smoke
@every_method
def test_bounds_of_one_layer(method):
    box = bound(lambda x: f(W, x), method)(ball(X, 0.1))
    middle, reach = W @ X, 0.1 * jnp.abs(W).sum(axis=1)
    equal(box.lower, jax.nn.relu(middle - reach))
    equal(box.upper, jax.nn.relu(middle + reach))


def test_shorthands():
    x = ball(X, 0.1)
    g = partial(f, W)
    equal(ibp(g)(x), bound(g, "ibp")(x))
    equal(crown(g, batch_size=1)(x), bound(g, "crown")(x))
    equal(bound(g)(x), bound(g, "crown-ibp")(x))


@every_method
def test_sets_anywhere_among_the_arguments(method):
    """In pytrees and keyword arguments, beside constants of every type."""

    def model(params, scale, *, x, mode, flag=None, count=2):
        y = params["layer"]["w"] @ x["image"] + params["b"]
        assert mode == "twice" and flag is None and count == 3 and scale == 2
        return {"y": scale * y, "none": None, "pair": (y[0], x["other"])}

    params = {"layer": {"w": W}, "b": Box(jnp.zeros(2), jnp.ones(2))}
    inputs = {"image": ball(X, 0.1), "other": np.arange(2)}
    out = bound(model, method)(params, 2, x=inputs, mode="twice", count=3)
    reach = 0.1 * jnp.abs(W).sum(axis=1)
    equal(out["y"], Box(2 * (W @ X - reach), 2 * (W @ X + reach + 1)))
    assert out["none"] is None
    equal(out["pair"][0], Box((W @ X - reach)[0], (W @ X + reach + 1)[0]))
    equal(out["pair"][1], Box(jnp.arange(2), jnp.arange(2)))


@every_method
def test_an_output_that_no_set_reaches_is_a_point(method):
    value, moving = bound(lambda x: (jnp.sin(W), x + 1.0), method)(ball(X, 0.1))
    equal(value, Box(jnp.sin(W), jnp.sin(W)))
    equal(moving, Box(X + 0.9, X + 1.1))


@every_method
def test_the_input_itself_is_an_output(method):
    for region in (ball(X, 0.1), LpBall(X, jnp.float32(0.1), 2)):
        equal(bound(lambda x: x, method)(region), Box(X - 0.1, X + 0.1))


def test_equinox_modules():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    first = model.layers[0].weight
    widened = eqx.tree_at(lambda m: m.layers[0].weight, model, Box(first - 0.1, first + 0.1))
    run = lambda m, x: m(x)  # noqa: E731
    box = bound(run, "crown")(widened, X)
    assert ((box.lower <= model(X)) & (model(X) <= box.upper)).all()
    assert (box.upper > box.lower).all()
    equal(bound(model, "crown")(ball(X, 0.0)), Box(model(X), model(X)))
    jitted = eqx.filter_jit(bound(run, "crown"))(widened, X)
    equal(jitted, box)


@every_method
def test_one_compilation_for_new_radii_inputs_and_weights(method):
    def of(w, x, eps):
        return bound(lambda v: f(w, v), method)(ball(x, eps))

    once = jax.jit(jax.vmap(chex.assert_max_traces(of, n=1), in_axes=(None, 0, None)))
    batch = jnp.stack([X, -X])
    widths = [once(W, batch, jnp.float32(eps)).radius.max() for eps in (0.0, 0.1, 0.2)]
    assert widths[0] <= 1e-7 < widths[1] < widths[2]
    once(2 * W, 3 * batch, jnp.float32(0.1))
    chex.clear_trace_counter()


def test_gradients_equal_finite_differences(float64):
    w, x = jnp.asarray(W, float), jnp.asarray(X, float)

    def worst(w, eps, method):
        box = bound(lambda v: jnp.tanh(f(w, v)).sum(), method)(ball(x, eps))
        return box.upper - 0.5 * box.lower

    for method in METHODS[:-1]:  # alpha-crown's fractions are held fixed in its derivative
        slope = jax.grad(worst, argnums=1)(w, 0.3, method)
        step = (worst(w, 0.3 + 1e-6, method) - worst(w, 0.3 - 1e-6, method)) / 2e-6
        np.testing.assert_allclose(slope, step, rtol=1e-5)
        assert slope > 0


def test_half_precision_casts():
    def low(x):
        return (W.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(jnp.float32)

    for method in METHODS:
        box = bound(lambda x: jax.nn.relu(low(x)), method)(ball(X, 0.1))
        exact = bound(lambda x: f(W, x), method)(ball(X, 0.1))
        assert box.lower.dtype == jnp.float32
        np.testing.assert_allclose(box.upper, exact.upper, atol=0.03)
    half = bound(lambda x: jax.nn.softplus(x), "crown")(ball(X.astype(jnp.float16), 0.1))
    assert half.lower.dtype == jnp.float16


def test_linear_bounds_have_the_structure_of_the_arguments():
    def model(params, x, *, shift):
        return {"y": params["w"] @ x, "z": x + shift, "c": W}

    params = {"w": W, "unused": jnp.zeros(2)}
    found = linear_bounds(model)(params, ball(X, 0.1), shift=Box(jnp.zeros(3), jnp.ones(3)))
    a, x_part, kwargs = found["z"].lower.A
    assert a == {"w": None, "unused": None}
    equal((x_part, kwargs["shift"]), (jnp.eye(3), jnp.eye(3)))
    equal(found["y"].upper.A[1], W)
    equal(found["y"].upper.A[2]["shift"], jnp.zeros((2, 3)))
    equal((found["c"].lower.b, found["c"].upper.b), (W, W))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: bound(f, "forwards"), ValueError, "method = 'forwards'.*'crown-ibp'"),
        (lambda: bound(f, rounding="upward"), ValueError, "rounding = 'upward'"),
        (lambda: CROWN(lower_slope="steep"), ValueError, "lower_slope = 'steep'"),
        (lambda: Forward(lower_slope="1"), ValueError, "lower_slope = '1'.*'zero'"),
        (lambda: method_of(CROWN), TypeError, r"did you mean CROWN\(\)"),
        (lambda: method_of(None), TypeError, r"method = None.*IBP\(\)"),
        (lambda: linear_method_of(AlphaCROWN()), TypeError, r"AlphaCROWN.*CROWNIBP\(\)"),
        (lambda: arithmetic_of(None), TypeError, r"rounding = None.*bnncert.Float"),
        (lambda: bound(f, batch_size=0), ValueError, "batch_size = 0"),
        (lambda: AlphaCROWN(steps=0), ValueError, "steps = 0"),
        (lambda: linear_bounds(f, "ibp"), ValueError, "method = 'ibp'"),
        (lambda: linear_bounds(f, batch_size=-1), ValueError, "batch_size = -1"),
        (lambda: bound(f)(W, X), ValueError, "no set among the arguments.*bnncert.ball"),
        (lambda: bound(f)(W, Box(X, X - 1.0)), ValueError, r"lower > upper at \(0,\)"),
        (lambda: bound(f)(W, Box(X, X * jnp.nan)), ValueError, "argument leaf 1.*NaN"),
        (lambda: bound(f)(W, LpBall(X, -0.5, 2)), ValueError, r"eps = -0\.5"),
        (lambda: bound(f)(W, Box(X, X[:2])), ValueError, r"\(3,\).*\(2,\)"),
        (lambda: bound(f)(W, Box(jnp.arange(3), jnp.arange(3))), TypeError, "int32"),
    ],
)
def test_bad_calls_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_what_is_public():
    assert set(bnncert.bounds.__all__) >= {"bound", "crown", "ibp", "linear_bounds"}
    assert bound(f).__name__ == "f"
