"""The model of arithmetic beside what XLA makes of several operations in a row.

Whether a rewrite happens depends on jaxlib's version, on sizes and on what is a literal: bounds
hold for each way of running a function.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from bnncert.bounds import bound
from bnncert.sets import Box

pytestmark = pytest.mark.slow

METHODS = ("ibp", "forward", "crown-ibp")


def f32(*values):
    return np.asarray(values, np.float32)


def spike(*shape):
    """Ones, and the first far larger."""
    values = np.ones(shape, np.float32)
    values.flat[0] = 1e8
    return values


def ones(*shape):
    return np.ones(shape, np.float32)


C, D = np.float32(123456.79), np.float32(1e-3)
SUMS = {
    "sum of sums of sums": (lambda x: x.sum(0).sum(0).sum(0), spike(12, 12, 12)),
    "reshaped between": (lambda x: x.sum(0).reshape(9, 16).sum(0).sum(), spike(12, 12, 12)),
    "negated between": (lambda x: (-x.sum(0)).T.sum(0).sum(), spike(12, 12, 12)),
    "mean of a sum": (lambda x: 12 * x.sum(0).mean(0).sum(), spike(12, 12, 12)),
    "sum of products": (lambda x: jnp.einsum("bi,bi->b", x, ones(40, 40)).sum(), spike(40, 40)),
    "in calls": (lambda x: jax.jit(lambda v: v.sum(0))(x).sum(), spike(40, 40)),
    "a factor of 1 between": (lambda x: (x.sum(0) * 1.0).sum(0).sum(), spike(12, 12, 12)),
    "ones between": (lambda x: (x.sum(0) / jnp.ones(12)).sum(0).sum(), spike(12, 12, 12)),
    "an addend of 0 between": (lambda x: (x.sum(0) + 0.0).sum(0).sum(), spike(12, 12, 12)),
    "a name between": (lambda x: checkpoint_name(x.sum(0), "a").sum(0).sum(), spike(12, 12, 12)),
    "selected all": (
        lambda x: jnp.where(ones(12, 12) > 0, x.sum(0), 0).sum(0).sum(),
        spike(12, 12, 12),
    ),
    "a kernel of ones": (
        lambda x: jax.lax.conv(
            x.sum(0)[None, None], jnp.ones((1, 1, 12, 12), x.dtype), (1, 1), "VALID"
        ).sum(),
        spike(12, 12, 12),
    ),
    "written over all": (
        lambda x: jnp.zeros((12, 12)).at[:, :].set(x.sum(0)).sum(0).sum(),
        spike(12, 12, 12),
    ),
    "the last of partial sums": (lambda x: jnp.cumsum(x.sum(0), 0)[-1].sum(), spike(12, 12, 12)),
}
BIASES = {
    "one unit": lambda b, w, x: w[:1] @ x + b,
    "rows": lambda b, w, x: x @ w[:1].T + b,
    "many": lambda b, w, x: x @ w.T + b,
    "a batch of one": lambda b, w, x: (x[None] @ w.T + b)[0],
    "a relu": lambda b, w, x: jax.nn.relu(w @ x + b),
    "before": lambda b, w, x: b - w @ x,
    "a second product": lambda b, w, x: w @ x + w @ (x * b),
    "scattered": lambda b, w, x: b + jnp.zeros(1).at[jnp.zeros(len(x), int)].add(x * w[0]),
    "a factor of 1": lambda b, w, x: (x @ w.T) * 1.0 + b,
    "a divisor of 1": lambda b, w, x: (x @ w.T) / np.ones(3, np.float32) + b,
    "no least value": lambda b, w, x: jnp.maximum(x @ w.T, -np.inf) + b,
    "scaled segments": lambda b, w, x: b + 1.0 * jax.ops.segment_sum(x, jnp.zeros(len(x), int), 1),
    "segments": lambda b, w, x: b + jax.ops.segment_sum(x, jnp.zeros(len(x), int), 1),
}
LITERALS = {
    "added": (lambda x: (x + C) + D, f32(-C)),
    "added and taken away": (lambda x: (x + 1e4) - 1e4, f32(1e-3)),
    "taken from": (lambda x: (C - x) + D, f32(C)),
    "reshaped": (lambda x: (x + C).reshape(1, 1) + D, f32(-C)),
    "arrays": (lambda x: (x + np.full(2, C)) + f32(1e-3, 2e-3), f32(-C, -C)),
    "three": (lambda x: ((x + C) - 0.37) + D, f32(-C)),
    "with a factor of 1": (lambda x: ((x + C) * 1.0) + D, f32(-C)),
    "with a sum of one term": (lambda x: (x + C).sum() + D, f32(-C)),
    "with an open range": (lambda x: jnp.clip(x + C, -np.inf, np.inf) + D, f32(-C)),
    "scaled and squared": (lambda x: (x[0] * 1e-25) ** 2, f32(1e25)),
    "scaled and cubed": (lambda x: (x[0] * 1e15) ** 3, f32(1e-15)),
    "a magnitude scaled and squared": (lambda x: jnp.abs(x[0] * 1e-25) ** 2, f32(1e25)),
    "scaled, with an addend of 0": (lambda x: (x * 1e-20 + 0.0) * 1e-25 * 1e30, f32(1e15)),
    "scaled, with a sum of one term": (lambda x: (x * 1e-20).sum() * 1e-25 * 1e30, f32(1e15)),
    "scaled to nothing": (lambda x: ((x * 1e-20) * 1e-25) * 1e30, f32(1e15)),
    "scaled to nothing, reshaped": (lambda x: (x * 1e-20)[:, None] * 1e-25 * 1e30, f32(1e15)),
    "scaled too far": (lambda x: (x * 1e20) * 1e20, f32(1e-30)),
    "divided to nothing": (lambda x: (x / 1e20) / 1e20, f32(1e30)),
    "a reciprocal": (lambda x: x / 2e38, f32(2e38)),
    "a factor's": (lambda x: x[:1] * 1e-25 * x[1:, None], f32(1e30, 1e-20)),
    "two factors'": (lambda x: (x[0] * 1e-25) * (x[1] * 1e-25), f32(1e30, 1e20)),
    "pointwise": (
        lambda x: jax.lax.conv(x.reshape(1, 1, 1) * 1e-20, jnp.full((1, 1, 1), 1e-25, x.dtype),
                               (1,), "VALID", precision="highest") * 1e30,
        f32(1e15),
    ),
}  # fmt: skip
EXPONENTIALS = {
    "two": (lambda x: jnp.exp(x[0]) * jnp.exp(x[1]), f32(39.085102, 39.27014)),
    "three": (
        lambda x: jnp.exp(x[0]) * jnp.exp(x[1]) * jnp.exp(x[2]),
        f32(83.90905, -10.429554, 7.418239),
    ),
    "a quotient": (lambda x: jnp.exp(x[0]) / jnp.exp(x[1]), f32(39.085102, -39.27014)),
    "a power": (lambda x: jnp.exp(x) ** 3, f32(27.918273)),
}


def values(f, x):
    """Eager, compiled, compiled with x as a literal, and in float64."""
    with jax.enable_x64(True):
        exact = f(jnp.asarray(x, jnp.float64))
    found = [f(jnp.asarray(x)), jax.jit(f)(x), jax.jit(lambda: f(jnp.asarray(x)))(), exact]
    return [np.asarray(v, np.float64).reshape(-1) for v in found]


def bounds_of(f):
    """Boxes by each method, of one compiled call."""
    return jax.jit(lambda *region: [bound(f, m, rounding="outward")(Box(*region)) for m in METHODS])


def check(boxes, found):
    """Values inside; where there is none (NaN), no bound."""
    for method, box in zip(METHODS, boxes, strict=True):
        lower, upper = (np.asarray(v, np.float64).reshape(-1) for v in vars(box).values())
        for value in found:
            inside = (lower <= value) & (value <= upper)
            assert (inside | np.isnan(value) & np.isinf(upper - lower)).all(), (method, box, value)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_sums_may_be_one_sum(name):
    f, x = SUMS[name]
    check(bounds_of(f)(x, x), values(f, x))


@pytest.mark.parametrize("name", BIASES)
def test_an_addend_of_a_sum_may_be_its_first_term(name):
    """With weights that are arguments of the network, and with weights that are literals."""
    f = BIASES[name]
    b, w, x = f32(1e8), ones(3, 100), ones(100)
    boxes = bounds_of(partial(f, b, w))(x, x)
    check(boxes, [*values(partial(f, b, w), x), np.asarray(jax.jit(f)(b, w, x), np.float64)])


@pytest.mark.parametrize("name", LITERALS)
def test_literals_in_a_row_may_be_folded(name):
    f, x = LITERALS[name]
    check(bounds_of(f)(x, x), values(f, x))


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_products_of_exponentials_may_be_exponentials_of_sums(name):
    f, x = EXPONENTIALS[name]
    check(bounds_of(f)(x, x), values(f, x))


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda x: (x * 300) * 300, 0.1),
        (lambda x: ((x * 1e-3) * 1e-4) * 3e4, 3e4),
        (lambda x: (x + 6e4) + 6e4, -6e4),
        (lambda x: x / 60000, 3e4),
    ],
)
def test_literals_in_a_row_leave_the_range_of_float16_soon(f, x):
    x = jnp.float16([x])
    computed = [np.asarray(v, np.float64) for v in (f(x), jax.jit(f)(x), f(np.float64(x)))]
    check(bounds_of(f)(x, x), computed)


def test_random_chains_of_operations_hold_compiled_and_eager():
    """Chains of two to five steps with constants of all magnitudes."""
    rng = np.random.default_rng(0)

    def step(kind, c):
        return {
            "add": lambda v: v + c,
            "take": lambda v: c - v,
            "scale": lambda v: v * c,
            "divide": lambda v: v / c,
            "turn": lambda v: v.T,
            "flat": lambda v: v.reshape(1, -1) if v.ndim == 2 else v,
            "sum": lambda v: v.sum(0, keepdims=True) if v.ndim == 2 else v,
            "bias": lambda v: v @ np.full((v.shape[-1], 2), 0.5, np.float32) + c,
        }[kind]

    kinds = ("add", "take", "scale", "divide", "turn", "flat", "sum", "bias")
    for _ in range(40):
        chosen = rng.choice(kinds, rng.integers(2, 6))
        magnitudes = 10 ** rng.uniform(-25, 25, len(chosen)) * rng.choice([-1, 1])
        if rng.uniform() < 0.5:
            magnitudes = 10 ** rng.uniform(-3, 6, len(chosen))
        constants = np.asarray(magnitudes, np.float32)
        steps = [step(kind, c) for kind, c in zip(chosen, constants, strict=True)]

        def f(x, steps=steps):
            for one in steps:
                x = one(x)
            return x

        x = np.float32(rng.normal(size=(3, 2)) - constants[0] * rng.integers(2))
        box = jax.jit(bound(f, "ibp", rounding="outward"))(Box(x, x))
        lower, upper = np.asarray(box.lower, np.float64), np.asarray(box.upper, np.float64)
        for value in (f(jnp.asarray(x)), jax.jit(f)(x)):
            value = np.asarray(value, np.float64)
            held = (lower <= value) & (value <= upper) | ~np.isfinite(value)
            assert held.all(), (chosen, constants)
