"""What is computed of constants alone: its value here, and how far off it may be elsewhere.

A network may compute with its weights before they meet an input: weight standardisation, W0 + A B,
a batch-norm's scale over its deviation. What it computes is rounded, in an order of its own, so
that under `rounding="outward"` no single number stands for it:

    Rounded(value, error)       |what is computed, or exact - value| <= error

Each such operation is bounded by intervals like any other (`rounding/constants.py`), and the node
that it flows into allows for the error. Moves, comparisons and operations that round nothing keep
exact constants exact. Where nothing is known (an operation without a rule, a comparison of rounded
numbers), the error is unknown, and so is what depends on it; a bounded value that would is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jaxtyping import Array

from bnncert.bounds.graph.primitives import is_jax_own
from bnncert.sets import Box


class Rounded(NamedTuple):
    """A constant that was computed from others.

    Attributes:
        value: as computed here.
        error: the largest distance from it, elementwise; None: not known.
        op: the operation that it is the result of; where it is not known, the first such.
        source: where the user's code calls that.
        history: as an element of `nodes.Graph.histories`, if there is one.
    """

    value: Any
    error: Array | None
    op: str
    source: str
    history: Any = None


def values_of(operands: Sequence[Any]) -> list[Any]:
    """The operands, with the value in place of each rounded constant."""
    return [o.value if isinstance(o, Rounded) else o for o in operands]


def unknown_among(operands: Sequence[Any]) -> Rounded | None:
    """The first constant of unknown error."""
    return next((o for o in operands if isinstance(o, Rounded) and o.error is None), None)


def around(constant: Any) -> Box | None:
    """The box of what a constant may be; None where that is not known."""
    if not isinstance(constant, Rounded):
        return Box(jnp.asarray(constant), jnp.asarray(constant))
    value, error = constant.value, constant.error
    return None if error is None else Box(value - error, value + error)


def distance(value: Array, box: Box) -> Array:
    """The distance from a value to the farther end of a box around it, rounded up."""
    farthest = jnp.maximum(jnp.maximum(box.upper - value, value - box.lower), 0)
    finfo = jnp.finfo(farthest.dtype)
    # `value +- error` rounds too.
    return farthest * (1 + 8 * finfo.eps) + 2 * finfo.eps * jnp.abs(value) + finfo.tiny


def is_float(value: Any) -> bool:
    """Whether a constant, or a dtype, is of floating-point numbers."""
    return jnp.issubdtype(_dtype(value), jnp.floating)


def rounds_nothing(
    op: str, params: Mapping[str, Any], operands: Sequence[Any], result: Any
) -> bool:
    """Whether an operation of exact constants, or of such dtypes, has an exact result."""
    if any(jnp.issubdtype(_dtype(v), jnp.complexfloating) for v in (result, *operands)):
        return False
    if op == "convert_element_type" and is_float(result):
        return _holds(result, operands[0])
    bodies = [body for value in params.values() for body in _bodies(value)]
    if bodies:  # of a loop, a branch or a call: what is rounded in it may decide about integers
        return all(map(_body_rounds_nothing, bodies))
    if not is_float(result):
        return True
    return op in _ROUNDLESS and params.get("update_jaxpr") is None


def _body_rounds_nothing(body: core.Jaxpr) -> bool:
    return all(
        rounds_nothing(eqn.primitive.name, eqn.params, list(map(_aval_dtype, eqn.invars)), dtype)
        and is_jax_own(eqn.primitive)
        for eqn in body.eqns
        for dtype in map(_aval_dtype, eqn.outvars)
    )


def _bodies(value: Any) -> list[core.Jaxpr]:
    found = value if isinstance(value, (tuple, list)) else (value,)
    opened = [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in found]
    return [body for body in opened if isinstance(body, core.Jaxpr)]


def _aval_dtype(atom: Any) -> np.dtype:
    return atom.aval.dtype


def _dtype(value: Any) -> Any:
    return (
        value
        if isinstance(value, np.dtype)
        else (value.dtype if hasattr(value, "dtype") else jnp.result_type(value))
    )


def _holds(result: Any, operand: Any) -> bool:
    """Whether a floating-point format holds each value of another type that may occur."""
    own, other = jnp.finfo(_dtype(result)), _dtype(operand)
    if is_float(operand):
        from_ = jnp.finfo(other)
        return own.nmant >= from_.nmant and own.maxexp >= from_.maxexp
    if jnp.issubdtype(other, jnp.bool_) or jnp.iinfo(other).bits <= own.nmant + 1:
        return True
    if isinstance(operand, (Tracer, np.dtype)):
        return False
    return bool((np.abs(np.asarray(operand, np.float64)) <= 2.0 ** (own.nmant + 1)).all())


_ROUNDLESS = frozenset(
    "abs and_ argmax argmin bitcast_convert_type broadcast_in_dim ceil clamp concatenate copy "
    "copy_p cummax cummin dynamic_slice dynamic_update_slice expand_dims floor gather iota max min "
    "name neg optimization_barrier pad reduce_max reduce_min reshape rev round scatter select_n "
    "sharding_constraint sign slice sort split squeeze stack stop_gradient tile transpose "
    "unstack".split()
)
