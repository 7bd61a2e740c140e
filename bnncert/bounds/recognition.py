"""Functions that JAX names itself, recognised by name and then checked.

`jax.nn.softplus` and `jax.nn.leaky_relu` are jitted calls that carry their name. Op by op they
compare and select on bounded values, which no relaxation follows, so each is to be one node. A name
proves nothing: the body of the call is compared with that of a fresh trace of the function,
equation by equation. What differs is left to its parts.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def _softplus_reference(body: core.Jaxpr, constants: Sequence[Any]) -> tuple[Callable, tuple]:
    del body, constants
    return jax.nn.softplus, ()


def _leaky_relu_reference(body: core.Jaxpr, constants: Sequence[Any]) -> tuple[Callable, tuple]:
    """The slope is an operand of the call, or a literal inside its body."""
    if constants:
        return jax.nn.leaky_relu, tuple(constants)
    slopes = [
        atom.val
        for eqn in body.eqns
        if eqn.primitive.name == "mul"
        for atom in eqn.invars
        if isinstance(atom, core.Literal)
    ]
    slope = slopes[0] if slopes else 0.01
    return jax.nn.leaky_relu, (float(slope),)


_RECOGNISED = {"softplus": _softplus_reference, "leaky_relu": _leaky_relu_reference}


def recognise(eqn: core.JaxprEqn, constants: Sequence[Any]) -> tuple[Callable, tuple] | None:
    """The function of `jax.nn` that a jitted call of one bounded operand is.

    Args:
        eqn: the call; its first operand is bounded.
        constants: its other operands.

    Returns:
        The function and its constant operands; None where the call is another function.
    """
    reference = _RECOGNISED.get(str(eqn.params.get("name")))
    body = eqn.params.get("jaxpr")
    if reference is None or not isinstance(body, core.ClosedJaxpr) or body.consts:
        return None
    function, found = reference(body.jaxpr, constants)
    # As in the call: literals were Python numbers, operands were arrays.
    traced = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
        for aval in map(_array_aval, eqn.invars)
    ]
    literals = () if constants else found
    fresh = jax.make_jaxpr(lambda *a: inspect.unwrap(function)(*a, *literals))(*traced)
    # A Python number, weakly typed in the call, is an array by now: it must not widen the result.
    dtype = _array_aval(eqn.outvars[0]).dtype
    found = tuple(jnp.asarray(c, dtype) for c in found)
    return (function, found) if _same(fresh.jaxpr, body.jaxpr) else None


def _same(a: core.Jaxpr, b: core.Jaxpr) -> bool:
    """Whether two jaxprs are equal up to the names of their variables."""
    if len(a.eqns) != len(b.eqns) or len(a.invars) != len(b.invars) or a.constvars or b.constvars:
        return False
    names: dict[Any, Any] = dict(zip(a.invars, b.invars, strict=True))

    def same_atom(u: Any, v: Any) -> bool:
        if isinstance(u, core.Literal) or isinstance(v, core.Literal):
            both = isinstance(u, core.Literal) and isinstance(v, core.Literal)
            return both and _dtypes([u]) == _dtypes([v]) and np.array_equal(u.val, v.val)
        return names.get(u) is v

    for p, q in zip(a.eqns, b.eqns, strict=True):
        if p.primitive is not q.primitive or len(p.invars) != len(q.invars):
            return False
        if not all(map(same_atom, p.invars, q.invars)) or not _same_params(p.params, q.params):
            return False
        if _dtypes(p.outvars) != _dtypes(q.outvars):
            return False
        names.update(zip(p.outvars, q.outvars, strict=True))
    return len(a.outvars) == len(b.outvars) and all(map(same_atom, a.outvars, b.outvars))


def _dtypes(variables: Sequence[Any]) -> list[Any]:
    return [_array_aval(variable).dtype for variable in variables]


def _array_aval(atom: Any) -> Any:
    return atom.aval


def _same_params(p: dict[str, Any], q: dict[str, Any]) -> bool:
    if p.keys() != q.keys():
        return False
    for u, v in zip(p.values(), q.values(), strict=True):
        if isinstance(u, core.ClosedJaxpr) and isinstance(v, core.ClosedJaxpr):
            if u.consts or v.consts or not _same(u.jaxpr, v.jaxpr):
                return False
        elif not callable(u) and u != v:  # derivative rules are objects made anew at each trace
            return False
    return True
