"""Affine runs are merged within a budget, and what must be merged is, whatever it costs."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds import bound, merging
from bnncert.bounds.margins import all_margin_bounds, margin_bounds
from bnncert.bounds.tracing import trace
from bnncert.sets import Box, LpBall, ball
from experiments.benchmarks import affine_runs
from tests.bounds.networks import METHODS, in_few_steps, starts

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(3)


def drawn(*shape):
    return RNG.normal(size=shape) / math.sqrt(shape[-1])


def around(*shape):
    return jnp.asarray(drawn(*shape))


def no_budget(monkeypatch, budget=0.0):
    monkeypatch.setattr(merging, "BUDGET", budget)
    monkeypatch.setattr(merging, "FEW", 0)


@pytest.mark.parametrize("name", affine_runs.NETWORKS)
def test_intervals_cost_a_few_forward_passes(name):
    for rounding in ("nearest", "outward"):
        for batch_size in (1, 8):
            bounds, forward, args = affine_runs.bounds_and_forward(
                name, batch_size, rounding=rounding
            )
            # XLA counts the body of a loop once: there must be none.
            assert "while" not in bounds.as_text()
            assert affine_runs.Compiled(bounds, forward, args).flops() <= 10


def dense(*sizes):
    return [around(m, n) for m, n in zip(sizes[1:], sizes[:-1], strict=True)]


def mlp(layers, x):
    for w in layers[:-1]:
        x = jax.nn.relu(w @ x + 0.1)
    return layers[-1] @ x


@pytest.mark.parametrize("sizes", [(784, 10), (64, 64, 10), (2, 16, 3), (16, 16, 32), (30, 60)])
def test_margins_of_a_dense_layer_are_always_merged(sizes, float64):
    """Elision of the last layer: |W_k - W_c| over the last hidden layer's box."""
    layers = dense(*sizes)
    center = around(sizes[0])
    region = hidden = Box(center - 0.05, center + 0.05)
    if len(sizes) > 2:
        hidden = bound(lambda x: jax.nn.relu(layers[0] @ x + 0.1), "ibp")(region)
    c = 1
    rows = layers[-1] - layers[-1][c]
    expected = rows @ hidden.center + jnp.abs(rows) @ hidden.radius
    found = margin_bounds(mlp, "ibp")(layers, region, jnp.int32(c))
    every = all_margin_bounds(mlp, "ibp")(layers, region)
    np.testing.assert_allclose(found.upper, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(every.upper[c], expected, rtol=1e-12, atol=1e-12)


def convolve(x, kernel):
    return affine_runs.convolve(x, jnp.asarray(kernel, x.dtype))


KERNELS = [drawn(3, 3, 2, 4), drawn(3, 3, 4, 4)]
LAST = drawn(3, 6 * 6 * 4)


def last(y):
    return jnp.asarray(LAST[:, : y.size], y.dtype) @ y.reshape(-1)


def two_convolutions(x):
    y = convolve(convolve(x, KERNELS[0]), KERNELS[1])
    return last(jax.nn.relu(y))


def linear_classifier(x):
    return last(convolve(convolve(x, KERNELS[0]), KERNELS[1]))


def test_margins_over_a_long_run_are_merged_as_far_back_as_the_budget_reaches(float64, monkeypatch):
    region = ball(around(6, 6, 2), 0.1)

    def of_budget(budget):
        no_budget(monkeypatch, budget)
        found = margin_bounds(lambda _, x: linear_classifier(x), "ibp")
        return jax.jit(found)(None, region, jnp.int32(0))

    least = of_budget(0.0)
    apart = bound(linear_classifier, "ibp")(region)
    hidden = bound(lambda x: convolve(convolve(x, KERNELS[0]), KERNELS[1]), "ibp")(region)
    whole = of_budget(math.inf)
    rows = LAST - LAST[0]
    reach = jnp.abs(rows) @ hidden.radius.reshape(-1)
    expected = rows @ hidden.center.reshape(-1) + reach
    np.testing.assert_allclose(least.upper, expected, rtol=1e-12, atol=1e-12)
    assert (whole.upper < least.upper - 0.1)[1:].all()
    assert (least.upper < (apart.upper - apart.lower[0]) - 0.1)[1:].all()


def test_crown_sweeps_the_runs_that_intervals_have_not_merged(float64, monkeypatch):
    region = ball(around(6, 6, 2), 0.1)
    methods = (*METHODS, "alpha-crown")

    def widths(budget):
        no_budget(monkeypatch, budget)
        boxes = jax.jit(
            lambda r: {m: bound(two_convolutions, in_few_steps(m, 2))(r) for m in methods}
        )
        return {m: np.asarray(box.upper - box.lower) for m, box in boxes(region).items()}

    few, many = widths(0.0), widths(math.inf)
    assert (many["ibp"] < few["ibp"] - 0.1).all()
    for method in ("crown", "alpha-crown"):
        np.testing.assert_allclose(few[method], many[method], rtol=1e-9)
    for narrow, wide in (("crown", "crown-ibp"), ("crown-ibp", "ibp"), ("alpha-crown", "crown")):
        assert (few[narrow] <= few[wide] + 1e-12).all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_the_first_sum_over_a_ball_is_exact_on_any_budget(p, rounding, float64, monkeypatch):
    no_budget(monkeypatch)
    region = LpBall(around(6, 6, 2), jnp.float64(0.3), p)

    def norms(matrix):
        return np.linalg.norm(matrix, ord={1: np.inf, 2: 2}[p], axis=-1)

    first = partial(convolve, kernel=KERNELS[0])
    rows = jax.jacobian(first)(region.center).reshape(-1, 72)
    reach = 0.3 * norms(rows).reshape(6, 6, 4)
    hidden = Box(first(region.center) - reach, first(region.center) + reach)
    expected = bound(partial(convolve, kernel=KERNELS[1]), "ibp")(hidden)
    two = bound(lambda x: convolve(first(x), KERNELS[1]), "ibp", rounding=rounding)
    found = jax.jit(two)(region)
    np.testing.assert_allclose(found.upper, expected.upper, rtol=1e-10, atol=1e-10)
    # Of x - mean(x) the first matrix is a sum of the ball's own coordinates still.
    w = around(4, 72)
    moved = bound(lambda x: jax.nn.relu(w @ (x - x.mean()).reshape(-1)), "ibp", rounding=rounding)
    exact = w - w.mean(axis=1, keepdims=True)
    upper = exact @ region.center.reshape(-1) + 0.3 * norms(exact)
    np.testing.assert_allclose(
        jax.jit(moved)(region).upper, jnp.maximum(upper, 0), rtol=1e-10, atol=1e-10
    )


def test_what_is_merged_stays_within_the_budget():
    for net in affine_runs.NETWORKS.values():
        weights = [jnp.zeros(shape) for shape in net.weights]
        region = ball(jnp.zeros(net.shape), 0.1)
        graph = trace(lambda x, net=net, weights=weights: net.apply(weights, x)[:3], (region,), {})
        forward = sum(merging.products(graph, node) for node in graph.nodes)
        runs = merging.merged_runs(graph)
        spent = sum(merging.cost(graph, i, run) for i, run in runs.items())
        assert spent <= merging.BUDGET * forward


RUNS = {
    "convolutions": (two_convolutions, (6, 6, 2)),
    "classifier": (lambda x: (lambda y: y - y[0])(linear_classifier(x)), (6, 6, 2)),
    "centered": (lambda x: last(jnp.tanh(x - x.mean())), (6, 6, 2)),
    "residual": (lambda x: jnp.cumsum(jax.nn.relu(x + convolve(x, KERNELS[1])))[::7], (6, 6, 4)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_bounds_hold_where_nothing_is_left_of_the_budget(name, rounding, monkeypatch):
    no_budget(monkeypatch)
    f, shape = RUNS[name]
    center = jnp.asarray(drawn(*shape), jnp.float32)
    regions = (ball(center, 0.1), LpBall(center, jnp.float32(0.5), 2))

    def boxes(regions):
        return [bound(f, m, rounding=rounding)(r) for r in regions for m in ("ibp", "crown")]

    found = iter(jax.jit(boxes)(regions))
    rng = np.random.default_rng(0)
    for region in regions:
        (points,) = starts(rng, (region,), 300)
        values = np.asarray(jax.jit(jax.vmap(f))(points))
        slack = 0.0 if rounding == "outward" else 2e-6 * np.abs(values).max()
        for box in (next(found), next(found)):
            assert (values >= box.lower - slack).all() and (values <= box.upper + slack).all()
