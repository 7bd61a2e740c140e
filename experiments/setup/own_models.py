"""Somebody's own network, from a file: `my_models.py:Net`, a module of Flax, NNX or Equinox.

Net is a class, or a function that returns a module. What its signature names is handed to it:
`num_classes`, `image_shape` (height, width, channels), and a source of random numbers as its
library spells it (`rngs` of NNX, `key` of Equinox). Called, it takes one image, without a batch
axis, and nothing else, and returns as many logits as there are classes.

Its params become plain dicts of dicts of arrays. What it learns from batches (running averages of
batch-norm) is refused: `--model cnn-bn` shows a network whose statistics are frozen.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from .data import Dataset
from .models import Model, of_module

EXAMPLE = "my_models.py:Net"


def is_own(name: str) -> bool:
    """Says whether a model is named by a file.

    >>> is_own("my_models.py:Net"), is_own("cnn")
    (True, False)
    """
    return ".py:" in name


def digest(name: str) -> str:
    """What tells one version of the file from another."""
    return hashlib.sha256(_path(name)[0].read_bytes()).hexdigest()[:16]


def build(name: str, dataset: Dataset) -> Model:
    """Makes the network for the images and classes of a data set.

    Args:
        name: a file and what it defines, as `my_models.py:Net`.
        dataset: gives the image's shape and the number of classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: no such name in it, another kind of thing, or a network that cannot
            be followed; the message has the way out.
    """
    path, attribute = _path(name)
    found = getattr(_imported(path), attribute, None)
    if found is None:
        raise ValueError(f"--model {name}: {path} defines no {attribute}")
    told = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
    kind = _kind(found, told)
    shape, classes = dataset.image_shape, dataset.num_classes
    model = _MAKERS[kind](name, found, told, shape)
    params = jax.eval_shape(model.init, jax.random.key(0))
    try:
        logits = jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    except TypeError as error:
        raise TypeError(
            f"--model {name}: called with one image of shape {shape} and nothing else it says: "
            f"{error}. Give other arguments defaults"
        ) from error
    if getattr(logits, "shape", None) != (classes,):
        raise ValueError(
            f"--model {name}: of one image of shape {shape} it makes "
            f"{getattr(logits, 'shape', type(logits).__name__)}, and not logits of {classes} "
            "classes. It is given one image, without a batch axis"
        )
    return model


def _path(name: str) -> tuple[Path, str]:
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--model {name}: there is no file {path}")
    return path, attribute


def _imported(path: Path) -> ModuleType:
    """Imports a file; those beside it can be imported from it."""
    spec = importlib.util.spec_from_file_location(f"_own_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _kind(found: Any, told: dict[str, Any]) -> str:
    """Says which library's module something is, or makes."""
    classes = {"linen": linen.Module, "nnx": nnx.Module}
    equinox = sys.modules.get("equinox")
    if equinox is not None:
        classes["equinox"] = equinox.Module
    made = found if isinstance(found, (type, *classes.values())) else _made(found, told, 0)
    for kind, base in classes.items():
        if isinstance(made, base) or (isinstance(made, type) and issubclass(made, base)):
            return kind
    what = made.__name__ if isinstance(made, type) else type(made).__name__
    raise TypeError(
        f"{what} is no module of Flax (linen or NNX) or Equinox, nor a function that returns one"
    )


def _made(found: Any, told: dict[str, Any], seed: Any) -> Any:
    """Calls a class or a function with what its signature names."""
    if isinstance(found, linen.Module):
        return found
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    given: dict[str, Callable[[], Any]] = {
        **{name: (lambda value=value: value) for name, value in told.items()},
        "rngs": lambda: nnx.Rngs(key),
        "key": lambda: key,
    }
    parameters = inspect.signature(found).parameters
    arguments = {name: make() for name, make in given.items() if name in parameters}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in arguments
        and name not in ("parent", "name")
    ]
    if missing:
        raise TypeError(
            f"{found.__name__} asks for {', '.join(missing)}: known are {', '.join(given)}; give "
            "others defaults"
        )
    return found(**arguments)


def _of_linen(name: str, found: Any, told: dict[str, Any], shape: tuple[int, ...]) -> Model:
    network = _made(found, told, 0)
    kept = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))
    if others := sorted(set(kept) - {"params"}):
        raise _follows_batches(name, others)
    return of_module(network, shape)  # pyright: ignore[reportArgumentType]


def _of_nnx(name: str, found: Any, told: dict[str, Any], shape: tuple[int, ...]) -> Model:
    del shape

    def parts(key: Any) -> Any:
        network = _made(found, told, key)
        network.eval()
        return nnx.split(network, nnx.Param, ...)

    graph, params, rest = parts(jax.random.key(0))
    statistics = [v for v in jax.tree.leaves(rest, is_leaf=_is_variable) if _is_statistic(v)]
    if statistics:
        raise _follows_batches(name, ["BatchStat"])

    def init(key: Any) -> Any:
        return _plain(nnx.to_pure_dict(parts(key)[1]))

    def apply(values: Any, x: Any) -> Any:
        state = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(state, _restored(values, nnx.to_pure_dict(params)))
        return nnx.merge(graph, state, rest, copy=True)(x)

    return Model(apply, init)


def _of_equinox(name: str, found: Any, told: dict[str, Any], shape: tuple[int, ...]) -> Model:
    del shape
    equinox: Any = sys.modules["equinox"]

    def parts(key: Any) -> tuple[Any, Any]:
        network = equinox.nn.inference_mode(_made(found, told, key))
        return equinox.partition(network, equinox.is_inexact_array)

    params, static = parts(jax.random.key(0))
    kept = jax.tree.leaves(static, is_leaf=lambda v: isinstance(v, equinox.nn.StateIndex))
    if any(isinstance(v, equinox.nn.StateIndex) for v in kept):
        raise _follows_batches(name, ["State"])
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    places = [_place(path) for path, _ in paths]

    def init(key: Any) -> Any:
        leaves = jax.tree.leaves(parts(key)[0])
        found: dict[str, dict[str, Any]] = {}
        for (layer, leaf), value in zip(places, leaves, strict=True):
            found.setdefault(layer, {})[leaf] = value
        return found

    def apply(values: Any, x: Any) -> Any:
        leaves = [values[layer][leaf] for layer, leaf in places]
        return equinox.combine(jax.tree.unflatten(tree, leaves), static)(x)

    return Model(apply, init)


_MAKERS = {"linen": _of_linen, "nnx": _of_nnx, "equinox": _of_equinox}


def _follows_batches(name: str, what: list[str]) -> ValueError:
    return ValueError(
        f"--model {name}: it keeps {', '.join(what)}, statistics of batches that these runs do not "
        "follow. Use a normalisation of one image (LayerNorm, GroupNorm), none, or --model cnn-bn"
    )


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _is_statistic(value: Any) -> bool:
    return isinstance(value, nnx.BatchStat)


def _plain(tree: Any) -> Any:
    """Makes dicts with text for keys: lists of layers have numbers."""
    return {str(k): _plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _restored(values: Any, like: Any) -> Any:
    return (
        {k: _restored(values[str(k)], v) for k, v in like.items()}
        if isinstance(like, dict)
        else values
    )


def _place(path: Any) -> tuple[str, str]:
    """Names a leaf: the layer that it is in, and itself."""
    names = [str(getattr(p, "name", getattr(p, "idx", getattr(p, "key", p)))) for p in path]
    return ".".join(names[:-1]) or "net", names[-1]
