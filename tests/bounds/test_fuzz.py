"""Random architectures, random sets, all methods: what must hold of every bound holds.

In float64 up to 1e-9, against values in float64. In float32 rounded outward, with no tolerance at
all, against values in float64 and in float32.

40 examples, the same ones at each run. More, and new ones at each run, by

    BNNCERT_FUZZ=300 python -m pytest -v --dist=load tests/bounds/test_fuzz.py

in shards of 20: each says when it has passed, and leaves no compiled function behind.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bnncert.bounds import bound
from tests.bounds import architectures, networks

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

            return bound(f, method, rounding=rounding, steps=3)(*sets)

        def total(params, sets):
            box = one("crown-ibp", params, sets)
            return jnp.sum(box.upper - 0.7 * box.lower)

        boxes = {method: one(method, params, sets) for method in methods}
        differentiated = methods == ("ibp", "crown-ibp")
        return boxes, jax.grad(total, argnums=(0, 1))(params, sets) if differentiated else ()

    return jax.jit(found)


def attained(architecture, seed):
    """Values in float64 at points inside, on the boundary, at corners, and along attacks."""
    rng = np.random.default_rng(seed)
    start = networks.starts(rng, architecture.sets, STARTS)
    size = jax.eval_shape(architecture.apply, *_nominal(architecture)).shape[0]
    unit = np.eye(size)[np.arange(STARTS) % size]
    direction = unit * rng.choice([-1.0, 1.0], (STARTS, 1))

    def one(params, sets, start, direction):
        def apply(*points):
            return architecture.apply(params, *points)

        return networks.attacks(apply, sets, start, direction, STEPS)

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))
    values = many(architecture.params, architecture.sets, start, direction)
    return np.asarray(values).reshape(-1, size)


def attained_in_float32(architecture, seed):
    """Values that the network computes in float32, at points of it; also in other batches."""
    rng = np.random.default_rng(seed + 1)
    params = jax.tree.map(np.float32, architecture.params)
    points = networks.starts(rng, networks.scaled(architecture.sets, 0.999), STARTS)
    points = jax.tree.map(lambda leaf: leaf.astype(np.float32), points)
    one = jax.jit(architecture.apply)
    many = jax.jit(jax.vmap(architecture.apply, (None, *[0] * len(points))))
    first = jax.tree.map(lambda leaf: leaf[0], points)
    values = np.concatenate([one(params, *first)[None], many(params, *points)])
    return values.astype(np.float64)


def _nominal(architecture):
    return (architecture.params, *networks.centers(architecture.sets))


def check(plan, dtype, methods):
    architecture = architectures.build(plan)
    params, sets = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (architecture.params, architecture.sets)
    )
    outward = dtype == "float32" and not OF_UNKNOWN_ROUNDING & set(plan.layers)
    if outward and not MORE:
        methods = tuple(m for m in methods if m != "alpha-crown")  # minutes to compile
    found = compiled(architecture, methods, "outward" if outward else "nearest")
    boxes, gradients = found(params, sets)
    values = attained(architecture, plan.seed)
    if outward:
        values = np.concatenate([values, attained_in_float32(architecture, plan.seed)])
    assert np.isfinite(values).all()
    ends = {m: (np.asarray(box.lower), np.asarray(box.upper)) for m, box in boxes.items()}
    for method, (lower, upper) in ends.items():
        assert not (np.isnan(lower).any() or np.isnan(upper).any()), method
        assert (lower <= upper).all(), method
        slack = 0.0 if outward else TOLERANCE[dtype] * (1 + np.abs(values).max())
        outside = max((lower - values).max(), (values - upper).max())
        assert outside <= slack, f"{method} is unsound by {outside}"
    for inner, outer in ORDER:
        if inner in ends and outer in ends:
            slack = TOLERANCE[dtype] * (1 + np.abs(ends[outer]))
            assert (ends[inner][0] >= ends[outer][0] - slack[0]).all(), (inner, outer)
            assert (ends[inner][1] <= ends[outer][1] + slack[1]).all(), (inner, outer)
    if all(np.isfinite(end).all() for end in ends.get("crown-ibp", ())):
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all(), "a gradient of crown-ibp is not finite"
    value = np.asarray(architecture.apply(*_nominal(architecture)))
    points, _ = found(params, networks.scaled(sets, 0.0))
    for method, box in points.items():
        if outward:
            assert (box.lower <= value).all() and (value <= box.upper).all(), method
            continue
        slack = TOLERANCE[dtype] * (1 + np.abs(values).max())
        np.testing.assert_allclose(box.lower, value, rtol=0, atol=slack, err_msg=method)
        np.testing.assert_allclose(box.upper, value, rtol=0, atol=slack, err_msg=method)


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
