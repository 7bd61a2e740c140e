"""Primitives that are traced as other operations: those that have bounds of their own.

    clamp(l, x, u)       min(max(x, l), u)
    x / y                x * reciprocal(y), for a bounded y
    x * x, x ** 2        square(x): never negative, and sharper than a product
    max(a, b)            itself, with a - b as a third operand, for a and b both bounded: then a - b
                         has bounds of its own, which are sharper than those of a less those of b
    logaddexp(a, b)      likewise; against a constant itself, a function of one value
    max over windows     max over an axis that lists each window's entries

Each rule is `(add, operands, params) -> results`; `add(op, operands, evaluate, **params)` appends a
node and returns its `Ref`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from bnncert.bounds.operands import Operand, Ref

Add = Callable[..., Ref]
_FAR = 1e37
Rewrite = Callable[[Add, Sequence[Any], Mapping[str, Any]], list[Operand]]


def _extremum(add: Add, name: str, a: Any, b: Any) -> Ref:
    """A max or a min; against a constant, by a selection, whose derivative is cheap."""
    if isinstance(a, Ref) and isinstance(b, Ref):
        extremum = jnp.maximum if name == "max" else jnp.minimum
        difference = add("sub", (a, b), jnp.subtract)
        return add(name, (a, b, difference), lambda v, w, _: extremum(v, w))
    x, constant = (a, b) if isinstance(a, Ref) else (b, a)
    # Written so that a NaN is handed on.
    if name == "max":
        return add(name, (x, constant), lambda v, c: jnp.where(v <= c, c, v))
    return add(name, (x, constant), lambda v, c: jnp.where(v >= c, c, v))


def _logaddexp(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
    del params
    a, b = operands
    if isinstance(a, Ref) and isinstance(b, Ref):
        difference = add("sub", (a, b), jnp.subtract)
        return [add("logaddexp", (a, b, difference), lambda v, w, _: jnp.logaddexp(v, w))]
    # Not softplus(x - c) + c: a large c, "log 0", would take all of x with it.
    x, constant = (a, b) if isinstance(a, Ref) else (b, a)
    return [add("logaddexp", (x, constant), jnp.logaddexp)]


def _clamp(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
    del params
    low, x, high = operands
    if isinstance(low, Ref) or isinstance(x, Ref):
        above: Any = _extremum(add, "max", x, low)
    else:
        above = jnp.maximum(x, low)
    return [_extremum(add, "min", above, high)]


def _div(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
    del params
    x, y = operands
    if isinstance(y, Ref):
        y = add("reciprocal", (y,), lambda v: 1 / v)
        return [add("mul", (x, y), jnp.multiply)]
    return [add("div", (x, y), jnp.divide)]


def _mul(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
    del params
    x, y = operands
    if isinstance(x, Ref) and isinstance(y, Ref) and x == y:
        return [add("square", (x,), jnp.square)]
    return [add("mul", (x, y), jnp.multiply)]


def _integer_pow(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
    (x,), exponent = operands, params["y"]
    if exponent == 2:
        return [add("square", (x,), jnp.square)]
    if exponent == -1:
        return [add("reciprocal", (x,), lambda v: 1 / v)]
    return [add("integer_pow", (x,), lambda v: jax.lax.integer_pow(v, exponent), y=exponent)]


def _window(reduction: str, sign: float) -> Rewrite:
    """Slices of the padded operand, one for each place in the window, stacked and reduced."""

    def rewrite(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
        (x,) = operands
        # Finite, so that centre and radius are, and never chosen.
        outside = np.asarray(sign * _FAR)
        windows = add("windows", (x, outside), lambda v, o: _windows(v, o, **params))
        reduce = jnp.max if sign < 0 else jnp.min
        return [add(reduction, (windows,), lambda v: reduce(v, axis=0), axes=(0,))]

    return rewrite


def _windows(
    v: Array,
    outside: ArrayLike,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Array:
    """All windows: place in the window first, then place of the window."""
    pads = [(*p, d - 1) for p, d in zip(padding, base_dilation, strict=True)]
    padded = jax.lax.pad(v, jnp.asarray(outside, v.dtype), pads)
    reach = [(w - 1) * d + 1 for w, d in zip(window_dimensions, window_dilation, strict=True)]
    counts = [(n - r) // s + 1 for n, r, s in zip(padded.shape, reach, window_strides, strict=True)]
    slices = []
    for place in product(*(range(w) for w in window_dimensions)):
        start = [i * d for i, d in zip(place, window_dilation, strict=True)]
        limit = [b + (n - 1) * s + 1 for b, n, s in zip(start, counts, window_strides, strict=True)]
        slices.append(jax.lax.slice(padded, start, limit, window_strides))
    return jnp.stack(slices)


REWRITES: Mapping[str, Rewrite] = {
    "clamp": _clamp,
    "max": lambda add, operands, _: [_extremum(add, "max", *operands)],
    "min": lambda add, operands, _: [_extremum(add, "min", *operands)],
    "logaddexp": _logaddexp,
    "div": _div,
    "mul": _mul,
    "integer_pow": _integer_pow,
    "reduce_window_max": _window("reduce_max", -1.0),
    "reduce_window_min": _window("reduce_min", 1.0),
}
