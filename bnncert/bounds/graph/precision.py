"""How exactly a network multiplies matrices: what it asks for, and what a backend makes of it.

A matrix product or convolution of float32 may be carried out in less: an accelerator rounds both
*factors* of each product to a coarser format, and adds up the products in float32.

    asked for                               factors rounded to
    HIGHEST ("float32")                     nothing coarser
    HIGH ("tensorfloat32")                  tensorfloat32, u = 2^-11 (or closer)
    DEFAULT ("bfloat16", "fastest")         bfloat16, u = 2^-8 (or closer)
    nothing                                 on a CPU nothing coarser, on a GPU tensorfloat32, on
                                            anything else bfloat16

`jax.default_matmul_precision` is part of what is asked for: JAX writes it into the traced product.
What is asked for holds on every backend, also on one that computes in float32 all the same: a
certificate made on a CPU speaks of the network wherever it runs so. What is left to the backend
(nothing asked for) is as on JAX's default backend.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from bnncert.bounds.graph.primitives import own_name

FACTOR_UNITS: Mapping[str, float] = {"float32": 0.0, "tensorfloat32": 2.0**-11, "bfloat16": 2.0**-8}
"""The unit roundoff of each format of factors; 0: that of the operands' own dtype."""

PRODUCTS = ("dot_general", "conv_general_dilated")

_ASKED: Mapping[Any, str] = {
    lax.Precision.HIGHEST: "float32",
    lax.Precision.HIGH: "tensorfloat32",
    lax.Precision.DEFAULT: "bfloat16",
    lax.DotAlgorithmPreset.F32_F32_F32: "float32",
    lax.DotAlgorithmPreset.F64_F64_F64: "float32",
    lax.DotAlgorithmPreset.BF16_BF16_F32_X9: "float32",
    lax.DotAlgorithmPreset.BF16_BF16_F32_X6: "tensorfloat32",
    lax.DotAlgorithmPreset.BF16_BF16_F32_X3: "tensorfloat32",
    lax.DotAlgorithmPreset.TF32_TF32_F32_X3: "tensorfloat32",
    lax.DotAlgorithmPreset.TF32_TF32_F32: "tensorfloat32",
    lax.DotAlgorithmPreset.BF16_BF16_F32: "bfloat16",
}
_LEFT_TO: Mapping[str, str] = {"cpu": "float32", "gpu": "tensorfloat32"}
_ANYWHERE_ELSE = "bfloat16"


def factors(asked: Any, platform: str) -> str | None:
    """The format that the factors of a product are rounded to.

    Args:
        asked: the parameter `precision` of the traced product.
        platform: of the backend, as `jax.default_backend()`.

    Returns:
        A key of `FACTOR_UNITS`; None where nothing is known (float8 and float16, whose range is
        smaller than that of float32; sums in less than float32).
    """
    pair = asked if isinstance(asked, tuple) else (asked, asked)
    found = []
    for one in pair:
        if one is None or one == lax.DotAlgorithmPreset.DEFAULT:
            found.append(_LEFT_TO.get(platform, _ANYWHERE_ELSE))
        else:
            found.append(_ASKED.get(one))
    return None if None in found else max(found, key=lambda name: FACTOR_UNITS[name or ""])


def coarsest(jaxpr: core.Jaxpr, platform: str) -> str | None:
    """The coarsest format of factors in any product of float32 of a program.

    Args:
        jaxpr: with its calls, loops and branches.
        platform: as for `factors`.

    Returns:
        A key of `FACTOR_UNITS`; None where nothing is known of one of them.
    """
    found: list[str | None] = ["float32"]
    for eqn in jaxpr.eqns:
        if own_name(eqn.primitive) in PRODUCTS and _is_rounded(eqn):
            found.append(factors(eqn.params["precision"], platform))
        for parameter in eqn.params.values():
            for body in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if isinstance(body, core.ClosedJaxpr):
                    body = body.jaxpr
                if isinstance(body, core.Jaxpr):
                    found.append(coarsest(body, platform))
    return None if None in found else max(found, key=lambda name: FACTOR_UNITS[name or ""])


def asked_of(f: Any, *args: Any) -> str | None:
    """As `coarsest`, for `f(*args)` on JAX's default backend."""
    return coarsest(jax.make_jaxpr(f)(*args).jaxpr, jax.default_backend())


def _is_rounded(eqn: core.JaxprEqn) -> bool:
    """Whether a coarser format of factors would round: float64 is never computed in less."""
    dtype: Any = eqn.outvars[0].aval.dtype  # pyright: ignore[reportAttributeAccessIssue]
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
