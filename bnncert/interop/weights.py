"""Weights of other libraries as the params of a network of one's own: by name, layout by layout.

PyTorch keeps the weight of a dense layer as (out, in), and that of a convolution as (out, in,
*window); Flax keeps a *kernel* as (in, out) and (*window, in, out). So what goes to a leaf called
`kernel` is turned round; everything else is taken as it is.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import prior as priors
from bnncert.types import Params

_OWN: Mapping[str, tuple[str, ...]] = {
    "kernel": ("weight",),
    "scale": ("weight",),
    "mean": ("running_mean",),
    "var": ("running_var",),
}
"""By the last part of a leaf's name: what PyTorch calls it."""


def from_torch(state: Mapping[str, Any], like: Any, layers: Mapping[str, str]) -> Params:
    """Takes weights from a PyTorch state dict, or any mapping of names to arrays.

        params[layer]["kernel"] = state[layers[layer] + ".weight"] transposed, ...

    Args:
        state: of `module.state_dict()`, or as `safetensors.numpy.load_file` reads it; tensors are
            taken as they are, without PyTorch being imported.
        like: params of the network, a pytree of arrays or of shapes; as `model.init` makes them.
        layers: by the name of a layer of `like` ("params/Dense_0"), its name in the state ("fc1");
            of a leaf without a layer, the whole name of both.

    Returns:
        Params of the structure, the shapes and the dtypes of `like`.

    Raises:
        ValueError: a layer that is not named, a name that is missing, weights that are left over,
            or another shape; the message lists them.

    Cost: one copy of the weights.

    Source: the layouts are those of PyTorch's and Flax's documentation.

    Example:
        >>> state = {"fc.weight": np.ones((3, 2)), "fc.bias": np.zeros(3)}
        >>> like = {"Dense_0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> from_torch(state, like, {"Dense_0": "fc"})["Dense_0"]["kernel"].shape
        (2, 3)
    """
    named = priors.named(like)
    taken, found, missing = set(), [], []
    for name, leaf in named.items():
        layer, _, own = name.rpartition("/")
        theirs = _their_name(name, layer, own, layers, state)
        if theirs is None:
            missing.append(name)
            continue
        taken.add(theirs)
        value = _turned(_array(state[theirs]), own)
        if value.shape != jnp.shape(leaf):
            raise ValueError(
                f"{theirs} has the shape {value.shape} as {name}, which has {jnp.shape(leaf)}: is "
                "it another layer?"
            )
        found.append(jnp.asarray(value, jnp.result_type(leaf)))
    left = sorted(set(state) - taken - {k for k in state if k.endswith("num_batches_tracked")})
    if missing or left:
        raise ValueError(
            f"nothing was found for {', '.join(missing) or 'no leaf'}; left over are "
            f"{', '.join(left) or 'none'}. Name each layer, e.g. {{'Dense_0': 'fc1'}}; the layers "
            f"are {', '.join(sorted({n.rpartition('/')[0] or n for n in named}))}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _their_name(
    name: str, layer: str, own: str, layers: Mapping[str, str], state: Mapping[str, Any]
) -> str | None:
    if name in layers:
        return layers[name] if layers[name] in state else None
    if layer not in layers:
        return None
    names = (f"{layers[layer]}.{theirs}" for theirs in (*_OWN.get(own, ()), own))
    return next((theirs for theirs in names if theirs in state), None)


def _array(value: Any) -> np.ndarray:
    """A tensor, wherever it lies, or an array."""
    for step in ("detach", "cpu", "numpy"):
        value = getattr(value, step)() if hasattr(value, step) else value
    return np.asarray(value)


def _turned(value: np.ndarray, own: str) -> np.ndarray:
    """Kernels have their inputs before their outputs, and both last."""
    if own != "kernel" or value.ndim < 2:
        return value
    return value.transpose(*range(2, value.ndim), 1, 0)
