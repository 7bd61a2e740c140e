"""JAX's own primitives by name.

Whoever makes a primitive names it: `jax.extend.core.Primitive("tanh")` may compute anything. A rule
holds for the object that JAX itself binds, and for no other of its name.
"""

from collections.abc import Iterator
from functools import cache

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from bnncert._varying import is_sharded


def is_jax_own(primitive: core.Primitive) -> bool:
    """Whether a primitive is the one that JAX has under this name."""
    if primitive.name == "pvary":  # JAX binds it inside of `jax.shard_map` alone
        return is_sharded() and primitive is _pvary()
    return _own().get(primitive.name) is primitive


def own_name(primitive: core.Primitive) -> str:
    """The name of one of JAX's own primitives; empty for any other."""
    return primitive.name if is_jax_own(primitive) else ""


@cache
def _own() -> dict[str, core.Primitive]:
    """The primitives that JAX publishes, and those that only its functions show."""
    found: dict[str, core.Primitive] = {}
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    for function in (
        jax.lax.optimization_barrier,
        lambda v: jnp.split(v, 2),
        lambda v: jnp.stack([v, v]),
        lambda v: jnp.tile(v, 2),
        jnp.unstack,
        jax.checkpoint(jnp.sin),
    ):
        found.update((p.name, p) for p in _bound(jax.make_jaxpr(function)(x).jaxpr))
    published = (p for p in vars(primitives).values() if isinstance(p, core.Primitive))
    return {**found, **{p.name: p for p in published}}


@cache
def _pvary() -> core.Primitive:
    """What casts a value to vary over mesh axes; it needs axes, and any will do."""
    axes = jax.sharding.get_abstract_mesh().manual_axes[:1]
    cast = jax.make_jaxpr(lambda v: jax.lax.pcast(v, axes, to="varying"))
    return cast(jax.ShapeDtypeStruct((), jnp.float32)).jaxpr.eqns[0].primitive


def _bound(jaxpr: core.Jaxpr) -> Iterator[core.Primitive]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive
        body = eqn.params.get("jaxpr")
        if isinstance(body, core.ClosedJaxpr):
            yield from _bound(body.jaxpr)
