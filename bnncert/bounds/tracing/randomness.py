"""Dropout that was left on: random masks inside a function that is to be bounded.

A function that draws a mask from a constant key is a fixed function, and could be bounded as one:
but what is deployed draws another mask at each call, and nothing would have been said of that. So a
value is followed through the trace, by what it depends on:

    0   no random number
    1   random numbers drawn inside the function
    2   a decision about them: a boolean of theirs, or their floor

and where a bounded value meets a constant of kind 2, which is how dropout, drop-path and
drop-connect are made, that is an error. Random numbers as such (kind 1: random features, drawn with
a fixed key) are let through: they are a way to write constants. So are masks that are drawn outside
of the function and passed in, which says that they are part of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from bnncert.bounds.tracing.equations import called, is_call, source_of
from bnncert.bounds.tracing.loops import LOOPS, bodies, condition

_DRAWS = (
    "random_bits",
    "random_gamma",
    "rng_bit_generator",
    "rng_uniform",
    "threefry2x32",
)
_BOUNDED = -1
_WAY_OUT = (
    "Bounds are of the network without: model.eval() (flax.nnx), deterministic=True (flax.linen), "
    "equinox.nn.inference_mode(model). A mask that is meant to be fixed is drawn outside of the "
    "function and passed in."
)
# What frameworks say where dropout has no key, or a training-mode layer writes to its state.
_SIGNS = ("dropout", "cannot mutate")


def refuse_random_masks(jaxpr: core.Jaxpr) -> None:
    """Raises if a bounded value meets a mask that the function draws.

    Args:
        jaxpr: of a function whose arguments are all bounded.

    Raises:
        ValueError: naming dropout, the line that uses the mask, and the way out.
    """
    if _draws(jaxpr):
        _kinds(jaxpr, [_BOUNDED] * len(jaxpr.invars), "")


@contextmanager
def advised() -> Iterator[None]:
    """Adds to a framework's error about dropout or training mode what to do about it."""
    try:
        yield
    except Exception as error:
        note = f"A layer is in training mode, dropout perhaps. {_WAY_OUT}"
        known = getattr(error, "__notes__", ())
        if any(sign in str(error).lower() for sign in _SIGNS) and note not in known:
            error.add_note(note)
        raise


def _draws(jaxpr: core.Jaxpr) -> bool:
    return any(eqn.primitive.name in _DRAWS or any(map(_draws, _bodies(eqn))) for eqn in jaxpr.eqns)


def _bodies(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    found = []
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, core.ClosedJaxpr):
                found.append(body.jaxpr)
            elif isinstance(body, core.Jaxpr):
                found.append(body)
    return found


def _kinds(jaxpr: core.Jaxpr, arguments: Sequence[int], source: str) -> list[int]:
    """The kinds of a jaxpr's outputs, by those of its arguments."""
    env: dict[Any, int] = dict.fromkeys(jaxpr.constvars, 0)
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def kind(atom: Any) -> int:
        return 0 if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        kinds = [kind(atom) for atom in eqn.invars]
        line = source_of(eqn) or source
        if is_call(eqn):
            made = _kinds(called(eqn)[0], kinds, line)
        elif eqn.primitive.name in LOOPS and (any(kinds) or any(map(_draws, _bodies(eqn)))):
            made = _of_loop(eqn, kinds, line)
        else:
            made = [_kind(eqn, kinds, var, line) for var in eqn.outvars]
        env.update(zip(eqn.outvars, made, strict=True))
    return [kind(atom) for atom in jaxpr.outvars]


def _of_loop(eqn: core.JaxprEqn, kinds: Sequence[int], source: str) -> list[int]:
    """The kinds of a loop's results, iteration by iteration until they are those of an earlier.

    Which branch is taken, and how often a loop runs, may be a mask: of layers as a whole.
    """
    if eqn.primitive.name == "cond" and kinds[0] > 0 and _BOUNDED in kinds:
        raise _left_on(source)
    found: list[list[int]] = []
    for body in bodies(eqn):
        arguments = [kinds[i] for i in body.passed]
        nothing_yet = [0] * len(body.results)
        for argument, result in body.carry.items():
            nothing_yet[result] = arguments[argument]
        if eqn.primitive.name == "while" or eqn.params.get("length") == 0:
            found.append(nothing_yet)  # it may not run at all
        if eqn.params.get("length") == 0:
            break
        seen: list[list[int]] = []
        while arguments not in seen:
            seen.append(list(arguments))
            if _BOUNDED in arguments and _is_random(eqn, kinds, arguments):
                raise _left_on(source)
            found.append(_kinds(body.jaxpr, arguments, source))
            for argument, result in body.carry.items():
                arguments[argument] = found[-1][result]
    return [_BOUNDED if _BOUNDED in each else max(each) for each in zip(*found, strict=True)]


def _is_random(eqn: core.JaxprEqn, kinds: Sequence[int], arguments: Sequence[int]) -> bool:
    """Says whether a while loop goes on by what is drawn."""
    if eqn.primitive.name != "while":
        return False
    skipped, own = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    given = [*kinds[:skipped], *arguments[own:]]
    return max(_kinds(condition(eqn), given, ""), default=0) > 0


def _kind(eqn: core.JaxprEqn, kinds: Sequence[int], result: Any, source: str) -> int:
    most = max(kinds, default=0)
    if _BOUNDED in kinds:
        # Integers are indices, which are decided about where they might be negative.
        if any(k == 2 and not _is_integer(a) for k, a in zip(kinds, eqn.invars, strict=True)):
            raise _left_on(source)
        return _BOUNDED
    if eqn.primitive.name in _DRAWS or any(map(_draws, _bodies(eqn))):
        most = max(most, 1)
    decided = eqn.primitive.name == "floor" or jnp.issubdtype(result.aval.dtype, jnp.bool_)
    return 2 if most and decided else most


def _left_on(source: str) -> ValueError:
    return ValueError(
        f"a random mask, drawn inside the function, meets a bounded value at "
        f"{source or 'a line inside JAX'}: dropout is left on. {_WAY_OUT}"
    )


def _is_integer(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.integer)
