"""Lines enclose their nonlinearity on every interval, and are as close as they can be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import relaxations

SLOPES = (0.0, 0.01, 0.2, 1.0, 1.5, -0.6)


def lines_of(name, lower_slope="adaptive"):
    """The function and its lines, `(h, (l, u) -> Lines)`."""
    rules = {
        "relu": (jax.nn.relu, partial(relaxations.relu, lower_slope=lower_slope)),
        "softplus": (jax.nn.softplus, relaxations.softplus),
        "exp": (jnp.exp, relaxations.exp),
        "tanh": (jnp.tanh, relaxations.tanh),
        "sigmoid": (jax.nn.sigmoid, relaxations.sigmoid),
        "maximum": (
            lambda x: jnp.maximum(x, 0.7),
            lambda l, u: relaxations.maximum(l, u, jnp.full_like(l, 0.7), lower_slope),
        ),
        "minimum": (
            lambda x: jnp.minimum(x, -0.3),
            lambda l, u: relaxations.minimum(l, u, jnp.full_like(l, -0.3), lower_slope),
        ),
    }
    for slope in SLOPES:
        rules[f"leaky {slope}"] = (
            partial(jax.nn.leaky_relu, negative_slope=slope),
            lambda l, u, slope=slope: relaxations.leaky_relu(
                l, u, jnp.asarray(slope, l.dtype), lower_slope
            ),
        )
    return rules[name]


PIECEWISE = ("relu", "maximum", "minimum", *(f"leaky {s}" for s in SLOPES))
SMOOTH = ("softplus", "exp", "tanh", "sigmoid")
every_rule = pytest.mark.parametrize("name", (*PIECEWISE, *SMOOTH))


def intervals(name, dtype, count=10_000):
    """Ordinary, degenerate, huge, tiny, one-sided intervals, and such as begin or end at 0."""
    rng = np.random.default_rng(0)
    huge = 60.0 if name == "exp" else 1e4  # e^x overflows
    scale = rng.choice([1e-6, 1e-3, 0.3, 3.0, 30.0, huge], count)
    l = rng.uniform(-1, 1, count) * scale
    u = rng.uniform(-1, 1, count) * rng.permutation(scale)
    fifth = count // 5
    u[:fifth] = l[:fifth]
    u[fifth : 2 * fifth] = l[fifth : 2 * fifth] + rng.choice([1e-9, 1e-7, 1e-5], fifth)
    l[2 * fifth : 2 * fifth + 200] = 0
    u[2 * fifth + 100 : 2 * fifth + 300] = 0
    u[2 * fifth + 300 : 2 * fifth + 400] = -l[2 * fifth + 300 : 2 * fifth + 400]
    l, u = np.minimum(l, u), np.maximum(l, u)
    return jnp.asarray(l, dtype), jnp.asarray(u, dtype)


def gaps(name, l, u, lower_slope="adaptive"):
    """h minus the lower line, and the upper line minus h, at 65 points; over the magnitudes."""
    h, rule = lines_of(name, lower_slope)
    lines = rule(l, u)
    t = jnp.linspace(0, 1, 65, dtype=l.dtype)[:, None]
    x = jnp.clip(l + t * (u - l), l, u)
    # In float64: what is tested is the lines, not the rounding of the test.
    x, l, u, *lines = (np.asarray(v, np.float64) for v in (x, l, u, *lines))
    value = np.asarray(h(jnp.asarray(x)))
    scale = (
        1
        + np.abs(value).max(0)
        + np.maximum(np.abs(l), np.abs(u)) * np.maximum(np.abs(lines[0]), np.abs(lines[2]))
    )
    below = value - (lines[0] * x + lines[1])
    above = (lines[2] * x + lines[3]) - value
    return below / scale, above / scale


@every_rule
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float64, 1e-12), (jnp.float32, 2e-6)])
def test_lines_enclose(name, dtype, atol, float64):
    below, above = gaps(name, *intervals(name, dtype))
    assert np.isfinite(below).all() and np.isfinite(above).all()
    assert below.min() >= -atol and above.min() >= -atol


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("lower_slope", relaxations.LOWER_SLOPES)
def test_every_lower_slope_encloses(name, lower_slope, float64):
    below, above = gaps(name, *intervals(name, jnp.float64), lower_slope)
    assert below.min() >= -1e-12 and above.min() >= -1e-12


@every_rule
def test_lines_touch(name, float64):
    """A line that touches nowhere could be moved closer."""
    l, u = intervals(name, jnp.float64)
    below, above = gaps(name, l, u)
    # A kink or a point of tangency may lie between two points of the grid.
    grid = np.asarray((u - l) / 64) ** (1 if name in PIECEWISE else 2)
    assert (below.min(0) <= 1e-12 + grid).all()
    assert (above.min(0) <= 1e-12 + grid).all()


@every_rule
def test_at_a_point_both_lines_give_the_value(name, float64):
    x = jnp.asarray([-40.0, -1.0, -1e-8, 0.0, 1e-8, 0.7, 40.0])
    h, rule = lines_of(name)
    lines = rule(x, x)
    np.testing.assert_allclose(
        lines.lower_slope * x + lines.lower_offset, h(x), rtol=1e-13, atol=1e-14
    )
    np.testing.assert_allclose(
        lines.upper_slope * x + lines.upper_offset, h(x), rtol=1e-13, atol=1e-14
    )


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gradients_are_finite(name, dtype, float64):
    _, rule = lines_of(name)
    l, u = intervals(name, dtype)
    total = lambda l, u: sum(jnp.sum(field) for field in rule(l, u))  # noqa: E731
    for slope in jax.grad(total, argnums=(0, 1))(l, u):
        assert bool(jnp.isfinite(slope).all())


def test_relu_takes_the_smaller_area():
    l, u = jnp.array([-1.0, -2.0, -2.0, -3.0, 1.0]), jnp.array([2.0, 1.0, 2.0, -1.0, 2.0])
    lines = relaxations.relu(l, u)
    np.testing.assert_array_equal(lines.lower_slope, [1, 0, 0, 0, 1])
    np.testing.assert_allclose(lines.upper_slope, [2 / 3, 1 / 3, 1 / 2, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(lines.upper_offset, [2 / 3, 2 / 3, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("name", SMOOTH)
def test_lines_support_the_envelope(name, float64):
    """At the middle, where the area is decided, no line could be closer.

    The convex envelope of h at the middle is the least of all chords that span it.
    """
    if name == "exp":
        pytest.skip("its tangent is held near l by choice")
    h, rule = lines_of(name)
    rng = np.random.default_rng(1)
    l = rng.uniform(-6, 4, 60)
    u = l + rng.uniform(0.05, 8, 60)
    middle = 0.5 * (l + u)
    lines = [np.asarray(v) for v in rule(jnp.asarray(l), jnp.asarray(u))]
    left = l + (middle - l) * np.linspace(0, 1, 401)[:, None]
    right = u - (u - middle) * np.linspace(0, 1, 401)[:, None]
    for sign, slope, offset in ((1, lines[0], lines[1]), (-1, -lines[2], -lines[3])):
        a, b = sign * np.asarray(h(left)), sign * np.asarray(h(right))
        for i in range(len(l)):
            span = np.maximum(right[None, :, i] - left[:, None, i], 1e-12)
            weight = (middle[i] - left[:, None, i]) / span
            envelope = ((1 - weight) * a[:, None, i] + weight * b[None, :, i])[:-1, :-1].min()
            line = slope[i] * middle[i] + offset[i]
            assert line <= envelope + 1e-12
            assert envelope - line <= 1e-3 * (u[i] - l[i]) ** 2 / 10 + 1e-9, (l[i], u[i])
