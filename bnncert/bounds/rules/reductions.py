"""Interval rules of operations that reduce an axis, exact for each output.

max, min, cumulative max and min, log-sum-exp, sort    increasing in every operand
softmax_i       increasing in x_i, decreasing in every other
log_softmax_i   likewise
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph import Node
from bnncert.bounds.rules.monotone import increasing
from bnncert.sets import Box


def _log_softmax(node: Node, box: Box) -> Box:
    axes = tuple(map(int, node.params["axes"]))
    return Box(_rival(box.lower, box.upper, axes), _rival(box.upper, box.lower, axes))


def _softmax(node: Node, box: Box) -> Box:
    logs = _log_softmax(node, box)
    return Box(jnp.exp(logs.lower), jnp.exp(logs.upper))


def _rival(own: Array, others: Array, axes: tuple[int, ...]) -> Array:
    """-log(1 + sum_{j != i} exp(others_j - own_i)) for each i along the axes."""
    flat_own, flat_others = (to_last(v, axes) for v in (own, others))
    itself = jnp.eye(flat_own.shape[-1], dtype=bool)
    differences = flat_others[..., None, :] - flat_own[..., :, None]
    total = jax.nn.logsumexp(jnp.where(itself, 0.0, differences), axis=-1)
    return from_last(-total, own.shape, axes)


def to_last(v: Array, axes: tuple[int, ...]) -> Array:
    """The axes flattened into one, the last."""
    others = [i for i in range(v.ndim) if i not in axes]
    return v.transpose(*others, *axes).reshape(*(v.shape[i] for i in others), -1)


def from_last(v: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The inverse of `to_last`, for a value of this shape."""
    order = [*(i for i in range(len(shape)) if i not in axes), *axes]
    moved = v.reshape([shape[i] for i in order])
    return moved.transpose([order.index(i) for i in range(len(shape))])


REDUCTIONS: Mapping[str, Callable[[Node, Box], Box]] = {
    "reduce_max": increasing,
    "reduce_min": increasing,
    "cummax": increasing,
    "cummin": increasing,
    "cumlogsumexp": increasing,
    "logsumexp": increasing,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
}
