"""Compiling once what is called again and again without `jax.jit`.

A certificate called as it is would be traced and compiled at every call: what it maps over samples
is a new function each time. Here the compiled program is kept for a function, its options and the
shapes of its arrays, as `jax.jit` would keep it.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

_KEPT = 64
"""Functions with options that are kept, those used last; with each what it closes over."""


def once(f: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """`f(*arrays, **options)`, compiled once for a function, options, and shapes.

    Args:
        f: a pure function of the library's own, defined at the top of a module.
        arrays: pytrees of arrays. Those of anything else have f called as it is; so has a call
            that is traced already, which whoever traces it compiles.
        options: anything else; likewise where they cannot be hashed.

    Returns:
        What f returns, a pytree of arrays.

    Example:
        >>> float(once(lambda x, by: x * by, jnp.ones(()), by=2.0))
        2.0
    """
    key = f, tuple(sorted(options.items()))
    if _are_known(arrays) and _is_hashable(key):
        return _compiled(*key)(*arrays)
    return f(*arrays, **options)


@lru_cache(_KEPT)
def _compiled(f: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(f, **dict(options)))


def _are_known(arrays: Any) -> bool:
    """Whether these are arrays of which the numbers are known now."""
    leaves = [jnp.zeros(()), *jax.tree.leaves(arrays)]  # inside of jit, all that is made is traced
    return all(isinstance(leaf, ArrayLike) and not isinstance(leaf, Tracer) for leaf in leaves)


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
