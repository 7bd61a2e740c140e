"""The battery: never weaker than PGD, and judged by the predictive that is attacked."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnncert import attack
from experiments.setup.data import load
from tests.attack.networks import BATCH, SIZE, chosen, clean_margins, mlp, mlp_samples

NAMES = ["pgd", "apgd-ce", "apgd-dlr", "targeted", "square", "transfer"]
XS = jax.random.uniform(jax.random.key(1), (BATCH, SIZE))
MEAN = jax.tree.map(lambda leaf: leaf.mean(0, keepdims=True), mlp_samples())


@pytest.fixture(scope="module")
def ys():
    return chosen(mlp, mlp_samples(), XS)


@pytest.fixture(scope="module")
def run():
    """Each attack's results, the strongest, and how often it was traced: once."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(keys, samples, mean, xs, ys, eps):
        def one(key, x, y):
            options = {"steps": 4, "restarts": 2, "queries": 10, "surrogate": mean}
            target = key, mlp, samples, x, y, eps
            each = attack.battery(*target, **options)
            alone = attack.pgd(*target, steps=4, restarts=2)
            return each, attack.strongest(*target, **options), alone

        return jax.vmap(one)(keys, xs, ys)

    return run


def test_the_strongest_is_the_worst_of_all_and_never_weaker_than_pgd(run, ys):
    samples, keys = mlp_samples(), jax.random.split(jax.random.key(2), BATCH)
    for eps in (0.0, 0.1, 0.3):
        each, worst, alone = run(keys, samples, MEAN, XS, ys, jnp.float32(eps))
        assert set(each) == set(NAMES)
        margins = jnp.stack([found.margin for found in each.values()])
        np.testing.assert_array_equal(worst.margin, margins.min(0))
        np.testing.assert_array_equal(worst.broken, worst.margin <= 0)
        assert (worst.margin <= alone.margin + 1e-6).all()
        there = clean_margins(mlp, samples, worst.x, ys)
        np.testing.assert_allclose(worst.margin, there, atol=1e-5)
        clean = clean_margins(mlp, samples, XS, ys)
        for found in each.values():  # the transferred points are judged by the predictive, too
            assert (found.margin <= clean + 1e-5).all()
            there = clean_margins(mlp, samples, found.x, ys)
            np.testing.assert_allclose(found.margin, there, atol=1e-5)
    assert (worst.margin < alone.margin - 1e-3).any()  # of the last radius: the others add
    assert len(np.unique(margins.argmin(0))) > 1
    again = run(keys, samples, MEAN, XS, ys, jnp.float32(0.3))[1]
    np.testing.assert_array_equal(again.x, worst.x)


def test_transfer_keeps_the_worst_of_the_candidates_it_is_given(ys):
    samples = mlp_samples()
    margins = clean_margins(mlp, samples, XS, jnp.full(BATCH, ys[0]))
    found = attack.transfer(mlp, samples, XS, ys[0])
    np.testing.assert_allclose(found.margin, margins.min(), atol=1e-5)
    np.testing.assert_array_equal(found.x, XS[margins.argmin()])
    same = attack.transfer(mlp, samples, jnp.stack([XS[0], XS[0]]), ys[0])
    np.testing.assert_allclose(same.margin, margins[0], atol=1e-5)


def test_an_attack_on_one_network_need_not_carry_over():
    """Two networks that disagree on every direction: each alone is fooled, their average is not."""
    w = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    samples, x, eps = {"w": 4 * w, "b": jnp.zeros((2, 2))}, jnp.array([0.5, 0.5]), 0.6
    first = jax.tree.map(lambda leaf: leaf[:1], samples)

    def apply(params, x):
        return params["w"] @ x + params["b"]

    @jax.jit
    def run(key):
        point = attack.pgd(key, apply, first, x, 0, eps)
        carried = attack.transfer(apply, samples, jnp.stack([x, point.x]), 0)
        return point.broken, carried.broken, attack.pgd(key, apply, samples, x, 0, eps).broken

    assert [bool(broken) for broken in run(jax.random.key(0))] == [True, False, True]


def test_square_is_left_out_where_it_has_no_meaning_and_bad_arguments_are_named():
    target = jax.random.key(0), mlp, mlp_samples(), XS[0], 0, 0.1

    def names(**options):
        return set(jax.eval_shape(lambda: attack.battery(*target, **options)))

    assert "square" not in names(p=2) and "square" not in names(queries=0)
    assert names() == set(NAMES) - {"transfer"}
    with pytest.raises(ValueError, match="queries = -1"):
        attack.strongest(*target, queries=-1)
    with pytest.raises(ValueError, match=r"candidates have shape \(0, 6\)"):
        attack.transfer(mlp, mlp_samples(), jnp.zeros((0, SIZE)), 0)
    with pytest.raises(ValueError, match="y = 7"):
        attack.transfer(mlp, mlp_samples(), XS, 7)


def test_a_plainly_trained_network_falls_to_it(shared_data):
    """MNIST, an MLP of 64 hidden units trained for clean accuracy: under 5% is left at eps 0.1."""
    data = load("mnist", shared_data)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (64, 784)) / 28,
        "a": jnp.zeros(64),
        "v": jax.random.normal(keys[1], (10, 64)) / 8,
        "b": jnp.zeros(10),
    }

    def apply(params, x):
        return params["v"] @ jax.nn.relu(params["w"] @ x.ravel() + params["a"]) + params["b"]

    def loss(params, x, y):
        logits = jax.vmap(apply, (None, 0))(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = optax.adam(2e-3)

    @jax.jit
    def train(params, x, y):
        def step(carry, batch):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, *batch), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(
            step, (params, optimizer.init(params)), (jnp.tile(x, (4, 1, 1)), jnp.tile(y, (4, 1)))
        )[0][0]

    x, y = data.train.x[:51_200].reshape(-1, 256, 784), data.train.y[:51_200].reshape(-1, 256)
    samples = jax.tree.map(lambda leaf: leaf[None], train(params, x, y))
    x, y = jnp.asarray(data.test.x[:200].reshape(-1, 784)), jnp.asarray(data.test.y[:200])

    @jax.jit
    def attacked(x, y):
        one = partial(attack.strongest, steps=10, queries=20, num_targets=5, clip=(0.0, 1.0))
        alone = partial(attack.pgd, steps=10, clip=(0.0, 1.0))
        return [
            jax.vmap(lambda x, y, f=f: f(jax.random.key(1), apply, samples, x, y, 0.1))(x, y)
            for f in (one, alone)
        ]

    worst, alone = attacked(x, y)
    clean = jax.vmap(lambda x: apply(jax.tree.map(lambda leaf: leaf[0], samples), x).argmax())(x)
    assert (clean == y).mean() > 0.9
    assert (~worst.broken).mean() < 0.05
    assert (worst.margin <= alone.margin + 1e-5).all()
