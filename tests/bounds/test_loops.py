"""Loops and branches are bounded as the operations that they run."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnncert as bc
from bnncert.bounds import UnsupportedPrimitiveError, bound
from bnncert.bounds.tracing import loops, trace
from bnncert.sets import Box, ball

KEY = jax.random.key(0)
W = np.array([[0.6, -0.4, 0.2], [0.3, 0.5, -0.7], [-0.2, 0.4, 0.6]], np.float32)
ROWS = np.array([[0.1, 0.2, 0.3], [0.0, -0.5, 0.4], [0.3, 0.3, 0.1]], np.float32)
X = jnp.array([0.4, -0.3, 0.8])
BOX = Box(X - 0.1, X + 0.1)


def step(c, v):
    return jnp.tanh(W @ c + v)


def by_scan(x):
    last, all_ = jax.lax.scan(lambda c, v: (step(c, v), 2 * c), x, ROWS)
    return jnp.concatenate([last, all_.ravel()])


def by_hand(x):
    c, seen = x, []
    for v in ROWS:
        seen.append(2 * c)
        c = step(c, v)
    return jnp.concatenate([c, jnp.stack(seen).ravel()])


def backwards(x):
    return jax.lax.scan(lambda c, v: (step(c, v), c * v), x, jnp.stack([x, 2 * x]), reverse=True)[1]


def backwards_by_hand(x):
    c, seen = x, []
    for v in (2 * x, x):
        seen.append(c * v)
        c = step(c, v)
    return jnp.stack(seen[::-1])


def counted(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: step(c, jnp.asarray(W)[i]), x)


def counted_by_hand(x):
    for i in range(3):
        x = step(x, W[i])
    return x


def until(x):
    """A condition on a number that is kept beside the bounded value, and a step of its own."""

    def body(state):
        i, j, c = state
        return i + j, j, step(c, W[0] * j)

    return jax.lax.while_loop(lambda s: s[0] * 1.5 < 9, body, (0.0, 2.0, x))[2]


def until_by_hand(x):
    i = 0.0
    while i * 1.5 < 9:
        i, x = i + 2.0, step(x, W[0] * 2.0)
    return x


def taken(x):
    x = jax.lax.cond(W[0, 0] > 0, lambda v: step(v, W[1]), jnp.negative, x)
    return jax.lax.switch(2, [jnp.negative, jnp.exp, lambda v: step(v, W[2])], x)


def nested(x):
    def outer(c, w):
        inner = jax.lax.scan(lambda d, _: (jnp.maximum(w @ d, 0.1 * d), None), c, length=2)[0]
        return inner, inner.sum()

    return jax.lax.scan(outer, x, jnp.stack([W, 2 * W]))[1]


def nested_by_hand(x):
    seen = []
    for w in (W, 2 * W):
        for _ in range(2):
            x = jnp.maximum(w @ x, 0.1 * x)
        seen.append(x.sum())
    return jnp.stack(seen)


PAIRS = {
    "scan": (by_scan, by_hand),
    "reverse": (backwards, backwards_by_hand),
    "fori": (counted, counted_by_hand),
    "while": (until, until_by_hand),
    "cond": (taken, lambda x: step(step(x, W[1]), W[2])),
    "nested": (nested, nested_by_hand),
}


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("method", ["ibp", pytest.param("crown", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PAIRS)
def test_bounds_are_those_of_the_operations_written_out(name, method, rounding):
    looped, written = PAIRS[name]
    found, expected = (jax.jit(bound(f, method, rounding=rounding))(BOX) for f in (looped, written))
    np.testing.assert_allclose(found.lower, expected.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.upper, expected.upper, rtol=1e-5, atol=1e-6)
    points = X + 0.1 * jax.random.uniform(KEY, (300, 3), minval=-1.0, maxval=1.0)
    values = jax.vmap(looped)(points)
    slack = 1e-5 if rounding == "nearest" else 0.0
    assert (values >= found.lower - slack).all() and (values <= found.upper + slack).all()


def linen(cell):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(cell(4))(x)[-1])

    net, x = Net(), jax.random.normal(KEY, (3, 2))
    return net.apply, net.init(KEY, x), x


def of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(2, 4, rngs=rngs))
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            seen: Any = self.rnn(x[None])
            return self.out(seen[0, -1])

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(KEY, (3, 2))
    # A copy: an RNN's carry counts the keys that it draws.
    return lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x


def of_equinox():
    cell = eqx.nn.LSTMCell(2, 4, key=KEY)
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    def apply(params, x):
        cell = eqx.combine(params, static)
        start = jnp.zeros(4), jnp.zeros(4)
        return jax.lax.scan(lambda c, v: (cell(v, c), None), start, x)[0][0]

    return apply, params, jax.random.normal(KEY, (3, 2))


def layers(p, x):
    """A scan over layers of stacked weights."""
    return jax.lax.scan(lambda h, w: (h + jax.nn.gelu(w["a"] @ h + w["b"]), None), x, p)[0]


def of_layers():
    weights = {"a": jax.random.normal(KEY, (3, 4, 4)) / 2, "b": jax.random.normal(KEY, (3, 4))}
    return layers, weights, jax.random.normal(KEY, (4,))


NETWORKS = {
    "simple": lambda: linen(nn.SimpleCell),
    "gru": lambda: linen(nn.GRUCell),
    "lstm": lambda: linen(nn.OptimizedLSTMCell),
    "nnx gru": of_nnx,
    "equinox lstm": of_equinox,
    "layers": of_layers,
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "ibp") for name in NETWORKS),
        *(pytest.param(name, "crown-ibp", marks=pytest.mark.slow) for name in NETWORKS),
    ],
)
def test_recurrent_networks_of_all_libraries_are_bounded(name, method):
    apply, params, x = NETWORKS[name]()
    box = jax.jit(lambda p, x: bound(apply, method, rounding="outward")(p, ball(x, 0.02)))(
        params, x
    )
    points = x + 0.02 * jax.random.uniform(KEY, (200, *x.shape), minval=-1.0, maxval=1.0)
    values = jax.vmap(apply, (None, 0))(params, points)
    assert (values >= box.lower).all() and (values <= box.upper).all()
    assert (box.upper - box.lower).max() < 1


def test_weights_are_sets_in_a_loop_too():
    apply, params, x = of_layers()
    params_box = jax.tree.map(lambda w: Box(w - 0.01, w + 0.01), params)
    box = bound(apply, "ibp")(params_box, ball(x, 0.01))
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 3)
        near = {
            n: w + 0.01 * jax.random.uniform(k, w.shape, minval=-1.0)
            for (n, w), k in zip(params.items(), keys[:2], strict=True)
        }
        value = apply(near, x + 0.01 * jax.random.uniform(keys[2], x.shape, minval=-1.0))
        assert (value >= box.lower - 1e-5).all() and (value <= box.upper + 1e-5).all()


def squared(x):
    def outer(c, _):
        return jax.lax.scan(lambda d, _: (0.9 * d, None), c, length=30)[0], None

    return jax.lax.scan(outer, x, length=30)[0]


def test_a_long_loop_is_unrolled_where_it_says_so():
    length = loops.MOST + 1

    def f(x, unroll=1):
        return jax.lax.scan(lambda c, _: (0.5 * c, None), x, length=length, unroll=unroll)[0]

    with pytest.raises(UnsupportedPrimitiveError, match=rf"{length} iterations.*unroll={length}"):
        bound(f, "ibp")(BOX)
    with pytest.raises(UnsupportedPrimitiveError, match=r"30 iterations, 900 with those"):
        bound(squared, "ibp")(BOX)
    graph = trace(lambda x: f(x, unroll=length), (BOX,), {})
    assert sum(node.op == "mul" for node in graph.nodes) == length


def endless(state):
    return jax.lax.while_loop(lambda s: s[0] >= 0, lambda s: (s[0], s[1] + 1), state)


@pytest.mark.parametrize(
    ("f", "match"),
    [
        (lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1, x), "how often it runs"),
        (
            lambda x: jax.lax.while_loop(
                lambda s: s[0] < 3, lambda s: (s[0] + 0 * s[1][0], s[1] + 1), (0.0, x)
            )[1],
            "how often it runs",
        ),
        (lambda x: endless((0, x))[1], f"more than {loops.MOST} times"),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.negative, jnp.exp, x), "'cond'.*not known"),
    ],
)
def test_what_depends_on_bounded_values_is_refused(f, match):
    with pytest.raises(UnsupportedPrimitiveError, match=match):
        bound(f, "ibp")(BOX)


def test_an_unknown_branch_is_refused_with_the_way_out():
    def f(flag, x):
        return jax.lax.cond(flag, jnp.negative, jnp.exp, x)

    with pytest.raises(UnsupportedPrimitiveError, match=r"jnp\.where"):
        jax.jit(lambda flag: bound(f, "ibp")(flag, BOX).lower)(True)
    box = bound(f, "ibp")(np.bool_(True), BOX)
    np.testing.assert_allclose(box.lower, -BOX.upper, rtol=1e-6)


def test_dropout_in_a_loop_is_an_error():
    def f(x):
        def drop(c, key):
            return c * jax.random.bernoulli(key, 0.5, c.shape), None

        return jax.lax.scan(drop, x, jax.random.split(KEY, 2))[0]

    def skip(x):
        keep = jax.random.bernoulli(KEY)
        return jax.lax.cond(keep, lambda v: step(v, W[0]), lambda v: v, x)

    def in_a_loop_of_its_own(x):
        keys = jax.random.split(KEY, 2)
        masks = jax.lax.map(lambda k: jax.random.bernoulli(k, 0.5, (3,)).astype(jnp.float32), keys)
        return x * masks[0]

    def counted_up(x):
        draw = lambda i: jax.random.uniform(jax.random.fold_in(KEY, i), (3,)) > 0.5  # noqa: E731
        return x * jax.lax.fori_loop(0, 2, lambda i, c: c * draw(i), jnp.ones(3))

    def in_a_branch(x):
        made = jax.lax.cond(
            W[0, 0] > 0,
            lambda k: 2.0 * jax.random.bernoulli(k, 0.5, (3,)),
            lambda k: jnp.ones(3),
            KEY,
        )
        return x * made

    def depth(x):
        trips = jax.random.randint(KEY, (), 0, 4)
        return jax.lax.while_loop(lambda c: c[0] < trips, lambda c: (c[0] + 1, 0.5 * c[1]), (0, x))[
            1
        ]

    def never(x):
        mask = jax.random.bernoulli(KEY, 0.5, (3,)).astype(jnp.float32)
        loop = jax.lax.scan(lambda c, _: ((c[0], jnp.ones(3)), None), (x, mask), None, length=0)[0]
        return loop[0] * loop[1]

    for left_on in (f, skip, in_a_loop_of_its_own, counted_up, in_a_branch, depth, never):
        with pytest.raises(ValueError, match="dropout"):
            bound(left_on, "ibp")(BOX)


def test_sums_across_iterations_count_all_their_terms():
    """Each sum feeds the next one directly: a compiler may make one of all, of 3^3 terms."""

    def f(x):
        return jax.lax.scan(lambda c, _: (jnp.broadcast_to(c.sum(), (3,)), None), x, length=3)[0]

    summed = [n.summed for n in trace(f, (BOX,), {}).nodes if n.op == "reduce_sum"]
    written = trace(lambda x: jnp.broadcast_to(jnp.broadcast_to(jnp.broadcast_to(
        x.sum(), (3,)).sum(), (3,)).sum(), (3,)), (BOX,), {})  # fmt: skip
    assert summed == [n.summed for n in written.nodes if n.op == "reduce_sum"]
    before = trace(lambda x: f((2 * x) @ np.ones((3, 3), np.float32)), (BOX,), {})
    assert next(n.summed for n in before.nodes if n.op == "dot_general") > 1
    assert bc.bound(f, "ibp", rounding="outward")(BOX).upper.shape == (3,)
