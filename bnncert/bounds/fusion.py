"""Runs of nodes that are one function, found in what a function was traced to.

    min(max(x, a), b)          clip(x, min(a, b), b)
    max(min(x, b), a)          clip(x, a, max(a, b))
    x * logistic(x)            silu(x)
    x * tanh(softplus(x))      mish(x)

Each is an identity of the nodes themselves, for all constants, so nothing is left to be checked: no
name is trusted. Relaxed as one, a function has closer lines than its parts one after the other, and
the parts of a product do not vary apart. What the parts were computed for besides stays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnncert.bounds.operands import Ref

Nodes = Sequence[Any]
Fusion = Callable[[Nodes, Any], Any]


def fused(nodes: Nodes) -> list[Any]:
    """The nodes, in place of the last of each run the function that it is of the first's operand.

    Args:
        nodes: `graph.Node`s, in the order of execution.

    Returns:
        As many; those that only a run was made of are no longer needed.
    """
    found: list[Any] = []
    for node in nodes:
        rule = _FUSIONS.get(node.op)
        found.append((rule and rule(found, node)) or node)
    return found


def _clip(nodes: Nodes, node: Any) -> Any | None:
    outer, inner = _with_constant(node), _operand(nodes, node)
    if outer is None or inner is None or {node.op, inner.op} != {"min", "max"}:
        return None
    within = _with_constant(inner)
    if within is None:
        return None
    (x, first), (_, last) = within, outer
    if node.op == "min":
        low, high = jnp.minimum(first, last), last
    else:
        low, high = last, jnp.maximum(first, last)

    def clip(v: Any, a: Any, b: Any) -> Any:
        # Written so that a NaN is handed on.
        above = jnp.where(v <= a, a, v)
        return jnp.where(above >= b, b, above)

    return node._replace(op="clip", operands=(x, low, high), evaluate=clip, params={})


def _gated(nodes: Nodes, node: Any) -> Any | None:
    """X times a function of x."""
    if len(node.operands) != 2:
        return None
    for x, gate in (node.operands, node.operands[::-1]):
        if not isinstance(x, Ref) or not isinstance(gate, Ref):
            continue
        op, (inner, *_) = nodes[gate.index].op, nodes[gate.index].operands or (None,)
        if op == "logistic" and inner == x:
            return _function(node, "silu", x, lambda v: v * jax.nn.sigmoid(v))
        if op != "tanh" or not isinstance(inner, Ref):
            continue
        softplus = nodes[inner.index]
        if softplus.op == "softplus" and softplus.operands == (x,):
            return _function(node, "mish", x, jax.nn.mish)
    return None


def _function(node: Any, op: str, x: Ref, function: Callable[[Any], Any]) -> Any:
    return node._replace(op=op, operands=(x,), evaluate=function, params={})


def _with_constant(node: Any) -> tuple[Ref, Any] | None:
    """The operands of a max or min with a constant."""
    if len(node.operands) != 2 or len(node.refs) != 1:
        return None
    return node.operands  # `rewriting` puts the constant last


def _operand(nodes: Nodes, node: Any) -> Any | None:
    return nodes[node.refs[0]] if node.refs else None


_FUSIONS: Mapping[str, Fusion] = {"min": _clip, "max": _clip, "mul": _gated}
