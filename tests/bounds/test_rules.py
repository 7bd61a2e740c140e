"""Interval rules are exact where coordinates are independent: equal to all corners tried."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.graph import Node
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.ops import AFFINE, EVERY, interval
from bnncert.bounds.ops.products import chord
from bnncert.bounds.tracing import trace
from bnncert.sets import Box

MONOTONE = {operation.name for operation in EVERY if operation.increasing}
REDUCTIONS = {operation.name for operation in EVERY if operation.family == "reduction"}
REDUCTIONS -= {"normalise"}  # of two values: tests/bounds/test_normalising.py
RNG = np.random.default_rng(0)
M = RNG.normal(size=(3, 6))
KERNEL: Any = RNG.normal(size=(2, 2, 1, 2))
NUMBERS = ("NHWC", "HWIO", "NHWC")

AFFINE_CASES = {
    "reshape": lambda x: x.reshape(2, 3),
    "transpose": lambda x: x.reshape(2, 3).T,
    "squeeze": lambda x: jnp.squeeze(x.reshape(1, 6), 0),
    "rev": lambda x: x[::-1],
    "slice": lambda x: x[1:4],
    "tile": lambda x: jnp.tile(x, 2),
    "stack": lambda x: jnp.stack([x, x[::-1], M[0]], axis=1),
    "unstack": lambda x: jax.numpy.unstack(x.reshape(3, 2))[1],
    "split": lambda x: jnp.split(x, 2)[1],
    "dynamic_slice": lambda x: jax.lax.dynamic_slice(x, (2,), (3,)),
    "concatenate": lambda x: jnp.concatenate([x[:2], np.ones(2), x[2:]]),
    "pad": lambda x: jnp.pad(x, 1, constant_values=3.0),
    "select_n": lambda x: jnp.where(M[0] > 0, x, -1.0),
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x, (2, 6)),
    "windows": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "SAME"),
    "dynamic_update_slice": lambda x: jax.lax.dynamic_update_slice(x, x[:2] - x[4:], (1,)),
    "scatter": lambda x: x.at[np.array([0, 3])].set(x[1:3] + 1.0),
    "scatter-add": lambda x: x.at[np.array([0, 3])].add(x[1:3] + 1.0),
    "gather": lambda x: x[np.array([0, 5, 5])],
    "add": lambda x: x + M[0],
    "sub": lambda x: M[0] - x,
    "neg": lambda x: -x,
    "mul": lambda x: x * M[0],
    "div": lambda x: x / M[0],
    "reduce_sum": lambda x: x.reshape(2, 3).sum(axis=1),
    "cumsum": lambda x: jnp.cumsum(x),
    "reduce_window_sum": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2,), (1,), "SAME"),
    "dot_general": lambda x: M @ x,
    "conv_general_dilated": lambda x: jax.lax.conv_general_dilated(
        x.reshape(1, 2, 3, 1), KERNEL, (1, 1), "SAME", dimension_numbers=NUMBERS
    ),
}


def corners(*boxes):
    """All corners of all boxes at once: (number, *shape) for each."""
    sizes = [box.lower.size for box in boxes]
    bits = np.array(list(itertools.product([False, True], repeat=sum(sizes))))
    parts = np.split(bits, np.cumsum(sizes)[:-1], axis=1)
    return [
        np.where(bit.reshape(-1, *box.lower.shape), box.upper, box.lower)
        for bit, box in zip(parts, boxes, strict=True)
    ]


def random_box(*shape):
    lower = RNG.normal(size=shape)
    return Box(jnp.asarray(lower), jnp.asarray(lower + RNG.uniform(0, 2, size=shape)))


@pytest.mark.parametrize("name", AFFINE_CASES)
def test_affine_operations_equal_their_corners(name, float64):
    box, f = random_box(6), AFFINE_CASES[name]
    assert name in {node.op for node in trace(f, (box,), {}).nodes}
    values = jax.vmap(f)(jnp.asarray(corners(box)[0]))
    for method in ("ibp", "crown"):
        found = bound(f, method)(box)
        np.testing.assert_allclose(found.lower, values.min(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.upper, values.max(0), rtol=1e-12, atol=1e-12)


def test_every_affine_rule_is_tested():
    """The others: identities of shape or type, and a sum that only derivatives make."""
    assert set(AFFINE) - set(AFFINE_CASES) == {"expand_dims", "convert_element_type", "add_any"}


INCREASING = {
    "max": lambda x: jnp.maximum(x, 0.3),
    "min": lambda x: jnp.minimum(x, 0.3),
    "logaddexp": lambda x: jnp.logaddexp(x, 0.5 * x - 0.3),
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, -0.5),
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "hard_tanh": jax.nn.hard_tanh,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "logistic": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "exp": jnp.exp,
    "exp2": jax.lax.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sqrt": jnp.sqrt,
    "cbrt": jnp.cbrt,
    "erf": jax.lax.erf,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "sinh": jnp.sinh,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
}


@pytest.mark.parametrize("name", INCREASING)
def test_monotone_operations_equal_the_extremes(name, float64):
    assert set(INCREASING) == set(MONOTONE)
    f = INCREASING[name]
    shift = 2.0 if name in ("log", "sqrt", "log1p") else 0.0
    box = Box(jnp.array([-1.5, -1.0, 0.2, -1.2]) + shift, jnp.array([-0.2, 1.5, 2.0, -1.2]) + shift)
    assert name in [node.op for node in trace(f, (box,), {}).nodes]
    grid = box.lower + jnp.linspace(0, 1, 201)[:, None] * (box.upper - box.lower)
    values = f(grid)
    for method in ("ibp", "crown"):
        found = bound(f, method)(box)
        assert (found.lower <= values.min(0) + 1e-12).all()
        assert (found.upper >= values.max(0) - 1e-12).all()
        np.testing.assert_allclose(found.lower, values.min(0), atol=0.02)
        np.testing.assert_allclose(found.upper, values.max(0), atol=0.02)


REDUCED = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=1),
    "reduce_max": lambda x: jnp.max(x, axis=1),
    "reduce_min": lambda x: jnp.min(x, axis=1),
    "cummax": lambda x: jax.lax.cummax(x, axis=1),
    "cummin": lambda x: jax.lax.cummin(x, axis=1),
    "cumlogsumexp": lambda x: jax.lax.cumlogsumexp(x, axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "top_k": lambda x: jax.lax.top_k(x, 2)[0],
    "reduce_prod": lambda x: jnp.prod(x, axis=1),
    "cumprod": lambda x: jax.lax.cumprod(x, axis=1),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_equal_their_corners(name, float64):
    """Monotone in each coordinate, so the extremes lie at corners."""
    assert set(REDUCED) == set(REDUCTIONS)
    box, f = random_box(2, 3), REDUCED[name]
    shape = jax.eval_shape(f, box.lower).shape
    node = Node(
        name, (Ref(0),), f, {"axes": (1,), "axis": 1, "reverse": False}, shape, box.lower.dtype, ""
    )
    values = jax.vmap(f)(jnp.asarray(corners(box)[0]))
    found = interval(node, box)
    np.testing.assert_allclose(found.lower, values.min(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.upper, values.max(0), rtol=1e-12, atol=1e-12)


def test_where_a_function_is_not_defined_there_is_no_bound(float64):
    for method in ("ibp", "crown"):
        found = bound(lambda x: 2.0 * jnp.log(x), method)(Box(jnp.array([-1.0]), jnp.array([1.0])))
        assert found.lower[0] == -jnp.inf and found.upper[0] >= 0.0


@pytest.mark.parametrize(
    ("spec", "a", "b"),
    [
        ("ij,j->i", (2, 3), (3,)),
        ("i,ij->j", (2,), (2, 2)),
        ("bi,bij->bj", (2, 1), (2, 1, 2)),
        ("i,i->", (3,), (3,)),
        ("i,i->i", (3,), (3,)),
    ],
)
def test_products_of_two_boxes_equal_their_corners(spec, a, b, float64):
    boxes = random_box(*a), random_box(*b)

    def f(x, y):
        return jnp.einsum(spec, x, y)

    values = jax.vmap(f)(*map(jnp.asarray, corners(*boxes)))
    found = bound(f, "ibp")(*boxes)
    np.testing.assert_allclose(found.lower, values.min(0), rtol=1e-12)
    np.testing.assert_allclose(found.upper, values.max(0), rtol=1e-12)
    relaxed = bound(f, "crown")(*boxes)
    np.testing.assert_allclose(relaxed.lower, found.lower, rtol=1e-12)
    np.testing.assert_allclose(relaxed.upper, found.upper, rtol=1e-12)


def test_the_chord_meets_the_minimum_at_both_ends(float64):
    """min_W W x = min(Wl x, Wu x) is concave: the line through its ends is the best below it."""
    x = Box(
        jnp.array([-2.0, -1.0, 0.5, 0.0, -1.0, 1.0, -3.0]),
        jnp.array([3.0, -0.5, 2.0, 0.0, 0.0, 1.0, -3.0]),
    )
    low, high = -0.7, 0.4
    lam, m = chord(x)

    def below(v):
        return (low + (high - low) * lam) * v + (high - low) * m

    def above(v):
        return (high - (high - low) * lam) * v - (high - low) * m

    for t in np.linspace(0, 1, 11):
        v = x.lower + t * (x.upper - x.lower)
        gap = np.minimum(low * v, high * v) - below(v)
        assert (gap >= -1e-12).all()
        assert (above(v) - np.maximum(low * v, high * v) >= -1e-12).all()
        if t in (0.0, 1.0):
            np.testing.assert_allclose(gap, 0.0, atol=1e-12)


def test_affine_is_decided_by_what_is_bounded():
    box = Box(jnp.zeros(3), jnp.ones(3))

    def last(f):
        return trace(f, (box,), {}).nodes[-1]

    assert last(lambda x: 2.0 * x).affine is not None
    assert last(lambda x: x / 2.0).affine is not None
    assert last(lambda x: x * x).affine is None
    assert last(lambda x: -(1.0 / x)).affine is not None
    assert last(lambda x: x**-1).affine is None
    assert last(lambda x: jnp.dot(x, x)).affine is None
    assert last(lambda x: x.astype(int)).affine is None
    assert last(lambda x: x.astype(jnp.bfloat16)).affine is not None
