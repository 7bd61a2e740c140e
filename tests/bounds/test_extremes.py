"""Bounds hold at the ends of a format's range: where functions, or what bounds them, over- or
underflow.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.ops import LINES, Choice, interval, lines, operation_of
from bnncert.bounds.tracing import trace
from bnncert.sets import Box
from tests.bounds.extremes import EXACT, intervals, points

pytestmark = pytest.mark.slow

FORMATS = (jnp.float32, jnp.bfloat16, jnp.float16)
COUNT = 2000
CONSTANTS = {
    "max": (0.7,),
    "min": (-0.3,),
    "clip": (-0.4, 0.9),
    "leaky_relu": (1.5,),
    "elu": (2.5,),
    "celu": (0.5,),
    "squareplus": (3.0,),
    "logaddexp": (-2.5,),
}
CASES = {
    **{op: (op, CONSTANTS.get(op, ())) for op in LINES if op not in ("integer_pow", "pow")},
    **{f"logaddexp {c}": ("logaddexp", (c,)) for c in (-np.inf, -1e30, 1e30)},
    **{f"power {n}": ("integer_pow", (n,)) for n in (3, 4, 5, -2, -3)},
    **{f"power {p}": ("pow", (p,)) for p in (0.3, 1.7, -0.7)},
}
METHODS = ("ibp", "forward", "crown-ibp", "crown")
SPELLED = {
    "max": jnp.maximum,
    "min": jnp.minimum,
    "abs": jnp.abs,
    "clip": jnp.clip,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "logaddexp": jnp.logaddexp,
    "square": jnp.square,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "pow": jnp.power,
    "reciprocal": lambda x: jax.lax.integer_pow(x, -1),
}


def function(name):
    """As users write it."""
    op, constants = CASES[name]
    if op == "integer_pow":
        return lambda x: jax.lax.integer_pow(x, constants[0])
    f = SPELLED.get(op) or getattr(jax.nn, op, None) or getattr(jax.lax, op)
    return lambda x: f(x, *(within(c, x.dtype) for c in constants))


def within(constant, dtype):
    """The constant in a format, or the format's largest."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.asarray(min(max(constant, -largest), largest), dtype)


def exact(name, x, dtype):
    """In float64, constants as the format has them; NaN where the function is not defined."""
    op, constants = CASES[name]
    with np.errstate(all="ignore"):
        rounded = [c if isinstance(c, int) else float(within(c, dtype)) for c in constants]
        return EXACT[op](x, *rounded)


@partial(jax.jit, static_argnames="name")
def nearest(name, l, u, fraction):
    """The interval, and lines by default and by fractions."""
    node = trace(function(name), (Box(l, u),), {}).nodes[-1]
    assert node.op == CASES[name][0]
    choices = [Choice(variant=v) for v in range(operation_of(node).variants)]
    choices.append(Choice(fraction, fraction))
    return interval(node, Box(l, u)), [lines(node, Box(l, u), choice) for choice in choices]


def excess(lower, values):
    """By how much a lower bound is above the values; an infinite one must be -inf."""
    assert not np.isnan(lower).any() and not (lower == np.inf).any()
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values) | np.isposinf(values), -np.inf, lower - values)


def in_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_intervals_and_lines_enclose_on_the_whole_range(name, dtype):
    """Up to 32 eps of the terms of a line, and 256 of the value: exp(-x^2) is x^2 eps off.

    A log-sum-exp and log Gamma are 0 where their terms cancel; x times a subnormal number is x of
    them off.
    """
    l, u = intervals(dtype, COUNT)
    x, eps = points(l, u), float(jnp.finfo(dtype).eps)
    h = exact(name, x, dtype)
    fraction = jnp.asarray(np.random.default_rng(5).choice([0, 0.3, 1], COUNT), dtype)
    box, found = in_float64(nearest(name, jnp.asarray(l), jnp.asarray(u), fraction))
    size = np.maximum(np.abs(l.astype(np.float64)), np.abs(u.astype(np.float64)))
    least = float(jnp.finfo(dtype).tiny) if dtype != jnp.float16 else 2.0**-24
    cancels = {"logaddexp": 4.0, "lgamma": 64.0}.get(CASES[name][0], 0.0) * eps
    sides = [(0 * size, box.lower, h), (0 * size, -box.upper, -h)]
    for a, b, c, d in found:
        sides += [(a, b, h), (-c, -d, -h)]
    for slope, offset, values in sides:
        with np.errstate(invalid="ignore"):
            slack = 32 * eps * (np.abs(slope) * size + np.abs(offset)) + 256 * eps * np.abs(values)
        over = excess(slope * x + offset, values)
        bad = over > np.where(np.isfinite(slack), slack, 0) + cancels + 20 * least
        assert not bad.any(), [(v[bad.any(0)][:3]) for v in (l, u, slope, offset)]


@partial(jax.jit, static_argnames="name")
def outward(name, l, u):
    run = bound(function(name), "crown-ibp", rounding="outward")
    return jax.vmap(lambda l, u: run(Box(l, u)))(l, u)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "pow"])
def test_outward_bounds_enclose_on_the_whole_range(name):
    l, u = intervals(jnp.float32, COUNT)
    h = exact(name, points(l, u), jnp.float32)
    box = in_float64(outward(name, jnp.asarray(l), jnp.asarray(u)))
    for lower, values in ((box.lower, h), (-box.upper, -h)):
        bad = excess(lower, values) > 0
        assert not bad.any(), [(v[bad.any(0)][:3]) for v in (l, u, lower)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("c", [-1e30, -np.inf, 1e30, np.full((2, 3), -1e30, np.float32)])
def test_a_large_constant_takes_nothing_from_logaddexp(method, c):
    x = Box(jnp.full(3, 4.0), jnp.full(3, 4.5))
    run = jax.jit(bound(lambda x, c: jnp.logaddexp(x, c), method))
    c = jnp.asarray(c, jnp.float32)
    expected = [jnp.broadcast_to(jnp.logaddexp(end, c), (2, 3)) for end in (x.lower, x.upper)]
    box = run(x, c)
    for found, end in zip((box.lower, box.upper), expected, strict=True):
        np.testing.assert_allclose(jnp.broadcast_to(found, (2, 3)), end, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_erfc_keeps_its_tail(method):
    x = Box(jnp.array([4.0, 5.0, 8.0]), jnp.array([4.1, 5.0, 8.1]))
    box = bound(jax.lax.erfc, method)(x)
    expected = jax.lax.erfc(x.upper), jax.lax.erfc(x.lower)
    for found, end in zip((box.lower, box.upper), expected, strict=True):
        np.testing.assert_allclose(found, end, rtol=2e-4)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quotient_of_any_magnitudes_is_enclosed(method, rounding):
    (xl, xu), (yl, yu) = (intervals(jnp.float32, 1000, seed) for seed in (1, 2))
    yl, yu = np.minimum(np.abs(yl), np.abs(yu)), np.maximum(np.abs(yl), np.abs(yu))
    run = bound(lambda x, y: x / y, method, rounding=rounding)
    box = in_float64(jax.jit(jax.vmap(run))(Box(xl, xu), Box(yl, yu)))
    x, y = points(xl, xu), np.random.default_rng(0).permutation(points(yl, yu, seed=2))
    with np.errstate(all="ignore"):
        value = x / y
    slack = 0.0
    if rounding == "nearest":  # of planes, by their largest terms
        slack = 1e-5 * np.abs(value).max(0) + 1e-37
    for lower, values in ((box.lower, value), (-box.upper, -value)):
        bad = excess(lower, values) > slack
        assert not bad.any(), [v[bad.any(0)][:3] for v in (xl, xu, yl, yu, lower)]


@pytest.mark.parametrize("method", METHODS)
def test_what_overflows_has_no_bound_on_that_side(method):
    def f(x, y):
        return jnp.exp(x), -jnp.exp(x), y * y[::-1], jax.lax.integer_pow(y, 5)

    box = bound(f, method)(
        Box(jnp.full(2, 100.0), jnp.full(2, 200.0)), Box(y := jnp.full(2, 1e30), 2 * y)
    )
    for i, part in enumerate(box):
        assert (part.lower < jnp.inf).all() and (part.upper > -jnp.inf).all()
        assert (part.lower == -jnp.inf).all() if i == 1 else (part.upper == jnp.inf).all()


def narrow_intervals(dtype, count=400):
    """Around 0 and numbers of every magnitude, from the width of a subnormal number on."""
    rng = np.random.default_rng(3)
    least = np.log2(float(jnp.finfo(dtype).tiny)) - 3
    size = np.exp2(rng.uniform(least, 2, count)) * rng.choice([-1, 0, 0, 1], count)
    width, share = np.exp2(rng.uniform(least, -3, count)), rng.random(count)
    return (jnp.asarray(v, dtype) for v in (size - share * width, size + (1 - share) * width))


SINGULAR = ("log", "lgamma", "sqrt", "rsqrt", "reciprocal", "pow")
"""Functions whose own derivatives overflow beside 0."""


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "name", [n for n, (op, c) in CASES.items() if op not in SINGULAR and c not in ((-2,), (-3,))]
)
def test_the_gradient_of_a_narrow_interval_is_a_number(name, dtype):
    l, u = narrow_intervals(dtype)

    @jax.jit
    @jax.grad
    def gradient(ends):
        node = trace(function(name), (Box(*ends),), {}).nodes[-1]
        found = lines(node, Box(*ends), Choice())
        return sum(jnp.sum(jnp.where(jnp.isfinite(field), field, 0)) for field in found)

    for part in gradient((l, u)):
        assert not jnp.isnan(part).any(), [v[jnp.isnan(part)][:3] for v in (l, u)]


def test_the_gradient_of_a_clipped_dead_unit_is_finite():
    """Rounded outward, what is 0 for every input is an interval of some subnormal numbers."""

    def total(w):
        dead = bound(lambda x: w * jnp.clip(4 * x, 0, 6), "crown-ibp", rounding="outward")
        return dead(Box(jnp.zeros(1), jnp.zeros(1))).upper[0]

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.float32(2.0)))
