"""Bounds on averages over posterior samples: those of the average, at one sample's memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import Float, bound, mean_bound
from bnncert.sets import Box, LpBall
from tests.bounds import networks

METHODS = ("crown-ibp", "crown")
SETS = ("box", "l2")


def region(name, factor=1.0):
    if name == "l2":
        return LpBall(jnp.ones(4), jnp.asarray(0.4 * factor), 2)
    return Box(jnp.zeros(4), factor * jnp.linspace(0.2, 0.7, 4))


def logits(params, x):
    (w, b), (v, c), (u, d) = params
    y = jax.nn.relu(v @ jax.nn.relu(w @ x + b) + c)
    return {"logits": u @ y + d, "first": y[0]}


def tanh_mlp(params, x):
    (w, b), (v, c), _ = params
    return jax.nn.softmax(v @ jnp.tanh(w @ x + b) + c)


def samples(count, width=6, scale=1.0):
    rng = np.random.default_rng(7)
    shapes = ((width, 4), (width, width), (3, width))
    return [
        (
            scale * rng.normal(size=(count, *s)) / np.sqrt(s[1]),
            0.3 * scale * rng.normal(size=(count, s[0])),
        )
        for s in shapes
    ]


def average(f, params, *args):
    values = jax.vmap(lambda p: f(p, *args))(params)
    return jax.tree.map(lambda leaf: leaf.mean(0), values)


@cache
def compiled(f, method):
    """The joint bound; that of the average as one function; the average of separate bounds."""

    def found(params, x):
        separate = [
            bound(f, method)(jax.tree.map(lambda leaf, i=i: leaf[i], params), x) for i in range(4)
        ]
        averaged = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *separate)

        def as_one(x):
            members = [f(jax.tree.map(lambda leaf, i=i: leaf[i], params), x) for i in range(4)]
            return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *members)

        return mean_bound(f, method)(params, x), bound(as_one, method)(x), averaged

    return jax.jit(found)


def ends(boxes):
    return networks.ends(boxes, networks=1)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_bound_of_the_average(method, name, float64):
    """Where the linear bound of each sample is inside its intervals: then nothing is intersected.

    Elsewhere each cuts by intervals in places of its own; the joint one stays inside the separate.
    """
    # Sets so small that next to no ReLU crosses: the intervals lose at the last layers only.
    x = region(name, 0.2)
    joint, as_one, _ = compiled(logits, method)(samples(4), x)
    for found, expected in zip(ends(joint), ends(as_one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("f", "method", "name"),
    [(logits, "crown", "box"), (logits, "crown-ibp", "l2"), (tanh_mlp, "crown-ibp", "box")],
)
def test_is_inside_the_average_of_separate_bounds(f, method, name, float64):
    joint, _, separate = compiled(f, method)(samples(4), region(name))
    (low, high), (separate_low, separate_high) = ends(joint), ends(separate)
    assert (low >= separate_low - 1e-12).all() and (high <= separate_high + 1e-12).all()
    assert (high - low).sum() < 0.95 * (separate_high - separate_low).sum()


@pytest.mark.parametrize(("f", "name"), [(logits, "l2"), (logits, "box")])
def test_averages_at_points_of_the_set_lie_inside(f, name, float64):
    params, x = samples(4), region(name)
    joint, *_ = compiled(f, "crown")(params, x)
    rng = np.random.default_rng(0)
    (start,) = networks.starts(rng, (x,), 200)
    size = ends(joint)[0].size
    direction = np.eye(size)[np.arange(200) % size] * rng.choice([-1.0, 1.0], (200, 1))

    def attacked(begin, towards):
        return networks.attacks(partial(average, f, params), (x,), (begin,), towards, 3)

    values = np.asarray(jax.vmap(attacked)(start, direction)).reshape(-1, size)
    low, high = ends(joint)
    assert (values >= low - 1e-12).all() and (values <= high + 1e-12).all()
    reached = values.max(0) - values.min(0)
    assert (reached > 0.2 * (high - low)).all()  # a bound much too small would be noticed


def test_at_a_point_it_is_the_average(float64):
    params, x = samples(4), region("box", 0.0)
    joint, *_ = compiled(logits, "crown")(params, x)
    value = networks.flat(average(logits, params, x.center))
    for end in ends(joint):
        np.testing.assert_allclose(end[0], value, rtol=1e-12, atol=1e-12)


def test_samples_without_a_common_axis_are_an_error():
    params = jax.tree.map(jnp.float32, samples(4))
    (w, b), *rest = params
    for wrong in ([(w[:3], b), *rest], jnp.float32(1.0)):
        with pytest.raises(ValueError, match="leading axis"):
            mean_bound(logits)(wrong, region("box"))


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_samples(method):
    def temporary(count):
        params = jax.tree.map(jnp.float32, samples(count, width=32))
        x = region("box")
        lowered = jax.jit(mean_bound(logits, method)).lower(params, x)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = temporary(2), temporary(64)
    assert few > 5_000  # it does count something
    assert many < 1.5 * few


@pytest.mark.parametrize("ball", [False, True], ids=["box", "l1"])
def test_averages_that_cancel_are_inside_outward_bounds_and_only_these(ball):
    """Samples are opposite, nearly: their mean is what rounding leaves of numbers 1e5 times it."""
    rng = np.random.default_rng(0)
    half = 1e5 * rng.normal(size=(60, 4, 5))
    w = np.float32(np.concatenate([half, -half * (1 + 1e-6 * rng.normal(size=half.shape))], 1))
    x = np.float32(rng.uniform(0.5, 1.5, (60, 5)))
    eps = np.float32(1e-4)

    @partial(jax.jit, static_argnames="rounding")
    def bounds(w, x, rounding):
        def one(w, x):
            region = LpBall(x, eps, 1) if ball else Box(x, x)
            return mean_bound(lambda w, x: w @ x, "crown", rounding=rounding)(w, region)

        return jax.vmap(one)(w, x)

    mean = np.float64(w).mean(1)  # both exact to 1e-9 of the numbers that cancel
    value, reach = (mean * x).sum(-1), (0.99 * eps * np.abs(mean).max(-1) if ball else 0)
    for rounding in ("outward", "nearest"):
        box = bounds(w, x, rounding)
        inside = (np.asarray(box.lower) <= value - reach) & (value + reach <= np.asarray(box.upper))
        assert inside.all() == (rounding == "outward")
    assert ((box.upper - box.lower) < 1).all()


def test_more_samples_than_a_dtype_can_average_are_an_error():
    w = jnp.ones((300, 2), jnp.bfloat16)
    with pytest.raises(ValueError, match="no error bound"):
        mean_bound(jnp.dot, rounding="outward")(w, Box(w[0], w[0]))
    with pytest.raises(ValueError, match="unit_roundoff"):
        mean_bound(jnp.dot, rounding=Float(2.0))
