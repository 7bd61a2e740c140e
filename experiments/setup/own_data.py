"""Somebody's own images: a .npz file, a folder of class folders, TFDS or Hugging Face by name.

    FILE.npz       x, y; besides them x_test, y_test, or split ("train" and "test" for each image)
    FOLDER         a folder for each class, of PNG or JPEG files; or train/ and test/ of such
    tfds:NAME      a data set that TensorFlow Datasets has prepared, with features image and label
    hf:NAME        one of Hugging Face's `datasets`, by name or by the folder of `save_to_disk`

Whole numbers are taken for pixels in 0 .. 255, others have to lie in [0, 1]. Where no test images
are told apart a fifth of each class is, always the same ones.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import Dataset, Split, check_images, dataset_of, from_tfds

TEST_SHARE = 0.2
"""Of each class, where the data tell no test images apart."""

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")


def read(source: str, data_dir: Path | None = None) -> Dataset:
    """Reads a data set from where its owner has it.

    Args:
        source: as the module says.
        data_dir: the TFDS data folder; for others, the folder that the source is in now.

    Returns:
        The data set, in the order that it is stored in; the same at every call.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError, TypeError: it holds something else; the message names it and the way out.
    """
    kind, _, name = source.partition(":")
    if kind == "tfds" and name:
        return from_tfds(name, data_dir)
    if kind == "hf" and name:
        return _hugging_face(name)
    path = Path(source).expanduser()
    if data_dir is not None:
        path = data_dir / path.name
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--data {source}: there is no {path}. Give a .npz file, a folder of class folders, "
            "tfds:NAME or hf:NAME"
        )
    if path.suffix != ".npz":
        raise ValueError(
            f"--data {source}: a file has to be a .npz of arrays x and y: "
            "np.savez('my.npz', x=images, y=labels)"
        )
    return _npz(path)


def digest(dataset: Dataset) -> str:
    """What tells one data set from another: of all its numbers and the names of its classes."""
    found = hashlib.sha256(repr(dataset.class_names).encode())
    for split in (dataset.train, dataset.test):
        for array in split:
            found.update(f"{array.shape}{array.dtype}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no .npz file of numbers and texts: {error}") from None
    known = {"x", "y", "x_test", "y_test", "split"}
    if not {"x", "y"} <= set(arrays) or ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: it needs x and y, and may "
            "have x_test and y_test, or split"
        )
    if unknown := set(arrays) - known:
        raise ValueError(
            f"{path} holds {', '.join(sorted(unknown))} besides: known are "
            f"{', '.join(sorted(known))}"
        )
    x, y = arrays["x"], arrays["y"]
    _check_lengths(path, "x", x, "y", y)
    if "x_test" in arrays:
        if "split" in arrays:
            raise ValueError(f"{path} holds x_test and split: give one of them")
        _check_lengths(path, "x_test", arrays["x_test"], "y_test", arrays["y_test"])
        parts = (x, y), (arrays["x_test"], arrays["y_test"])
    else:
        test = _test_mask(path, y, arrays.get("split"))
        parts = (x[~test], y[~test]), (x[test], y[test])
    return _dataset(path.stem, path, parts)


def _check_lengths(path: Path, x_name: str, x: Any, y_name: str, y: Any) -> None:
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        hint = " (one-hot labels: y.argmax(1))" if y.ndim == 2 else ""
        raise ValueError(
            f"{path}: {x_name} has shape {x.shape} and {y_name} {y.shape}; give as many labels as "
            f"images, (N, ...) and (N,){hint}"
        )


def _test_mask(path: Path, y: np.ndarray, split: np.ndarray | None) -> np.ndarray:
    """Says which examples are for the test."""
    if split is None:
        return stratified(y, TEST_SHARE)
    if split.shape != y.shape or not set(split.tolist()) <= {"train", "test"}:
        names = sorted(set(map(str, split.ravel().tolist())))[:5]
        raise ValueError(
            f"{path}: split has shape {split.shape} and values {', '.join(names)}; give 'train' or "
            f"'test' for each of the {len(y)} images"
        )
    return split == "test"


def stratified(y: np.ndarray, share: float) -> np.ndarray:
    """Chooses a share of each class, one at least where it has two; always the same.

    >>> stratified(np.array([0, 0, 0, 0, 0, 1, 1]), 0.2).sum()
    np.int64(2)
    """
    chosen = np.zeros(len(y), bool)
    order = np.random.default_rng(0).permutation(len(y))
    for label in np.unique(y):
        of_class = order[y[order] == label]
        count = min(max(round(share * len(of_class)), 1), len(of_class) - 1)
        chosen[of_class[:count]] = True
    return chosen


def _folder(path: Path) -> Dataset:
    """Reads folders of class folders."""
    names = {child.name for child in path.iterdir() if child.is_dir()}
    if {"train", "test"} <= names:
        train, test = (_class_folders(path / part) for part in ("train", "test"))
        return _dataset(path.name, path, (train, test))
    x, y = _class_folders(path)
    test = stratified(y, TEST_SHARE)
    return _dataset(path.name, path, ((x[~test], y[~test]), (x[test], y[test])))


def _class_folders(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    files = [
        (child.name, file)
        for child in sorted(path.iterdir())
        if child.is_dir()
        for file in sorted(child.iterdir())
        if file.suffix.lower() in IMAGES
    ]
    if not files:
        raise ValueError(
            f"{path}: it has no folders with images ({', '.join(IMAGES)}): one for each class"
        )
    images, modes = [], set()
    for _, file in files:
        try:
            with Image.open(file) as image:
                modes.add("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")
                images.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{file} is no image that can be read: {error}") from None
    sizes = [image.size for image in images]
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        first, second = files[0][1], files[other][1]
        raise ValueError(
            f"images have several sizes: {first} is {sizes[0][0]}x{sizes[0][1]}, {second} is "
            f"{sizes[other][0]}x{sizes[other][1]}. Bring them to one size first"
        )
    mode = "RGB" if "RGB" in modes else "L"
    x = np.stack([np.asarray(image.convert(mode)) for image in images])
    return x, np.array([name for name, _ in files])


def _hugging_face(name: str) -> Dataset:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"--data hf:{name} needs Hugging Face's library: pip install datasets"
        ) from None
    found: Any = (
        datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    )
    parts = dict(found) if isinstance(found, Mapping) else {"train": found}
    if "train" not in parts:
        raise ValueError(f"hf:{name} has the splits {', '.join(parts)}: one must be 'train'")
    read = [_columns(name, parts[part]) for part in ("train", "test") if part in parts]
    if len(read) == 1:
        (x, y), test = read[0], stratified(read[0][1], TEST_SHARE)
        read = [(x[~test], y[~test]), (x[test], y[test])]
    return _dataset(Path(name).name, f"hf:{name}", (read[0], read[1]))


def _columns(name: str, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Reads the columns of images and labels of one split."""
    columns = list(rows.column_names)
    x = next((c for c in ("image", "img", "images", "x") if c in columns), None)
    y = next((c for c in ("label", "labels", "fine_label", "y") if c in columns), None)
    if x is None or y is None:
        raise ValueError(
            f"hf:{name} has the columns {', '.join(columns)}: one must be image and one label"
        )
    labels = np.asarray(rows[y])
    names = getattr(getattr(rows, "features", {}).get(y), "names", None)
    if names is not None:
        labels = np.array(names)[labels]
    return np.stack([np.asarray(image) for image in rows[x]]), labels


def _dataset(name: str, where: Path | str, parts: Sequence[tuple[Any, Any]]) -> Dataset:
    """Makes a data set of what was read, checked."""
    if not all(len(y) for _, y in parts):
        raise ValueError(f"{where}: no images for {'training' if not len(parts[0][1]) else 'test'}")
    names = _class_names(where, np.concatenate([y for _, y in parts]))
    missing = set(names) - set(map(_text, np.unique(parts[0][1])))
    if missing:
        raise ValueError(
            f"{where}: of the classes {', '.join(sorted(missing))} there are no training images"
        )
    places = {label: place for place, label in enumerate(names)}
    splits = [
        Split(_pixels(where, x), np.array([places[_text(label)] for label in y], np.int32))
        for x, y in parts
    ]
    shapes = [split.x.shape[1:] for split in splits]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{where}: training images are of shape {shapes[0]}, test images of {shapes[1]}"
        )
    for split in splits:
        check_images(split.x, split.y, len(names))
    return dataset_of(name, splits[0], splits[1], names)


def _class_names(where: Path | str, y: np.ndarray) -> tuple[str, ...]:
    if y.dtype.kind not in "iubUS":
        raise TypeError(
            f"{where}: labels have dtype {y.dtype}; give whole numbers or names of classes"
            + (", e.g. y.astype(int)" if y.dtype.kind == "f" else "")
        )
    names = tuple(_text(label) for label in np.unique(y))
    if len(names) < 2:
        raise ValueError(f"{where}: all labels are {', '.join(names)}: give two classes at least")
    return names


def _text(label: Any) -> str:
    return label.decode() if isinstance(label, bytes) else str(label)


def _pixels(where: Path | str, x: np.ndarray) -> np.ndarray:
    """Brings images to (N, height, width, channels), float32 in [0, 1]."""
    if x.dtype.kind in "iu":
        low, high = int(x.min()), int(x.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"{where}: whole numbers are taken for pixels in 0 .. 255, these lie in {low} .. "
                f"{high}. Scale them to [0, 1] first"
            )
        x = x.astype(np.float32) / np.float32(255)
    elif x.dtype.kind != "f":
        raise TypeError(f"{where}: images have dtype {x.dtype}; give numbers")
    x = x.astype(np.float32)
    if not (np.isfinite(x).all() and 0 <= x.min() and x.max() <= 1):
        raise ValueError(
            f"{where}: pixels lie in [{x.min():g}, {x.max():g}]; radii are in units of pixels in "
            "[0, 1]: scale them, or save whole numbers in 0 .. 255 as integers"
        )
    if x.ndim == 2:  # vectors: images of one row
        return x[:, None, :, None]
    if x.ndim == 3:
        return x[..., None]
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{where}: images of shape {x.shape[1:]} have their channels first; give them last: "
            "x.transpose(0, 2, 3, 1)"
        )
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(
            f"{where}: images have shape {x.shape}; give (N, height, width), (N, height, width, "
            "channels) of 1 or 3 channels, or vectors (N, features)"
        )
    return x
