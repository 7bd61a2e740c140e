"""Random architectures, random sets, all methods: what must hold of every bound holds.

In float64 up to 1e-9, against values in float64. In float32 rounded outward, with no tolerance at
all, against values in float64 and in float32.

40 examples, the same ones at each run. More, and new ones at each run, by

    BNNCERT_FUZZ=300 python -m pytest -v --dist=load tests/bounds/test_fuzz.py

in shards of 20: each says when it has passed, and leaves no compiled function behind. Of each
architecture, 34,200 values or more are then compared: in sets of all sizes, down to points.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bnncert.bounds import bound
from bnncert.sets import Box, LpBall, is_set
from tests.bounds import architectures, networks
from tests.bounds.networks import in_few_steps

SUITES = (
    ("ibp", "forward"),
    ("ibp", "crown-ibp"),
    ("crown-ibp", "crown"),
    ("crown", "alpha-crown"),
)
"""Methods of one example: all of them take 20 seconds to compile."""

OF_UNKNOWN_ROUNDING = {"power"}
MORE = int(os.environ.get("BNNCERT_FUZZ", "0"))
SHARD = 20 if MORE else 40
STARTS, STEPS = 150, 3
MORE_SETS = 55 if MORE else 0
"""Sets of an architecture, besides its own and a point: of each, STARTS (STEPS + 1) values."""
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
# Inner and outer of pairs; all are inside ibp.
ORDER = (("forward", "ibp"), ("crown-ibp", "ibp"), ("crown", "crown-ibp"), ("alpha-crown", "crown"))

thorough = settings(
    max_examples=SHARD,
    derandomize=not MORE,
    database=None,
    deadline=None,
    # A plan is small, and each one that is tried compiles for seconds.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)


def compiled(architecture, methods, rounding):
    """`(params, sets) -> boxes by method, gradients of crown-ibp` if that is among them."""

    def found(params, sets):
        def one(method, params, sets):
            def f(*points):
                return architecture.apply(params, *points)

            return bound(f, in_few_steps(method, 3), rounding=rounding)(*sets)

        def total(params, sets):
            box = one("crown-ibp", params, sets)
            return jnp.sum(box.upper - 0.7 * box.lower)

        boxes = {method: one(method, params, sets) for method in methods}
        differentiated = methods == ("ibp", "crown-ibp")
        return boxes, jax.grad(total, argnums=(0, 1))(params, sets) if differentiated else ()

    return jax.jit(found)


def evaluation(architecture, outward):
    """`(sets, rng) -> values` at points of sets, compiled once."""
    in_float64 = _attacked(architecture, np.float64)
    if not outward:
        return in_float64
    others = [_in_float32(architecture), *([_attacked(architecture, np.float32)] if MORE else [])]

    def found(sets, rng):
        return np.concatenate([in_float64(sets, rng), *(f(_inside(sets), rng) for f in others)])

    return found


def _attacked(architecture, dtype):
    """Values at points inside, on the boundary, at corners, and along attacks."""
    size = jax.eval_shape(architecture.apply, *_nominal(architecture)).shape[0]
    params = jax.tree.map(dtype, architecture.params)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, 0, 0))
    def many(params, sets, start, direction):
        def apply(*points):
            return architecture.apply(params, *points)

        return networks.attacks(apply, sets, start, direction, STEPS)

    def found(sets, rng):
        unit = np.eye(size)[np.arange(STARTS) % size]
        direction = unit * rng.choice([-1.0, 1.0], (STARTS, 1))
        start = networks.starts(rng, sets, STARTS)
        values = many(params, *jax.tree.map(dtype, (sets, start, direction)))
        return np.asarray(values, np.float64).reshape(-1, size)

    return found


def _in_float32(architecture):
    """Values that the network computes in float32; also in other batches, and uncompiled."""
    params = jax.tree.map(np.float32, architecture.params)
    one = jax.jit(architecture.apply)
    many = jax.jit(jax.vmap(architecture.apply, (None, *[0] * len(architecture.sets))))

    def found(sets, rng):
        points = jax.tree.map(np.float32, networks.starts(rng, sets, STARTS))
        first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], points) for i in (0, -1))
        values = [one(params, *first)[None], many(params, *points)]
        if MORE:
            values.append(architecture.apply(params, *last)[None])
        return np.concatenate(values).astype(np.float64)

    return found


def _inside(sets):
    """Balls that are smaller: rounded to float32, points of theirs are still in those given."""

    def one(region):
        if isinstance(region, Box):
            return region
        rounding = 1e-6 * (1 + np.abs(region.center).sum())
        return LpBall(region.center, np.maximum(0.999 * region.eps - rounding, 0.0), region.p)

    return jax.tree.map(one, sets, is_leaf=is_set)


def _other_sets(sets, rng):
    """Around points of those given, of other sizes; all numbers are float32's."""
    points = networks.starts(rng, sets, max(MORE_SETS, 1))

    def one(region, point, factor):
        if isinstance(region, LpBall):
            return LpBall(point, region.eps * factor, region.p)
        reach = region.radius * factor
        return Box(point - reach, point + reach)

    for i in range(MORE_SETS):
        moved = partial(one, factor=rng.choice([0.0, 1e-5, 1e-3, 0.03, 0.3, 1.0]))
        point = jax.tree.map(lambda leaf, i=i: leaf[i], points)
        found = jax.tree.map(moved, sets, point, is_leaf=is_set)
        yield _rounded(found)


def _rounded(sets):
    return jax.tree.map(lambda leaf: np.float64(np.float32(leaf)), sets)


def _nominal(architecture):
    return (architecture.params, *networks.centers(architecture.sets))


def check(plan, dtype, methods):
    architecture = architectures.build(plan)
    outward = dtype == "float32" and not OF_UNKNOWN_ROUNDING & set(plan.layers)
    if not outward and set(plan.layers) & set(architectures.DELICATE):
        dtype = "float64"  # what cancels is off by more than a tolerance
    if outward and not MORE:
        methods = tuple(m for m in methods if m != "alpha-crown")  # minutes to compile
    compiled_bounds = compiled(architecture, methods, "outward" if outward else "nearest")
    values_in = evaluation(architecture, outward)
    rng = np.random.default_rng(plan.seed)

    def found(sets):
        """Boxes by method, gradients and values, after they were compared."""
        params, region = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype), (architecture.params, sets)
        )
        boxes, gradients = compiled_bounds(params, region)
        values = values_in(sets, rng)
        assert np.isfinite(values).all()
        for method, box in boxes.items():
            lower, upper = np.asarray(box.lower), np.asarray(box.upper)
            assert not (np.isnan(lower).any() or np.isnan(upper).any()), method
            assert (lower <= upper).all(), method
            slack = 0.0 if outward else TOLERANCE[dtype] * (1 + np.abs(values).max())
            outside = max((lower - values).max(), (values - upper).max())
            assert outside <= slack, f"{method} is unsound by {outside}"
        return boxes, gradients, values

    boxes, gradients, values = found(architecture.sets)
    ends = {m: (np.asarray(box.lower), np.asarray(box.upper)) for m, box in boxes.items()}
    for inner, outer in ORDER:
        if inner in ends and outer in ends:
            slack = TOLERANCE[dtype] * (1 + np.abs(ends[outer]))
            assert (ends[inner][0] >= ends[outer][0] - slack[0]).all(), (inner, outer)
            assert (ends[inner][1] <= ends[outer][1] + slack[1]).all(), (inner, outer)
    if all(np.isfinite(end).all() for end in ends.get("crown-ibp", ())):
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all(), "a gradient of crown-ibp is not finite"
    point = _rounded(networks.scaled(architecture.sets, 0.0))
    value = np.asarray(architecture.apply(architecture.params, *networks.centers(point)))
    points, _, _ = found(point)
    for method, box in points.items():
        if outward:
            assert (box.lower <= value).all() and (value <= box.upper).all(), method
            continue
        slack = TOLERANCE[dtype] * (1 + np.abs(values).max())
        np.testing.assert_allclose(box.lower, value, rtol=0, atol=slack, err_msg=method)
        np.testing.assert_allclose(box.upper, value, rtol=0, atol=slack, err_msg=method)
    for sets in _other_sets(architecture.sets, rng):
        found(sets)


@pytest.fixture
def forgetful():
    """300 networks in one process would run out of memory maps."""
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("shard", range(max(1, -(-MORE // SHARD))))
@thorough
@given(
    architectures.plans(),
    st.sampled_from(("float64", "float32")),
    st.sampled_from(SUITES),
)
def test_every_architecture_is_bounded(shard, plan, dtype, methods):
    with jax.enable_x64(True):
        check(plan, dtype, methods)
