"""Whether a function ends in probabilities: seen in its trace, so under `jit` as well.

    e / sum(e)                     softmax, and whatever else is divided by its own sum
    exp(z - log sum exp z)         the exponential of a log_softmax
    sigmoid(z), one number         and (1 - sigmoid(z), sigmoid(z)), in either order

followed by nothing but changes of shape or dtype. What is found so is normalised by construction;
other ways to be normalised are not seen.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bnncert.bounds.tracing.equations import called, is_call
from bnncert.bounds.tracing.randomness import advised

_MOVES = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "optimization_barrier",
    "pvary",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
)


class _Value(NamedTuple):
    """What an operation made of which values; a constant or an argument has none."""

    op: str
    operands: tuple[Any, ...]
    size: int


def ends_in_probabilities(apply: Callable[..., Any], params: Any, x: Any) -> bool:
    """Whether `apply(params, x)` is seen to be normalised.

    Args:
        apply: `(params, x) -> outputs` for one example.
        params: one network's weights, or their shapes and dtypes.
        x: one input, or its shape and dtype.

    Cost: one trace of apply.
    """
    with advised():
        closed = jax.make_jaxpr(apply)(params, x)
    if len(closed.jaxpr.outvars) != 1:
        return False
    (value,) = _values(closed.jaxpr, [_leaf(v) for v in closed.jaxpr.invars])
    return _is_normalised(_moved(value))


def _values(jaxpr: core.Jaxpr, arguments: Sequence[_Value]) -> list[_Value]:
    """The outputs of a jaxpr, calls inlined."""
    env: dict[Any, _Value] = {v: _leaf(v) for v in jaxpr.constvars}
    env.update(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        operands = [_leaf(a) if isinstance(a, core.Literal) else env[a] for a in eqn.invars]
        if is_call(eqn):
            made = _values(called(eqn)[0], operands)
        else:
            made = [_Value(eqn.primitive.name, tuple(operands), _size(v)) for v in eqn.outvars]
        env.update(zip(eqn.outvars, made, strict=True))
    return [_leaf(a) if isinstance(a, core.Literal) else env[a] for a in jaxpr.outvars]


def _leaf(atom: Any) -> _Value:
    return _Value("", (atom,), _size(atom))


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


def _moved(value: _Value) -> _Value:
    """The value before changes of shape and dtype."""
    while value.op in _MOVES:
        value = value.operands[0]
    return value


def _is_normalised(value: _Value) -> bool:
    parts = [_moved(v) for v in value.operands if isinstance(v, _Value)]
    if value.op == "div":
        return _is_sum_of(parts[1], parts[0])
    if value.op == "exp" and parts[0].op == "sub":
        z, log = (_moved(v) for v in parts[0].operands)
        total = _moved(log.operands[0]) if log.op == "log" else log
        sums = log.op == "log" and total.op == "reduce_sum"
        return sums and _is_exp_of(_moved(total.operands[0]), z)
    if value.op in ("concatenate", "stack") and len(parts) == 2 and value.size == 2:
        return any(_is_rest_of(parts[i], parts[1 - i]) for i in (0, 1))
    return value.op == "logistic" and value.size == 1


def _is_sum_of(total: _Value, terms: _Value) -> bool:
    return total.op == "reduce_sum" and total.size == 1 and _same(_moved(total.operands[0]), terms)


def _same(a: _Value, b: _Value) -> bool:
    """Whether two values are one, or were made alike of one: exp z, twice."""
    pairs = zip(map(_moved, a.operands), map(_moved, b.operands), strict=True)
    return a is b or (a.op == b.op == "exp" and all(u is v for u, v in pairs))


def _is_exp_of(power: _Value, z: _Value) -> bool:
    return power.op == "exp" and _moved(power.operands[0]) is z


def _is_rest_of(rest: _Value, probability: _Value) -> bool:
    """Whether one is 1 - sigmoid, and the other this sigmoid."""
    return (
        rest.op == "sub"
        and probability.op == "logistic"
        and _moved(rest.operands[1]) is probability
    )
