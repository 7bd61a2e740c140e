"""The networks of the experiments: functions of ONE image with pixels in [0, 1].

The data set's normalisation is the first thing inside each network, so that a radius always speaks
of pixels. Weights start at std sqrt(2 pi) / fan_in, at which the expected interval keeps its width
from layer to layer; biases start at zero.

With batch-norm a network is one of a single image only once its statistics are frozen: they are
leaves of the params, which `prepare` fills in from a batch of clean images, and `freeze` from
training images in each network that is deployed. Bounds see them as constants.

Source: Shi et al., "Fast certified robust training with short warmup", NeurIPS 2021, sections 3.1
and 3.2; Ioffe and Szegedy, "Batch normalization", ICML 2015.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from bnncert.types import Prepare, Stacked

from .data import Dataset
from .requirements import check_name

EPSILON = 1e-5
"""Added to the variances of batch-norm."""

Image = Float[Array | np.ndarray, "height width channels"]


class Model(NamedTuple):
    """A network as functions; `params` is a plain nested dict.

    Attributes:
        apply: one image to its logits.
        init: a key to fresh parameters.
        prepare: `(params, images) -> params` with the statistics of these images; None where there
            are none to fill in.
        dense: whether all layers are dense: then networks side by side are fast by vmap, on CPUs
            too, where convolutions of different kernels are not.
    """

    apply: Callable[[Any, Image], Float[Array, " classes"]]
    init: Callable[[PRNGKeyArray], Any]
    prepare: Prepare | None = None
    dense: bool = False


def build(name: str, dataset: Dataset) -> Model:
    """Make the network `name` for the images and classes of a data set.

    Args:
        name: a key of `MODELS`.
        dataset: gives the image's shape, the number of classes, and the normalisation.

    Returns:
        Its functions.

    Raises:
        ValueError: an unknown name.

    >>> from experiments.setup.data import load
    >>> digits = load("digits")
    >>> model = build("mlp", digits)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, digits.train.x[0]).shape
    (10,)
    """
    check_name(name, tuple(MODELS), "model")
    network = MODELS[name](dataset.num_classes, dataset.mean, dataset.std)
    return of_module(network, dataset.image_shape)


def of_module(network: nn.Module, shape: tuple[int, int, int]) -> Model:
    """The functions of a Flax module on images of a shape."""

    def apply(params: Any, x: Image) -> Float[Array, " classes"]:
        return network.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    def init(key: PRNGKeyArray) -> Any:
        return network.init(key, jnp.zeros(shape))["params"]

    def prepare(params: Any, images: Array) -> Any:
        def one(x: Array) -> Any:
            return network.apply({"params": params}, x, axis="images", mutable=["statistics"])[1]

        found = jax.vmap(one, axis_name="images")(images)["statistics"]
        # The same for every image.
        return {
            layer: {**leaves, **{name: leaf[0] for name, leaf in found.get(layer, {}).items()}}
            for layer, leaves in params.items()
        }

    return Model(apply, init, prepare if getattr(network, "normalised", False) else None)


def freeze(model: Model, samples: Stacked, images: Array | np.ndarray) -> Stacked:
    """Networks that are functions of one image: each sample with its own statistics of the images.

    Args:
        model: the network.
        samples: stacked params.
        images: of the training set, (N, height, width, channels).

    Returns:
        The samples as they are, where there is nothing to fill in. Memory: the activations of one
        sample on all images.
    """
    if model.prepare is None:
        return samples
    prepare, batch = model.prepare, jnp.asarray(images)
    return jax.jit(lambda many: jax.lax.map(lambda params: prepare(params, batch), many))(samples)


def ibp_normal(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Normal weights with std sqrt(2 pi) / fan_in; the last axis is the output's."""
    return jax.random.normal(key, shape, dtype) * ibp_scale(shape)


def ibp_scale(shape: Sequence[int]) -> float:
    """Return sqrt(2 pi) / fan_in for a kernel whose last axis is the output's.

    >>> round(ibp_scale((784, 512)) * 784, 4)
    2.5066
    """
    return math.sqrt(2 * math.pi) / math.prod(shape[:-1])


class BatchNorm(nn.Module):
    """(x - mean) / deviation * scale + bias for each channel, the last axis.

    With an axis of images, mean and deviation are theirs and are noted as "statistics"; else they
    are the ones in the params.
    """

    @nn.compact
    def __call__(self, x: Array, axis: str | None = None) -> Array:
        """Normalise the activations of one image."""
        shape = x.shape[-1:]
        mean = self.param("mean", nn.initializers.zeros, shape)
        deviation = self.param("deviation", nn.initializers.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if axis is not None:
            places = tuple(range(x.ndim - 1))
            mean = jax.lax.pmean(x.mean(places), axis)
            variance = jax.lax.pmean(jnp.square(x - mean).mean(places), axis)
            deviation = jnp.sqrt(variance + EPSILON)
            self.variable("statistics", "mean", lambda: mean)
            self.variable("statistics", "deviation", lambda: deviation)
        return (x - mean) / deviation * scale + bias


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
    """Two 4x4 convolutions of stride 2, a hidden dense layer, ReLU (after batch-norm) between."""

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    channels: Sequence[int] = (16, 32)
    hidden: int = 100
    padding: str = "SAME"
    normalised: bool = False

    @nn.compact
    def __call__(self, x: Image, axis: str | None = None) -> Float[Array, " classes"]:
        """Return the logits of one image, which may be one of an axis of images."""
        norm = (lambda x: BatchNorm()(x, axis)) if self.normalised else lambda x: x
        x = _normalise(x, self.mean, self.std)
        for features in self.channels:
            conv = nn.Conv(features, (4, 4), 2, padding=self.padding, kernel_init=ibp_normal)
            x = nn.relu(norm(conv(x)))
        x = nn.relu(norm(nn.Dense(self.hidden, kernel_init=ibp_normal)(x.reshape(-1))))
        return nn.Dense(self.num_classes, kernel_init=ibp_normal)(x)


class SmallResNet(nn.Module):
    """A convolution, three residual blocks, of which two halve the image, a hidden dense layer."""

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    channels: Sequence[int] = (16, 16, 32)
    hidden: int = 100

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, " classes"]:
        """Return the logits of one image."""
        x = _normalise(x, self.mean, self.std)
        x = nn.relu(nn.Conv(self.channels[0], (3, 3), 2, kernel_init=ibp_normal)(x))
        for features in self.channels:
            halved = 1 if features == x.shape[-1] else 2
            within = nn.relu(nn.Conv(features, (3, 3), halved, kernel_init=ibp_normal)(x))
            past = nn.Conv(features, (3, 3), kernel_init=ibp_normal)(within)
            if halved > 1:
                x = nn.Conv(features, (1, 1), halved, kernel_init=ibp_normal)(x)
            x = nn.relu(0.5 * (x + past))
        x = nn.relu(nn.Dense(self.hidden, kernel_init=ibp_normal)(x.reshape(-1)))
        return nn.Dense(self.num_classes, kernel_init=ibp_normal)(x)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": SmallCNN,
    "cnn-bn": partial(SmallCNN, normalised=True),
    "resnet": SmallResNet,
}


def _normalise(x: Image, mean: Sequence[float], std: Sequence[float]) -> Array:
    # NumPy constants: they are folded into the trace, and follow x to float64.
    return jnp.divide(x - np.asarray(mean, x.dtype), np.asarray(std, x.dtype))
