"""P_safe by bounds linear in the weights: against draws of these, and where it is exact."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

import bnncert as bc
from bnncert.bounds.arithmetic import Float, Real
from bnncert.bounds.graph import UnsupportedPrimitiveError
from bnncert.bounds.methods import AlphaCROWN, Method
from bnncert.certify import Constraints, class_stays, outputs_within, safety
from bnncert.gaussian import Margins, margins
from bnncert.gaussian.folded import folded_mean
from bnncert.gaussian.network import Margin
from bnncert.posterior import Gaussian, LowRank
from bnncert.sets import Box, LpBall

KEY = jax.random.key(0)
DELTA = 1e-9
DRAWS = 40_000


def bounded(apply, delta, q, region, rows, method: str | Method = "crown", arithmetic=None):
    options = {"method": method, "rounding": arithmetic or Real(), "delta": delta}
    found = jax.jit(lambda q, region, rows: margins(apply, q, region, *rows, **options))(
        q, region, jax.tree.map(jnp.asarray, rows)
    )
    return Margin(found.mean, found.lipschitz)


def mass(margin, delta):
    return float(Margins(margin.mean, margin.lipschitz, delta).probability())


def linear(apply, delta, loc, spread, region, rows):
    return bounded(apply, delta, bc.MeanField(loc, spread), region, rows)


def normal(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def dense(p, x):
    return p["c"] @ jax.nn.relu(p["b"] @ jax.nn.relu(p["a"] @ x + p["u"])) + p["v"]


def curved(p, x):
    return p["c"] @ jnp.tanh(p["b"] @ jax.nn.silu(p["a"] @ x))


def residual(p, x):
    h = jax.nn.relu(p["a"] @ x)
    return p["c"] @ (h + jax.nn.relu(p["b"] @ h))


def skips(p, x):
    return p["a"] @ x[:2] + p["c"] @ jax.nn.relu(p["b"] @ x)


def twice(p, x):
    """Two layers on one set."""
    return p["a"] @ x + p["c"] @ jax.nn.relu(p["b"] @ x)


def convolution(p, x):
    h = jax.lax.conv_general_dilated(x.reshape(1, 1, 5), p["k"], (1,), "SAME")
    return p["c"] @ jax.nn.relu(h).ravel()


def normalised(p, x):
    """Batch normalisation at fixed statistics, its scale and shift random."""
    h = (p["a"] @ x - 0.1) / jnp.sqrt(1.3)
    return p["c"] @ jax.nn.relu(h * p["s"] + p["t"])


def tokens(p, x):
    """One layer at several places, and a pool."""
    h = jax.nn.relu(x.reshape(2, 2) @ p["a"])
    return p["c"] @ h.mean(0)


def repeated(p, x):
    """A weight that meets one value in several outputs."""
    w = jnp.broadcast_to(p["r"][:, None], (4, 3))
    return p["c"] @ jax.nn.relu(x @ w + p["u"][:3])


def cut(p, x):
    """Repeated, and cut to the number of weights that there are."""
    w = jnp.broadcast_to(p["r"][:, None], (2, 3))[:, :2]
    scale = jnp.broadcast_to(p["s"][:, None], (2, 3)).reshape(6)[:2]
    return p["c"] @ jnp.concatenate([jnp.tanh(x[:2] @ w) * scale, x[2:3]])


def negative(p, x):
    """Weights with a minus before them, in a layer, as a scale, and in one at several places."""
    h = jax.nn.relu((-p["a"]) @ x + 1.0) * (-p["s"])
    return p["c"] @ jax.nn.silu(h.reshape(3, 1) @ (-p["r"]).reshape(1, 2)).mean(1)


def sliced(p, x):
    """A part of the weights, at two places."""
    return p["c"] @ jnp.tanh(x.reshape(2, 2) @ p["a"][:, :3]).sum(0)


LEAVES = {
    "a": (3, 4), "b": (3, 3), "c": (2, 3), "u": (3,), "v": (2,), "k": (2, 1, 3), "s": (3,),
    "t": (3,), "r": (4,),
}  # fmt: skip


def layer_norm(p, x):
    h = p["a"] @ x
    centred = h - h.mean()
    return p["c"] @ jax.nn.relu(centred * jax.lax.rsqrt(jnp.mean(centred * centred) + 0.01))


OWN = {
    "dense": (dense, "abcuv", {}),
    "layer norm": (layer_norm, "ac", {}),
    "curved": (curved, "abc", {}),
    "residual": (residual, "abc", {}),
    "skips": (skips, "abc", {"a": (2, 2), "b": (3, 4)}),
    "twice": (twice, "abc", {"a": (2, 4), "b": (3, 4)}),
    "convolution": (convolution, "kc", {"c": (2, 10)}),
    "normalised": (normalised, "acst", {}),
    "tokens": (tokens, "ac", {"a": (2, 3)}),
    "repeated": (repeated, "rcu", {}),
    "cut": (cut, "rcs", {"r": (2,), "s": (2,)}),
    "negative": (negative, "acrs", {"r": (2,)}),
    "sliced": (sliced, "ac", {"a": (2, 6)}),
}
FEW = ("dense", "convolution", "twice", "normalised")
MANY = [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in OWN]
MATRIX = jnp.array([[1.0, -1.0], [-1.0, 1.0], [0.5, 0.0]])
ROWS = Constraints(MATRIX, jnp.array([2.0, 2.5, 1.0]))


def network(name, scale):
    apply, names, shapes = OWN[name]
    loc = {n: 0.2 + 0.5 * normal(ord(n), *shapes.get(n, LEAVES[n])) for n in names}
    spread = {n: scale * (0.5 + jax.random.uniform(jax.random.fold_in(KEY, ord(n)), v.shape))
              for n, v in loc.items()}  # fmt: skip
    size = 5 if name == "convolution" else 4
    return apply, loc, spread, 0.5 + 0.3 * normal(7, size)


def corners(center, reach):
    signs = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * center.size), -1).reshape(-1, center.size)
    return center + reach * signs


def least_rows(apply, q, points, seed):
    """For each draw of the weights the least value of each row over some points of the set."""

    def one(key):
        params = jax.tree.map(lambda leaf: leaf[0], q.sample(key, 1))
        values = jax.vmap(lambda x: ROWS.matrix @ apply(params, x) + ROWS.offset)(points)
        return values.min(0)

    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys))


def posterior(kind, loc, spread):
    """Of the same deviations, weights independent or not."""
    if kind == "factorised":
        return bc.MeanField(loc, spread)
    if kind == "low rank":
        own = jax.tree.map(lambda s: 0.4 * s, spread)
        factors = {n: 0.6 * spread[n] * normal(50 + ord(n), 3, *v.shape) for n, v in loc.items()}
        return LowRank(loc, own, factors)
    names = tuple(sorted(loc))
    scales = jnp.concatenate([spread[n].ravel() for n in names])
    mixed = jnp.tril(normal(60, scales.size, scales.size)) / math.sqrt(scales.size)
    return Gaussian(loc, scales[:, None] * (0.6 * mixed + 0.4 * jnp.eye(scales.size)), names)


REACH = 0.05


@functools.cache
def drawn(name, scale, kind):
    """A posterior, a set, and the least rows over it of draws."""
    apply, loc, spread, x = network(name, scale)
    q = posterior(kind, loc, spread)
    least = least_rows(apply, q, corners(np.asarray(x), REACH), 1)
    return apply, q, Box(x - REACH, x + REACH), least


def check_draws(found, least):
    """The mean lies below that of the least value, as delta is tiny; tails hold at every depth."""
    error = 5 * least.std(0) / math.sqrt(DRAWS)
    assert (np.asarray(found.mean) <= least.mean(0) + error + 1e-5).all()
    mean, spread_of = (np.asarray(v, np.float64) for v in found)
    for depth in (0.5, 1.0, 1.5, 2.0, 3.0):
        share = (least <= mean - depth * spread_of - 1e-5).mean(0)
        most = ndtr(-depth)
        assert (share <= most + 5 * math.sqrt(most / DRAWS)).all(), (depth, share, most)


@pytest.mark.parametrize("name", OWN)
def test_the_networks_are_alive(name):
    apply, loc, _, x = network(name, 0.1)
    slopes = jax.tree.leaves(jax.jacobian(lambda p, x: MATRIX @ apply(p, x), (0, 1))(loc, x))
    assert all(jnp.abs(slope).max() > 0.01 for slope in slopes)


@pytest.mark.parametrize("arithmetic", [Real(), Float()], ids=["real", "float"])
@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("name", OWN)
def test_no_draw_contradicts_it(name, scale, arithmetic):
    apply, q, region, least = drawn(name, scale, "factorised")
    check_draws(bounded(apply, DELTA, q, region, ROWS, "crown", arithmetic), least)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("name", MANY)
def test_no_draw_contradicts_cheaper_methods(name, method):
    apply, q, region, least = drawn(name, 0.2, "factorised")
    found = bounded(apply, DELTA, q, region, ROWS, method)
    check_draws(found, least)
    outward = bounded(apply, DELTA, q, region, ROWS, method, Float())
    check_draws(outward, least)
    if name not in ("cut", "negative", "repeated"):  # where weights have better boxes by chance
        assert (outward.mean <= found.mean + 1e-6).all()
        assert (outward.lipschitz >= found.lipschitz * (1 - 1e-6)).all()


@pytest.mark.parametrize("arithmetic", [Real(), Float()], ids=["real", "float"])
@pytest.mark.parametrize("kind", ["factorised", "low rank"])
@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(n, marks=pytest.mark.slow) for n in ("curved", "skips", "residual"))],
)
def test_optimised_slopes_prove_no_less_and_no_draw_contradicts_them(name, kind, arithmetic):
    apply, q, region, least = drawn(name, 0.2, kind)
    start = bounded(apply, DELTA, q, region, ROWS, "crown", arithmetic)
    found = bounded(apply, DELTA, q, region, ROWS, AlphaCROWN(steps=8), arithmetic)
    check_draws(found, least)
    before, after = (jnp.where(m.mean > 0, m.mean / m.lipschitz, m.mean) for m in (start, found))
    assert (after >= before).all()
    if name in ("dense", "residual"):
        assert (after > before + 1e-3).any()


def test_of_bounds_below_0_the_higher_is_kept():
    """By E / L the one of more deviation would be: rows that prove nothing are of use to others."""
    loc = {"a": normal(3, 8, 3), "b": normal(4, 8, 8), "c": normal(5, 2, 8)}
    q = bc.MeanField(loc, jax.tree.map(lambda v: jnp.full_like(v, 0.1), loc))

    def f(p, x):
        return p["c"] @ jax.nn.relu(p["b"] @ jax.nn.relu(p["a"] @ x))

    region = Box(jnp.full(3, -1.0), jnp.ones(3))
    start, found = (
        bounded(f, 1e-4, q, region, ROWS, method) for method in ("crown", AlphaCROWN(steps=8))
    )
    below = start.mean < 0
    assert below.any() and (found.mean >= start.mean)[below].all()


def test_slopes_are_optimised_where_weights_are_known_too():
    """Deviations of nearly 0: what alpha-CROWN finds of the network of the means."""
    apply, loc, _, x = network("dense", 0.1)
    q = bc.MeanField(loc, jax.tree.map(lambda v: jnp.full_like(v, 1e-30), loc))
    region = Box(x - 0.4, x + 0.4)
    start, found = (
        bounded(apply, 1e-4, q, region, ROWS, m).mean for m in ("crown", AlphaCROWN(steps=20))
    )
    assert (found >= start).all() and (found > start + 1e-3).any()


def test_what_overflows_proves_nothing():
    q = bc.MeanField({"a": jnp.ones((2, 1)), "c": jnp.ones((1, 2))},
                     {"a": jnp.full((2, 1), 1e20), "c": jnp.full((1, 2), 1e20)})  # fmt: skip
    one, rows = jnp.ones(1), Constraints(jnp.ones((1, 1)), jnp.zeros(1))
    for method in ("ibp", "crown", AlphaCROWN(steps=2)):
        for arithmetic in (Real(), Float()):
            found = bounded(lambda p, x: p["c"] @ jax.nn.relu(p["a"] @ x), 1e-4, q,
                            Box(one, one), rows, method, arithmetic)  # fmt: skip
            assert (found.mean == -jnp.inf).all()


def test_the_posterior_has_gradients_through_optimised_slopes():
    apply, loc, spread, x = network("dense", 0.1)
    region = Box(x - REACH, x + REACH)

    def proved(loc):
        found = margins(apply, bc.MeanField(loc, spread), region, *ROWS, method=AlphaCROWN(steps=3))
        return (found.mean / found.lipschitz).sum()

    slopes = jax.jit(jax.grad(proved))(loc)
    assert all(jnp.isfinite(v).all() and (v != 0).any() for v in jax.tree.leaves(slopes))


@pytest.mark.parametrize("arithmetic", [Real(), Float()], ids=["real", "float"])
@pytest.mark.parametrize("kind", ["low rank", "full"])
@pytest.mark.parametrize("name", MANY)
def test_no_draw_of_correlated_weights_contradicts_it(name, kind, arithmetic):
    apply, q, region, least = drawn(name, 0.2, kind)
    check_draws(bounded(apply, DELTA, q, region, ROWS, "crown", arithmetic), least)
    check_draws(bounded(apply, DELTA, q, region, ROWS, "ibp", arithmetic), least)


@pytest.mark.parametrize("name", ["dense", "convolution", "residual", "normalised", "tokens"])
def test_a_factorised_posterior_written_as_a_correlated_one(name):
    """Of factors with one weight each, nothing is lost but signs inside a convolution."""
    apply, loc, spread, x = network(name, 0.1)
    names = tuple(sorted(loc))
    scales = jnp.concatenate([spread[n].ravel() for n in names])
    region = Box(x - REACH, x + REACH)
    one = bounded(apply, 1e-4, bc.MeanField(loc, spread), region, ROWS)
    other = bounded(apply, 1e-4, Gaussian(loc, jnp.diag(scales), names), region, ROWS)
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.lipschitz, one.lipschitz, rtol=2e-3)


# What is repeated or negated first is relaxed on an interval, as any value is: all of it is lost.
@pytest.mark.parametrize("name", [n for n in OWN if n not in ("repeated", "cut", "negative")])
def test_small_deviations_at_a_point_are_those_of_the_gradient(name):
    """There nothing is relaxed: F is the margin, and L the norm of s times its gradient."""
    apply, loc, spread, x = network(name, 1e-4)
    found = linear(apply, DELTA, loc, spread, Box(x, x), ROWS)
    slopes = jax.jacobian(lambda p: MATRIX @ apply(p, x))(loc)
    squares = ((spread[n] * slopes[n]) ** 2 for n in loc)
    exact = jnp.sqrt(sum(square.reshape(3, -1).sum(1) for square in squares))
    assert (found.lipschitz >= 0.98 * exact).all() and (found.lipschitz <= 1.1 * exact).all()
    np.testing.assert_allclose(found.mean, MATRIX @ apply(loc, x) + ROWS.offset, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "convolution"])
@pytest.mark.parametrize("p", [1, 2])
def test_over_balls(name, p):
    apply, loc, spread, x = network(name, 0.1)
    found = linear(apply, DELTA, loc, spread, LpBall(x, 0.1, p), ROWS)
    directions = normal(11, 200, x.size)
    norms = jnp.linalg.norm(directions, p, axis=1, keepdims=True)
    axes = jnp.concatenate([jnp.eye(x.size), -jnp.eye(x.size)])
    points = x + 0.1 * jnp.concatenate([directions / norms, axes, jnp.zeros((1, x.size))])
    least = least_rows(apply, bc.MeanField(loc, spread), points, 2)
    error = 5 * least.std(0) / math.sqrt(DRAWS)
    assert (np.asarray(found.mean) <= least.mean(0) + error + 1e-5).all()


def test_one_layer_at_a_point_is_exact():
    loc, spread = {"w": normal(1, 2, 4), "b": normal(2, 2)}, {"w": 0.3 + 0 * normal(1, 2, 4)}
    x = normal(3, 4)
    found = linear(lambda p, x: p["w"] @ x + p["b"], 0.1, loc, spread, Box(x, x), ROWS)
    value = ROWS.matrix @ (loc["w"] @ x + loc["b"]) + ROWS.offset
    deviation = jnp.sqrt((MATRIX**2).sum(1) * (0.09 * x**2).sum())
    np.testing.assert_allclose(found.mean, value, rtol=1e-5)
    np.testing.assert_allclose(found.lipschitz, deviation, rtol=1e-5)


def test_weights_that_are_known_give_crown():
    """As the deviations vanish, the bound is that of CROWN's lines, or of better ones."""
    apply, loc, _, x = network("convolution", 0.0)
    spread = {n: jnp.full(v.shape, 1e-12) for n, v in loc.items()}
    region = Box(x - 0.2, x + 0.2)
    found = linear(apply, 0.1, loc, spread, region, ROWS)
    rows = bc.linear_bounds(lambda x: ROWS.matrix @ apply(loc, x) + ROWS.offset)(region).lower
    least = rows.A[0] @ region.center - jnp.abs(rows.A[0]) @ region.radius + rows.b
    assert (np.asarray(found.mean) >= np.asarray(least) - 1e-4).all()
    assert np.asarray(found.lipschitz).max() < 1e-8


def test_the_folded_normal_number_of_a_first_layer():
    """E min over |x| <= 1 of w x, w ~ N(m, s^2), is -E |w|: a folded normal number, exactly."""
    for m, s in ((0.0, 1.0), (0.7, 0.2), (-1.0, 3.0)):
        weights = {"w": jnp.array([m])}
        found = linear(
            lambda p, x: p["w"] * x, 0.1, weights, {"w": jnp.array([s])},
            Box(-jnp.ones(1), jnp.ones(1)), Constraints(jnp.ones((1, 1)), jnp.zeros(1)),
        )  # fmt: skip
        folded = s * math.sqrt(2 / math.pi) * math.exp(-0.5 * (m / s) ** 2)
        folded += m * (2 * ndtr(m / s) - 1)
        assert float(found.mean[0]) == pytest.approx(-folded, rel=1e-5)
        assert float(found.lipschitz[0]) == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_safety_lies_around_the_truth(scale):
    apply, loc, spread, x = network("dense", scale)
    region, rows = Box(x - 0.05, x + 0.05), outputs_within(np.full(2, -4.0), np.full(2, 4.0))
    q = bc.MeanField(loc, spread)
    found = safety(KEY, apply, q, region, rows, delta=1e-4)
    points = corners(np.asarray(x), 0.05)

    def one(key):
        params = jax.tree.map(lambda leaf: leaf[0], q.sample(key, 1))
        values = jax.vmap(lambda x: rows.matrix @ apply(params, x) + rows.offset)(points)
        return (values > 0).all()

    safe = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(
        jax.random.split(KEY, DRAWS)
    )
    share = float(safe.mean())
    error = 5 * math.sqrt(max(share * (1 - share), 1 / DRAWS) / DRAWS)
    assert found.lower <= share + error and share - error <= found.upper
    assert found.lower > 0.9 or scale > 0.1


def test_unsafe_at_an_attacked_point():
    loc = {"w": jnp.array([[2.0], [-2.0]])}
    q = bc.MeanField(loc, jax.tree.map(lambda v: jnp.full_like(v, 0.1), loc))
    region = Box(jnp.array([-1.0]), jnp.array([1.0]))
    found = safety(KEY, lambda p, x: p["w"] @ x, q, region, class_stays(0, 2), delta=1e-4)
    assert found.lower == 0.0 and found.upper < 0.001
    assert found.inputs.shape == (1, 1) and found.inputs[0, 0] < 0 and found.rows.tolist() == [0]
    assert len(found.safe.masses) == 0 == len(found.unsafe.masses)


def test_squares_that_underflow():
    loc, spread = {"w": jnp.array([1e-24])}, {"w": jnp.array([1e-23])}
    one, rows = jnp.ones(1), Constraints(jnp.ones((1, 1)), jnp.zeros(1))
    found = linear(lambda p, x: p["w"] * x, 0.1, loc, spread, Box(one, one), rows)
    assert mass(found, 1e-9) < 0.54


def test_two_layers_on_one_set_whose_weights_are_one():
    """Their variances do not add up: the sum of both has twice the deviation."""
    size = 200
    loc = {"a": jnp.full((1, size), 0.02), "b": jnp.full((1, size), 0.02)}
    none, factors = jax.tree.map(jnp.zeros_like, loc), {n: jnp.eye(size)[:, None] for n in loc}
    q = LowRank(loc, jax.tree.map(lambda s: s + 1e-6, none), factors)
    one, rows = jnp.ones(size), Constraints(jnp.ones((1, 1)), jnp.array([200.0]))
    found = bounded(lambda p, x: p["a"] @ x + p["b"] @ x, 1e-9, q, Box(-one, one), rows)
    # The least value is 200 - sum |0.04 + 2 c|, c standard normal.
    mean = 200 - size * float(folded_mean(jnp.array(0.04), jnp.array(4.0)))
    assert float(found.mean[0]) <= mean + 1e-2 and mass(found, 1e-9) < 0.02


@pytest.mark.parametrize(("x", "scale"), [(1e-20, 1e15), (1e-23, 1e18)])
def test_squares_that_underflow_before_they_meet(x, scale):
    loc, spread = {"w": jnp.zeros((1, 1))}, {"w": jnp.full((1, 1), scale)}
    point, rows = jnp.full(1, x), Constraints(jnp.ones((1, 1)), jnp.full(1, 1e-6))
    for arithmetic in (Real(), Float()):
        q = bc.MeanField(loc, spread)
        found = bounded(
            lambda p, x: p["w"] @ x, 1e-9, q, Box(point, point), rows, "crown", arithmetic
        )
        assert mass(found, 1e-9) <= ndtr(1e-6 / (x * scale)) + 1e-3


@pytest.mark.parametrize(
    ("dtype", "loc", "scale", "x"),
    [
        (jnp.float16, 0.01, 0.1, 300.0),
        (jnp.float32, 1.0, 1e-15, 1e20),
        (jnp.float32, 1.0, 1e20, 1.0),
        (jnp.float32, 1.0, 1e30, 1e30),
    ],
)
def test_squares_that_overflow(dtype, loc, scale, x):
    """In the place of the numbers that count there is 0 * inf."""
    params = {"w": jnp.full((2, 1), loc, dtype)}
    spread = {"w": jnp.full((2, 1), scale, dtype)}
    point = jnp.full(1, x, dtype)
    rows = Constraints(jnp.array([[1.0, 0.0]], dtype), jnp.ones(1, dtype))
    found = linear(lambda p, x: p["w"] @ x, 0.1, params, spread, Box(point, point), rows)
    assert mass(found, 1e-9) <= ndtr((loc * x + 1) / (scale * x)) + 1e-3
    found = linear(
        lambda p, x: jnp.tanh(p["w"] @ x) - 1.5, 0.1, params, spread, Box(point, point), rows
    )
    assert mass(found, 1e-9) <= ndtr((loc * x - 0.5) / (scale * x)) + 1e-3


def test_no_more_than_its_delta():
    def of(mean, spread):
        return Margin(jnp.array([mean]), jnp.array([spread]))

    assert mass(of(1e9, 1.0), 0.25) == pytest.approx(0.75)
    assert mass(of(1e9, 0.0), 0.25) <= 0.75
    for margin in (
        (0.0, 0.0),
        (-1.0, 1.0),
        (np.nan, 1.0),
        (1.0, np.nan),
        (1.0, np.inf),
        (np.inf, 1.0),
    ):
        assert mass(of(*margin), 1e-3) == 0.0


def test_a_weight_that_is_used_twice_is_refused():
    loc = {"w": normal(1, 4, 4)}
    q = bc.MeanField(loc, jax.tree.map(jnp.ones_like, loc))
    rows = outputs_within(-np.ones(4), np.ones(4))
    region = Box(normal(2, 4), normal(2, 4))

    def twice(p, x):
        return p["w"] @ jax.nn.relu(p["w"] @ x)

    with pytest.raises(UnsupportedPrimitiveError, match=r"used by .*dot_general.*dot_general"):
        safety(KEY, twice, q, region, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"delta": 0.0}, "delta = 0.0"), ({"delta": 1.0}, "delta = 1.0")],
)
def test_bad_options(options, message):
    apply, loc, spread, x = network("dense", 0.1)
    options = {"rounding": "nearest", **options}
    with pytest.raises(ValueError, match=message):
        safety(KEY, apply, bc.MeanField(loc, spread), Box(x, x), class_stays(0, 2),
               **options)  # fmt: skip


def test_an_empty_set_proves_nothing_and_a_batch_is_mapped():
    apply, loc, spread, x = network("dense", 0.02)
    reaches = jnp.array([0.01, 0.02, -1.0])

    def at(reach):
        return linear(apply, 1e-3, loc, spread, Box(x - reach, x + reach), ROWS)

    found = jax.jit(jax.vmap(at))(reaches)
    one = at(jnp.array(0.01))
    np.testing.assert_allclose(found.mean[0], one.mean, rtol=1e-5)
    assert (found.mean[1] < found.mean[0]).all() and (found.mean[2] == -jnp.inf).all()


def test_what_is_not_finite_proves_nothing():
    """A NaN that a bounded function would hide."""
    q = bc.MeanField({"w": jnp.ones((1, 1)), "f": jnp.full((1,), jnp.nan)},
                     {"w": jnp.full((1, 1), 0.1), "f": None})  # fmt: skip
    one, rows = jnp.ones(1), Constraints(jnp.ones((1, 1)), jnp.full(1, 1.5))
    for method in ("ibp", "crown-ibp", "crown", AlphaCROWN(steps=2)):
        for arithmetic in (Real(), Float()):
            found = bounded(lambda p, x: jnp.tanh(p["f"] * (p["w"] @ x)), 1e-6, q, Box(one, one),
                            rows, method, arithmetic)  # fmt: skip
            assert mass(found, 1e-6) == 0.0


def test_outputs_that_depend_on_nothing_are_refused():
    q = bc.MeanField({"w": jnp.ones(1)}, {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match="depend neither"):
        margins(
            lambda p, x: jnp.ones(1), q, Box(jnp.zeros(1), jnp.ones(1)), jnp.eye(1), jnp.ones(1)
        )


def test_a_leaf_of_no_factors_among_others():
    loc = {"a": normal(1, 2, 3), "b": normal(2, 2)}
    q = LowRank(loc, {"a": 0.1 + 0 * loc["a"], "b": 0.2 + 0 * loc["b"]},
                {"a": 0.1 * normal(3, 2, 2, 3), "b": None})  # fmt: skip
    x, rows = normal(4, 3), Constraints(jnp.eye(2), jnp.zeros(2))
    found = bounded(lambda p, x: p["a"] @ x + p["b"], 0.1, q, Box(x, x), rows)
    shared = jnp.einsum("rkn,n->rk", q.deviations["a"], x)
    exact = jnp.sqrt(0.01 * (x**2).sum() + 0.04 + (shared**2).sum(0))
    np.testing.assert_allclose(found.lipschitz, exact, rtol=1e-4)


def test_what_follows_from_margins_against_draws():
    """Of one layer at a point F is the Gaussian margin itself: all formulas nearly hold as such."""
    mean, spread = np.array([1.0, 0.4]), np.array([0.5, 0.3])
    draws = mean + spread * np.random.default_rng(0).normal(size=(400_000, 2))
    found = Margins(jnp.asarray(mean), jnp.asarray(spread), 1e-9)
    safe = (draws > 0).all(1).mean()
    assert safe - 0.02 < found.probability() <= safe + 2e-3
    for level in (0.01, 0.2, 0.7):
        quantiles = np.quantile(draws, level, axis=0)
        assert (found.quantile(level) <= quantiles + 5e-3).all()
        worst = np.array([d[d <= q].mean() for d, q in zip(draws.T, quantiles, strict=True)])
        np.testing.assert_allclose(found.cvar(level), worst, atol=1e-2)
    np.testing.assert_allclose(found.quantile(0.2), np.quantile(draws, 0.2, axis=0), atol=5e-3)
    softmax = (1 / (1 + np.exp(-draws).sum(1))).mean()
    assert softmax - 0.12 < found.class_probability() <= softmax + 1e-3
    one = Margins(jnp.array([[1.0]]), jnp.array([[0.5]]), 1e-9).class_probability()
    assert one.shape == (1,) and 0 < (1 / (1 + np.exp(-draws[:, 0]))).mean() - one[0] < 0.1
    for level in (1e-9, 1.0, math.nan):
        with pytest.raises(ValueError, match="level = "):
            found.quantile(level)
    with pytest.raises(ValueError, match="level = 0"):
        found.cvar(0.0)


def test_a_band_of_a_regression_holds_draws():
    apply, loc, spread, x = network("dense", 0.05)
    q = bc.MeanField(loc, spread)
    region = Box(x - REACH, x + REACH)
    both = margins(apply, q, region, jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), jnp.zeros(4))
    ends = both.quantile(0.05 / 4)  # of four ends, each lies beyond for so much
    points = corners(np.asarray(x), REACH)
    values = jax.vmap(lambda w: jax.vmap(lambda x: apply(w, x))(points))(q.sample(KEY, 5000))
    inside = (values >= ends[:2]).all((1, 2)) & (values <= -ends[2:]).all((1, 2))
    assert float(inside.mean()) >= 0.95
    assert (-ends[2:] - ends[:2] < 6 * (values.max((0, 1)) - values.min((0, 1)))).all()


def wide(kind):
    """A network of hundreds of units, of float64 numbers; its first sums cancel or do not."""
    rng = np.random.default_rng(3)
    n, k = 500, 200
    a = rng.normal(size=(k, n)) / math.sqrt(n)
    if kind == "cancels":
        a = np.concatenate([a[:, : n // 2], 1e-3 * a[:, n // 2 :] - a[:, : n // 2]], 1) * 10
    loc = {"a": a, "u": 0.1 * rng.normal(size=k), "c": rng.normal(size=(2, k)) / math.sqrt(k)}
    spread = {name: 1e-3 * rng.uniform(0.5, 1.5, size=v.shape) for name, v in loc.items()}
    x = rng.uniform(size=n)
    x[n // 2 :] = x[: n // 2] if kind == "cancels" else x[n // 2 :]
    single = jax.tree.map(np.float32, (loc, spread, x))  # both formats see the same numbers
    return single


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("kind", ["plain", "cancels"])
def test_rounding_is_on_the_safe_side_of_float64(kind, method):
    def apply(p, x):
        return p["c"] @ jax.nn.relu(p["a"] @ x + p["u"])

    def found(numbers, arithmetic):
        loc, spread, x = numbers
        region = Box(x - x.dtype.type(0.01), x + x.dtype.type(0.01))
        rows = jax.tree.map(lambda v: np.asarray(v, x.dtype), ROWS)
        margin = bounded(apply, 1e-4, bc.MeanField(loc, spread), region, rows, method, arithmetic)
        return tuple(np.asarray(v, np.float64) for v in margin)

    single = jax.tree.map(jnp.asarray, wide(kind))
    mean, lipschitz = found(single, Float())
    with jax.enable_x64(True):
        double = jax.tree.map(lambda v: jnp.asarray(np.float64(v)), wide(kind))
        mean64, lipschitz64 = found(double, Real())
    assert mean64.dtype == np.float64 and (mean <= mean64).all()
    # Wider intervals may be crossed by a kink, whose line is of another slope.
    less = 1 - 1e-6 if method == "ibp" else 0.9
    assert (lipschitz >= less * lipschitz64).all()
    assert (mean >= mean64 - (0.5 if kind == "cancels" else 0.05)).all(), mean64 - mean


def test_methods_by_name_and_as_objects():
    apply, loc, spread, x = network("dense", 0.1)
    q, region = bc.MeanField(loc, spread), Box(x - REACH, x + REACH)
    for method in (bc.IBP(), bc.CROWNIBP(), bc.CROWN(), AlphaCROWN()):
        one = bounded(apply, 1e-4, q, region, ROWS, method)
        other = bounded(apply, 1e-4, q, region, ROWS, method.name)
        np.testing.assert_array_equal(one.mean, other.mean)
    for bad in ("forward", bc.Forward(), bc.CROWN(lower_slope="zero"), AlphaCROWN(9, "one")):
        with pytest.raises(ValueError, match="without options"):
            bounded(apply, 1e-4, q, region, ROWS, bad)


def test_a_network_that_has_changed_is_traced_anew():
    """What a function refers to may change between two calls: no compiled one stands for it."""

    class Scaled:
        factor = 1.0

        def __call__(self, p, x):
            return self.factor * (p["w"] @ x)

    q, network = bc.MeanField({"w": jnp.ones((1, 2))}, {"w": jnp.full((1, 2), 0.1)}), Scaled()
    one = jnp.ones(2)
    before = margins(network, q, Box(one, one), jnp.ones((1, 1)), jnp.zeros(1))
    network.factor = -1.0
    after = margins(network, q, Box(one, one), jnp.ones((1, 1)), jnp.zeros(1))
    assert before.mean[0] > 1.9 and after.mean[0] < -1.9


def test_all_products_are_of_full_precision_on_any_device():
    apply, loc, spread, x = network("convolution", 0.1)
    q = bc.MeanField(loc, spread)
    for method in ("crown", "ibp"):
        lowered = jax.jit(
            lambda x, m=method: bounded(apply, 1e-4, q, Box(x, x + 0.1), ROWS, m)
        ).lower(x)
        lines = lowered.as_text().splitlines()
        products = [
            i for i in lines if "stablehlo.dot_general" in i or "stablehlo.convolution" in i
        ]
        assert len(products) > 5 and all("HIGHEST" in i for i in products)


def test_a_variance_that_underflows_beside_a_wide_set():
    """E min over |x| <= r of w x is -sqrt(2/pi) s r, here .008, though s^2 is below all numbers."""
    q = bc.MeanField({"w": jnp.zeros((1, 1))}, {"w": jnp.full((1, 1), 1e-20)})
    reach = jnp.full(1, 1e18)
    for method in ("ibp", "crown-ibp", "crown"):
        for arithmetic in (Real(), Float()):
            rows = Constraints(jnp.ones((1, 1)), jnp.zeros(1))
            found = bounded(
                lambda p, x: p["w"] @ x, 1e-6, q, Box(-reach, reach), rows, method, arithmetic
            )
            assert float(found.mean[0]) <= -0.0079
