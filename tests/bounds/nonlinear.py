"""Nonlinearities of the vectors y and p > 0, by name: those that no other network of the zoo has.

Each group is one network (`networks.together`) that applies all of its functions to one hidden
layer. Three groups, because one function with two sets of planes has all of a network swept twice.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array, jax.Array], jax.Array]


def _of_y(function: Callable[[jax.Array], jax.Array]) -> Function:
    return lambda y, p: function(y)


ONE_SET_OF_LINES: Mapping[str, Function] = {
    **{
        f.__name__: _of_y(f)
        for f in (
            jax.nn.hard_tanh,
            jax.nn.elu,
            jax.nn.selu,
            jax.nn.squareplus,
            jax.nn.log_sigmoid,
            jax.nn.soft_sign,
        )
    },
    "elu, steep": _of_y(partial(jax.nn.elu, alpha=2.5)),
    "celu": _of_y(partial(jax.nn.celu, alpha=0.5)),
    "abs": _of_y(jnp.abs),
    "square": _of_y(jnp.square),
    "sqrt, 1 / sqrt": lambda y, p: jnp.sqrt(p) + jax.lax.rsqrt(p),
    "log": lambda y, p: jnp.log(p),
    "1 / p": lambda y, p: 1 / p,
    "cosh": _of_y(jnp.cosh),
    "log Gamma": lambda y, p: jax.lax.lgamma(p),
    "cumulative": _of_y(lambda y: jax.lax.cummax(y) - jax.lax.cummin(y) + jax.lax.cumlogsumexp(y)),
}

TWO_SETS_OF_LINES: Mapping[str, Function] = {
    "gelu": _of_y(partial(jax.nn.gelu, approximate=False)),
    "gelu by tanh": _of_y(jax.nn.gelu),
    "silu": _of_y(jax.nn.silu),
    "mish": _of_y(jax.nn.mish),
    "hard_silu": _of_y(jax.nn.hard_silu),
    "sin": _of_y(jnp.sin),
    "cos": _of_y(jnp.cos),
    "cube": _of_y(lambda y: y**3),
    "p ** -2": lambda y, p: jax.lax.integer_pow(p, -2),
}

OF_AN_AXIS: Mapping[str, Function] = {
    "softmax": _of_y(jax.nn.softmax),
    "log_softmax": _of_y(jax.nn.log_softmax),
    "logsumexp": _of_y(jax.nn.logsumexp),
    "max": _of_y(jnp.max),
    "min": _of_y(jnp.min),
    "normalised": _of_y(lambda y: y * jax.lax.rsqrt(jnp.mean(jnp.square(y)) + 0.01)),
    "order": _of_y(lambda y: jnp.sort(y) + jax.lax.top_k(y, 2)[0][1]),
    "product": _of_y(lambda y: y * y[::-1]),
    "quotient": lambda y, p: y[::-1] / p,
}
