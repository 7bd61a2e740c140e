"""Random sets, traced, in three dtypes: those that are empty or overflow certify nothing.

What is valid is decided here on the host, in float64.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnncert as bc
from bnncert._emptiness import is_valid
from bnncert.sets import Box, LpBall, ball

pytestmark = pytest.mark.slow

SIZE, NUM = 5, 400
WEIGHTS = np.array([[1.0, -2.0, 0.5, 3.0, -1.0], [0.25, 1.0, -1.0, 0.5, 0.125]])
DTYPES = {name: jnp.dtype(name) for name in ("float16", "bfloat16", "float32")}
FORMATS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def numbers(rng, shape, dtype):
    """Of all magnitudes and both signs; one in ten is 0, an end of the format, infinite or NaN."""
    kind = jnp.finfo(dtype)
    exponent = rng.uniform(np.log2(float(kind.tiny)), np.log2(float(kind.max)), shape)
    values = rng.choice([-1, 1], shape) * 2.0**exponent
    usual = rng.uniform(-3, 3, shape)
    special = rng.choice(
        [0, -0.0, np.inf, -np.inf, np.nan, float(kind.max), float(kind.tiny)], shape
    )
    kinds = rng.uniform(size=shape)
    return np.where(kinds < 0.05, special, np.where(kinds < 0.2, values, usual)).astype(dtype)


def boxes(seed, dtype):
    """Half of them sorted: random ends of three coordinates are rarely in order."""
    rng = np.random.default_rng(seed)
    low, high = (numbers(rng, (NUM, SIZE), dtype) for _ in range(2))
    low[: NUM // 2], high[: NUM // 2] = (
        end[: NUM // 2] for end in (np.minimum(low, high), np.maximum(low, high))
    )
    high[: NUM // 8] = low[: NUM // 8]
    return Box(low, high)


def balls(seed, dtype, p):
    rng = np.random.default_rng(seed)
    return LpBall(numbers(rng, (NUM, SIZE), dtype), numbers(rng, NUM, dtype), p)


def meant(region):
    """Which sets of a batch are valid."""
    if isinstance(region, LpBall):
        center, eps = (np.asarray(v, np.float64) for v in (region.center, region.eps))
        return np.isfinite(center).all(1) & np.isfinite(eps) & (eps >= 0)
    low, high = (np.asarray(v, np.float64) for v in (region.lower, region.upper))
    return (np.isfinite(low) & np.isfinite(high) & (low <= high)).all(1)


def magnitude(region):
    """The sum of the largest coordinates in each set of a batch."""
    if isinstance(region, LpBall):
        ends = np.abs(np.asarray(region.center, np.float64)) + np.asarray(region.eps)[:, None]
    else:
        ends = np.maximum(
            *(np.abs(np.asarray(v, np.float64)) for v in (region.lower, region.upper))
        )
    return ends.sum(1)[:, None]


def network(x):
    w = jnp.asarray(WEIGHTS, x.dtype)
    return w @ jax.nn.relu(3 * x - jnp.flip(x))


@cache
def bounded(method, rounding):
    g = bc.bound(network, method, rounding=rounding)
    return jax.jit(jax.vmap(lambda region: (is_valid(region), g(region))))


@FORMATS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("p", [1, 2, jnp.inf])
def test_bounds_over_random_sets(dtype, p):
    region = boxes(0, dtype) if p == jnp.inf else balls(0, dtype, p)
    right = meant(region)
    assert 0.1 < right.mean() < 0.9
    for method, rounding in (("ibp", "outward"), ("crown", "nearest")):
        valid, box = bounded(method, rounding)(region)
        lower, upper = (np.asarray(end).astype(np.float64) for end in (box.lower, box.upper))
        np.testing.assert_array_equal(valid, right)
        assert (lower[~right] == -np.inf).all() and (upper[~right] == np.inf).all()
        assert (lower < np.inf).all() and (upper > -np.inf).all()  # nor is any of them NaN
        middle = np.asarray(region.center).astype(np.float64)[right]
        with np.errstate(all="ignore"):
            hidden = np.maximum(3 * middle - middle[:, ::-1], 0)
            value, size = hidden @ WEIGHTS.T, magnitude(region)[right]
        # "nearest" is up to rounding; what overflows in the format is bounded by nothing
        room = 0 if rounding == "outward" else 64 * float(jnp.finfo(dtype).eps) * size
        room += float(jnp.finfo(dtype).tiny) * 64 if rounding == "nearest" else 0
        assert (lower[right] <= value + room).all() and (value - room <= upper[right]).all()


@FORMATS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_random_balls(dtype, clip):
    """Valid, and in the range, or empty: whatever dtype the radius comes in."""
    rng = np.random.default_rng(1)
    x = numbers(rng, (NUM, SIZE), dtype)
    x[: NUM // 2] = rng.uniform(0, 1, (NUM // 2, SIZE)).astype(dtype)
    eps = numbers(rng, NUM, np.float32)
    eps[: NUM // 4] = np.abs(eps[: NUM // 4])
    exact, radius = x.astype(np.float64), eps.astype(np.float64)[:, None]
    inside = np.isfinite(exact) if clip is None else (exact >= 0) & (exact <= 1)
    right = inside.all(1) & np.isfinite(eps) & (eps >= 0)
    make = jax.vmap(lambda x, eps: ball(x, eps, clip=clip))
    region = jax.jit(make)(x, eps)
    valid = np.asarray(jax.jit(jax.vmap(is_valid))(region))
    low, high = (np.asarray(end).astype(np.float64) for end in (region.lower, region.upper))
    finite = (np.isfinite(low) & np.isfinite(high)).all(1)
    np.testing.assert_array_equal(valid, right & finite)
    assert valid.any() and (~valid).any()
    assert ((low <= exact) & (exact <= high))[valid].all()
    if clip is not None:
        assert finite.all() and (low[valid] >= 0).all() and (high[valid] <= 1).all()
    ends = exact - radius, exact + radius
    if clip is not None:
        ends = np.maximum(ends[0], 0), np.minimum(ends[1], 1)
    slack = float(jnp.finfo(dtype).eps) * (np.abs(exact) + radius)
    assert (low <= ends[0] + slack)[valid].all() and (high >= ends[1] - slack)[valid].all()


@FORMATS
def test_overflow_never_certifies(dtype):
    """Products, powers and sums of numbers near the end of the format, over valid sets."""
    top = float(jnp.finfo(dtype).max)
    rng = np.random.default_rng(2)
    low = (top * rng.uniform(-1, 1, (64, SIZE))).astype(dtype)
    high = np.maximum(low, (top * rng.uniform(-1, 1, (64, SIZE))).astype(dtype))

    def f(x):
        return {
            "sum": jnp.sum(x, keepdims=True),
            "cancels": 3 * x - x,
            "relu": jax.nn.relu(x + 0.9 * x) - 2 * x,
            "squares": jnp.square(x) - jnp.square(0.5 * x),
            "exp": jnp.exp(x),
            "tanh": jnp.tanh(4 * x),
        }

    for method in ("ibp", "forward", "crown"):
        found = jax.jit(jax.vmap(bc.bound(f, method)))(Box(low, high))
        for name, box in found.items():
            ends = low.astype(np.float64), high.astype(np.float64)
            assert (np.asarray(box.lower) < np.inf).all() and (
                np.asarray(box.upper) > -np.inf
            ).all()
            for x in (*ends, 0.5 * ends[0] + 0.5 * ends[1]):
                with jax.enable_x64(True):
                    exact = np.asarray(jax.vmap(f)(jnp.asarray(x))[name])
                room = 16 * float(jnp.finfo(dtype).eps) * np.abs(x).sum(1, keepdims=True)
                room = room * np.maximum(1.0, np.where(name == "squares", np.abs(x).max(), 1.0))
                assert (np.asarray(box.lower).astype(np.float64) <= exact + room).all()
                assert (exact - room <= np.asarray(box.upper).astype(np.float64)).all()
