"""Affine runs are bounded as one map: exact prefixes, and margins with the last layer merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound
from bnncert.bounds.merging import affine_prefix, merged_runs
from bnncert.bounds.norms import first_sums
from bnncert.bounds.ops.boxes import drop_nan, intersect
from bnncert.bounds.tracing import trace
from bnncert.sets import Box, LpBall, ball

RNG = np.random.default_rng(0)
V, U = RNG.normal(size=(5, 6)), RNG.normal(size=(4, 5))


def dual_norm(matrix, p):
    order = {np.inf: 1, 1: np.inf, 2: 2}[p]
    return np.linalg.norm(matrix, ord=order, axis=1)


@pytest.mark.parametrize("p", [np.inf, 1, 2])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_an_affine_function_is_bounded_by_the_dual_norm(p, method, float64):
    x = RNG.normal(size=6)
    cases = (
        (lambda v: U @ (V @ v + 1.0), U @ V),
        (lambda v: v - v.mean(), np.eye(6) - 1 / 6),
        (lambda v: v[:4] + U @ (V @ v), U @ V + np.eye(4, 6)),
        (lambda v: jnp.cumsum(v - v[::-1]), np.cumsum(np.eye(6) - np.eye(6)[::-1], axis=0)),
    )
    for f, matrix in cases:
        box = bound(f, method)(ball(jnp.asarray(x), 0.3, p=float(p) if p == np.inf else p))
        reach = 0.3 * dual_norm(matrix, p)
        np.testing.assert_allclose(box.upper, f(x) + reach, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(box.lower, f(x) - reach, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_a_ball_is_not_bounded_through_its_hull(p, float64):
    """The first layer by the dual norm: far narrower than the box around the ball."""
    w = jnp.asarray(RNG.normal(size=(3, 784)))
    x = jnp.zeros(784)
    f = lambda v: jax.nn.relu(w @ v)  # noqa: E731
    tight = bound(f, "ibp")(LpBall(x, 0.1, p))
    wide = bound(f, "ibp")(ball(x, 0.1))
    assert (tight.upper * 20 < wide.upper).all()
    np.testing.assert_allclose(tight.upper, 0.1 * dual_norm(np.asarray(w), p), rtol=1e-12)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_margins_merge_with_the_last_layer(method, float64):
    def logits(x):
        return U @ jax.nn.relu(V @ x) + 0.1

    def margins(x):
        y = logits(x)
        return y - y[2]

    for seed in range(5):
        x = ball(jnp.asarray(np.random.default_rng(seed).normal(size=6)), 0.2)
        found, plain = bound(margins, method)(x), bound(logits, method)(x)
        np.testing.assert_allclose([found.lower[2], found.upper[2]], 0.0, atol=1e-14)
        naive = plain.upper - plain.lower[2]
        others = np.array([0, 1, 3])
        assert (found.upper[others] <= naive[others] + 1e-12).all()
        assert (found.upper[others] < naive[others] - 1e-3).any()


def test_interval_margins_have_a_closed_form(float64):
    """IBP of the hidden layer, then |U_j - U_y| over it: elision of the last layer."""
    x = jnp.asarray(RNG.normal(size=6))
    found = bound(lambda v: (lambda y: y - y[1])(U @ jax.nn.relu(V @ v)), "ibp")(ball(x, 0.2))
    reach = 0.2 * np.abs(V).sum(axis=1)
    low, high = (np.maximum(V @ np.asarray(x) + s * reach, 0) for s in (-1, 1))
    rows = U - U[1]
    expected = np.maximum(rows, 0) @ high + np.minimum(rows, 0) @ low
    np.testing.assert_allclose(found.upper, expected, rtol=1e-12, atol=1e-12)


def graph_of(f, region=None):
    return trace(f, (Box(jnp.zeros(6), jnp.ones(6)) if region is None else region,), {})


def test_only_what_is_loose_is_merged():
    """A plain network over a box is exact op by op up to its last nonlinearity."""
    plain = graph_of(lambda x: U @ jax.nn.relu(V @ x + 1.0) + 2.0)
    assert merged_runs(plain) == {}
    two = graph_of(lambda x: jax.nn.relu(U @ (V @ x)))
    assert {two.nodes[i].op for i in merged_runs(two)} == {"dot_general"}
    over_ball = graph_of(lambda x: jax.nn.relu(V @ x), LpBall(jnp.zeros(6), 1.0, 2))
    assert merged_runs(over_ball) == {} and first_sums(over_ball) == {1}


def test_prefix_and_bounded_nodes():
    graph = graph_of(lambda x: U @ jax.nn.relu(V @ x + 1.0))
    ops = [node.op for node in graph.nodes]
    assert ops == ["input", "dot_general", "add", "max", "dot_general"]
    assert affine_prefix(graph) == {0, 1, 2}
    assert graph.acted_on | set(graph.output_nodes) == {2, 4}


def test_boxes_that_rounding_parted_keep_the_gap():
    a, b = (
        Box(jnp.array([0.0, 0.0]), jnp.array([1.0, 1.0])),
        Box(jnp.array([0.5, 1.1]), jnp.array([2.0, 2.0])),
    )
    both = intersect(a, b)
    np.testing.assert_allclose(both.lower, [0.5, 1.0])
    np.testing.assert_allclose(both.upper, [1.0, 1.1])


def test_nan_becomes_no_bound():
    box = drop_nan(Box(jnp.array([jnp.nan, 0.0]), jnp.array([1.0, jnp.nan])))
    np.testing.assert_array_equal(box.lower, [-jnp.inf, 0.0])
    np.testing.assert_array_equal(box.upper, [1.0, jnp.inf])


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_overflow_is_never_a_nan(method):
    f = lambda x: jax.nn.relu(jnp.exp(100 * x) - jnp.exp(90 * x)) * 2.0 - x  # noqa: E731
    box = bound(f, method)(Box(-jnp.ones(3), jnp.ones(3)))
    assert not bool(jnp.isnan(box.lower).any() | jnp.isnan(box.upper).any())
    assert (box.upper == jnp.inf).all()
