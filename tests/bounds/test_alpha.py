"""alpha-CROWN: never wider than CROWN, tighter where slopes matter, differentiable."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import CROWN, AlphaCROWN, bound
from bnncert.bounds.methods.alpha_crown import _met
from bnncert.sets import Box


def mlp(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(w @ x + b)
    w, b = params[-1]
    return w @ x + b


def tanh_mlp(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(2 * (w @ x + b))
    w, b = params[-1]
    return w @ x + b


def network(seed=0, sizes=(4, 8, 8, 3)):
    rng = np.random.default_rng(seed)
    pairs = zip(sizes[1:], sizes[:-1], strict=True)
    return [(rng.normal(size=(m, n)) / np.sqrt(n), 0.2 * rng.normal(size=m)) for m, n in pairs]


def region(seed=0):
    center = np.random.default_rng(seed + 100).normal(size=4)
    return Box(center - 0.4, center + 0.4)


@cache
def compiled(f, method, **options):
    return jax.jit(bound(f, method, **options))


@pytest.mark.parametrize("f", [mlp, tanh_mlp])
def test_it_lies_inside_crown_and_is_a_tenth_narrower(f, float64):
    """The stated amount, on average over outputs of three networks: 5% in 20 steps."""
    ratios = []
    for seed in range(3):
        crown = compiled(f, "crown")(network(seed), region(seed))
        alpha = jax.jit(bound(f, AlphaCROWN(20)))(network(seed), region(seed))
        assert (alpha.lower >= crown.lower - 1e-12).all()
        assert (alpha.upper <= crown.upper + 1e-12).all()
        ratios.append(float(alpha.radius.sum() / crown.radius.sum()))
    assert np.mean(ratios) < 0.95, ratios


def families(params, x):
    """One function of each family of free planes, each an output, of one layer."""
    (w, b), (v, c) = params
    y = w @ x + b
    found = (
        jnp.clip(y, -0.4, 0.6),
        jnp.tanh(2 * y),
        jax.nn.selu(y),
        jnp.sin(2 * y),
        jnp.exp(y),
        jnp.minimum(y, y[::-1]),
        jnp.logaddexp(3 * y, 0.5 - y),
        jax.nn.softmax(2 * y),
        y * y[::-1],
    )
    return jnp.stack([v @ f + c @ y for f in found])


def test_every_family_of_free_planes_lies_inside_crown_and_is_sound(float64):
    """At two radii; and some of them are narrower for it."""
    rng = np.random.default_rng(4)
    params = [(rng.normal(size=(4, 4)) / 2, rng.normal(size=4) / 2), rng.normal(size=(2, 4))]
    center = rng.normal(size=4)

    @jax.jit
    def run(x):
        methods = ("crown", AlphaCROWN(3))
        return [bound(partial(families, params), m)(x) for m in methods]

    for eps in (0.1, 0.5):
        corners = rng.choice([-1.0, 0.0, 1.0], (300, 4))
        points = center + eps * np.concatenate([corners, rng.uniform(-1, 1, (300, 4))])
        values = jax.vmap(partial(families, params))(points)
        crown, alpha = run(Box(center - eps, center + eps))
        assert (alpha.lower <= values + 1e-9).all() and (values <= alpha.upper + 1e-9).all()
        assert (alpha.lower >= crown.lower - 1e-12).all()
        assert (alpha.upper <= crown.upper + 1e-12).all()
        assert (alpha.radius < 0.999 * crown.radius).sum() >= 3


def test_more_steps_never_lose(float64):
    """All steps are intersected."""
    few, many = (jax.jit(bound(mlp, AlphaCROWN(steps)))(network(), region()) for steps in (2, 12))
    assert (many.lower >= few.lower - 1e-12).all() and (many.upper <= few.upper + 1e-12).all()
    assert many.radius.sum() < 0.999 * few.radius.sum()


def test_it_is_differentiable(float64):
    """By weights and by the set; a step along the gradient changes the bound as it says."""

    def width(params, x):
        return bound(mlp, AlphaCROWN(3))(params, x).radius.sum()

    params, x = network(), region()
    value_and_slope = jax.jit(jax.value_and_grad(width, argnums=(0, 1)))
    value, slopes = value_and_slope(params, x)
    leaves = jax.tree.leaves(slopes)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves[:4])
    weights = slopes[0]
    steepness = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(weights))
    rate = 1e-3 * float(value) / steepness  # a thousandth of the width, to first order
    moved = jax.tree.map(lambda p, s: p - rate * s, params, weights)
    assert value_and_slope(moved, x)[0] < value - 0.5e-3 * value


def test_it_learns_from_bounds_that_differ_by_rounding_alone():
    """Where it starts they are CROWN's: rounding puts them on either side."""

    def ends(shift, known):
        found = Box(shift - 1.0, shift + 1.0)
        box = _met(found, known)
        return box.upper - box.lower + shift

    known = Box(jnp.asarray(-1.0), jnp.asarray(1.0))
    for shift in (-2e-7, 0.0, 2e-7):
        assert jax.grad(ends)(shift, known) == 1.0  # both ends move
    assert jax.grad(ends)(0.5, known) == 0.0  # the lower end, and the known upper one


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error(steps):
    with pytest.raises(ValueError, match=f"steps = {steps}"):
        AlphaCROWN(steps)


@pytest.mark.parametrize("batch_size", [1024, 3])
def test_rows_of_unstable_units_are_all_that_crown_needs(batch_size, float64):
    """A ReLU that does not cross is exact on any interval that does not: little is lost.

    Not nothing: the boxes of such units are wider, and with them the intervals further on that
    are intersected with.
    """
    for seed in range(4):
        for depth in (1, 2):
            params, x = network(seed, (4, *[12] * (depth + 1), 3)), region(seed)
            all_rows = compiled(mlp, "crown")(params, x)
            some = compiled(mlp, CROWN(unstable_only=True), batch_size=batch_size)(params, x)
            least = compiled(mlp, "crown-ibp")(params, x)
            assert (some.lower >= least.lower - 1e-12).all()
            assert (some.upper <= least.upper + 1e-12).all()
            assert some.radius.sum() <= 1.1 * all_rows.radius.sum()


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}])
def test_it_compiles_once(options):
    """Neither another set nor the optimiser's steps trace the network again."""
    calls = 0

    def counted(params, x):
        nonlocal calls
        calls += 1
        return mlp(params, x)

    g = jax.jit(bound(counted, AlphaCROWN(2), **options))
    params = jax.tree.map(np.float32, network())
    for seed in range(3):
        found = g(params, jax.tree.map(np.float32, region(seed)))
        assert np.isfinite(found.lower).all()
    assert calls == 1
