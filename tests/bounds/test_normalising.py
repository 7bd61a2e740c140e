"""Normalisations are one node in every spelling, and its bounds hold; what is none is left."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from bnncert.bounds import bound
from bnncert.bounds.arithmetic import Float, Real
from bnncert.bounds.ops import Choice
from bnncert.bounds.ops.normalising import Groups, interval, relax
from bnncert.bounds.propagate import values_at
from bnncert.bounds.tracing import trace
from bnncert.sets import Box

TOKENS = (3, 8)
IMAGE = (1, 4, 4, 8)


def _linen(module: Any, shape: tuple[int, ...]) -> Any:
    params = module.init(jax.random.key(0), jnp.zeros(shape))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)
    return lambda x: module.apply(params, x)


def _hand(x: jax.Array) -> jax.Array:
    c = x - x.mean(-1, keepdims=True)
    return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-3)


def _by_n_less_one(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-3)


def _of_groups(x: jax.Array) -> jax.Array:
    y = x.reshape(*x.shape[:-1], 4, 2)
    y = (y - y.mean((1, 2, 4), keepdims=True)) * jax.lax.rsqrt(
        y.var((1, 2, 4), keepdims=True) + 1e-3
    )
    return y.reshape(x.shape)


def _haiku(x: jax.Array) -> jax.Array:
    """As haiku.LayerNorm writes it."""
    mean, variance = x.mean(-1, keepdims=True), jnp.var(x, -1, keepdims=True)
    scale = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, x.shape[-1]), x.shape)
    return scale * jax.lax.rsqrt(variance + 1e-3) * (x - mean) + 0.1


SPELLINGS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linen": (_linen(linen.LayerNorm(epsilon=1e-3), TOKENS), TOKENS),
    "linen, two passes": (_linen(linen.LayerNorm(1e-3, use_fast_variance=False), TOKENS), TOKENS),
    "linen, without scale": (_linen(linen.LayerNorm(1e-3, use_scale=False), TOKENS), TOKENS),
    "linen RMS": (_linen(linen.RMSNorm(epsilon=1e-3), TOKENS), TOKENS),
    "linen groups": (_linen(linen.GroupNorm(4, epsilon=1e-3), IMAGE), IMAGE),
    "linen groups, two passes": (
        _linen(linen.GroupNorm(4, epsilon=1e-3, use_fast_variance=False), IMAGE),
        IMAGE,
    ),
    "linen instances": (_linen(linen.InstanceNorm(epsilon=1e-3), IMAGE), IMAGE),
    "nnx": (nnx.LayerNorm(8, epsilon=1e-3, rngs=nnx.Rngs(0)), TOKENS),
    "nnx RMS": (nnx.RMSNorm(8, epsilon=1e-3, rngs=nnx.Rngs(0)), TOKENS),
    "nnx groups": (nnx.GroupNorm(8, num_groups=4, epsilon=1e-3, rngs=nnx.Rngs(0)), IMAGE),
    "equinox": (jax.vmap(eqx.nn.LayerNorm(8, eps=1e-3)), TOKENS),
    "equinox RMS": (jax.vmap(eqx.nn.RMSNorm(8, eps=1e-3)), TOKENS),
    "equinox groups": (eqx.nn.GroupNorm(4, 8, eps=1e-3), (8, 4, 4)),
    "haiku": (_haiku, TOKENS),
    "jax.nn": (partial(jax.nn.standardize, epsilon=1e-3), TOKENS),
    "jax.nn, over two axes": (partial(jax.nn.standardize, axis=(0, 2), epsilon=1e-3), (3, 2, 4)),
    "by hand": (_hand, TOKENS),
    "by n - 1": (_by_n_less_one, TOKENS),
    "groups by hand": (_of_groups, IMAGE),
    "of a vector": (_hand, (5,)),
}


def _fast(x: jax.Array, mean: jax.Array, squares: jax.Array) -> jax.Array:
    return (x - mean) * jax.lax.rsqrt(squares - mean**2 + 1e-3)


def _mean(x: jax.Array, axis: int = -1) -> jax.Array:
    return x.mean(axis, keepdims=True)


OTHERS = {
    "mean over another axis": lambda x: _fast(x, _mean(x, 0), _mean(x**2)),
    "squares over another axis": lambda x: _fast(x, _mean(x), _mean(x**2, 0)),
    "squares of another value": lambda x: _fast(x, _mean(x), _mean((2 * x) ** 2)),
    "mean of another value": lambda x: _fast(x, _mean(x + 1), _mean(x**2)),
    "mean by n - 1": lambda x: _fast(x, x.sum(-1, keepdims=True) / 7, _mean(x**2)),
    "squares by n - 1": lambda x: _fast(x, _mean(x), (x**2).sum(-1, keepdims=True) / 7),
    "not centred": lambda x: x * jax.lax.rsqrt(_mean(x**2) - _mean(x) ** 2 + 1e-3),
    "centred twice": lambda x: _fast(x - _mean(x), _mean(x), _mean(x**2)),
    "variance of other rows": lambda x: (
        (x - _mean(x)) * jax.lax.rsqrt(x.var(-1, keepdims=True)[::-1] + 1e-3)
    ),
    "variance along another axis": lambda x: (
        (x - _mean(x)) * jax.lax.rsqrt(x.var(0, keepdims=True) + 1e-3)
    ),
    "squares of what is not centred": lambda x: (x - _mean(x)) * jax.lax.rsqrt(_mean(x**2) + 1e-3),
    "some of the squares": lambda x: x * jax.lax.rsqrt(_mean(x[:, :4] ** 2) + 1e-3),
    "a constant after the root": lambda x: (x - _mean(x)) / (x.std(-1, keepdims=True) + 1e-3),
    "no constant": lambda x: (x - _mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.0),
    "a constant that squares are lost in": lambda x: x * jax.lax.rsqrt(_mean(x**2) + 1e-37),
    "less, not more": lambda x: x * jax.lax.rsqrt(_mean(x**2) - 1e-3),
    "the negative": lambda x: x * jax.lax.rsqrt(1e-3 - _mean(x**2)),
    "cubes": lambda x: x * jax.lax.rsqrt(_mean(x**4) + 1e-3),
}


def operations(f: Any, shape: tuple[int, ...]) -> list[str]:
    x = jnp.ones(shape)
    return [node.op for node in trace(f, (Box(x - 1, x + 1),), {}).nodes]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_node(name):
    f, shape = SPELLINGS[name]
    found = operations(f, shape)
    assert found.count("normalise") == 1 and found.count("square") == 1
    assert not {"rsqrt", "sqrt", "reciprocal", "max", "select_n"} & set(found)


REFUSED = ("equinox", "equinox groups", "haiku", "by n - 1", "groups by hand")
"""Of jnp.var, which compares what it computes of a shape: refused in rounded arithmetic."""


@pytest.mark.parametrize(
    ("name", "rounding"),
    [*((n, Real()) for n in SPELLINGS), *((n, Float()) for n in SPELLINGS if n not in REFUSED)],
)
def test_its_nodes_compute_what_was_traced(name, rounding):
    f, shape = SPELLINGS[name]
    x = jax.random.normal(jax.random.key(2), shape)
    graph = trace(f, (Box(x, x),), {}, rounding.tracking())
    assert [node.op for node in graph.nodes].count("normalise") == 1
    assert jnp.allclose(values_at(graph, [x])[graph.outputs[0].index], f(x), atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_a_near_miss_is_not_taken_for_one(name):
    assert "normalise" not in operations(OTHERS[name], TOKENS)


def test_a_traced_constant_is_left_to_its_parts():
    def f(x, e):
        return x * jax.lax.rsqrt(_mean(x**2) + e)

    def lower(e):
        found = bound(lambda x: f(x, e), "ibp")(Box(jnp.ones(3), jnp.ones(3)))
        return found.lower

    assert jnp.allclose(jax.jit(lower)(1.0), jnp.sqrt(0.5), atol=1e-5)


# --- the box and the planes -----------------------------------------------------------------------

E = 1e-3


def _value(c: jax.Array, e: float = E) -> jax.Array:
    return c / jnp.sqrt((c**2).mean(-1, keepdims=True) + e)


def _boxes(n: int, count: int = 3000) -> Box:
    """Narrow, wide and huge, at zero and far from it, some of them points."""
    rng = np.random.default_rng(n)
    center = rng.normal(size=(count, n)) * rng.choice([0, 1e-4, 0.3, 3, 300], (count, 1))
    reach = rng.uniform(size=(count, n)) * 10.0 ** rng.uniform(-6, 1, (count, 1))
    reach[rng.uniform(size=reach.shape) < 0.2] = 0
    return Box(jnp.asarray(center - reach), jnp.asarray(center + reach))


def _points(box: Box, count: int = 60) -> jax.Array:
    rng = np.random.default_rng(1)
    size = (count, *box.lower.shape)
    at = np.where(
        rng.uniform(size=(count, 1, 1)) < 0.5, rng.integers(0, 2, size), rng.uniform(size=size)
    )
    return jnp.clip(box.lower + at * (box.upper - box.lower), box.lower, box.upper)


def _q(box: Box, e: float = E) -> Box:
    """The exact box of q."""
    inner = jnp.maximum(jnp.maximum(box.lower, -box.upper), 0) ** 2
    outer = jnp.maximum(box.lower**2, box.upper**2)
    return Box(*((v.mean(-1, keepdims=True) + e) for v in (inner, outer)))


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_interval_holds_and_is_exact(n, float64):
    box = _boxes(n)
    found = interval(box, _q(box), 1 / n, E)
    values = _value(_points(box))
    slack = 1e-9
    assert bool((found.lower - slack <= values).all() & (values <= found.upper + slack).all())
    # The largest value of the first coordinate: itself at its end, the others least or largest.
    l, u = box.lower, box.upper
    near, far = jnp.clip(0.0, l, u), jnp.where(jnp.abs(l) > jnp.abs(u), l, u)
    at = jnp.where(u[:, :1] >= 0, near, far).at[:, 0].set(u[:, 0])
    assert jnp.allclose(found.upper[:, 0], _value(at)[:, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("fraction", [None, 0.0, 0.3, 1.0])
def test_planes_hold(n, fraction, float64):
    box = _boxes(n)
    q = Box(*(jnp.broadcast_to(v, box.lower.shape) for v in vars(_q(box)).values()))
    values = interval(box, q, 1 / n, E)
    points = _points(box)
    h, squares = _value(points), (points**2).mean(-1, keepdims=True) + E
    for variant in (0, 1):
        f = None if fraction is None else jnp.full_like(box.lower, fraction)
        lower, upper = relax(box, q, values, Choice(f, f, variant))
        below, above = (s.of_c * points + s.of_q * squares + s.offset for s in (lower, upper))
        slack = 1e-9 * (1 + jnp.abs(h))
        assert bool((below <= h + slack).all()) and bool((h - slack <= above).all())


def test_planes_are_as_close_as_the_square_of_the_radius(float64):
    center = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16)))
    widths = []
    for radius in (1e-3, 1e-4):
        box = Box(center - radius, center + radius)
        q = Box(*(jnp.broadcast_to(v, center.shape) for v in vars(_q(box)).values()))
        lower, upper = relax(box, q, interval(box, q, 1 / 16, E), Choice())
        square = (center**2).mean(-1, keepdims=True) + E
        at = [s.of_c * center + s.of_q * square + s.offset for s in (lower, upper)]
        widths.append(float((at[1] - at[0]).max()))
    assert widths[0] < 1e-5 and 80 < widths[0] / widths[1] < 120


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e10, 1e25, 3e38])
def test_the_ends_of_float32_keep_the_interval(size):
    """Squares beyond the range: the values are those of float64."""
    rng, e = np.random.default_rng(0), 1e-12
    center = rng.normal(size=(500, 4)) / 4
    reach = rng.uniform(size=(500, 4)) * 10.0 ** rng.uniform(-3, 0, (500, 1))
    l, u = (np.float32(np.clip(v, -1, 1) * size) for v in (center - reach, center + reach))
    points = l + rng.integers(0, 2, (60, 500, 4)) * (u.astype(np.float64) - l)
    values = points / np.sqrt((points**2).mean(-1, keepdims=True) + e)
    inner = np.maximum(np.maximum(l, -u), 0).astype(np.float64) ** 2
    outer = np.maximum(np.abs(l), np.abs(u)).astype(np.float64) ** 2
    with np.errstate(over="ignore"):
        ends = (np.float32(v.mean(-1, keepdims=True) + e) for v in (inner, outer))
        q = Box(*map(jnp.asarray, ends))
    found = interval(Box(jnp.asarray(l), jnp.asarray(u)), q, 0.25, e)
    assert bool(((found.lower <= values + 2e-5) & (values - 2e-5 <= found.upper)).all())
    assert float(jnp.abs(found.upper).max()) <= 2.0001


def test_groups_come_back_where_they_were():
    x = jnp.arange(48.0).reshape(2, 3, 8)
    groups = Groups((2, 3, 4, 2), (1, 3))
    assert groups.apart(x).shape == (2, 4, 6)
    assert (groups.back(groups.apart(x), x.shape) == x).all()
    sums = x.reshape(groups.shape).sum(groups.axes)
    assert (groups.apart(groups.spread(sums, x.shape)) == groups.apart(x).sum(-1)[..., None]).all()


# --- networks -------------------------------------------------------------------------------------


def _network(norm: Any) -> Any:
    rng = np.random.default_rng(0)
    ws = [jnp.asarray(rng.normal(size=(16, 16)) / 4, jnp.float32) for _ in range(2)]

    def f(x):
        y = (ws[0] @ x).reshape(2, 8)
        y = jax.nn.relu(norm(y) + 0.5 * y)
        return ws[1][:3] @ norm(y).reshape(-1)

    return f


def _attacked(f: Any, x: jax.Array, eps: float) -> jax.Array:
    """The function at random points, corners, and where each output's gradient leads."""
    rng = np.random.default_rng(1)
    points = [rng.choice([-1.0, 1.0], (200, x.size)), rng.uniform(-1, 1, (200, x.size))]
    step, slopes = jnp.zeros((3, 2, x.size), x.dtype), jax.vmap(jax.vmap(jax.jacobian(f)))
    for _ in range(3):
        own = jnp.einsum("isij->isj", slopes(x + eps * step))
        step = jnp.sign(own) * jnp.array([1.0, -1.0])[:, None]
        points.append(step.reshape(-1, x.size))
    return jax.vmap(f)(x + eps * jnp.concatenate([jnp.asarray(p, x.dtype) for p in points]))


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("linen", "nearest"),
        ("linen", "outward"),
        pytest.param("linen, two passes", "outward", marks=pytest.mark.slow),
        pytest.param("linen RMS", "nearest", marks=pytest.mark.slow),
        pytest.param("linen RMS", "outward", marks=pytest.mark.slow),
        pytest.param("haiku", "nearest", marks=pytest.mark.slow),
        pytest.param("by hand", "outward", marks=pytest.mark.slow),
    ],
)
def test_networks_stay_within_their_bounds(name, rounding):
    f = _network(SPELLINGS[name][0])
    at = jax.random.normal(jax.random.key(0), (16,))
    run = jax.jit(lambda box: [bound(f, m, rounding=rounding)(box) for m in ("ibp", "crown")])
    slack = 2e-5 if rounding == "nearest" else 0.0
    attacked = jax.jit(lambda x, eps: _attacked(f, x, eps))
    for x in (at, 0 * at):  # at 0 nothing varies
        for eps in (0.0, 1e-6, 1e-4, 1e-3, 0.1, 10.0):
            values, boxes = attacked(x, eps), run(Box(x - eps, x + eps))
            for box in boxes:
                inside = (box.lower <= values + slack) & (values - slack <= box.upper)
                assert bool(inside.all()), (eps, box)
            if eps in (1e-4, 1e-3) and x is at:
                spread, width = values.max(0) - values.min(0), boxes[1].upper - boxes[1].lower
                assert bool((width < 1.1 * spread + 20 * slack + _SLACK[rounding]).all()), eps
    if rounding == "nearest":  # no coordinate is more than the root of their number
        assert boxes[0].upper.max() < 100


_SLACK = {"nearest": 1e-5, "outward": 5e-3}
"""What bounds may be wider by than the function's range."""


def test_squares_that_underflow_under_a_large_factor_are_left_to_their_parts():
    """1e16 times what is flushed to 0 is more than e: a node would leave float32 values out."""

    def normed(change, e):
        return lambda x: x * jax.lax.rsqrt(change(jnp.sum(x * x, -1, keepdims=True)) + e)

    cases = [
        (lambda s: s * 1e16, 1e-24, 1e-19),
        (lambda s: s * 1e-30 * 1e30, 1e-12, 2e-5),
        (lambda s: s / 3e30 / 1e-30, 1e-12, 2e-5),
        (lambda s: s * 1e-38 * 1e-38 * 1e-38, 1e-12, 1e-5),
    ]
    for change, e, size in cases:
        f, s = normed(change, e), jnp.full(3, size)
        with jax.disable_jit():
            value = f(s)
        for rounding in ("nearest", "outward"):
            box = bound(f, "ibp", rounding=rounding)(Box(-s, s))
            assert (box.upper >= value).all() and (box.lower <= -value).all()


@pytest.mark.parametrize("place", ["e", "a"])
def test_numbers_that_are_computed_are_not_taken_for_exact(place):
    a, b = jnp.float32(30), jnp.float32(0.0010137568460777402)

    def f(x, number):
        mean = jnp.mean(x * x, -1, keepdims=True)
        return x * jax.lax.rsqrt(mean + number if place == "e" else mean * number + 1e-5)

    center = 1e-4 if place == "e" else 100.0
    region = Box(jnp.full(3, center), jnp.full(3, center * 1.00001))
    box = bound(lambda x: f(x, (a + b) - a), "ibp", rounding="outward")(region)
    exact = np.float64(b)
    x = np.asarray(region.upper, np.float64)
    mean = np.mean(x * x)
    truth = x / np.sqrt(mean + exact if place == "e" else mean * exact + 1e-5)
    assert (np.asarray(box.lower) <= truth).all() and (truth <= np.asarray(box.upper)).all()


def test_scales_whose_product_underflows_on_the_way_are_left_to_their_parts():
    def f(x):
        return x * (jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * 1e-36 * 1e34)

    region = Box(jnp.full(3, 900.0), jnp.full(3, 1e3))
    with jax.disable_jit():
        value = f(region.upper)  # 0 on the way
    box = bound(f, "ibp", rounding="outward")(region)
    assert (box.lower <= value).all() and (box.upper >= jax.jit(f)(region.upper)).all()


def test_a_computed_zero_is_not_nothing():
    """(1e5 + .001) - 1e5 is 0 in float32, and .001 really: c and what is squared are not one."""
    a = jnp.float32(1e5)

    def off(x):
        return x + ((a + jnp.float32(1e-3)) - a)

    region = Box(jnp.full(3, -1e-3), jnp.full(3, -0.99e-3))
    f = lambda x: x * jax.lax.rsqrt((off(x) ** 2).mean(-1, keepdims=True) + 1e-8)  # noqa: E731
    for method in ("ibp", "crown"):
        assert bound(f, method, rounding="outward")(region).lower.max() <= -9.9
