"""A small network with one output: dense layers with ReLU between them.

Weights start as in `experiments.setup.models`, at std sqrt(2 pi) / fan_in, at which intervals keep
their width from layer to layer. The biases of the first layer start at N(0, 1): with one input,
kinks that all start at 0 would leave a sine two straight lines.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from ...setup.models import Model, ibp_normal

Features = Float[Array | np.ndarray, " features"]


class Regressor(nn.Module):
    """Dense layers with ReLU between them; the mean of the standardised target."""

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, " 1"]:
        """Return the mean at one datum."""
        start = nn.initializers.normal(1.0)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=ibp_normal, bias_init=start)(x))
            start = nn.initializers.zeros
        return nn.Dense(1, kernel_init=ibp_normal)(x)


def build(hidden: Sequence[int], features: int) -> Model:
    """The functions of a network.

    Args:
        hidden: widths of its hidden layers.
        features: of the input.

    >>> import jax
    >>> model = build((8, 8), features=3)
    >>> model.apply(model.init(jax.random.key(0)), jnp.zeros(3)).shape
    (1,)
    """
    network = Regressor(tuple(hidden))

    def apply(params: Any, x: Features) -> Float[Array, " 1"]:
        return network.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

    def init(key: PRNGKeyArray) -> Any:
        return network.init(key, jnp.zeros(features))["params"]

    return Model(apply, init, dense=True)
