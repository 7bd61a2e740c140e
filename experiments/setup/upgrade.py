"""Settings as earlier versions wrote them: `train` held those of every inference method.

A run of then is certified, attacked, reported and resumed as one of now. What its method did not
use is dropped: it changed nothing.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from .methods import METHODS

MOVED: Mapping[str, str] = {
    "clip_norm": "clip_norm",
    "initial_scale": "initial_scale",
    "beta1": "beta1",
    "beta2": "beta2",
    "clip_step": "clip_step",
    "members": "members",
    "collect_from": "collect_from",
    "collect": "collect",
    "guide": "guide",
    "rank": "rank",
    "friction": "friction",
    "curvature": "curvature",
    "mcmc_images": "images",
    "mcmc_warmup": "warmup",
    "mcmc_samples": "samples",
    "mcmc_chains": "chains",
    "mcmc_depth": "depth",
}
"""Fields that `train` had -> what they are called in the methods that use them."""


def upgraded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json in today's form; those of today are as they were.

    Args:
        fields: with the name of a method as "inference", in the earlier form.

    >>> upgraded({"inference": "ensemble", "train": {"epochs": 3, "members": 2, "rank": 9}})
    {'inference': {'name': 'ensemble', 'members': 2}, 'train': {'epochs': 3}}
    """
    name, train = fields["inference"], dict(fields.get("train", {}))
    if not isinstance(name, str):
        return dict(fields)
    old = {MOVED[field]: train.pop(field) for field in MOVED if field in train}
    own = _taken(METHODS[name], old) if name in METHODS else {}
    return {**fields, "inference": {"name": name, **own}, "train": train}


def place_of(field: str) -> dict[str, str]:
    """Where a field of `MOVED` is now: for each method that has it, the option.

    >>> place_of("rank")["hmc"]
    'inference.start.rank'
    """
    places = {name: _path(kind, MOVED[field], "inference.") for name, kind in METHODS.items()}
    return {name: path for name, path in places.items() if path is not None}


def _taken(kind: type[Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that a method has, or the method that it starts from."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = _taken(typing.cast(Any, hints[field.name]), old)
            found |= {field.name: inner} if inner else {}
        elif field.name in old:
            found[field.name] = old[field.name]
    return found


def _path(kind: type[Any], name: str, prefix: str) -> str | None:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name == name:
            return prefix + name
        if dataclasses.is_dataclass(hints[field.name]):
            inner = _path(typing.cast(Any, hints[field.name]), name, f"{prefix}{field.name}.")
            if inner:
                return inner
    return None
