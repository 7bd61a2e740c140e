"""Functions of `jax.nn` that are to be one node, recognised in what they were traced to.

Op by op many compare and select on bounded values, which no relaxation follows, or multiply two
values that depend on each other. Two ways lead back to the function:

    a call     most are jitted calls that carry their name: `recognise`, `is_logaddexp`
    a run      gelu, softmax and logsumexp leave their equations among the caller's, one after the
               other: `find_runs`

A name, or a first equation, proves nothing: what is found is compared with a fresh trace of the
function, equation by equation. What differs is left to its parts.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from bnncert.bounds.graph.primitives import own_name
from bnncert.bounds.ops import ELEMENTWISE
from bnncert.bounds.ops.operation import Operation, Parameter
from bnncert.bounds.tracing.equations import with_literals


class Recognised(NamedTuple):
    """A function of one bounded operand.

    Attributes:
        op: its name among the operations.
        function: `(operand, *constants) -> value`.
        constants: its other operands.
        params: what its rules must know besides.
        operation: one of the user's own.
    """

    op: str
    function: Callable[..., Any]
    constants: tuple[Any, ...] = ()
    params: Mapping[str, Any] = {}
    operation: Operation | None = None


class Run(NamedTuple):
    """Consecutive equations that are one function.

    Attributes:
        operand: the variable it is a function of.
        result: the variable of its value.
        last: the place of its last equation.
        recognised: the function.
        alone: whether nothing else of it is used.
    """

    operand: Any
    result: Any
    last: int
    recognised: Recognised
    alone: bool


_FUNCTIONS = {o.name: o for o in ELEMENTWISE if o.function is not None}
_CALLS = {n: o for n, o in _FUNCTIONS.items() if not isinstance(o.function, partial)}
_RUNS = tuple(o for o in _FUNCTIONS.values() if isinstance(o.function, partial))
"""Functions that JAX does not leave as a call of their name."""


def recognise(eqn: core.JaxprEqn, constants: Sequence[Any]) -> Recognised | None:
    """The function of `jax.nn` that a jitted call of one bounded operand is.

    Args:
        eqn: the call; its first operand is bounded.
        constants: its other operands.

    Returns:
        None where the call is another function.
    """
    name, body = str(eqn.params.get("name")), eqn.params.get("jaxpr")
    if name not in _CALLS or not isinstance(body, core.ClosedJaxpr) or body.consts:
        return None
    parameter, function = _CALLS[name].parameter, _CALLS[name].function
    assert function is not None
    found = tuple(constants)
    if parameter is not None and not constants:
        found = (_literal(with_literals(body.jaxpr), parameter),)
    if len(found) != (parameter is not None):
        return None
    if parameter is not None and not _is_at_least(found[0], parameter.least):
        return None
    # As in the call: literals were Python numbers, operands were arrays.
    traced = [_array_aval(atom) for atom in eqn.invars]
    literals = () if constants else found
    fresh = jax.make_jaxpr(lambda *a: inspect.unwrap(function)(*a, *literals))(*traced)
    if not _same(fresh.jaxpr, body.jaxpr):
        return None
    # A Python number, weakly typed in the call, is an array by now: it must not widen the result.
    dtype = _array_aval(eqn.outvars[0]).dtype
    return Recognised(name, function, tuple(jnp.asarray(c, dtype) for c in found))


def is_logaddexp(eqn: core.JaxprEqn) -> bool:
    """Whether a call is `jnp.logaddexp` of its two operands."""
    if own_name(eqn.primitive) != "custom_jvp_call" or len(eqn.invars) != 2:
        return False
    body = eqn.params["call_jaxpr"]
    traced = [_array_aval(atom) for atom in eqn.invars]
    if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in traced):
        return False
    (fresh,) = jax.make_jaxpr(jnp.logaddexp)(*traced).jaxpr.eqns[-1:]
    own = fresh.params.get("call_jaxpr")
    return own is not None and not body.consts and _same(own.jaxpr, body.jaxpr)


def find_runs(jaxpr: core.Jaxpr, own: Sequence[Operation] = ()) -> dict[int, Run]:
    """Runs of equations that are one function, by the place of their first equation.

    Args:
        jaxpr: without its calls.
        own: operations of the user's own.

    Raises:
        ValueError: the function of one of these holds arrays.
    """
    runs: dict[int, Run] = {}
    for place, eqn in enumerate(jaxpr.eqns):
        for recognised, reference in _candidates(eqn, own):
            last = place + len(reference.eqns) - 1
            operand = next(v for v in eqn.invars if not isinstance(v, core.Literal))
            names: dict[Any, Any] = {reference.invars[0]: operand}
            if not _same_eqns(reference.eqns, jaxpr.eqns[place : last + 1], names):
                continue
            result = names[reference.outvars[0]]  # pyright: ignore[reportArgumentType]
            alone = _is_closed(jaxpr, place, last, result)
            runs[place] = Run(operand, result, last, recognised, alone)
            break
    return runs


def _is_closed(jaxpr: core.Jaxpr, first: int, last: int, result: Any) -> bool:
    """Whether of a run of equations nothing but its result is used."""
    inner = {v for eqn in jaxpr.eqns[first : last + 1] for v in eqn.outvars} - {result}
    outside = [v for eqn in (*jaxpr.eqns[:first], *jaxpr.eqns[last + 1 :]) for v in eqn.invars]
    return not any(isinstance(v, core.Var) and v in inner for v in (*outside, *jaxpr.outvars))


def _candidates(
    eqn: core.JaxprEqn, own: Sequence[Operation]
) -> Iterator[tuple[Recognised, core.Jaxpr]]:
    """The functions that may begin with this equation, each with a trace of it."""
    operands = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    if len({id(v) for v in operands}) != 1:
        return
    aval = _array_aval(operands[0])
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return
    for operation in own:
        function = operation.function
        assert function is not None
        reference = _reference(function, aval.shape, aval.dtype)
        if reference.constvars:
            raise ValueError(
                f"the function of operation '{operation.name}' holds arrays: it is recognised by "
                "its equations, in which numbers are part of the function and arrays are not."
            )
        if reference.eqns and reference.eqns[0].primitive is eqn.primitive:
            yield Recognised(operation.name, function, operation=operation), reference
    name = own_name(eqn.primitive)
    if name not in ("reduce_max", "mul", "integer_pow"):
        return
    axes = tuple(map(int, eqn.params["axes"])) if name == "reduce_max" else ()
    for recognised in _beginning_with(name, axes):
        reference = _reference(recognised.function, aval.shape, aval.dtype)
        if reference.eqns[0].primitive is eqn.primitive:
            yield recognised, reference


@cache
def _beginning_with(primitive: str, axes: tuple[int, ...]) -> tuple[Recognised, ...]:
    if primitive != "reduce_max":
        return tuple(Recognised(o.name, o.function) for o in _RUNS if o.function is not None)
    softmaxes = [
        Recognised(function.__name__, partial(function, axis=axis), params={"axes": axes})
        for function in (jax.nn.softmax, jax.nn.log_softmax)
        for axis in _spellings(axes)
    ]
    sums = [
        Recognised(
            "logsumexp",
            partial(jax.nn.logsumexp, axis=axis, keepdims=keep),
            params={"axes": axes, "keepdims": keep},
        )
        for axis in _spellings(axes)
        for keep in (False, True)
    ]
    return (*softmaxes, *sums)


def _spellings(axes: tuple[int, ...]) -> tuple[Any, ...]:
    """One axis by itself, or several as a tuple."""
    return axes if len(axes) == 1 else (axes,)


@lru_cache(4096)
def _reference(function: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> core.Jaxpr:
    """The equations of a function, out of the call that it may be."""
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr
    while len(jaxpr.eqns) == 1 and isinstance(
        body := jaxpr.eqns[0].params.get("jaxpr"), core.ClosedJaxpr
    ):
        jaxpr = body.jaxpr
    return jaxpr


def _literal(body: core.Jaxpr, parameter: Parameter) -> float:
    numbers = [
        atom.val
        for eqn in body.eqns
        if eqn.primitive.name == parameter.primitive
        for atom in eqn.invars
        if isinstance(atom, core.Literal)
    ]
    return float(numbers[0]) if numbers else parameter.default


def _is_at_least(value: Any, least: float) -> bool:
    if least == -np.inf:
        return True
    return not isinstance(value, Tracer) and bool(np.all(np.asarray(value) >= least))


def _same(a: core.Jaxpr, b: core.Jaxpr) -> bool:
    """Whether two jaxprs are equal up to the names of their variables."""
    a, b = with_literals(a), with_literals(b)
    if len(a.eqns) != len(b.eqns) or len(a.invars) != len(b.invars) or a.constvars or b.constvars:
        return False
    names: dict[Any, Any] = dict(zip(a.invars, b.invars, strict=True))
    if not _same_eqns(a.eqns, b.eqns, names) or len(a.outvars) != len(b.outvars):
        return False
    return all(_same_atom(u, v, names) for u, v in zip(a.outvars, b.outvars, strict=True))


def _same_eqns(a: Sequence[Any], b: Sequence[Any], names: dict[Any, Any]) -> bool:
    """Whether two lists of equations are equal; `names` takes the variables of a to those of b."""
    if len(a) != len(b):
        return False
    for p, q in zip(a, b, strict=True):
        if p.primitive is not q.primitive or len(p.invars) != len(q.invars):
            return False
        pairs = zip(p.invars, q.invars, strict=True)
        if not all(_same_atom(u, v, names) for u, v in pairs):
            return False
        if not _same_params(p.params, q.params) or _dtypes(p.outvars) != _dtypes(q.outvars):
            return False
        names.update(zip(p.outvars, q.outvars, strict=True))
    return True


def _same_atom(u: Any, v: Any, names: Mapping[Any, Any]) -> bool:
    if isinstance(u, core.Literal) or isinstance(v, core.Literal):
        both = isinstance(u, core.Literal) and isinstance(v, core.Literal)
        return both and _dtypes([u]) == _dtypes([v]) and np.array_equal(u.val, v.val)
    return names.get(u) is v


def _dtypes(variables: Sequence[Any]) -> list[Any]:
    return [_array_aval(variable).dtype for variable in variables]


def _array_aval(atom: Any) -> Any:
    return atom.aval


def _same_params(p: dict[str, Any], q: dict[str, Any]) -> bool:
    if p.keys() != q.keys():
        return False
    for key, u in p.items():
        v = q[key]
        if isinstance(u, core.ClosedJaxpr) and isinstance(v, core.ClosedJaxpr):
            if u.consts or v.consts or not _same(u.jaxpr, v.jaxpr):
                return False
        elif not (callable(u) or key.startswith(_DERIVATIVES)) and u != v:
            return False
    return True


_DERIVATIVES = ("jvp", "fwd", "bwd")
"""Parameters of calls: rules of derivatives, objects made anew at each trace."""
