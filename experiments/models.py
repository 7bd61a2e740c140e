"""The networks of the experiments: functions of ONE image with pixels in [0, 1].

The data set's normalisation is the first thing inside each network, so that a radius always speaks
of pixels. Weights start at std sqrt(2 pi) / fan_in, at which the expected interval keeps its width
from layer to layer; biases start at zero.

Source: Shi et al., "Fast certified robust training with short warmup", NeurIPS 2021, section 3.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.data import Dataset, check_name

Image = Float[Array | np.ndarray, "height width channels"]


class Model(NamedTuple):
    """A network as two functions; `params` is a plain nested dict."""

    apply: Callable[[Any, Image], Float[Array, " classes"]]
    init: Callable[[PRNGKeyArray], Any]


def build(name: str, dataset: Dataset) -> Model:
    """Make the network `name` for the images and classes of a data set.

    Args:
        name: a key of `MODELS`.
        dataset: gives the image's shape, the number of classes, and the normalisation.

    Returns:
        `apply(params, x)` from one image to its logits, and `init(key)` to fresh parameters.

    Raises:
        ValueError: an unknown name.

    >>> from experiments.data import load
    >>> digits = load("digits")
    >>> model = build("mlp", digits)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, digits.train.x[0]).shape
    (10,)
    """
    check_name(name, tuple(MODELS), "model")
    network = MODELS[name](dataset.num_classes, dataset.mean, dataset.std)

    def apply(params: Any, x: Image) -> Float[Array, " classes"]:
        return network.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    def init(key: PRNGKeyArray) -> Any:
        return network.init(key, jnp.zeros(dataset.image_shape))["params"]

    return Model(apply, init)


def ibp_normal(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Normal weights with std sqrt(2 pi) / fan_in; the last axis is the output's."""
    return jax.random.normal(key, shape, dtype) * ibp_scale(shape)


def ibp_scale(shape: Sequence[int]) -> float:
    """Return sqrt(2 pi) / fan_in for a kernel whose last axis is the output's.

    >>> round(ibp_scale((784, 512)) * 784, 4)
    2.5066
    """
    return math.sqrt(2 * math.pi) / math.prod(shape[:-1])


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    hidden: Sequence[int] = (512,)

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, " classes"]:
        """Return the logits of one image."""
        x = _normalise(x, self.mean, self.std).reshape(-1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=ibp_normal)(x))
        return nn.Dense(self.num_classes, kernel_init=ibp_normal)(x)


class SmallCNN(nn.Module):
    """Two 4x4 convolutions of stride 2, a hidden dense layer, ReLU between them."""

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    channels: Sequence[int] = (16, 32)
    hidden: int = 100
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, " classes"]:
        """Return the logits of one image."""
        x = _normalise(x, self.mean, self.std)
        for features in self.channels:
            conv = nn.Conv(features, (4, 4), 2, padding=self.padding, kernel_init=ibp_normal)
            x = nn.relu(conv(x))
        x = nn.relu(nn.Dense(self.hidden, kernel_init=ibp_normal)(x.reshape(-1)))
        return nn.Dense(self.num_classes, kernel_init=ibp_normal)(x)


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": SmallCNN}


def _normalise(x: Image, mean: Sequence[float], std: Sequence[float]) -> Array:
    # NumPy constants: they are folded into the trace, and follow x to float64.
    return jnp.divide(x - np.asarray(mean, x.dtype), np.asarray(std, x.dtype))
