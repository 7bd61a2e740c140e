"""Dropout that was left on is an error; random numbers that are no masks are constants."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnncert as bc

KEY = jax.random.key(0)
X = jnp.array([0.2, 0.7])
BOX = bc.ball(X, 0.05)
W = jax.random.normal(KEY, (3, 2))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        x = nn.Dropout(0.5)(nn.relu(nn.Dense(4)(x)), deterministic=deterministic)
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, key=None):
        return self.dropout(self.first(x), key=key)


def linen(**options):
    net = Linen()
    params = net.init(KEY, X, deterministic=True)
    return lambda params, x: net.apply(params, x, **options), params


def split(model, *kinds):
    graph, params, *rest = nnx.split(model, *kinds)
    return lambda params, x: nnx.merge(graph, params, *rest)(x), params


def equinox(key=None, inference=False):
    net = Equinox(eqx.nn.Linear(2, 3, key=KEY), eqx.nn.Dropout(0.5, inference=inference))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda params, x: eqx.combine(params, static)(x, key), params


def evaluated():
    model = Nnx(nnx.Rngs(0))
    model.eval()
    return split(model, nnx.Param, ...)


LEFT_ON = {
    "linen with a key": lambda: linen(rngs={"dropout": KEY}),
    "linen without": linen,
    "nnx, all as params": lambda: split(Nnx(nnx.Rngs(0))),
    "nnx": lambda: split(Nnx(nnx.Rngs(0)), nnx.Param, ...),
    "equinox with a key": lambda: equinox(KEY),
    "equinox without": equinox,
}
OFF = {
    "linen": lambda: linen(deterministic=True),
    "nnx": evaluated,
    "equinox": lambda: equinox(inference=True),
    "equinox with a key": lambda: equinox(KEY, inference=True),
}


@pytest.mark.parametrize("name", LEFT_ON)
def test_dropout_left_on_is_an_error_that_says_what_turns_it_off(name):
    apply, params = LEFT_ON[name]()
    samples = jax.tree.map(lambda leaf: leaf[None], params)
    way_out = r"(?s)[Dd]ropout.*model\.eval\(\).*deterministic=True.*inference_mode"
    for call in (
        lambda: bc.bound(apply, "ibp")(params, BOX),
        lambda: bc.certify.decision(apply, samples, BOX),
    ):
        with pytest.raises(Exception, match=way_out) as caught:
            call()
        assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("name", OFF)
def test_without_dropout_there_is_a_bound(name):
    apply, params = OFF[name]()
    box = bc.bound(apply, "crown")(params, BOX)
    y = apply(params, X)
    assert (box.lower <= y).all() and (y <= box.upper).all()


MASKS = {
    "selected": lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0),
    "multiplied": lambda x: x * jax.random.bernoulli(KEY, 0.5, x.shape) / 0.5,
    "floored": lambda x: x * jnp.floor(0.5 + jax.random.uniform(KEY, x.shape)),
    "compared": lambda x: x * (jax.random.uniform(KEY, x.shape) < 0.5),
    "of the weights": lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, W.shape), W, 0) @ x,
    "of the path": lambda x: x + jax.random.bernoulli(KEY, 0.5) * jnp.tanh(x),
    "jitted": jax.jit(lambda x: jax.jit(lambda m, x: jnp.where(m, x, 0))(
        jax.random.bernoulli(jax.random.PRNGKey(0), 0.5, x.shape), x)
    ),
    "rematerialised": jax.checkpoint(lambda x: x * jax.random.bernoulli(KEY, 0.5, x.shape)),
}  # fmt: skip
MASK = jax.random.bernoulli(KEY, 0.5, (2,))
FEATURES = {
    "normal": lambda x: jnp.cos(jax.random.normal(KEY, (4, 2)) @ x),
    "uniform": lambda x: jnp.cos(x + jax.random.uniform(KEY, (2,), maxval=6.0)),
    "truncated": lambda x: jax.random.truncated_normal(KEY, -1.0, 1.0, (4, 2)) @ x,
    "initialiser": lambda x: jax.nn.initializers.glorot_uniform()(KEY, (4, 2)) @ x,
    "permuted": lambda x: x[jax.random.permutation(KEY, 2)],
    "integers": lambda x: x[jax.random.randint(KEY, (3,), 0, 2)],
    "gumbel": lambda x: x + jax.random.gumbel(KEY, (2,)),
    "a fixed mask": lambda x: jnp.where(MASK, x, 0),
    "a mask of nothing random": lambda x: jnp.where(jnp.arange(2) < 1, x, 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_is_drawn_inside_is_an_error_with_its_line(name):
    with pytest.raises(ValueError, match=r"random mask.*test_randomness\.py.*dropout"):
        bc.bound(MASKS[name], "ibp")(BOX)


def test_random_numbers_that_are_no_masks_are_constants():
    def all_of(x):
        return {name: f(x) for name, f in FEATURES.items()}

    box, y = bc.bound(all_of, "ibp")(BOX), all_of(X)
    for name, value in y.items():
        assert (box[name].lower <= value + 1e-6).all(), name
        assert (value <= box[name].upper + 1e-6).all(), name
    np.testing.assert_array_equal(box["a fixed mask"].upper == 0, ~MASK)
