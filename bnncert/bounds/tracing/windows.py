"""The entries that sliding windows look at.

A place of a window that lies in the padding, or in a hole of a dilated operand, holds the neutral
value of a maximum or a minimum, -inf or inf, which no bound can be computed with. It looks at
another entry of its own window instead: max(a, b, b) = max(a, b). Windows are products over the
axes, and so are the places inside, hence an axis at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Places(NamedTuple):
    """Where windows look along one axis; shape (places of a window, windows).

    Attributes:
        entry: its index in the operand.
        outside: whether it stands for padding or a hole.
    """

    entry: np.ndarray
    outside: np.ndarray


def places(shape: Sequence[int], params: Mapping[str, Any]) -> list[Places]:
    """Where windows look, by axis; where a window has no entry, outside of the operand.

    Args:
        shape: of the operand.
        params: of the primitive `reduce_window_max`.
    """
    found = []
    for size, window, stride, dilation, hole, (low, high) in zip(
        map(int, shape),
        *(map(int, params[name]) for name in _SIZES),
        params["padding"],
        strict=True,
    ):
        padded = int(low) + max(0, (size - 1) * hole + 1) + int(high)
        number = max(0, (padded - (window - 1) * dilation - 1) // stride + 1)
        at = stride * np.arange(number) + dilation * np.arange(window)[:, None] - int(low)
        outside = (at < 0) | (at > (size - 1) * hole) | (at % hole > 0)
        inside = np.take_along_axis(at, np.argmin(outside, 0)[None], 0)
        found.append(Places(np.where(outside, inside, at) // hole, outside))
    return found


def empty_window(shape: Sequence[int], params: Mapping[str, Any]) -> tuple[int, int] | None:
    """The axis and the number of the first window without an entry; None where each has one."""
    for axis, (_, outside) in enumerate(places(shape, params)):
        empty = np.flatnonzero(outside.all(0))
        if empty.size:
            return axis, int(empty[0])
    return None


def stacked(v: Array, where: Sequence[Places]) -> Array:
    """All windows: shape (places of a window, *windows)."""
    for axis, (entry, _) in enumerate(where):
        # The places of the axes before this one lie in front.
        v = jnp.stack([_entries(v, 2 * axis, row) for row in entry], axis)
    return v.reshape(-1, *(entry.shape[1] for entry, _ in where))


def repeats(where: Sequence[Places]) -> np.ndarray | None:
    """Which of `stacked` repeat an entry of their window; None where none does."""
    rank = len(where)
    each = []
    for axis, (_, outside) in enumerate(where):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = outside.shape
        each.append(outside.reshape(shape))
    every = np.broadcast_arrays(*each)
    found = np.any(every, 0).reshape(-1, *every[0].shape[rank:])
    return found if found.any() else None


def _entries(v: Array, axis: int, row: np.ndarray) -> Array:
    """Entries of one axis: a slice, where they are evenly spaced."""
    if row.size == 0:
        return jax.lax.slice_in_dim(v, 0, 0, axis=axis)
    step = int(row[1] - row[0]) if row.size > 1 else 1
    if step > 0 and (np.diff(row) == step).all():
        return jax.lax.slice_in_dim(v, int(row[0]), int(row[-1]) + 1, step, axis)
    return jnp.take(v, row, axis, mode="clip")


_SIZES = ("window_dimensions", "window_strides", "window_dilation", "base_dilation")
