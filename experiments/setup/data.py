"""Image classification data in host memory, pixels in [0, 1].

`digits` comes with scikit-learn and needs no download. `mnist`, `fashion_mnist` and `cifar10` are
read from folders that stock TensorFlow Datasets prepared in its `array_record` format: reading
them takes no TensorFlow, preparing them does (the extra `prepare`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from .logs import errors_only
from .requirements import check_name

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")


class Split(NamedTuple):
    """Inputs and targets, in host memory: images and labels, or features and numbers."""

    x: Float[np.ndarray, "num ..."]  # float32; images are (height, width, channels), in [0, 1]
    y: Shaped[np.ndarray, " num"]  # int32, 0 .. num_classes - 1; or float32


class Dataset(NamedTuple):
    """A data set, with the mean and standard deviation of each channel over its train split."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.train.x.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """How many classes there are, in the labels' numbering."""
        return len(self.class_names)


class Batches(NamedTuple):
    """One epoch: row i holds the examples of minibatch i."""

    indices: Int[np.ndarray, "steps batch"]  # into the split; padding repeats valid positions
    mask: Float[np.ndarray, "steps batch"]  # float32: 1 for an example, 0 for padding


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Read a whole data set into host memory.

    Args:
        name: one of `DATASETS`.
        data_dir: the TFDS data folder; None is TFDS's own default. `digits` needs none.

    Returns:
        The data set; its order is the same at every call.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the set has not been prepared there; the message has the command.

    Time: 4 to 8 seconds for a train split from TFDS (PNG decoding). Memory: 4 bytes a pixel,
    0.2 GB for MNIST and 0.7 GB for CIFAR-10.

    >>> digits = load("digits")
    >>> digits.train.x.shape, digits.test.x.shape, digits.num_classes
    ((1437, 8, 8, 1), (360, 8, 8, 1), 10)
    """
    check_name(name, DATASETS, "data set")
    return dataset_of(name, *_digits()) if name == "digits" else from_tfds(name, data_dir)


def from_tfds(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Read a data set of images that TensorFlow Datasets has prepared.

    Args:
        name: as TFDS knows it, with features image and label, and splits train and test.
        data_dir: the TFDS data folder; None is TFDS's own default.

    Raises:
        FileNotFoundError: the set has not been prepared there; the message has the command.
        ValueError: it has other features.
    """
    with errors_only():  # TFDS advertises OpenCV
        source = {split: _tfds_source(name, split, data_dir) for split in ("train", "test")}
        features = source["train"].dataset_info.features
        if not {"image", "label"} <= set(features):
            raise ValueError(
                f"data set '{name}' has the features {', '.join(features)}: it needs image and "
                "label"
            )
        train, test = _decode(source["train"]), _decode(source["test"])
    return dataset_of(name, train, test, tuple(features["label"].names))


def dataset_of(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    """Make a data set of its two splits, checked, with the statistics of its channels."""
    for split in (train, test):
        check_images(split.x, split.y, len(class_names))
    # Four digits, as the literature quotes them: the last bits of a sum depend on the machine.
    mean = tuple(round(float(m), 4) for m in train.x.mean(axis=(0, 1, 2), dtype=np.float64))
    # A channel that is constant is divided by 1.
    std = tuple(round(float(s), 4) or 1.0 for s in train.x.std(axis=(0, 1, 2), dtype=np.float64))
    return Dataset(name, train, test, class_names, mean, std)


def check_images(x: Any, y: Any, num_classes: int) -> None:
    """Raise an error unless x are images with pixels in [0, 1] and y their labels.

    Args:
        x: images, shape (num, height, width, channels), floating point, in [0, 1].
        y: labels, shape (num,), integers in 0 .. num_classes - 1.
        num_classes: number of classes.

    Raises:
        TypeError: integer images, or labels that are not integers.
        ValueError: wrong shapes, pixels outside [0, 1] or not finite, labels out of range.
    """
    x, y = np.asarray(x), np.asarray(y)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(
            f"images have dtype {x.dtype}; radii are in units of pixels in [0, 1], so scale them "
            "first: x.astype(np.float32) / 255"
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"labels have dtype {y.dtype}; pass integers 0 .. {num_classes - 1}")
    if x.ndim != 4 or y.shape != x.shape[:1]:
        raise ValueError(
            f"images have shape {x.shape} and labels {y.shape}; pass "
            "(num, height, width, channels) and (num,)"
        )
    if not x.size:
        raise ValueError(f"no images: shape {x.shape}")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0.0 and high <= 1.0):  # also true of NaN, which min and max hand on
        raise ValueError(f"pixels lie in [{low}, {high}]; scale them to [0, 1]")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"labels lie in {y.min()} .. {y.max()}; {num_classes} classes need "
            f"0 .. {num_classes - 1}"
        )


def validation_split(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Part a split at random into (all but n examples, n examples).

    Args:
        split: the examples.
        n: how many to hold out; 0 holds out none.
        seed: the same seed gives the same two parts.

    Returns:
        The remaining examples and the held-out ones, each in their old order.

    Raises:
        ValueError: n is negative or leaves nothing.
    """
    num = len(split.y)
    if not 0 <= n < num:
        raise ValueError(f"cannot hold out {n} of {num} examples; choose 0 .. {num - 1}")
    held = np.zeros(num, dtype=bool)
    held[np.random.default_rng(seed).permutation(num)[:n]] = True
    return Split(split.x[~held], split.y[~held]), Split(split.x[held], split.y[held])


def epoch_batches(seed: int | Sequence[int], num: int, batch_size: int) -> Batches:
    """Visit every example once, in a random order, in minibatches of one shape.

    Args:
        seed: fixes the order; pass (seed, epoch) to have another one each epoch.
        num: number of examples.
        batch_size: examples in a minibatch.

    Returns:
        Indices and mask, both of shape (ceil(num / batch_size), batch_size).

    >>> indices, mask = epoch_batches((0, 1), num=5, batch_size=2)
    >>> sorted(indices[mask > 0].tolist()), mask.tolist()
    ([0, 1, 2, 3, 4], [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    """
    if num < 1 or batch_size < 1:
        raise ValueError(f"num and batch_size must be positive, got {num} and {batch_size}")
    order = np.random.default_rng(seed).permutation(num)
    steps = -(-num // batch_size)
    # Padding repeats real examples, so that nothing unusual (NaN, infinity) is ever computed.
    indices = np.resize(order, steps * batch_size).astype(np.int32)
    mask = (np.arange(steps * batch_size) < num).astype(np.float32)
    return Batches(indices.reshape(steps, batch_size), mask.reshape(steps, batch_size))


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    y = y.astype(np.int32)
    # The published set has no split of its own: this one is ours, and never depends on a seed.
    parts = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    train, test = (Split(x[part], y[part]) for part in map(np.asarray, parts))
    return train, test, tuple(str(digit) for digit in range(10))


def _tfds_source(name: str, split: str, data_dir: str | Path | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    folder = Path(constants.DATA_DIR if data_dir is None else data_dir).expanduser()
    # Asked before TFDS is: for a set that is absent it would turn to the network first.
    if not list((folder / name).glob("*/dataset_info.json")):
        raise FileNotFoundError(_how_to_prepare(name, folder, "is not there"))
    try:
        return tfds.data_source(name, split=split, data_dir=folder, download=False)
    except (NotImplementedError, FileNotFoundError, AssertionError) as error:
        raise FileNotFoundError(_how_to_prepare(name, folder, f"is unreadable ({error})")) from None


def _how_to_prepare(name: str, folder: Path, what: str) -> str:
    program = (
        f"import tensorflow_datasets as t; t.builder({name!r}, data_dir={str(folder)!r}, "
        "file_format='array_record').download_and_prepare()"
    )
    return (
        f"data set '{name}' {what} in {folder}. Prepare it once with\n"
        '    pip install "bnncert[prepare]"\n'
        f'    python -c "{program}"\n'
        "or name the TFDS folder that has it with --data-dir. "
        "The preset 'digits' needs no download."
    )


def _decode(source: Any) -> Split:
    """Read a split through one uint8 buffer: a float copy of each image would be slower."""
    shape = source.dataset_info.features["image"].shape
    x = np.empty((len(source), *shape), np.uint8)
    y = np.empty(len(source), np.int32)
    chunk = 4096
    for start in range(0, len(source), chunk):
        rows = range(start, min(start + chunk, len(source)))
        for row, record in zip(rows, source.__getitems__(rows), strict=True):
            x[row], y[row] = record["image"], record["label"]
    return Split(x.astype(np.float32) / np.float32(255.0), y)
