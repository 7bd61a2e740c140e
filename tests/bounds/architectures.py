"""Random architectures: layers drawn one after another on a small vector or a small image.

    Architecture(apply, params, sets)        apply(params, *sets) -> outputs, for one example

A plan (`plans`, a hypothesis strategy) says which layers, what set, and the seed of all numbers;
`build` makes the network. Every layer takes any x of its rank to values of moderate size, so that
any order of layers is a network. A third of them are those of `delicate`, where rounding shows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from hypothesis import strategies as st

from bnncert.sets import Box, LpBall
from tests.bounds import delicate
from tests.bounds.delicate import Apply, Layer


class Plan(NamedTuple):
    """What hypothesis draws, and prints where a test fails."""

    shape: tuple[int, ...]
    layers: tuple[str, ...]
    region: str
    bounded_weights: bool
    seed: int


class Architecture(NamedTuple):
    """A network and its sets, in numpy; numbers are float32's, in float64."""

    apply: Callable[..., jax.Array]
    params: Any
    sets: tuple


# --- layers on any shape --------------------------------------------------------------------------


def _positive(x: jax.Array) -> jax.Array:
    return jax.nn.softplus(x) + 0.2


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.2),
    "relu6": lambda x: jax.nn.relu6(4 * x),
    "hard_tanh": jax.nn.hard_tanh,
    "elu": jax.nn.elu,
    "elu_steep": partial(jax.nn.elu, alpha=2.0),
    "selu": jax.nn.selu,
    "celu": partial(jax.nn.celu, alpha=0.7),
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": lambda x: jax.nn.hard_sigmoid(3 * x),
    "tanh": lambda x: jnp.tanh(2 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "hard_silu": lambda x: jax.nn.hard_silu(3 * x),
    "mish": jax.nn.mish,
    "log_sigmoid": jax.nn.log_sigmoid,
    "soft_sign": jax.nn.soft_sign,
    "exp": lambda x: jnp.exp(x / 2),
    "exp2": lambda x: jnp.exp2(x / 2),
    "expm1": lambda x: jnp.expm1(x / 2),
    "log": lambda x: jnp.log(_positive(x)),
    "log1p": lambda x: jnp.log1p(jax.nn.relu(x)),
    "sqrt": lambda x: jnp.sqrt(_positive(x)),
    "rsqrt": lambda x: jax.lax.rsqrt(_positive(x)),
    "cbrt": lambda x: jnp.cbrt(_positive(x)),
    "square": lambda x: 0.5 * jnp.square(x),
    "cube": lambda x: 0.2 * x**3,
    "fourth": lambda x: 0.1 * x**4,
    "inverse": lambda x: _positive(x) ** -1,
    "inverse_square": lambda x: 0.2 * _positive(x) ** -2,
    "power": lambda x: _positive(x) ** 1.7,
    "abs": jnp.abs,
    "sin": lambda x: jnp.sin(2 * x),
    "cos": jnp.cos,
    "arctan": jnp.arctan,
    "arcsinh": jnp.arcsinh,
    "sinh": lambda x: jnp.sinh(x / 2),
    "erf": jax.lax.erf,
    "erfc": jax.lax.erfc,
    "clip": lambda x: jnp.clip(x, -0.4, 0.9),
    "sign": lambda x: x + 0.3 * jnp.sign(x),
    "floor": lambda x: x - 0.2 * jnp.floor(2 * x),
    "self_product": lambda x: x * jnp.tanh(x),
    "quotient": lambda x: x / _positive(x),
    "no_gradient": lambda x: x + jax.lax.stop_gradient(jnp.abs(x)),
}


def _activation(function: Callable[[jax.Array], jax.Array]) -> Layer:
    return lambda rng, shape: ((), lambda params, x: function(x))


def _batch_norm(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    """At fixed statistics; scales of either sign."""
    size = shape[-1]
    params = {"mean": rng.normal(size=size) / 2, "var": rng.uniform(0.5, 2.0, size)}
    params |= {"scale": rng.normal(size=size), "bias": rng.normal(size=size) / 2}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]

    return params, apply


def _layer_norm(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    params = {"scale": rng.normal(size=shape[-1]), "bias": rng.normal(size=shape[-1]) / 2}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        spread = jnp.square(centered).mean(-1, keepdims=True)
        return centered / jnp.sqrt(spread + 0.3) * p["scale"] + p["bias"]

    return params, apply


def _where(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    mask = rng.uniform(size=shape) < 0.6
    return (), lambda params, x: jnp.where(mask, x, 0.5 - x[::-1])


def _set(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    place = int(rng.integers(shape[0]))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = x.at[place].set(0.5 * x[0])
        return x.at[jnp.array([0, shape[0] - 1])].add(0.3)

    return (), apply


ANY: dict[str, Layer] = {
    **{name: _activation(function) for name, function in ACTIVATIONS.items()},
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": _activation(lambda x: 3 * jax.nn.softmax(x)),
    "log_softmax": _activation(jax.nn.log_softmax),
    "where": _where,
    "set": _set,
    "flip": _activation(lambda x: x - 0.5 * jnp.flip(x, -1)),
    "roll": _activation(lambda x: jnp.concatenate([x, 0.5 * jnp.roll(x, 1, 0)], -1)[..., 1:]),
    "cumsum": _activation(lambda x: jnp.cumsum(x, 0) / x.shape[0]),
    "cummax": _activation(lambda x: jax.lax.cummax(x, axis=0)),
    "cumlogsumexp": _activation(lambda x: jax.lax.cumlogsumexp(x, axis=0)),
    "above_mean": _activation(lambda x: x - x.mean()),
    "below_max": _activation(lambda x: x - x.max(0)),
    "min_first": _activation(lambda x: jnp.minimum(x, x[0] + x.min())),
}

# --- layers on vectors ----------------------------------------------------------------------------


def _matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape) * (1.2 / np.sqrt(np.prod(shape[1:])))


def _dense(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    size = int(rng.integers(2, 6))
    params = {"w": _matrix(rng, size, *shape), "b": 0.3 * rng.normal(size=size)}
    return params, lambda p, x: p["w"] @ x + p["b"]


def _with_matrix(apply: Apply) -> Layer:
    """A layer with one square matrix."""
    return lambda rng, shape: (_matrix(rng, *shape, *shape), apply)


def _attention(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    """Two tokens that look at each other."""
    size = shape[0] // 2

    def apply(params: Any, x: jax.Array) -> jax.Array:
        tokens = x[: 2 * size].reshape(2, size)
        q, k, v = (tokens @ w for w in params)
        return (tokens + jax.nn.softmax(q @ k.T, axis=-1) @ v).reshape(-1)

    return [_matrix(rng, size, size) for _ in range(3)], apply


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = x.shape[0] // 2
    return x[:half], x[-half:]


def _stacked(x: jax.Array) -> jax.Array:
    pair = jnp.stack([x, x[::-1]]).T
    return jax.lax.pad(pair.sum(1) - pair[:, 0], jnp.asarray(0.3, x.dtype), ((1, -1, 0),))


VECTOR: dict[str, Layer] = {
    "dense": _dense,
    "residual": _with_matrix(lambda w, x: x + 0.5 * jax.nn.relu(w @ x)),
    "gate": _with_matrix(lambda w, x: x * jax.nn.sigmoid(w @ x)),
    "divide": _with_matrix(lambda w, x: x / _positive(w @ x)),
    "product": _with_matrix(lambda w, x: x * (w @ x)),
    "quadratic": _with_matrix(lambda w, x: jnp.append(x[1:], 0.3 * x @ (w @ x))),
    "attention": _attention,
    "logsumexp": _activation(lambda x: jnp.append(x[1:], jax.nn.logsumexp(x))),
    "max_halves": _activation(lambda x: jnp.append(jnp.maximum(*_halves(x)), x[0])),
    "logaddexp": _activation(lambda x: jnp.logaddexp(x, 0.5 - x[::-1]) - jnp.logaddexp(x, 0.3)),
    "gather": _activation(lambda x: x[jnp.array([0, -1, 0, 1])]),
    "stacked": _activation(_stacked),
}

# --- layers on images, (height, width, channels) --------------------------------------------------


def _conv(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    groups = int(rng.choice([1, 2])) if shape[-1] % 2 == 0 else 1
    taps = [int(t) for t in rng.integers(1, 4, 2)]
    options = {
        "window_strides": tuple(int(s) for s in rng.integers(1, 3, 2)),
        "rhs_dilation": tuple(int(d) for d in rng.integers(1, 3, 2)),
        # At least as many rows and columns of zeros as a dilated window needs.
        "padding": [(2, int(p)) for p in rng.integers(2, 4, 2)],
        "feature_group_count": groups,
    }
    params = {"w": rng.normal(size=(*taps, shape[-1] // groups, 2)), "b": rng.normal(size=2) / 2}
    params["w"] /= np.sqrt(np.prod(params["w"].shape[:-1]))

    def apply(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x[None], p["w"], dimension_numbers=numbers, **options)
        return y[0, :4, :4] + p["b"]

    return params, apply


def _pool(pool: Callable[..., jax.Array]) -> Layer:
    """Windows that overlap, and reach over the edge."""

    def build(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
        window = (int(rng.integers(1, 4)), 2)
        strides = (int(rng.integers(1, 3)), 1)
        return (), lambda params, x: pool(x, window, strides=strides, padding="SAME")

    return build


def _conv_transpose(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    w = rng.normal(size=(2, 2, shape[-1], 2)) / 2

    def apply(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_transpose(x[None], p, (2, 1), "SAME", dimension_numbers=numbers)[0, :4]

    return w, apply


IMAGE: dict[str, Layer] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "avg_pool": _pool(linen.avg_pool),
    "max_pool": _pool(linen.max_pool),
    "min_pool": _pool(lambda x, *a, **k: -linen.max_pool(-x, *a, **k)),
    "transpose": _activation(lambda x: x.transpose(1, 0, 2)),
    "squeeze_excite": _activation(lambda x: x * jax.nn.sigmoid(x.mean((0, 1)))),
}

# --- plans ----------------------------------------------------------------------------------------

REGIONS = ("box", "partial_box", "l1", "l2")
WITH_WEIGHTS = ("dense", "conv")
"""Layers whose weights may be a set."""
DELICATE = {**delicate.ANY, **delicate.VECTOR, **delicate.IMAGE}
LAYERS = {**ANY, **VECTOR, **IMAGE, **DELICATE}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Three or four layers; the first mixes the input; every second one is likely to mix too."""
    image = draw(st.booleans())
    mixing, others = (IMAGE, "conv") if image else (VECTOR, "dense")
    rounded = {**delicate.ANY, **(delicate.IMAGE if image else delicate.VECTOR)}
    free = st.one_of(*(st.sampled_from(sorted(pool)) for pool in (ANY, mixing, rounded)))
    count = draw(st.integers(2, 3))
    return Plan(
        shape=(4, 3, 2) if image else (4,),
        layers=(others, *(draw(free) for _ in range(count))),
        region=draw(st.sampled_from(REGIONS)),
        bounded_weights=draw(st.sampled_from((False, False, True))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def build(plan: Plan) -> Architecture:
    """The network of a plan, with its sets: the input, and one of layers' weights if bounded."""
    rng = np.random.default_rng(plan.seed)
    shape, applies, params = plan.shape, [], []
    for name in plan.layers:
        layer_params, apply = LAYERS[name](rng, shape)
        single = jax.tree.map(np.float32, (layer_params, np.zeros(shape)))
        applies, params = [*applies, apply], [*params, layer_params]
        shape = jax.eval_shape(apply, *single).shape
    params.append(_matrix(rng, 2, int(np.prod(shape))))
    inside = _input_set(rng, plan)
    weights = {
        str(i): jax.tree.map(partial(_box, rng, radius=0.05), params[i])
        for i, name in enumerate(plan.layers)
        if plan.bounded_weights and name in WITH_WEIGHTS
    }

    def whole(params: Any, x: jax.Array, weights: Any) -> jax.Array:
        for i, apply in enumerate(applies):
            x = apply(weights.get(str(i), params[i]), x)
        return params[-1] @ x.reshape(-1)

    def rounded(leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float32).astype(np.float64)

    return Architecture(whole, *jax.tree.map(rounded, (params, (inside, weights))))


def _input_set(rng: np.random.Generator, plan: Plan) -> Box | LpBall:
    center = rng.normal(size=plan.shape)
    if plan.region in ("l1", "l2"):
        return LpBall(center, np.float64(0.5), 1 if plan.region == "l1" else 2)
    return _box(rng, center, fixed=0.4 if plan.region == "partial_box" else 0.0)


def _box(
    rng: np.random.Generator, center: np.ndarray, radius: float = 0.3, fixed: float = 0.0
) -> Box:
    """Half-widths differ; a part of the coordinates may be single points."""
    reach = radius * rng.uniform(size=center.shape) * (rng.uniform(size=center.shape) >= fixed)
    return Box(center - reach, center + reach)
