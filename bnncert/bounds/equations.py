"""What one equation of a jaxpr is: a call with a body, a function to evaluate, a line of code."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend import core, source_info_util

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

_MATRIX_PRODUCTS = ("dot_general", "conv_general_dilated")


def called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The body of a call, and its constants."""
    body = eqn.params[CALLS[eqn.primitive.name]]
    return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())


def multiplies(eqn: core.JaxprEqn) -> bool:
    """Whether a jitted call holds a matrix product, whose precision is then ours to set.

    Calls with derivatives of their own are kept whole: those are the derivatives of a constant.
    """
    if eqn.primitive.name in _MATRIX_PRODUCTS:
        return True
    if CALLS.get(eqn.primitive.name) != "jaxpr":
        return False
    body = eqn.params["jaxpr"]
    return any(map(multiplies, body.eqns))


def source_of(eqn: core.JaxprEqn) -> str:
    """Where the user's code calls an equation; empty where that is not known."""
    summary = source_info_util.summarize(eqn.source_info)
    return (
        "" if summary == source_info_util.summarize(source_info_util.new_source_info()) else summary
    )


def bind(eqn: core.JaxprEqn) -> Callable[..., Any]:
    """The equation as a function; matrix products in full float32 (no TF32, no bfloat16)."""
    params = dict(eqn.params)
    if params.get("mode") is jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        # An index that breaks the promise is clamped, but its transpose drops it.
        params["mode"] = jax.lax.GatherScatterMode.CLIP
    if eqn.primitive.name in _MATRIX_PRODUCTS:
        params["precision"] = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(params))
