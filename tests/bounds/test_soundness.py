"""Bounds hold at every point tried, over a zoo of random networks, and behave as bounds must.

Points: inside the sets, on their boundaries, at their corners, and along attacks on an output.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.ops import EVERY
from bnncert.bounds.tracing import trace
from tests.bounds import networks
from tests.bounds.networks import KINDS, METHODS, NETWORKS

STARTS, STEPS = 500, 3
every_kind = pytest.mark.parametrize("name", KINDS)


@cache
def visited(name):
    """Values at all points, in float64: (networks, points, outputs)."""
    params, args = networks.sample(name, jnp.float64)
    apply = KINDS[name].apply
    rng = np.random.default_rng(1)
    each = [networks.starts(rng, networks.member(args, i), STARTS) for i in range(NETWORKS)]
    begin = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    out = jax.eval_shape(apply, *networks.member((params, *networks.centers(args)), 0))
    size = sum(leaf.size for leaf in jax.tree.leaves(out))
    unit = np.eye(size)[rng.integers(size, size=(NETWORKS, STARTS))]
    direction = unit * rng.choice([-1.0, 1.0], (NETWORKS, STARTS, 1))

    def one(params, args, start, direction):
        return networks.attacks(partial(apply, params), args, start, direction, STEPS)

    many = jax.vmap(jax.vmap(one, in_axes=(None, None, 0, 0)))
    values = jax.jit(many)(params, args, begin, direction)
    return np.asarray(values).reshape(NETWORKS, -1, size)


def violation(name, methods=METHODS):
    """How far values leave the boxes, over 1 plus the largest magnitude, by method."""
    params, args = networks.sample(name, jnp.float64)
    values = visited(name)
    assert values.shape[1] == STARTS * (STEPS + 1)
    worst = {}
    for method, found in networks.boxes(name, methods)(params, args).items():
        lower, upper = networks.ends(found)
        assert np.isfinite(lower).all() and np.isfinite(upper).all()
        below, above = lower[:, None] - values, values - upper[:, None]
        worst[method] = max(below.max(), above.max()) / (1 + np.abs(values).max())
    return worst


def test_there_are_a_hundred_thousand_points_and_fifty_networks():
    assert len(KINDS) * NETWORKS >= 50
    assert len(KINDS) * NETWORKS * STARTS * (STEPS + 1) >= 100_000


def test_every_relaxation_there_is_is_in_a_network():
    """But for those whose rounding is not known, and products that are a convolution.

    Here all are rounded outward; and a convolution of two bounded values is in `test_fuzz.py`.
    """
    exempt = {o.name for o in EVERY if o.rounding is None and o.family != "affine"}
    assert exempt == set("acos acosh asin atanh cumprod erf_inv pow reduce_prod tan".split())
    used, exempt = set(), exempt | {"conv_general_dilated"}
    for kind in KINDS.values():
        params, args = kind.init(np.random.default_rng(0))
        nodes = trace(partial(kind.apply, params), args, {}).nodes
        used |= {node.op for node in nodes if node.is_relaxed}
    assert used == {o.name for o in EVERY if o.family != "affine"} - exempt


@every_kind
def test_no_point_leaves_the_box_in_float64(name, float64):
    worst = violation(name)
    assert max(worst.values()) <= 1e-9, worst


@every_kind
def test_outward_no_point_leaves_the_box_in_float32_at_all(name, float64):
    """Neither values in float64 nor the network's own in float32."""
    params, args = networks.sample(name, jnp.float32)
    found = networks.boxes(name, ("crown",), "outward")(params, args)
    lower, upper = networks.ends(found["crown"])
    assert np.isfinite(lower).all() and np.isfinite(upper).all()
    values = np.concatenate([visited(name), in_float32(name)], axis=1)
    assert (lower[:, None] <= values).all() and (values <= upper[:, None]).all()


def in_float32(name):
    """Values computed in float32, at points of it: (networks, points, outputs)."""
    params, args = networks.sample(name, jnp.float32)
    apply = KINDS[name].apply
    rng = np.random.default_rng(2)
    each = [
        networks.starts(rng, networks.scaled(networks.member(args, i), 0.999), 200)
        for i in range(NETWORKS)
    ]
    points = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *each)

    def one(params, point):
        return networks.flat(apply(params, *point))

    many = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0))))
    return np.asarray(many(params, points), np.float64)


@every_kind
def test_at_a_point_the_bounds_are_the_value(name, float64):
    params, args = networks.sample(name, jnp.float64)
    value = jax.vmap(lambda p, a: networks.flat(KINDS[name].apply(p, *a)))(
        params, networks.centers(args)
    )
    for method, found in networks.boxes(name)(params, networks.scaled(args, 0.0)).items():
        for end in networks.ends(found):
            np.testing.assert_allclose(end, value, rtol=1e-11, atol=1e-11, err_msg=method)


@every_kind
@pytest.mark.parametrize("factor", [1.0, 0.2])
def test_each_method_lies_inside_the_one_below(name, factor, float64):
    params, args = networks.sample(name, jnp.float64)
    found = networks.boxes(name)(params, networks.scaled(args, factor))
    (l0, u0), (lf, uf), (l1, u1), (l2, u2) = (networks.ends(found[m]) for m in METHODS)
    slack = 1e-12 * (1 + np.abs(l0) + np.abs(u0))
    assert (l0 <= l1 + slack).all() and (u1 <= u0 + slack).all()
    assert (l1 <= l2 + slack).all() and (u2 <= u1 + slack).all()
    assert (l0 <= lf + slack).all() and (uf <= u0 + slack).all()


@every_kind
def test_intervals_grow_with_the_sets(name, float64):
    params, args = networks.sample(name, jnp.float64)
    inner = None
    for factor in (0.0, 0.3, 0.6, 1.0):
        found = networks.boxes(name)(params, networks.scaled(args, factor))["ibp"]
        lower, upper = networks.ends(found)
        if inner is not None:
            assert (lower <= inner[0] + 1e-12).all() and (inner[1] <= upper + 1e-12).all()
        inner = lower, upper


# The kinds that between them hold every backward rule.
DIFFERENTIATED = ("clipped", "leaky", "convex", "tanh", "l1", "l2-image", "products", "several")


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_finite(name):
    """With respect to weights and radii; at sets that are points and at weights that are 0 too."""
    params, args = networks.member(networks.sample(name, jnp.float32), 0)

    def total(params, factor):
        scaled = networks.scaled(args, factor)
        found = bound(partial(KINDS[name].apply, params), "crown")(*scaled)  # runs the others
        return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(found)))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    for weight_factor, factor in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        weights = jax.tree.map(lambda leaf, t=weight_factor: t * leaf, params)
        slopes = jax.tree.leaves(gradient(weights, jnp.float32(factor)))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in slopes), (weight_factor, factor)
        if (weight_factor, factor) == (1.0, 1.0):
            assert all(float(jnp.abs(leaf).max()) > 0 for leaf in slopes)


@pytest.mark.parametrize("name", ["conv-strided", "several", "weights-and-input"])
def test_vmap_equals_a_loop(name, float64):
    """Over stacked weights and stacked sets at once."""
    params, args = networks.sample(name, jnp.float64)
    together = networks.boxes(name)(params, args)["crown"]
    alone = jax.jit(lambda p, a: bound(partial(KINDS[name].apply, p), "crown")(*a))
    for i in range(NETWORKS):
        one = alone(*networks.member((params, args), i))
        equal = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
        jax.tree.map(equal, one, networks.member(together, i))


@pytest.mark.smoke
def test_jit_equals_eager(float64):
    params, args = networks.sample("margins", jnp.float64)
    together = networks.boxes("margins")(params, args)
    p, a = networks.member((params, args), 0)
    for method in METHODS:
        alone = bound(partial(KINDS["margins"].apply, p), method)(*a)
        np.testing.assert_allclose(alone.lower, together[method].lower[0], rtol=1e-12)
        np.testing.assert_allclose(alone.upper, together[method].upper[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "factor"), [("affine", 0.97), ("mlp", 0.6), ("l1", 0.6), ("l2", 0.7)]
)
def test_a_bound_that_is_too_small_would_be_noticed(name, factor, float64):
    """The points find the extremes where the bound is exact, and come near them elsewhere."""
    params, args = networks.sample(name, jnp.float64)
    found = networks.boxes(name)(params, networks.scaled(args, factor))["crown"]
    lower, upper = networks.ends(found)
    values = visited(name)
    assert (values < lower[:, None]).any() and (values > upper[:, None]).any()


def test_samples_swept_by_a_map_equal_vmap(float64):
    """`lax.map` over stacked weights, as posteriors are swept."""
    params, args = networks.sample("mlp", jnp.float64)
    x = networks.member(args, 0)

    def one(p):
        return bound(partial(KINDS["mlp"].apply, p), "crown")(*x)

    swept, stacked = jax.lax.map(one, params), jax.jit(jax.vmap(one))(params)
    np.testing.assert_allclose(swept.lower, stacked.lower, rtol=1e-11)
    np.testing.assert_allclose(swept.upper, stacked.upper, rtol=1e-11)
