"""What a run is about: its images and its network, ours or somebody's own.

Of a run's own data or network `own.json` keeps what tells them from others, so that a finished run
is never certified on other images, or with another network.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from . import models, own_data, own_models
from .config import RunConfig
from .data import Dataset, load
from .models import Model

RECORD = "own.json"
"""The file of a run's folder that tells its own data and network from others."""

_SMALL = 256
"""Pixels of an image that a network without convolutions is for."""


def read(config: RunConfig, data_dir: Path | None = None) -> Dataset:
    """Reads the images of a run.

    Args:
        config: of the run.
        data_dir: where they are now; None: where they were.
    """
    if config.data is None:
        return load(config.dataset, data_dir or config.data_dir)
    return own_data.read(config.data, data_dir or config.data_dir)


def build(config: RunConfig, dataset: Dataset) -> Model:
    """Makes the network of a run."""
    maker: Any = own_models if own_models.is_own(config.model) else models
    return maker.build(config.model, dataset)


def settled(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The settings, files by their whole path, and a network for the images where none was named.

    Args:
        config: of the run.
        dataset: its images.
    """
    if config.data is not None and ":" not in config.data:
        config = dataclasses.replace(config, data=str(Path(config.data).expanduser().resolve()))
    if own_models.is_own(config.model):
        file, _, name = config.model.rpartition(":")
        whole = f"{Path(file).expanduser().resolve()}:{name}"
        return dataclasses.replace(config, model=whole)
    if config.model != "auto":
        return config
    height, width, channels = dataset.image_shape
    small = min(height, width) < 8 or height * width * channels <= _SMALL
    return dataclasses.replace(config, model="mlp" if small else "cnn")


def identity(config: RunConfig, dataset: Dataset) -> dict[str, Any] | None:
    """What tells a run's own data and network from others; None where both are ours."""
    found: dict[str, Any] = {}
    if config.data is not None:
        found["data"] = {
            "source": config.data,
            "digest": own_data.digest(dataset),
            "train": len(dataset.train.y),
            "test": len(dataset.test.y),
            "image_shape": list(dataset.image_shape),
            "class_names": list(dataset.class_names),
        }
    if own_models.is_own(config.model):
        found["model"] = {"source": config.model, "digest": own_models.digest(config.model)}
    return found or None


def check(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Raises ValueError unless data and network are those that a run was made with.

    Args:
        folder: of the run.
        config: of the run.
        dataset: as it was read now.
    """
    path, now = folder / RECORD, identity(config, dataset) or {}
    before = json.loads(path.read_text()) if path.is_file() else {}
    for what, recorded in before.items():
        if now.get(what, {}).get("digest") != recorded["digest"]:
            way = (
                "name the folder of the unchanged file with --data-dir"
                if what == "data"
                else "put the file back as it was"
            )
            raise ValueError(
                f"{folder}: the {what} of this run, {recorded['source']}, changed since: {way}, or "
                "make another run"
            )
