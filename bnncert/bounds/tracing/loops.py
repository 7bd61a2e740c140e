"""Loops and branches as the operations that they run, where these are known when they are traced.

    scan        its body, length times; `fori_loop` between numbers and `lax.map` are scans
    while       its body, for as long as its condition holds: that is computed here, from the part
                of the carry that it depends on, which must be known
    cond        the branch that a known index takes

The body is a call of the same jaxpr each time. A loop is no operation of its own, and has no bounds
that are better than those of its iterations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from bnncert.bounds.graph.nodes import UnsupportedPrimitiveError

LOOPS = ("scan", "while", "cond")

MOST = 512
"""Iterations that a loop is run for, with those of loops in it; more where it says `unroll=`."""


def unrolled(eqn: core.JaxprEqn, operands: Sequence[Any], source: str) -> core.ClosedJaxpr:
    """Writes a loop or a branch as its operations, a function of the same operands.

    Args:
        eqn: the loop.
        operands: its operands: anything that is no array is not known.
        source: the user's line.

    Raises:
        UnsupportedPrimitiveError: how often it runs, or which branch, is not known, or is too much.
    """
    name = eqn.primitive.name
    if name == "scan":
        _check_length(eqn, source)
        return _traced(partial(_scanned, eqn.params, _counts(eqn)), eqn)
    if name == "while":
        return _traced(partial(_repeated, eqn.params, _trips(eqn, operands, source)), eqn)
    index = operands[0]
    if not _is_known(index):
        raise UnsupportedPrimitiveError(
            f"'cond' over bounded values, called at {source}, takes a branch that is not known "
            "when the function is traced: give its predicate as a known number (under jit, an "
            "argument is none), or compute both branches and choose by jnp.where."
        )
    branches = eqn.params["branches"]
    taken = branches[min(max(int(index), 0), len(branches) - 1)]
    return _traced(lambda _, *values: core.jaxpr_as_fun(taken)(*values), eqn)


class Body(NamedTuple):
    """What a loop runs again and again, or what a branch may run.

    Attributes:
        jaxpr: its operations.
        passed: the places of the equation's operands that its arguments are, in order.
        results: the places of the equation's results that its own are.
        carry: by the place of an argument, that of the result which is it in the next iteration.
    """

    jaxpr: core.Jaxpr
    passed: tuple[int, ...]
    results: tuple[int, ...]
    carry: Mapping[int, int]


def bodies(eqn: core.JaxprEqn) -> list[Body]:
    """Lists what a loop or a branch may run."""
    params, count = eqn.params, len(eqn.invars)
    results = tuple(range(len(eqn.outvars)))
    if eqn.primitive.name == "cond":
        passed = tuple(range(1, count))
        return [Body(_opened(branch)[0], passed, results, {}) for branch in params["branches"]]
    if eqn.primitive.name == "scan":
        first, carried = _counts(eqn)
        carry = {first + i: i for i in range(carried)}
        return [Body(_opened(params["jaxpr"])[0], tuple(range(count)), results, carry)]
    skipped, own = params["cond_nconsts"], params["body_nconsts"]
    carry = {own + i: i for i in results}
    return [Body(_opened(params["body_jaxpr"])[0], tuple(range(skipped, count)), results, carry)]


def condition(eqn: core.JaxprEqn) -> core.Jaxpr:
    """Gives what a while loop goes on by."""
    return _opened(eqn.params["cond_jaxpr"])[0]


def _traced(f: Callable[..., Any], eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    avals: Any = [atom.aval for atom in eqn.invars]
    return jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))


def _check_length(eqn: core.JaxprEqn, source: str) -> None:
    length, unroll = eqn.params["length"], eqn.params.get("unroll", 1)
    runs = length * max(_runs(_opened(eqn.params["jaxpr"])[0]), 1)
    if runs > MOST and not (unroll is True or unroll >= length):
        inside = "" if runs == length else f", {runs} with those of the loops in it"
        raise UnsupportedPrimitiveError(
            f"a 'scan' of {length} iterations{inside}, over bounded values, called at {source}: it "
            f"would be bounded as so many copies of its body, and more than {MOST} are not made "
            f"unasked. If that is meant, say unroll={length} where the loop is written "
            "(jax.lax.scan, jax.lax.fori_loop, flax's RNN); else shorten it."
        )


def _runs(jaxpr: core.Jaxpr) -> int:
    """Counts the iterations of all scans that a jaxpr and its calls run."""
    found = 0
    for eqn in jaxpr.eqns:
        inner = [
            _opened(body)[0]
            for value in eqn.params.values()
            for body in (value if isinstance(value, tuple | list) else (value,))
            if isinstance(body, core.ClosedJaxpr | core.Jaxpr)
        ]
        below = sum(map(_runs, inner))
        found += eqn.params["length"] * max(below, 1) if eqn.primitive.name == "scan" else below
    return found


def _opened(body: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, of what later versions of JAX no longer close."""
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def _counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many constants a scan has, and how many values it carries.

    Told by shapes, for the parameters that say so are others from one version of JAX to the next:
    what is scanned over, or stacked, has an axis more than in the body.
    """
    body = _opened(eqn.params["jaxpr"])[0]
    stacked = [_rank(a) > _rank(b) for a, b in zip(eqn.outvars, body.outvars, strict=True)]
    scanned = [_rank(a) > _rank(b) for a, b in zip(eqn.invars, body.invars, strict=True)]
    carried = len(stacked) - sum(stacked)
    return len(scanned) - sum(scanned) - carried, carried


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def _scanned(params: Any, counts: tuple[int, int], *operands: Any) -> list[Any]:
    length, (num_consts, num_carry) = params["length"], counts
    body = jax.jit(core.jaxpr_as_fun(params["jaxpr"]))
    consts, carry = operands[:num_consts], list(operands[num_consts : num_consts + num_carry])
    sequences = operands[num_consts + num_carry :]
    rows: list[Any] = []
    for step in range(length):
        place = length - 1 - step if params["reverse"] else step
        now = (jax.lax.index_in_dim(x, place, keepdims=False) for x in sequences)
        out = body(*consts, *carry, *now)
        carry, row = list(out[:num_carry]), out[num_carry:]
        rows.append(row)
    if params["reverse"]:
        rows.reverse()
    if rows:
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
    avals: list[Any] = [atom.aval for atom in _opened(params["jaxpr"])[0].outvars[num_carry:]]
    return [*carry, *(jnp.zeros((0, *aval.shape), aval.dtype) for aval in avals)]


def _repeated(params: Any, trips: int, *operands: Any) -> list[Any]:
    skipped, own = params["cond_nconsts"], params["body_nconsts"]
    consts, carry = operands[skipped : skipped + own], list(operands[skipped + own :])
    body = jax.jit(core.jaxpr_as_fun(params["body_jaxpr"]))
    for _ in range(trips):
        carry = list(body(*consts, *carry))
    return carry


def _trips(eqn: core.JaxprEqn, operands: Sequence[Any], source: str) -> int:
    """Counts how often a condition holds, computed from what it depends on."""
    params = eqn.params
    skipped, own = params["cond_nconsts"], params["body_nconsts"]
    going_on, body = _opened(params["cond_jaxpr"]), _opened(params["body_jaxpr"])
    carry = dict(enumerate(operands[skipped + own :]))
    # 1. The part of the carry that decides, and what decides it.
    deciding: set[int] = set()
    asked = _needed(going_on[0], going_on[0].outvars)
    wanted = {i for i, v in enumerate(going_on[0].invars[skipped:]) if v in asked}
    fixed: set[int] = set()
    while not wanted <= deciding:
        deciding |= wanted
        asked = _needed(body[0], [body[0].outvars[i] for i in deciding])
        wanted |= {i for i, v in enumerate(body[0].invars[own:]) if v in asked}
        fixed = {i for i, v in enumerate(body[0].invars[:own]) if v in asked}
    given = [*operands[:skipped], *(operands[skipped + i] for i in fixed)]
    if not all(map(_is_known, [*given, *(carry[i] for i in deciding)])):
        raise UnsupportedPrimitiveError(
            f"'while' over bounded values, called at {source}: how often it runs depends on "
            "bounded values, or is not known when the function is traced. Bound a loop of a known "
            "number of iterations (jax.lax.fori_loop between numbers, jax.lax.scan)."
        )
    # 2. It is run by itself.
    state = {i: carry[i] for i in deciding}
    consts = {i: operands[skipped + i] for i in fixed}
    with jax.ensure_compile_time_eval():
        for trip in range(MOST + 1):
            (more,) = _evaluated(
                going_on, [*operands[:skipped], *(state.get(i) for i in carry)], [0]
            )
            if not bool(more):
                return trip
            arguments = [*(consts.get(i) for i in range(own)), *(state.get(i) for i in carry)]
            order = sorted(deciding)
            state = dict(zip(order, _evaluated(body, arguments, order), strict=True))
    raise UnsupportedPrimitiveError(
        f"'while' over bounded values, called at {source}, runs more than {MOST} times, and so "
        "many copies of its body are not made. Write it as jax.lax.scan with unroll=True if that "
        "is meant; else shorten it."
    )


def _needed(jaxpr: core.Jaxpr, results: Sequence[Any]) -> set[Any]:
    """Finds the variables that results depend on."""
    found = {v for v in results if isinstance(v, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if not found.isdisjoint(eqn.outvars):
            found |= {v for v in eqn.invars if isinstance(v, core.Var)}
    return found


def _evaluated(
    body: tuple[core.Jaxpr, Sequence[Any]], arguments: Sequence[Any], which: Sequence[int]
) -> list:
    """Evaluates some results of a jaxpr, from the arguments that they depend on."""
    jaxpr, consts = body
    wanted = [jaxpr.outvars[i] for i in which]
    needed = _needed(jaxpr, wanted)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        if needed.isdisjoint(eqn.outvars):
            continue
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*map(read, eqn.invars), **params)
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
    return [read(v) for v in wanted]


def _is_known(value: Any) -> bool:
    """Says whether a value is an array of numbers that are known, and few."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return is_array and not isinstance(value, Tracer) and math.prod(value.shape) <= 2**16
