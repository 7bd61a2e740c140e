"""Bounds on margins f_k - f_c of a classifier, each bounded as one function of the input.

A difference of two bounded logits forgets that both come from one hidden layer; the margin as a
function of its own merges the difference with the last affine layer (`merging.py`).

Two ways give the C margins against one class c:

    by rows   the C rows of class c. Under `vmap` over examples, each has a matrix of its own.
    by pairs  the C (C - 1) / 2 pairs j < k once: f_k - f_j in [l, u] gives f_j - f_k in [-u, -l].
              Their matrix is that of no example, so that intervals of a whole batch are concretised
              by one matrix product. Where each row costs a backward pass, it loses.

Margins are merged with the last layer whatever that costs: one product of the C rows, or of the
pairs, with its matrix; the rest of the function has the budget of any other (`merging.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnncert.bounds.api import margin_bound
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import IBP, Method, method_of
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params

_MOST_CLASSES_BY_PAIRS = 32


def margin_bounds(
    apply: Apply, method: str | Method = "crown-ibp", *, rounding: Rounding = "nearest"
) -> Callable[[Params, Set, Int[Array, ""]], Box]:
    """Bounds on the margins f_k - f_c against one class.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        method: as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.

    Returns:
        `(params, region, c) -> Box` of shape (C,): entry k bounds f_k - f_c; entry c is exactly 0.
    """
    by_pairs, by_intervals = _pairs(apply, method, rounding), method_of(method) == IBP()

    def rows(params: Params, x: Array, c: Array) -> Array:
        return differences(apply(params, x), c)

    by_rows = margin_bound(rows, method, rounding)

    def bounded(params: Params, region: Set, c: Int[Array, ""]) -> Box:
        classes = _num_classes(apply, params, region)
        if not by_intervals or classes > _MOST_CLASSES_BY_PAIRS:
            box = by_rows(params, region, c)
            # Exact even where an overflow left no bound.
            itself = jnp.arange(classes) == c
            return jax.tree.map(lambda ends: jnp.where(itself, 0.0, ends), box)
        lower, upper, where = by_pairs(params, region)
        return Box(lower[where[c]], upper[where[c]])

    return bounded


def differences(values: Float[Array, " classes"], c: Int[Array, ""]) -> Float[Array, " classes"]:
    """v_k - v_c, one product with a matrix, as the layer before is."""
    unit = jnp.eye(values.shape[-1], dtype=jnp.int8)  # of integers, the difference is exact
    return (unit - unit[c][None, :]).astype(values.dtype) @ values


def all_margin_bounds(
    apply: Apply, method: str | Method = "crown-ibp", *, rounding: Rounding = "nearest"
) -> Callable[[Params, Set], Box]:
    """Bounds on the margins against every class.

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        method: as for `bnncert.bound`.
        rounding: as for `bnncert.bound`.

    Returns:
        `(params, region) -> Box` of shape (C, C): entry [c, k] bounds f_k - f_c.

    Cost: C (C - 1) / 2 outputs of `bnncert.bound`, merged with the last layer.
    """
    by_pairs = _pairs(apply, method, rounding)

    def bounded(params: Params, region: Set) -> Box:
        lower, upper, where = by_pairs(params, region)
        return Box(lower[where], upper[where])

    return bounded


def _pairs(
    apply: Apply, method: str | Method, rounding: Rounding
) -> Callable[[Params, Set], tuple[Array, Array, Int[Array, "classes classes"]]]:
    """Flat lower and upper bounds, and where the margin [c, k] stands among them."""

    def margins(params: Params, x: Array) -> Array:
        logits = apply(params, x)
        first, second = np.triu_indices(logits.shape[-1], 1)
        unit = np.eye(logits.shape[-1])
        return jnp.asarray(unit[second] - unit[first], logits.dtype) @ logits

    pairs = margin_bound(margins, method, rounding)

    def bounded(params: Params, region: Set) -> tuple[Array, Array, Array]:
        classes = _num_classes(apply, params, region)
        box = pairs(params, region)
        first, second = np.triu_indices(classes, 1)
        count = len(first)
        where = np.full((classes, classes), 2 * count)  # the diagonal: 0
        where[first, second] = np.arange(count)
        where[second, first] = count + np.arange(count)
        zero = jnp.zeros(1, box.lower.dtype)
        lower = jnp.concatenate([box.lower, -box.upper, zero])
        upper = jnp.concatenate([box.upper, -box.lower, zero])
        return lower, upper, jnp.asarray(where)

    return bounded


def _num_classes(apply: Apply, params: Params, region: Set) -> int:
    center = jax.eval_shape(lambda s: s.center, region)
    return jax.eval_shape(apply, params, center).shape[-1]
