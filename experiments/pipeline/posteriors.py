"""Posteriors on disk: one .npz of plain arrays, read back without the code that trained them.

Arrays are stored under numbers; a JSON text beside them says what they are: the class of the
posterior, its fields, and the dicts, lists and tuples of the params. Nothing is pickled, and
nothing but `bnncert.posterior` is needed to read one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnncert import posterior as posteriors

from .writing import whole

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        posteriors.MeanField,
        posteriors.LowRank,
        posteriors.Gaussian,
        posteriors.Samples,
        posteriors.Mixture,
    )
}
"""What can be stored, by name."""


def save(path: Path, posterior: Any) -> None:
    """Write a posterior; a file that is there is replaced, and never left half written.

    Args:
        path: of the file, by convention `posterior.npz`.
        posterior: of `bnncert.posterior`, its params made of dicts, lists, tuples and arrays.

    Raises:
        TypeError: it is, or holds, something else; names it and the way out.
        WriteError: there is no place, or no right to write there.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_describe(posterior, arrays))
    stored: dict[str, Any] = {str(i): array for i, array in enumerate(arrays)}
    with whole(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, description=np.array(text), **stored)


def load(path: Path) -> Any:
    """Read a posterior back: of the same class, with the same arrays.

    Args:
        path: what `save` was given.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file holds no posterior.

    >>> import tempfile
    >>> q = posteriors.MeanField({"w": jnp.ones(3)}, {"w": jnp.full(3, 0.1)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "posterior.npz", q)
    ...     print(load(Path(folder) / "posterior.npz").scale)
    {'w': Array([0.1, 0.1, 0.1], dtype=float32)}
    """
    with np.load(path, allow_pickle=False) as stored:
        if "description" not in stored:
            raise ValueError(f"{path} holds no posterior (of `experiments.pipeline.posteriors`)")
        return _build(json.loads(str(stored["description"])), stored)


def _describe(value: Any, arrays: list[np.ndarray]) -> Any:
    """JSON for a value, with the arrays in it appended to a list."""
    if value is None:
        return {"none": True}
    if type(value) in KINDS.values():
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        described = {name: _describe(child, arrays) for name, child in fields.items()}
        return {"kind": type(value).__name__, "fields": described}
    if type(value) is dict and all(type(name) is str for name in value):
        return {"dict": {name: _describe(child, arrays) for name, child in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(child, arrays) for child in value]}
    if type(value) in (str, int, float, bool):
        return {"value": value}
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        arrays.append(np.asarray(value))
        return {"array": len(arrays) - 1}
    raise TypeError(
        f"cannot store a {type(value).__name__}: a posterior of bnncert.posterior whose params are "
        "dicts (with text as keys), lists, tuples and arrays can be; for Flax, the state as a dict"
    )


def _build(described: Any, stored: Any) -> Any:
    (tag, content), *rest = described.items()
    if tag == "kind":
        fields = {name: _build(child, stored) for name, child in dict(rest)["fields"].items()}
        return KINDS[content](**fields)
    if tag == "dict":
        return {name: _build(child, stored) for name, child in content.items()}
    if tag in ("list", "tuple"):
        children = [_build(child, stored) for child in content]
        return children if tag == "list" else tuple(children)
    if tag == "array":
        return jnp.asarray(stored[str(content)])
    return None if tag == "none" else content
