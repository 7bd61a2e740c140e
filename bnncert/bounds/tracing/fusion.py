"""Runs of nodes that are one function, found in what a function was traced to.

    min(max(x, a), b)          clip(x, min(a, b), b)
    max(min(x, b), a)          clip(x, a, max(a, b))
    x * logistic(x)            silu(x)
    x * tanh(softplus(x))      mish(x)
    where(x > 0, x, a * x)     leaky_relu(x, a); also by >=, < or <=, and with -x

Each is an identity of the nodes themselves, for all constants, so nothing is left to be checked but
that the 0 of a comparison is 0: no name is trusted. Relaxed as one, a function has closer lines
than its parts one after the other, and the parts of a product do not vary apart. What the parts
were computed for besides stays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bnncert.bounds.graph.operands import Ref

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
    known = not isinstance(first, Tracer) and not isinstance(last, Tracer)
    numbers = np if known else jnp  # JAX would stage known ones under `jit`
    if node.op == "min":
        low, high = numbers.asarray(numbers.minimum(first, last)), last
    else:
        low, high = last, numbers.asarray(numbers.maximum(first, last))

    def clip(v: Any, a: Any, b: Any) -> Any:
        # Written so that a NaN is handed on.
        above = jnp.where(v <= a, a, v)
        return jnp.where(above >= b, b, above)

    clipped = node._replace(op="clip", operands=(x, low, high), evaluate=clip, params={})
    computed = [c for n in (node, inner) for c in n.computed if c is not None]
    if not computed:
        return clipped._replace(computed=())
    # Either end is one of the two constants.
    error = sum(c.error for c in computed)
    ends = (computed[0]._replace(value=end, error=error) for end in (low, high))
    return clipped._replace(computed=(None, *ends))


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


def _leaky(nodes: Nodes, node: Any) -> Any | None:
    """A selection of x or a multiple of it by the sign of x; at 0 both are 0."""
    if len(node.operands) != 3 or not all(isinstance(o, Ref) for o in node.operands):
        return None
    condition, *cases = (nodes[o.index] for o in node.operands)
    sides = _COMPARISONS.get(condition.op)
    if sides is None or condition.computed:  # a 0 that is computed may be none
        return None
    x, zero = condition.operands
    if isinstance(zero, Ref):
        (x, zero), sides = (zero, x), sides[::-1]
    if not isinstance(x, Ref) or isinstance(zero, Tracer) or np.any(np.asarray(zero)):
        return None
    # A selection's cases: where the condition is false, where it is true.
    right, left = sides
    slope = _multiple(cases[left], x)
    if node.operands[1 + right] != x or slope is None or node.shape != nodes[x.index].shape:
        return None
    computed = next((c for c in cases[left].computed if c is not None), None)
    return node._replace(
        op="leaky_relu",
        operands=(x, slope),
        evaluate=jax.nn.leaky_relu,
        params={},
        computed=() if computed is None else (None, computed),
    )


def _multiple(node: Any, x: Ref) -> Any | None:
    """The constant that a node multiplies x by."""
    if node.op == "neg" and node.operands == (x,):
        return jnp.asarray(-1, node.dtype)
    if node.op != "mul" or len(node.operands) != 2 or node.refs != (x.index,):
        return None
    return next(o for o in node.operands if not isinstance(o, Ref))


def _function(node: Any, op: str, x: Ref, function: Callable[[Any], Any]) -> Any:
    return node._replace(op=op, operands=(x,), evaluate=function, params={}, computed=())


def _with_constant(node: Any) -> tuple[Ref, Any] | None:
    """The operands of a max or min with a constant."""
    if len(node.operands) != 2 or len(node.refs) != 1:
        return None
    return node.operands  # `rewriting` puts the constant last


def _operand(nodes: Nodes, node: Any) -> Any | None:
    return nodes[node.refs[0]] if node.refs else None


_COMPARISONS: Mapping[str, tuple[int, int]] = {
    "gt": (1, 0),
    "ge": (1, 0),
    "lt": (0, 1),
    "le": (0, 1),
}
"""Of x with 0: which case of a selection holds right of 0, and which left of it."""

_FUSIONS: Mapping[str, Fusion] = {"min": _clip, "max": _clip, "mul": _gated, "select_n": _leaky}
