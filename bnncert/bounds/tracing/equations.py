"""What one equation of a jaxpr is: a call with a body, a function to evaluate, a line of code."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core, source_info_util

from bnncert._varying import axes_of, varying
from bnncert.bounds.graph.primitives import is_jax_own, own_name
from bnncert.bounds.tracing.loops import LOOPS, Body, bodies

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Calls that are inlined, and the parameter that holds their body."""

_PASSED_BY_SUMS = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim rev neg convert_element_type copy "
    "copy_p name sharding_constraint slice dynamic_slice reduce_precision optimization_barrier "
    "stop_gradient".split()
)
_MOVING = frozenset(
    "concatenate pad gather scatter dynamic_update_slice select_n split tile".split()
)
_MATRIX_PRODUCTS = ("dot_general", "conv_general_dilated")


def is_call(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is one of JAX's calls."""
    return eqn.primitive.name in CALLS and is_jax_own(eqn.primitive)


def called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The body of a call, and its constants."""
    body = eqn.params[CALLS[eqn.primitive.name]]
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def multiplies(eqn: core.JaxprEqn) -> bool:
    """Whether a jitted call holds a matrix product, whose precision is then ours to set.

    Calls with derivatives of their own are kept whole: those are the derivatives of a constant.
    """
    if is_matrix_product(eqn):
        return True
    return has_plain_body(eqn) and any(map(multiplies, eqn.params["jaxpr"].eqns))


def has_plain_body(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a call that has no derivative of its own."""
    return is_call(eqn) and CALLS[eqn.primitive.name] == "jaxpr"


def is_matrix_product(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a matrix product or a convolution."""
    return eqn.primitive.name in _MATRIX_PRODUCTS and is_jax_own(eqn.primitive)


def summed_on(
    jaxpr: core.Jaxpr, outside: Sequence[int], given: Mapping[Any, Any] | None = None
) -> dict[core.Var, int]:
    """How many values are added up to one, for each variable, by the sums it flows into directly.

    A compiler makes one sum of a sum of sums, also where values are moved or negated between, or
    where a constant changes nothing: each term then passes through as many roundings as all of them
    have terms.

    Args:
        jaxpr: with its calls.
        outside: those of its outputs, by what uses them.
        given: the values of its constants and arguments that are known.
    """
    found: dict[core.Var, int] = {}
    constants = _constants(jaxpr, given or {})

    def note(atoms: Sequence[Any], counts: Sequence[int]) -> None:
        for atom, count in zip(atoms, counts, strict=True):
            if isinstance(atom, core.Var):
                found[atom] = max(found.get(atom, 1), count)

    note(jaxpr.outvars, outside)
    for eqn in reversed(jaxpr.eqns):
        after = [found.get(v, 1) for v in eqn.outvars]
        name = own_name(eqn.primitive)
        if is_call(eqn):
            body = called(eqn)[0]
            passed = zip(body.invars, eqn.invars[-len(body.invars) :], strict=True)
            inside = {v: _value(atom, constants) for v, atom in passed}
            inner = summed_on(body, after, {v: c for v, c in inside.items() if c is not None})
            note(eqn.invars[-len(body.invars) :], [inner.get(v, 1) for v in body.invars])
        elif name in LOOPS:
            for body in bodies(eqn):
                note([eqn.invars[i] for i in body.passed], _summed_in(body, after))
        elif name == "reduce_sum":
            operand: Any = eqn.invars[0]
            size = math.prod(operand.aval.shape) // max(math.prod(eqn.outvars[0].aval.shape), 1)  # pyright: ignore
            note(eqn.invars, [max(size, 1) * after[0]])
        elif name in ("cumsum", "reduce_window_sum"):
            note(eqn.invars, [_window_size(eqn) * after[0]])
        elif name in _PASSED_BY_SUMS:
            note(eqn.invars[:1], after[:1])
        elif name in _MOVING:
            note(eqn.invars, [after[0] if _is_as_large(v, eqn) else 1 for v in eqn.invars])
        elif name == "integer_pow" and eqn.params["y"] == 1:
            note(eqn.invars, after)
        else:
            values = [_value(atom, constants) for atom in eqn.invars]
            kept = [i for i in range(len(values)) if is_neutral(name, i, values)]
            note([eqn.invars[i] for i in kept], after * len(kept))
            for i in (0, 1):
                if name in _MATRIX_PRODUCTS and is_neutral("mul", i, values):  # a sum, then
                    size = math.prod(eqn.invars[1 - i].aval.shape)  # pyright: ignore
                    note(eqn.invars[i : i + 1], [max(size, 1) * after[0]])
    return found


def _summed_in(body: Body, after: Sequence[int]) -> list[int]:
    """What `summed_on` finds of the arguments of a body, which a compiler may unroll."""
    outside = [after[i] for i in body.results]
    for _ in range(_ROUNDS):
        inner = summed_on(body.jaxpr, outside)
        found = [inner.get(v, 1) for v in body.jaxpr.invars]
        grown = list(outside)
        for argument, result in body.carry.items():
            grown[result] = max(grown[result], found[argument])
        if grown == outside:
            return found
        outside = grown
    return [_TOO_MANY] * len(body.jaxpr.invars)  # a sum of all sums before: nothing is known


_ROUNDS = 4
_TOO_MANY = 2**40
"""More terms than any format adds up with an error that is bounded."""


def is_neutral(op: str, place: int, values: Sequence[Any]) -> bool:
    """Whether an operation returns one of its operands, or its negative, for what the others are.

    Args:
        op: the primitive's name.
        place: of the operand.
        values: of all operands; None (or a tracer) where they are not known.
    """
    if op not in _NEUTRAL or place not in _NEUTRAL[op]:
        return False
    return all(_are_all(values[i], neutral) for i, neutral in _NEUTRAL[op][place].items())


def _are_all(value: Any, numbers: Sequence[float | int]) -> bool:
    """Whether a value is known, and each number of it one of these."""
    if value is None or isinstance(value, Tracer):
        return False
    flat = np.asarray(value).reshape(-1)
    if np.iscomplexobj(flat):
        return False
    if not flat.size or float(flat[0]) not in numbers:
        return not flat.size
    return bool(np.isin(flat.astype(np.float64), numbers).all())


def _is_as_large(atom: Any, eqn: core.JaxprEqn) -> bool:
    """Whether what an operation moves may be all that it returns."""
    result: Any = eqn.outvars[0]
    return math.prod(atom.aval.shape) == math.prod(result.aval.shape)


_LEAST, _MOST = (-np.inf,), (np.inf,)
_NEUTRAL: Mapping[str, Mapping[int, Mapping[int, tuple[float, ...]]]] = {
    "mul": {0: {1: (1, -1)}, 1: {0: (1, -1)}},
    "div": {0: {1: (1, -1)}},
    **{op: {0: {1: (0,)}, 1: {0: (0,)}} for op in ("add", "add_any", "sub")},
    "max": {0: {1: _LEAST}, 1: {0: _LEAST}},
    "min": {0: {1: _MOST}, 1: {0: _MOST}},
    "clamp": {1: {0: _LEAST, 2: _MOST}},
    "clip": {0: {1: _LEAST, 2: _MOST}},
}
"""By operation and place of an operand: for which other operands it is what comes out."""


def _constants(jaxpr: core.Jaxpr, given: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values that are known, and what is only moved of them: the same numbers."""
    found = dict(given)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("broadcast_in_dim", "reshape", "squeeze", "copy"):
            value = _value(eqn.invars[0], found)
            if value is not None:
                found[eqn.outvars[0]] = value
    return found


def _value(atom: Any, constants: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else constants.get(atom)


def _window_size(eqn: core.JaxprEqn) -> int:
    if eqn.primitive.name == "cumsum":
        return max(1, eqn.invars[0].aval.shape[eqn.params["axis"]])  # pyright: ignore
    return max(1, math.prod(eqn.params["window_dimensions"]))


def source_of(eqn: core.JaxprEqn) -> str:
    """Where the user's code calls an equation; empty where that is not known."""
    summary = source_info_util.summarize(eqn.source_info)
    return (
        "" if summary == source_info_util.summarize(source_info_util.new_source_info()) else summary
    )


def bind(eqn: core.JaxprEqn) -> Callable[..., Any]:
    """The equation as a function that does not rest on what its caller promised.

    Matrix products are in full float32 (no TF32, no bfloat16). An index that breaks the promise to
    be inside is clamped by XLA where it gathers, and dropped where it scatters; the transposes of
    JAX do the contrary, and those of indices that are said to be unique take them at their word.
    Inside `jax.shard_map` operands may vary over other mesh axes than those that were traced.
    """
    params = dict(eqn.params)
    name = own_name(eqn.primitive)
    if name in ("gather", "scatter", "scatter-add"):
        if params["mode"] is _PROMISE:
            params["mode"] = _MODES[name]
        if math.prod(eqn.invars[1].aval.shape[:-1]) > 1:  # pyright: ignore
            params |= {"unique_indices": False, "indices_are_sorted": False}
    if name in _MATRIX_PRODUCTS:
        params["precision"] = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    function = partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(params))
    traced = [axes_of(atom.aval) for atom in eqn.invars]  # pyright: ignore

    def evaluate(*values: Any) -> Any:
        pairs = [(axes_of(v), axes) for v, axes in zip(values, traced, strict=True)]
        more = frozenset().union(*(own - axes for own, axes in pairs))
        return function(*(varying(v, more | axes) for v, axes in zip(values, traced, strict=True)))

    return evaluate


def is_cast(eqn: core.JaxprEqn) -> bool:
    """Whether an equation only says that its operand varies over more mesh axes."""
    return eqn.primitive.name == "pvary" and is_jax_own(eqn.primitive)


def with_literals(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """A jaxpr with its numbers as literals, where these were cast to vary over mesh axes.

    Those of another type (0 for 0.0) were converted after that.
    """
    if not any(map(is_cast, jaxpr.eqns)):
        return jaxpr
    numbers: dict[Any, core.Literal] = {}

    def read(atom: Any) -> Any:
        return numbers.get(atom, atom) if isinstance(atom, core.Var) else atom

    eqns = []
    for eqn in jaxpr.eqns:
        atoms = [read(atom) for atom in eqn.invars]
        first = atoms[0] if atoms else None
        converts = eqn.primitive.name == "convert_element_type" and eqn.invars[0] in numbers
        if isinstance(first, core.Literal) and (is_cast(eqn) or converts):
            aval: Any = eqn.outvars[0].aval
            numbers[eqn.outvars[0]] = core.Literal(np.asarray(first.val, aval.dtype)[()], aval)
        else:
            eqns.append(eqn.replace(invars=atoms))
    return jaxpr.replace(eqns=eqns, outvars=[read(atom) for atom in jaxpr.outvars])


_PROMISE = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
_MODES = {
    "gather": jax.lax.GatherScatterMode.CLIP,
    "scatter": jax.lax.GatherScatterMode.FILL_OR_DROP,
    "scatter-add": jax.lax.GatherScatterMode.FILL_OR_DROP,
}
