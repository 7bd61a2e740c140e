"""Posteriors that others released: fully connected ReLU networks on MNIST, weights Gaussian.

    h_0 = the 784 pixels in [0, 1],   h_{i+1} = relu(h_i W_i + b_i),   logits = h_n W_n + b_n
    every weight  ~  N(loc, scale^2), all independent

as .npz files of float arrays `layer{i}/{kernel,bias}/{loc,scale}`, i from 0, kernels of shape
(in, out). Doubles are rounded to float32, and it is the rounded posterior that is read.

Sources: Wicker et al., "Probabilistic safety for Bayesian neural networks", UAI 2020; Batten et
al., "Tight verification of probabilistic robustness in Bayesian neural networks", AISTATS 2024
(whose networks and settings `KNOWN` names).
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnncert.posterior import MeanField

PIXELS_OF_AN_IMAGE, CLASSES = 784, 10
PARTS = tuple(f"{name}/{part}" for name in ("kernel", "bias") for part in ("loc", "scale"))


class Setting(NamedTuple):
    """What a posterior is certified on.

    Attributes:
        eps: l_inf radii, pixels in [0, 1].
        images: of the test set, the first ones.
        against: the class that has to stay: the "label", or the "mean" network's own.
    """

    eps: tuple[float, ...] = (0.025,)
    images: int = 50
    against: str = "label"


KNOWN = {
    "uai_1_64": Setting((0.0125, 0.025), 36, "mean"),
    "wick_1_128": Setting(),
    "mlp_2_50": Setting(),
    "wick_2_256": Setting((0.001, 0.025)),
}
"""By the stem of the file's name; any other has the setting of most, `Setting()`."""


def read(path: Path) -> MeanField:
    """Reads a posterior over `{"layer0": {"kernel": ..., "bias": ...}, ...}`.

    Raises:
        ValueError: it is no such file; the message names the file and what is missing or wrong.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of numbers: {error}") from None
    depth = 1 + max(
        (int(digits) for name in arrays if (digits := name.split("/")[0][5:]).isdecimal()),
        default=0,
    )
    wanted = [f"layer{i}/{part}" for i in range(depth) for part in PARTS]
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}. "
            "Save a posterior as layer0/kernel/loc, layer0/kernel/scale, layer0/bias/loc, "
            "layer0/bias/scale, layer1/..., or move the file out of the folder"
        )
    if unknown := sorted(set(arrays) - set(wanted)):
        raise ValueError(
            f"{path} has arrays of no fully connected layer: {', '.join(unknown)}. Only ReLU "
            f"networks of layers 0 to {depth - 1} are read; move the file out of the folder"
        )
    _check(path, arrays, depth)

    def params(part: str) -> dict[str, Any]:
        return {
            f"layer{i}": {
                name: jnp.asarray(arrays[f"layer{i}/{name}/{part}"]) for name in ("kernel", "bias")
            }
            for i in range(depth)
        }

    return MeanField(params("loc"), params("scale"))


def apply(params: Mapping[str, Any], x: Float[Array, "..."]) -> Float[Array, " classes"]:
    """Computes the logits of one image of 784 pixels."""
    h, last = jnp.ravel(x), len(params) - 1
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        h = h @ layer["kernel"] + layer["bias"]
        h = h if i == last else jax.nn.relu(h)
    return h


def _check(path: Path, arrays: Mapping[str, np.ndarray], depth: int) -> None:
    """Shapes that fit one another, finite means and positive deviations."""
    width = PIXELS_OF_AN_IMAGE
    for i in range(depth):
        found = arrays[f"layer{i}/kernel/loc"].shape
        out = CLASSES if i == depth - 1 else (found[1] if len(found) == 2 else -1)
        for name, shape in (("kernel", (width, out)), ("bias", (out,))):
            for part in ("loc", "scale"):
                array, key = arrays[f"layer{i}/{name}/{part}"], f"layer{i}/{name}/{part}"
                if array.shape != shape or -1 in shape:
                    raise ValueError(
                        f"{path}: {key} has shape {array.shape}, and not {shape}. Kernels are "
                        f"(in, out), from {PIXELS_OF_AN_IMAGE} pixels to {CLASSES} classes: "
                        "transpose them if they are (out, in)"
                    )
                if not np.isfinite(array).all() or (part == "scale" and not (array > 0).all()):
                    raise ValueError(
                        f"{path}: {key} has values that are not "
                        f"{'positive and ' if part == 'scale' else ''}finite. A scale is a "
                        "standard deviation: save it after its softplus or exp"
                    )
        width = out
