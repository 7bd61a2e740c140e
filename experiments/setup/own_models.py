"""Somebody's own network, from a file: `my_models.py:Net`, a module of Flax, NNX or Equinox.

Net is a class, or a function that returns a module. What its signature names is handed to it:
`num_classes`, `image_shape` (height, width, channels), and a source of random numbers as its
library spells it (`rngs` of NNX, `key` of Equinox). It is called with images alone, a batch of them
or a single one, whichever it is written for (Equinox: one, with the channels first, as its layers
want it), in evaluation mode, and returns a logit for each class.

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
from .models import Model

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
    seen: list[Any] = []
    # 1. Most modules are for batches; one for a single image makes something else of two.
    for batch, expected in (((2,), (2, classes)), ((), (classes,))):
        try:
            logits = jax.eval_shape(model.apply, params, _image((*batch, *shape)))
        except Exception as error:  # whatever a network raises at a shape that it is not for
            seen.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        if getattr(logits, "shape", None) == expected:
            return model._replace(apply=_of_one(model.apply)) if batch else model
        seen.append(getattr(logits, "shape", type(logits).__name__))
    # 2. Neither.
    raise ValueError(
        f"--model {name}: it makes no logits of {classes} classes. Of two images of shape {shape} "
        f"it makes {seen[0]}, of one of them {seen[1]}"
    )


def _image(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _of_one(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda params, x: apply(params, x[None])[0]


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
    if not callable(found) or (not isinstance(found, type) and isinstance(found, nnx.Module)):
        raise TypeError(
            f"{type(found).__name__}: give the class, or a function that makes the network, so "
            "that it can begin at random"
        )
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    given: dict[str, Callable[[], Any]] = {
        **{name: (lambda value=value: value) for name, value in told.items()},
        "rngs": lambda: nnx.Rngs(key),
        "key": lambda: key,
    }
    # The metaclass of NNX hides the signature of a class.
    own = found.__init__ if isinstance(found, type) and issubclass(found, nnx.Module) else found
    parameters = {n: p for n, p in inspect.signature(own).parameters.items() if n != "self"}
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
    parameters = inspect.signature(type(network).__call__).parameters
    switches = {switch: value for switch, value in _SWITCHES.items() if switch in parameters}

    def variables(key: Any, batch: tuple[int, ...]) -> Any:
        return network.init(key, jnp.zeros((*batch, *shape)), **switches)

    batch, kept = _first_that_works(name, variables)
    if others := sorted(set(kept) - {"params"}):
        raise _follows_batches(name, others)

    def apply(params: Any, x: Any) -> Any:
        return network.apply({"params": params}, x, **switches)

    return Model(apply, lambda key: variables(key, batch)["params"])


_SWITCHES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}
"""Arguments of a call that say that it is no training, and their values."""


def _first_that_works(name: str, variables: Callable[..., Any]) -> tuple[tuple[int, ...], Any]:
    """Finds whether a module begins with a batch of images or with one, and what it then has."""
    errors = []
    for batch in ((1,), ()):
        try:
            return batch, jax.eval_shape(lambda key, b=batch: variables(key, b), jax.random.key(0))
        except Exception as error:  # whatever a network raises at a shape that it is not for
            errors.append(str(error).splitlines()[0])
    raise ValueError(
        f"--model {name}: called with images alone it says {errors[0]!r}. Give other arguments "
        f"defaults; known are {', '.join(_SWITCHES)}"
    )


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
        net = equinox.combine(jax.tree.unflatten(tree, leaves), static)
        return net(jnp.moveaxis(x, -1, -3))

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
