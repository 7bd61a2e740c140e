"""What one equation of a jaxpr is: a call with a body, a function to evaluate, a line of code."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend import core, source_info_util

from bnncert.bounds.primitives import is_jax_own

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
    if not is_call(eqn) or CALLS[eqn.primitive.name] != "jaxpr":
        return False
    body = eqn.params["jaxpr"]
    return any(map(multiplies, body.eqns))


def is_matrix_product(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a matrix product or a convolution."""
    return eqn.primitive.name in _MATRIX_PRODUCTS and is_jax_own(eqn.primitive)


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
    """
    params = dict(eqn.params)
    name = eqn.primitive.name
    if not is_jax_own(eqn.primitive):
        name = ""
    if name in ("gather", "scatter", "scatter-add"):
        if params["mode"] is _PROMISE:
            params["mode"] = _MODES[name]
        if math.prod(eqn.invars[1].aval.shape[:-1]) > 1:  # pyright: ignore
            params |= {"unique_indices": False, "indices_are_sorted": False}
    if name in _MATRIX_PRODUCTS:
        params["precision"] = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(params))


_PROMISE = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
_MODES = {
    "gather": jax.lax.GatherScatterMode.CLIP,
    "scatter": jax.lax.GatherScatterMode.FILL_OR_DROP,
    "scatter-add": jax.lax.GatherScatterMode.FILL_OR_DROP,
}
