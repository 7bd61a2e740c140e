"""Primitives that are traced as other operations: those that have bounds of their own.

    clamp(l, x, u)       min(max(x, l), u)
    x / y                x * reciprocal(y), for a bounded y
    x * x, x ** 2        square(x): never negative, and sharper than a product
    max(a, b)            itself, with a - b as a third operand, for a and b both bounded: then a - b
                         has bounds of its own, which are sharper than those of a less those of b
    logaddexp(a, b)      likewise; against a constant itself, a function of one value
    max over windows     max over an axis that lists each window's entries

Each rule is `(add, operands, params) -> results`, the parameters with the first operand's shape
besides ("operand"); `add(op, operands, evaluate, **params)` appends a node and returns its `Ref`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.bounds.tracing.windows import places, repeats, stacked

Add = Callable[..., Ref]
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


def _window(reduction: str, reduce: Callable[..., Array]) -> Rewrite:
    """All windows, stacked by the places in them and reduced."""

    def rewrite(add: Add, operands: Sequence[Any], params: Mapping[str, Any]) -> list[Operand]:
        windows = add("windows", tuple(operands), lambda v: stacked(v, places(v.shape, params)))
        repeated = repeats(places(params["operand"], params))
        rest = {} if repeated is None else {"repeats": repeated}
        return [add(reduction, (windows,), lambda v: reduce(v, axis=0), axes=(0,), **rest)]

    return rewrite


REWRITES: Mapping[str, Rewrite] = {
    "clamp": _clamp,
    "max": lambda add, operands, _: [_extremum(add, "max", *operands)],
    "min": lambda add, operands, _: [_extremum(add, "min", *operands)],
    "logaddexp": _logaddexp,
    "div": _div,
    "mul": _mul,
    "integer_pow": _integer_pow,
    "reduce_window_max": _window("reduce_max", jnp.max),
    "reduce_window_min": _window("reduce_min", jnp.min),
}
