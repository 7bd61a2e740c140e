"""Models as people bring them, of Flax (linen and nnx), Equinox, Haiku and plain JAX.

    MODELS["linen-cnn"]() -> Model(apply, params, x)        apply(params, x), one example

For each: every point tried lies inside, by every method; vmap over inputs equals a loop; and the
whole tree of parameters may be a set, where a rule exists for each product that then has two
bounded operands.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from bnncert.bounds import bound
from bnncert.sets import Box, ball
from tests.bounds import networks

METHODS = ("forward", "crown")  # crown runs crown-ibp too
"""Boxes of `ibp` contain those of `crown-ibp`."""

EPS, WEIGHT_EPS = 0.005, 0.0003


class Model(NamedTuple):
    """A function of one example, its parameters, and where an example's shape is."""

    apply: Callable[..., Any]
    params: Any
    shape: tuple[int, ...]


# --- Flax linen -----------------------------------------------------------------------------------


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(6)(x))
        x = linen.gelu(linen.LayerNorm()(linen.Dense(6)(x)))
        return linen.log_softmax(linen.Dense(3)(x))


class LinenCnn(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(3, (3, 3))(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = linen.relu(linen.GroupNorm(num_groups=2)(linen.Conv(4, (2, 2))(x)))
        x = linen.avg_pool(x, (2, 2), strides=(1, 1))
        return linen.Dense(3)(x.reshape(-1))


class LinenTransformer(linen.Module):
    """A block before which layers are normalised, mean of tokens, a head."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(
            linen.LayerNorm()(x)
        )
        x = x + linen.Dense(4)(linen.gelu(linen.Dense(6)(linen.LayerNorm()(x))))
        return linen.Dense(3)(x.mean(0))


def _linen(module: linen.Module, *shape: int) -> Model:
    variables = module.init(jax.random.key(0), np.zeros(shape, np.float32))
    return Model(module.apply, _perturbed(variables), shape)


def _perturbed(params: Any) -> Any:
    """Biases start at 0 and scales at 1: give them values that would show a mistake."""
    rng = np.random.default_rng(0)
    # Each by its own factor around 1, so that variances stay positive.
    return jax.tree.map(
        lambda p: p * rng.uniform(0.7, 1.3, p.shape) + 0.1 * (np.asarray(p) == 0), params
    )


# --- Flax nnx -------------------------------------------------------------------------------------


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.silu(self.norm(self.first(x))))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.last(nnx.max_pool(x, (2, 2), strides=(2, 2)).reshape(-1))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.last((x + self.attention(self.norm(x))).mean(0))


def _nnx(module: Callable[..., nnx.Module], *shape: int) -> Model:
    definition, state = nnx.split(module(nnx.Rngs(0)))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(definition, params)(x)  # pyright: ignore

    return Model(apply, _floats_perturbed(state), shape)


def _floats_perturbed(state: Any) -> Any:
    floats, others = eqx.partition(state, eqx.is_inexact_array)
    return eqx.combine(_perturbed(floats), others)


# --- Equinox --------------------------------------------------------------------------------------


class EqxCnn(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=first)
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.last = eqx.nn.Linear(16, 3, key=second)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x)))
        return self.last(eqx.nn.AvgPool2d(2)(eqx.nn.MaxPool2d(2, padding=1)(x)).reshape(-1))


class EqxAttention(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    last: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(4)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=first)
        self.last = eqx.nn.Linear(4, 3, key=second)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        return self.last((x + self.attention(y, y, y)).mean(0))


def _eqx(build: Callable[..., Any], *shape: int) -> Model:
    params, static = eqx.partition(build(key=jax.random.key(0)), eqx.is_inexact_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return eqx.combine(params, static)(x)

    return Model(apply, _perturbed(params), shape)


# --- Haiku, plain JAX -----------------------------------------------------------------------------


def _haiku() -> Model:
    haiku = pytest.importorskip("haiku", reason="Haiku is not installed")

    def model(x: jax.Array) -> jax.Array:
        x = haiku.LayerNorm(-1, True, True)(jax.nn.relu(haiku.Linear(6)(x)))
        return haiku.nets.MLP([5, 3], activation=jnp.tanh)(x)

    transformed = haiku.without_apply_rng(haiku.transform(model))
    params = transformed.init(jax.random.key(0), np.zeros(4, np.float32))
    return Model(transformed.apply, _perturbed(params), (4,))


def _plain() -> Model:
    """A mixture of two experts: a softmax gate, products of values, a quotient."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        hidden = jax.nn.leaky_relu(x @ params["in"]["w"] + params["in"]["b"])
        experts = jnp.einsum("eij,i->ej", params["experts"], hidden)
        mixed = jax.nn.softmax(x @ params["gate"]) @ experts
        return mixed / (1 + jnp.linalg.norm(mixed) ** 2) ** 0.5

    rng = np.random.default_rng(0)
    params = {
        "in": {"w": rng.normal(size=(4, 5)), "b": rng.normal(size=5)},
        "experts": rng.normal(size=(2, 5, 3)) / 2,
        "gate": rng.normal(size=(4, 2)),
    }
    return Model(apply, params, (4,))


MODELS: dict[str, Callable[[], Model]] = {
    "linen-mlp": lambda: _linen(LinenMlp(), 4),
    "linen-cnn": lambda: _linen(LinenCnn(), 4, 4, 2),
    "linen-transformer": lambda: _linen(LinenTransformer(), 3, 4),
    "nnx-mlp": lambda: _nnx(NnxMlp, 4),
    "nnx-cnn": lambda: _nnx(NnxCnn, 4, 4, 2),
    "nnx-attention": lambda: _nnx(NnxAttention, 3, 4),
    "equinox-mlp": lambda: _eqx(partial(eqx.nn.MLP, 4, 3, 6, 2), 4),
    "equinox-cnn": lambda: _eqx(EqxCnn, 2, 4, 4),
    "equinox-attention": lambda: _eqx(EqxAttention, 3, 4),
    "haiku-mlp": _haiku,
    "plain": _plain,
}
every_model = pytest.mark.parametrize("name", MODELS)
# The others take long to compile, and the tight methods longest: they are those of the zoo.


@cache
def model(name: str) -> Model:
    return MODELS[name]()


def example(shape: tuple[int, ...], count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *shape))


def cast(tree: Any) -> Any:
    """In float64; counters and keys stay what they are."""
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64) if _is_float(v) else v, tree)


def _is_float(value: Any) -> bool:
    return eqx.is_inexact_array_like(value)


@cache
def over_inputs(name: str) -> Callable[..., Any]:
    """`(params, xs) -> {method: boxes}`, over balls around several inputs."""
    apply = model(name).apply

    def one(params: Any, x: jax.Array) -> dict[str, Box]:
        methods = METHODS if name.endswith("mlp") else ("ibp", "crown-ibp")
        return {m: bound(apply, m)(params, ball(x, EPS)) for m in methods}

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))


def values_at(apply: Callable[..., Any], args: tuple, count: int, size: int) -> np.ndarray:
    """At points inside the sets, at corners, and along attacks on each output."""
    rng = np.random.default_rng(2)
    start = networks.starts(rng, args, count)
    direction = np.eye(size)[np.arange(count) % size] * rng.choice([-1.0, 1.0], (count, 1))
    many = jax.vmap(lambda s, d: networks.attacks(apply, args, s, d, 3))
    return np.asarray(jax.jit(many)(start, direction)).reshape(-1, size)


def check_inside(values: np.ndarray, box: Box, method: str) -> None:
    assert np.isfinite(box.lower).all() and np.isfinite(box.upper).all(), method
    assert (values >= np.asarray(box.lower) - 1e-9).all(), method
    assert (values <= np.asarray(box.upper) + 1e-9).all(), method


@every_model
def test_every_method_holds_at_every_point(name, float64):
    apply, params, shape = model(name)
    params, xs = cast(params), jnp.asarray(example(shape))
    found = over_inputs(name)(params, xs)
    for i, x in enumerate(xs):
        values = values_at(partial(apply, params), (ball(x, EPS),), 300, 3)
        for method, boxes in found.items():
            box = networks.member(boxes, i)
            check_inside(values, box, method)
        if name.endswith("mlp"):  # a bound much too small would be noticed
            reached = values.max(0) - values.min(0)
            assert (reached > 0.02 * 2 * networks.member(found["crown"], i).radius).any()


@pytest.mark.parametrize("name", ["equinox-mlp", "nnx-attention"])
def test_vmap_over_inputs_equals_a_loop(name, float64):
    apply, params, shape = model(name)
    params, xs = cast(params), jnp.asarray(example(shape))
    together = over_inputs(name)(params, xs)
    method = "forward" if name.endswith("mlp") else "ibp"
    alone = jax.jit(lambda p, x: bound(apply, method)(p, ball(x, EPS)))
    for i, x in enumerate(xs):
        one, member = alone(params, x), networks.member(together[method], i)
        np.testing.assert_allclose(one.lower, member.lower, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(one.upper, member.upper, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["linen-mlp", "linen-cnn", "nnx-mlp", "nnx-cnn", "equinox-mlp", "equinox-cnn", "plain"]
)
def test_all_parameters_and_the_input_may_be_sets(name, float64):
    apply, params, shape = model(name)
    params, x = cast(params), jnp.asarray(example(shape)[0])
    widened = jax.tree.map(
        lambda p: Box(p - WEIGHT_EPS, p + WEIGHT_EPS) if _is_float(p) else p, params
    )
    fixed = jax.tree.map(lambda p: None if _is_float(p) else p, params)
    regions = eqx.filter(widened, _is_box, is_leaf=_is_box)

    def merged(sets: Any, x: jax.Array) -> jax.Array:
        return apply(eqx.combine(sets, fixed, is_leaf=lambda v: v is None), x)

    args = (regions, ball(x, EPS))
    box = jax.jit(bound(merged, "crown-ibp"))(*args)
    check_inside(values_at(merged, args, 200, math.prod(box.lower.shape)), box, name)


def _is_box(value: Any) -> bool:
    return isinstance(value, Box)
