"""Mesh axes that values vary over, inside `jax.shard_map`.

There each value has in its type the axes over whose devices it varies, and JAX asks that

    operands    of one primitive vary over the same axes; functions of `jax.lax` cast them
    a loop      hands on what it was given: what it starts from varies as what its body returns

Casting to more axes moves nothing, but it is *linear*: its transpose sums over these axes. What is
differentiated, or transposed, for each device by itself is to vary over all axes beforehand.
"""

from typing import Any

import jax


def axes_of(*trees: Any) -> frozenset[str]:
    """Lists the mesh axes that any leaf varies over: none outside of `jax.shard_map`.

    Args:
        trees: pytrees of arrays, numbers, or of what `jax.eval_shape` returns.
    """
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(trees):
        # What `eval_shape` returns, and abstract values, have it themselves.
        kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
        if kind.manual_axis_type is not None:
            found |= kind.manual_axis_type.varying
    return found


def varying(tree: Any, axes: frozenset[str]) -> Any:
    """Gives the same values, each leaf varying over these mesh axes besides its own."""
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - axes_of(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def is_sharded() -> bool:
    """Says True inside of `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
