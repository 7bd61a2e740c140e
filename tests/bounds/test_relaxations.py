"""Lines enclose their nonlinearity on every interval, and are as close as they can be."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds.graph import Node
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.ops import ELEMENTWISE, LINES, LOWER_SLOPES, Choice, interval
from bnncert.sets import Box

INITIAL = {o.name: o.initial for o in ELEMENTWISE if o.lines and o.initial}
FREE = set(INITIAL)
TWO_VARIANTS = {operation.name for operation in ELEMENTWISE if operation.variants == 2}

# By name: the operation, the function, its constants, and where it is defined and representable.
EVERYWHERE = (-1e4, 1e4)
POSITIVE = (1e-3, 1e4)
CASES = {
    "max": ("max", partial(jnp.maximum, 0.7), (0.7,), EVERYWHERE),
    "min": ("min", partial(jnp.minimum, -0.3), (-0.3,), EVERYWHERE),
    "abs": ("abs", jnp.abs, (), EVERYWHERE),
    **{
        f"clip {a} {b}": ("clip", lambda x, a=a, b=b: jnp.clip(x, a, b), (a, b), EVERYWHERE)
        for a, b in ((-0.4, 0.9), (0.0, 6.0), (0.5, 0.5), (-np.inf, 2.0), (-3.0, np.inf))
    },
    "hard_tanh": ("hard_tanh", lambda x: jnp.clip(x, -1, 1), (), EVERYWHERE),
    **{
        f"leaky {a}": ("leaky_relu", partial(jax.nn.leaky_relu, negative_slope=a), (a,), EVERYWHERE)
        for a in (0.0, 0.01, 1.0, 1.5, -0.6)
    },
    **{
        f"elu {a}": ("elu", partial(jax.nn.elu, alpha=a), (a,), EVERYWHERE) for a in (0.0, 1.0, 2.5)
    },
    "celu": ("celu", partial(jax.nn.celu, alpha=0.5), (0.5,), EVERYWHERE),
    # without the cancellation of (x + sqrt(x^2 + b)) / 2
    "squareplus": (
        "squareplus",
        lambda x: jnp.maximum(x, 0) + 1.5 / (jnp.sqrt(x * x + 3) + jnp.abs(x)),
        (3.0,),
        EVERYWHERE,
    ),
    **{
        f"logaddexp {c}": ("logaddexp", lambda x, c=c: jnp.logaddexp(x, c), (c,), EVERYWHERE)
        for c in (-1.5, -1e30, 50.0)
    },
    "gelu": ("gelu", partial(jax.nn.gelu, approximate=False), (), EVERYWHERE),
    "gelu_tanh": ("gelu_tanh", partial(jax.nn.gelu, approximate=True), (), EVERYWHERE),
    **{
        name: (name, getattr(jax.nn, name), (), EVERYWHERE)
        for name in (
            "softplus",
            "log_sigmoid",
            "selu",
            "silu",
            "mish",
            "hard_silu",
            "soft_sign",
        )
    },
    "logistic": ("logistic", jax.nn.sigmoid, (), EVERYWHERE),
    "tanh": ("tanh", jnp.tanh, (), EVERYWHERE),
    "erf": ("erf", jax.lax.erf, (), EVERYWHERE),
    "erfc": ("erfc", jax.lax.erfc, (), EVERYWHERE),
    "atan": ("atan", jnp.arctan, (), EVERYWHERE),
    "asinh": ("asinh", jnp.arcsinh, (), EVERYWHERE),
    "cbrt": ("cbrt", jnp.cbrt, (), EVERYWHERE),
    "sin": ("sin", jnp.sin, (), (-1e3, 1e3)),
    "cos": ("cos", jnp.cos, (), (-1e3, 1e3)),
    "exp": ("exp", jnp.exp, (), (-1e4, 60.0)),
    "exp2": ("exp2", jnp.exp2, (), (-1e4, 60.0)),
    "expm1": ("expm1", jnp.expm1, (), (-1e4, 60.0)),
    "log": ("log", jnp.log, (), POSITIVE),
    "log1p": ("log1p", jnp.log1p, (), (-0.999, 1e4)),
    "sqrt": ("sqrt", jnp.sqrt, (), (0.0, 1e4)),
    "rsqrt": ("rsqrt", jax.lax.rsqrt, (), POSITIVE),
    "reciprocal": ("reciprocal", lambda x: 1 / x, (), POSITIVE),
    "reciprocal, negative": ("reciprocal", lambda x: 1 / x, (), (-1e4, -1e-3)),
    "square": ("square", jnp.square, (), EVERYWHERE),
    "cosh": ("cosh", jnp.cosh, (), (-60.0, 60.0)),
    "lgamma": ("lgamma", jax.lax.lgamma, (), POSITIVE),
    **{
        f"power {n}": ("integer_pow", lambda x, n=n: x**n, (n,), EVERYWHERE)
        for n in (0, 1, 3, 4, 5)
    },
    **{
        f"power {n} of {side}": ("integer_pow", lambda x, n=n: x ** (1.0 * n), (n,), where)
        for n in (-2, -3)
        for side, where in (("positive", (1e-2, 1e4)), ("negative", (-1e4, -1e-2)))
    },
    **{
        f"power {p}": ("pow", lambda x, p=p: x**p, (p,), (0.0 if p > 0 else 1e-2, 1e3))
        for p in (0.3, 0.5, 1.7, 2.0, -0.7)
    },
}
KINKS = tuple(
    name for name, case in CASES.items() if case[0] in ("max", "min", "abs", "leaky_relu")
)
CLIPPED = (*(name for name in CASES if name.startswith("clip")), "hard_tanh")
KINKED = (*KINKS, *CLIPPED, "hard_silu", "elu 2.5", "selu", "elu 0.0")
SETTINGS = {
    "variant 0": Choice(variant=0),
    "variant 1": Choice(variant=1),
    **{f"fraction {t}": Choice(jnp.float32(t), jnp.float32(t)) for t in (0.0, 0.3, 1.0)},
}
SINGULAR = ("cbrt", "sqrt", "log", "rsqrt", "reciprocal", "power 0.3", "gelu_tanh", "selu")
every_case = pytest.mark.parametrize("name", CASES)


def test_every_operation_is_tested():
    assert {case[0] for case in CASES.values()} == set(LINES) == FREE
    assert TWO_VARIANTS < FREE


@cache
def intervals(name, dtype, count=10_000):
    """Ordinary, degenerate, huge, tiny, one-sided intervals, and such as begin or end at 0."""
    lowest, highest = CASES[name][3]
    rng = np.random.default_rng(0)
    huge = max(-lowest, highest)
    scale = rng.choice([1e-6, 1e-3, 0.3, 3.0, 30.0, huge], count)
    l = rng.uniform(-1, 1, count) * scale
    u = rng.uniform(-1, 1, count) * rng.permutation(scale)
    fifth = count // 5
    u[:fifth] = l[:fifth]
    u[fifth : 2 * fifth] = l[fifth : 2 * fifth] + rng.choice([1e-9, 1e-7, 1e-5], fifth)
    l[2 * fifth : 2 * fifth + 200] = 0
    u[2 * fifth + 100 : 2 * fifth + 300] = 0
    u[2 * fifth + 300 : 2 * fifth + 400] = -l[2 * fifth + 300 : 2 * fifth + 400]
    if lowest >= 0 or highest <= 0:
        l, u = np.abs(l) * np.sign(highest + lowest), np.abs(u) * np.sign(highest + lowest)
    l, u = np.clip(l, lowest, highest), np.clip(u, lowest, highest)
    l, u = np.minimum(l, u), np.maximum(l, u)
    return jnp.asarray(l, dtype), jnp.asarray(u, dtype)


def constants_of(name, dtype):
    return [c if isinstance(c, int) else np.asarray(c, dtype) for c in CASES[name][2]]


@partial(jax.jit, static_argnames=("name", "variant", "lower_slope"))
def _lines(name, l, u, lower, upper, variant, lower_slope):
    choice = Choice(lower, upper, variant, lower_slope)
    return LINES[CASES[name][0]](l, u, *constants_of(name, l.dtype), choice=choice)


def lines_of(name, l, u, choice):
    spread = [
        None if f is None else jnp.broadcast_to(jnp.asarray(f, l.dtype), l.shape)
        for f in (choice.lower, choice.upper)
    ]
    return _lines(name, l, u, *spread, choice.variant, choice.lower_slope)


@cache
def grid(name, dtype):
    """Intervals, and 33 points of each with their values: (l, u, x, h(x)), in float64."""
    l, u = (np.asarray(v, np.float64) for v in intervals(name, dtype))
    x = np.clip(l + np.linspace(0, 1, 33)[:, None] * (u - l), l, u)
    return l, u, x, np.asarray(CASES[name][1](jnp.asarray(x)))


def gaps(name, dtype, lines):
    """h minus the lower line, and the upper line minus h, on a grid; over the magnitudes.

    In float64: what is tested is the lines, not the rounding of the test.
    """
    l, u, x, value = grid(name, dtype)
    lines = [np.asarray(v, np.float64) for v in lines]
    slope = np.maximum(np.abs(lines[0]), np.abs(lines[2]))
    scale = 1 + np.abs(value).max(0) + np.maximum(np.abs(l), np.abs(u)) * slope
    below = value - (lines[0] * x + lines[1])
    above = (lines[2] * x + lines[3]) - value
    return below / scale, above / scale


def settings(name):
    """All that differ for this operation."""
    one_default = CASES[name][0] not in TWO_VARIANTS
    return [c for key, c in SETTINGS.items() if not (one_default and key == "variant 1")]


@every_case
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_lines_enclose(name, dtype, float64):
    l, u = intervals(name, dtype)
    atol = 1e-12 if dtype == jnp.float64 else 1e-6
    if name in ("sin", "cos", "mish", "gelu", "gelu_tanh", "silu") and dtype == jnp.float32:
        # A slope and its offset, compiled apart, may round the touching point differently.
        far = np.maximum(np.abs(l), np.abs(u)).astype(float)
        atol = np.maximum(atol, 2.0**-19 * far)
    if name == "exp2" and dtype == jnp.float32:
        atol = 5e-6  # XLA's own exp2 has an error of 60 ulp at 60
    if name == "lgamma" and dtype == jnp.float32:
        atol = 5e-6  # and its lgamma one of 40 units of 1, where it is 0
    for choice in settings(name):
        below, above = gaps(name, dtype, lines_of(name, l, u, choice))
        assert np.isfinite(below).all() and np.isfinite(above).all()
        assert (below >= -atol).all() and (above >= -atol).all(), choice


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("lower_slope", LOWER_SLOPES)
def test_every_lower_slope_encloses(name, lower_slope, float64):
    l, u = intervals(name, jnp.float64)
    below, above = gaps(name, jnp.float64, lines_of(name, l, u, Choice(lower_slope=lower_slope)))
    assert below.min() >= -1e-12 and above.min() >= -1e-12


@every_case
def test_at_a_point_both_lines_give_the_value(name, float64):
    l, _ = intervals(name, jnp.float64)
    value = CASES[name][1](l)
    for choice in settings(name):
        lines = lines_of(name, l, l, choice)
        for slope, offset in (lines[:2], lines[2:]):
            slack = 1e-14 + 1e-13 * np.abs(value) + 1e-15 * np.abs(l * slope)
            assert (np.abs(slope * l + offset - value) <= slack).all()


@every_case
def test_lines_touch(name, float64):
    """A line that touches nowhere could be moved closer."""
    l, u, _, value = grid(name, jnp.float64)
    bend = np.abs(np.diff(value, 2, axis=0)).max(0)
    if name in KINKED or CASES[name][3][0] in (0.0, 1e-3, 1e-2, -0.999):
        bend = np.maximum(bend, value.max(0) - value.min(0))  # between two points of the grid
    for choice in settings(name):
        lines = lines_of(name, jnp.asarray(l), jnp.asarray(u), choice)
        below, above = gaps(name, jnp.float64, lines)
        scale = 1 + np.abs(value).max(0)
        narrow = u - l < 1
        assert (below.min(0) <= 1e-12 + bend / scale)[narrow].all(), choice
        assert (above.min(0) <= 1e-12 + bend / scale)[narrow].all(), choice


@every_case
def test_no_worse_than_the_interval(name, float64):
    """The area between the lines: their distance at the middle, times the width."""
    op, h, constants, _ = CASES[name]
    l, u = intervals(name, jnp.float64)
    operands = (Ref(0), *constants_of(name, l.dtype)) if op != "integer_pow" else (Ref(0),)
    params = {"y": constants[0]} if op == "integer_pow" else {}
    node = Node(op, operands, lambda x, *_: h(x), params, l.shape, l.dtype, "")
    box = interval(node, Box(l, u))
    a, b, c, d = (np.asarray(v) for v in lines_of(name, l, u, Choice()))
    gap = (c - a) * 0.5 * np.asarray(l + u) + d - b
    size = np.maximum(np.abs(l), np.abs(u)) * np.maximum(abs(a), abs(c))
    scale = 1 + np.maximum(np.abs(box.lower), np.abs(box.upper)) + size
    assert (gap <= np.asarray(box.upper - box.lower) + 1e-9 * scale).all()
    values = grid(name, jnp.float64)[3]
    assert (values.min(0) >= box.lower - 1e-13 * scale).all()
    assert (values.max(0) <= box.upper + 1e-13 * scale).all()


@every_case
def test_gradients_are_finite(name, float64):
    def total(l, u, t, variant):
        fields = LINES[CASES[name][0]](
            l, u, *constants_of(name, l.dtype), choice=Choice(t, t, variant)
        )
        return sum(jnp.sum(field) for field in fields)

    for dtype in (jnp.float64,) if name not in SINGULAR else (jnp.float64, jnp.float32):
        l, u = intervals(name, dtype, 2000)
        half = jnp.full_like(l, 0.4)
        gradient = jax.jit(jax.grad(total, (0, 1, 2)), static_argnums=3)(l, u, half, 0)
        for part in gradient:
            assert bool(jnp.isfinite(part).all())


@pytest.mark.parametrize(
    "name",
    [
        *("max", "min", "leaky 1.5", "clip -0.4 0.9", "exp", "tanh", "gelu", "sin", "log"),
        *("power 3", "elu 1.0", "elu 2.5", "selu"),
    ],
)
def test_initial_choice_gives_the_default_lines(name, float64):
    l, u = intervals(name, jnp.float64)
    op, _, _, _ = CASES[name]
    start = INITIAL[op](l, u, *constants_of(name, l.dtype))
    found, default = (lines_of(name, l, u, c) for c in (start, Choice()))
    for a, b in zip(found, default, strict=True):
        scale = 1 + np.abs(b)
        assert (np.abs(a - b) <= 1e-6 * scale).all()


@pytest.mark.parametrize("name", ["elu 1.0", "elu 2.5", "selu"])
def test_no_line_above_is_lower_in_the_middle(name, float64):
    """Any is at least the concave envelope there: the highest chord across, on a grid, or h."""
    rng = np.random.default_rng(3)
    l, u = -rng.uniform(0.01, 4.0, 300), rng.uniform(0.01, 4.0, 300)
    upper = [np.asarray(v) for v in lines_of(name, jnp.asarray(l), jnp.asarray(u), Choice())[2:]]
    middle = 0.5 * (l + u)
    # The kink is a point of its own: an envelope may bend there.
    x = np.sort(np.concatenate([l + np.linspace(0, 1, 100)[:, None] * (u - l), 0.0 * l[None]]), 0)
    left, right = (x < middle)[:, None], (x > middle)[None]
    value, (a, b) = np.asarray(CASES[name][1](jnp.asarray(x))), (x[:, None], x[None])
    width = np.where(left & right, b - a, 1)
    share = (middle - a) / width
    chords = (1 - share) * value[:, None] + share * value[None]
    envelope = np.where(left & right, chords, -np.inf).max((0, 1))
    envelope = np.maximum(envelope, np.asarray(CASES[name][1](jnp.asarray(middle))))
    found = upper[0] * middle + upper[1]
    assert (found >= envelope - 1e-12).all()
    assert (found <= envelope + 1e-9).all()
