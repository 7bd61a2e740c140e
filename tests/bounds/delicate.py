"""Layers on which rounding shows: short sums whose terms cancel, and weights that are computed.

    ANY, VECTOR, IMAGE        layers by name, as in `architectures`, which draws from them

Large numbers of which a small one is left over: constants and weights of magnitudes up to 1e4 that
cancel, so that values stay of moderate size while the error of each operation is 1e4 times theirs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Apply = Callable[[Any, jax.Array], jax.Array]
Layer = Callable[[np.random.Generator, tuple[int, ...]], tuple[Any, Apply]]
"""`(rng, shape of x) -> params, (params, x) -> value`."""


def _sizes(rng: np.random.Generator, low: float, high: float, shape: Any) -> np.ndarray:
    """Numbers of either sign, of magnitudes from 10^low to 10^high."""
    return 10 ** rng.uniform(low, high, shape) * rng.choice([-1.0, 1.0], shape)


def _few(rng: np.random.Generator, most: int = 3) -> int:
    return int(rng.integers(1, min(most, 3) + 1))


def _cancelling(rng: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    """Large constants whose sum over the first axis is of moderate size."""
    found = _sizes(rng, 0, 4, (count, *shape))
    found[-1] = rng.normal(size=shape) - found[:-1].sum(0)
    return found


# --- layers on any shape --------------------------------------------------------------------------


def _constants(low: float, high: float, apply: Apply) -> Layer:
    """A layer with one number of such a magnitude for each feature."""
    return lambda rng, shape: (_sizes(rng, low, high, shape[-1:]), apply)


def _shifts(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    c = _cancelling(rng, 3, *shape[-1:])
    return list(c), lambda p, x: ((x + p[0]) + p[1]) + p[2]


def _scalings(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    a, b = _sizes(rng, -10, 10, (2, shape[-1]))
    return [a, b, a * b * _sizes(rng, 0, 0.5, shape[-1])], lambda p, x: ((x * p[0]) * p[1]) / p[2]


def _exponentials(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        pair = jnp.exp(x / 4) * jnp.exp(0.3 - x[::-1] / 4)
        return pair - (jnp.exp(x / 6) * jnp.exp(x[::-1] / 6)) * jnp.exp(p - x / 6)

    return rng.normal(size=shape[-1]) / 2, apply


def _soft_maxima(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    floors = rng.choice([-1e30, -1e4, -20.0, 0.3, 3.0], shape[-1])
    return floors, lambda p, x: jnp.logaddexp(x, p)


def _short_mean(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    count = _few(rng, shape[0])

    def apply(c: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate([(x[:count] + c).mean(0, keepdims=True), x[1:]])

    return _cancelling(rng, count, *shape[1:]), apply


def _short_cumsum(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    count = _few(rng, shape[0])

    def apply(c: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.cumsum(x[:count] + c, 0) - jnp.cumsum(c, 0), x[count:]])

    return _cancelling(rng, count, *shape[1:]), apply


def _two_at_one_place(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    place = int(rng.integers(shape[0]))

    def apply(c: Any, x: jax.Array) -> jax.Array:
        places, updates = jnp.array([place, place]), jnp.stack([x[0] + c, 0.5 * x[-1] - c])
        return 0.5 * x + jnp.zeros_like(x).at[places].add(updates)

    return _sizes(rng, 0, 4, shape[1:]), apply


def _sums_of_sums(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    def apply(c: Any, x: jax.Array) -> jax.Array:
        return 0.5 * x - jnp.stack([x + c, 0.3 * x[::-1] - c]).sum(0).sum(0) / shape[0]

    return _sizes(rng, 0, 4, shape), apply


def _folded_batch_norm(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    """As it is for inference: one scale and one shift, from four numbers of each feature."""
    size = shape[-1]
    params = [_sizes(rng, 0, 2, size), rng.uniform(0.01, 4.0, size), *rng.normal(size=(2, size))]

    def apply(p: Any, x: jax.Array) -> jax.Array:
        mean, var, gain, bias = p
        scale = 0.3 * jnp.tanh(gain) * jax.lax.rsqrt(var + 1e-3)
        return x * scale + (bias - (mean - mean.mean()) * scale / 30)

    return params, apply


def _positive_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x * jax.nn.softplus(p[0]) / (0.5 + jax.nn.softplus(p[1])) + (p[0] - p.mean())

    return rng.normal(size=(2, shape[-1])), apply


ANY: dict[str, Layer] = {
    "there_and_back": _constants(0, 4, lambda c, x: (x + c) - c),
    "shifts": _shifts,
    "scalings": _scalings,
    "exponentials": _exponentials,
    "erfc_tail": _constants(-1, 0, lambda c, x: 1e3 * jax.lax.erfc(3 + c * jnp.tanh(x))),
    "soft_maxima": _soft_maxima,
    "short_mean": _short_mean,
    "short_cumsum": _short_cumsum,
    "two_at_one_place": _two_at_one_place,
    "sums_of_sums": _sums_of_sums,
    "folded_batch_norm": _folded_batch_norm,
    "positive_scales": _positive_scales,
}

# --- layers on vectors ----------------------------------------------------------------------------


def _bottleneck(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    """Through one to three units; their weights' sizes differ, and what they add up to is small."""
    units, size = _few(rng), int(rng.integers(2, 6))
    w = np.array(sorted(_sizes(rng, -3, 4, units), key=abs))
    first = rng.normal(size=(units, *shape)) / 2
    first[-1] = (first[-1] - w[:-1] @ first[:-1]) / w[-1]
    params = [first, rng.normal(size=(size, 1)) * w, rng.normal(size=size) / 3]
    return params, lambda p, x: p[1] @ (p[0] @ x) + p[2]


def _few_inputs(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    count, size = _few(rng, shape[0]), int(rng.integers(2, 6))
    w, c = rng.normal(size=(size, count)), _sizes(rng, 0, 4, count)
    return [w, c, -(w @ c)], lambda p, x: p[0] @ (x[:count] + p[1]) + p[2]


def _with_matrix(weights: Callable[[Any], jax.Array], shift: float = 0.0) -> Layer:
    """A dense layer; its weights are computed of a square matrix."""

    def build(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
        return shift + rng.normal(size=(*shape, *shape)), lambda p, x: weights(p) @ x

    return build


def _standardised(w: Any, axes: tuple[int, ...] = (1,)) -> jax.Array:
    centered = w - w.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + 1e-2) / 2


def _normalised(w: Any, steps: int) -> jax.Array:
    """By its largest singular value, from a few power iterations."""
    v = jnp.ones_like(w[0])
    u = v
    for _ in range(steps):
        u = w @ v
        u = u / (jnp.linalg.norm(u) + 1e-2)
        v = w.T @ u
        v = v / (jnp.linalg.norm(v) + 1e-2)
    return w / (jnp.abs(u @ (w @ v)) + 0.3)


VECTOR: dict[str, Layer] = {
    "bottleneck": _bottleneck,
    "few_inputs": _few_inputs,
    "standardised": _with_matrix(_standardised),
    "standardised_far": _with_matrix(_standardised, shift=100.0),
    "normalised_once": _with_matrix(partial(_normalised, steps=1)),
    "normalised_twice": _with_matrix(partial(_normalised, steps=2)),
    "low_rank": _with_matrix(lambda p: (p + p[:, :2] @ p[:2]) / 4),
    "mixture": _with_matrix(lambda p: 1.5 * jax.nn.softmax(p, axis=1)),
}

# --- layers on images, (height, width, channels) --------------------------------------------------


def _convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def _far_away(layer: Apply) -> Apply:
    """A linear layer on an image that is moved far away, and back."""
    return lambda p, x: layer(p[0], x + p[1]) - layer(p[0], jnp.broadcast_to(p[1], x.shape))


def _pointwise(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    count = _few(rng, shape[-1])
    layer = _far_away(lambda kernel, x: _convolve(x[..., :count], kernel))
    return [rng.normal(size=(1, 1, count, 2)), _sizes(rng, 0, 3, shape[-1])], layer


def _depthwise(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    taps = [(1, 1), (1, 2), (3, 1), (2, 2)][rng.integers(4)]
    layer = _far_away(lambda kernel, x: _convolve(x, kernel, groups=shape[-1]))
    return [rng.normal(size=(*taps, 1, shape[-1])), _sizes(rng, 0, 3, shape[-1])], layer


def _standardised_conv(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Apply]:
    kernel = rng.normal(size=(2, 2, shape[-1], 2))
    return kernel, lambda p, x: _convolve(x, _standardised(p, (0, 1, 2))) / 2


IMAGE: dict[str, Layer] = {
    "pointwise": _pointwise,
    "depthwise": _depthwise,
    "standardised_conv": _standardised_conv,
}
