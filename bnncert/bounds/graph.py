"""A JAX function as a flat list of nodes: what bound propagation walks.

`trace(f, args, kwargs)` runs f once on abstract values and lists every operation that a set
reaches, in the order of execution. Operations on constants alone are evaluated at once (a constant
may be a tracer: that is how `vmap` over weights works), calls are inlined. Every other module sees

    Node(op, operands, evaluate, ...)        operands: Ref(index) of a node, or an array

and never a jaxpr: this module looks inside JAX for them (public API only, `jax.extend`), with the
help of `equations.py`, `recognition.py`, `fusion.py` and `convolution.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util
from jaxtyping import Array, ArrayLike, PyTree

from bnncert.bounds.equations import CALLS, bind, called, multiplies, source_of
from bnncert.bounds.fusion import fused
from bnncert.bounds.operands import Operand, Ref
from bnncert.bounds.recognition import Recognised, find_runs, is_logaddexp, recognise
from bnncert.bounds.rewriting import REWRITES
from bnncert.emptiness import settled
from bnncert.sets import Set, check_set, is_set

# Operations that return their operand. `stop_gradient` must be one of them: its transpose is zero.
_IDENTITIES = (
    "stop_gradient",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "sharding_constraint",
)
# Elementwise operations whose scalar operands JAX leaves to broadcast by themselves.
_PROMOTING = ("add", "sub", "mul", "div", "max", "min", "clamp", "logaddexp")


# A traceback into this file would hide the user's line.
source_info_util.register_exclusion(__file__)


class UnsupportedPrimitiveError(NotImplementedError):
    """An operation on bounded values that has no sound rule."""


class Node(NamedTuple):
    """One operation on bounded values, or (op "input") one set.

    Attributes:
        op: the primitive's name, or that of a recognised function ("softplus").
        operands: a `Ref` for each bounded operand, the array itself for each constant.
        evaluate: `(*operand values) -> value`.
        params: the primitive's parameters.
        shape: of the value.
        dtype: of the value.
        source: where the user's code calls it ("model.py:12 (apply)").
    """

    op: str
    operands: tuple[Operand, ...]
    evaluate: Callable[..., Array]
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    source: str

    @property
    def refs(self) -> tuple[int, ...]:
        """Indices of the bounded operands."""
        return tuple(o.index for o in self.operands if isinstance(o, Ref))

    def fill(self, values: Sequence[Any]) -> list[Any]:
        """The operands, with `values` in place of the bounded ones."""
        iterator = iter(values)
        return [next(iterator) if isinstance(o, Ref) else o for o in self.operands]


class Graph(NamedTuple):
    """A traced function.

    Attributes:
        nodes: in the order of execution; the first `len(inputs)` are the sets.
        inputs: the sets among the arguments, in the order of their leaves; as `settled`.
        valid: whether they certify anything, as `settled`.
        outputs: a `Ref` for each output leaf, or an array that no set reaches.
        in_tree: structure of the arguments `(args, kwargs)`, sets as leaves.
        set_leaves: positions of the sets among the leaves of the arguments.
        out_tree: structure of the outputs.
        users: for each node, the nodes that act on it, once for each of their operands it is.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Set, ...]
    valid: Array | None
    outputs: tuple[Operand, ...]
    in_tree: Any
    set_leaves: tuple[int, ...]
    out_tree: Any
    users: tuple[tuple[int, ...], ...]


def trace(f: Callable[..., PyTree], args: tuple, kwargs: dict[str, Any]) -> Graph:
    """Lists the operations of `f(*args, **kwargs)` that the sets among its arguments reach.

    Raises:
        ValueError: no set among the arguments, or an invalid one.
        UnsupportedPrimitiveError: a loop or a branch over bounded values.
    """
    leaves, in_tree = jax.tree.flatten((args, kwargs), is_leaf=is_set)
    where = [i for i, leaf in enumerate(leaves) if is_set(leaf)]
    if not where:
        raise ValueError(
            "no set among the arguments: at least one must be a bnncert.Box or bnncert.LpBall "
            "(for an input x and a radius eps: bnncert.ball(x, eps))."
        )
    for i in where:
        check_set(leaves[i], f"argument leaf {i}")

    def on_sets(*values: Array) -> PyTree:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        fargs, fkwargs = jax.tree.unflatten(in_tree, filled)
        return f(*fargs, **fkwargs)

    inputs, valid = settled([leaves[i] for i in where])
    avals = [_aval(region) for region in inputs]
    closed, out_shape = jax.make_jaxpr(on_sets, return_shape=True)(*avals)
    nodes = [_input_node(aval, i) for i, aval in zip(where, avals, strict=True)]
    refs = [Ref(i) for i in range(len(nodes))]
    outputs = _walk(closed.jaxpr, closed.consts, refs, nodes)
    live, outputs = _prune(fused(nodes), outputs, len(inputs))
    out_tree = jax.tree.structure(out_shape)
    return Graph(live, inputs, valid, outputs, in_tree, tuple(where), out_tree, _users(live))


def unsupported(node: Node, supported: Sequence[str], hint: str = "") -> UnsupportedPrimitiveError:
    """The error for a node without a rule: what, where, and what there is instead."""
    bounded = [i for i, o in enumerate(node.operands) if isinstance(o, Ref)]
    source = node.source or "a line inside JAX"
    return UnsupportedPrimitiveError(
        f"no bound rule for primitive '{node.op}' with bounded operand(s) {bounded} of "
        f"{len(node.operands)}, called at {source}.{' ' + hint if hint else ''} "
        f"Supported: {', '.join(sorted(supported))}."
    )


def _users(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        for i in node.refs:
            found[i].append(index)
    return tuple(map(tuple, found))


def _prune(
    nodes: Sequence[Node], outputs: Sequence[Operand], num_sets: int
) -> tuple[tuple[Node, ...], tuple[Operand, ...]]:
    """Drops the nodes that no output needs: they are neither bounded nor in need of a rule."""
    needed = {o.index for o in outputs if isinstance(o, Ref)} | set(range(num_sets))
    for index in range(len(nodes) - 1, -1, -1):
        if index in needed:
            needed |= set(nodes[index].refs)
    place = {old: new for new, old in enumerate(sorted(needed))}

    def moved(operands: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(Ref(place[o.index]) if isinstance(o, Ref) else o for o in operands)

    live = (nodes[index] for index in sorted(needed))
    return tuple(node._replace(operands=moved(node.operands)) for node in live), moved(outputs)


def _aval(region: Set) -> jax.ShapeDtypeStruct:
    value = next(iter(vars(region).values()))
    return jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))


def _input_node(aval: jax.ShapeDtypeStruct, leaf: int) -> Node:
    source = f"argument leaf {leaf}"
    return Node("input", (), jnp.zeros, {}, aval.shape, aval.dtype, source)


def _walk(
    jaxpr: core.Jaxpr,
    consts: Sequence[ArrayLike],
    arguments: Sequence[Any],
    nodes: list[Node],
    source: str = "",
) -> list[Operand]:
    """Appends the bounded operations of one jaxpr to `nodes`; returns its outputs.

    Each call has its own environment: a function called twice is the same jaxpr object twice.
    Bodies that JAX keeps from an earlier trace have lost their user's line: `source` is that of the
    call.
    """
    env: dict[core.Var, Operand] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: core.Var | core.Literal) -> Operand:
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore
        return env[atom]

    runs = find_runs(jaxpr)
    for place, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        if any(isinstance(o, Ref) for o in operands):
            values = _step(eqn, operands, nodes, source_of(eqn) or source)
        elif eqn.primitive.name in CALLS and multiplies(eqn):
            values = _inline(eqn, operands, nodes, source)
        else:
            out = bind(eqn)(*operands)
            values = list(out) if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, values, strict=True))
        run = runs.get(place)
        if run is not None and isinstance(env[run.operand], Ref):
            # What it was computed from is dropped, where nothing else needs it.
            add = partial(_derived, nodes, eqn, source_of(eqn) or source)
            env[run.result] = _function(add, run.recognised, env[run.operand])
    return [read(atom) for atom in jaxpr.outvars]


def _function(add: Callable[..., Ref], recognised: Recognised, operand: Operand) -> Ref:
    """Appends a recognised function of one bounded value."""
    operands = (operand, *recognised.constants)
    return add(recognised.op, operands, recognised.function, **recognised.params)


def _step(
    eqn: core.JaxprEqn, operands: list[Any], nodes: list[Node], source: str
) -> Sequence[Operand]:
    """Appends one equation on bounded values; returns a reference for each of its results."""
    name = eqn.primitive.name
    add = partial(_append, nodes, eqn, source)
    if name in _IDENTITIES:
        return operands
    if name in CALLS:
        bounded = [i for i, o in enumerate(operands) if isinstance(o, Ref)]
        recognised = recognise(eqn, operands[1:]) if bounded == [0] else None
        if recognised is not None:
            return [_function(partial(_derived, nodes, eqn, source), recognised, operands[0])]
        if not is_logaddexp(eqn):
            return _inline(eqn, operands, nodes, source)
        name = "logaddexp"
    if name in _PROMOTING:
        operands = [_broadcast(nodes, eqn, source, o) for o in operands]
    if name in REWRITES:
        add = partial(_derived, nodes, eqn, source)
        return REWRITES[name](add, operands, eqn.params)
    if name in ("split", "unstack"):
        parts = bind(eqn)
        return [
            add(name, tuple(operands), lambda x, i=i: parts(x)[i], var)
            for i, var in enumerate(eqn.outvars)
        ]
    if eqn.primitive.multiple_results:
        raise UnsupportedPrimitiveError(
            f"'{name}' over bounded values, called at {source or 'a line inside JAX'}: loops, "
            "branches and operations with several results have no bound rule. Unroll a loop in "
            "Python, or take a branch on values that no set reaches (jnp.where with a constant "
            "mask is supported)."
        )
    return [add(name, tuple(operands), bind(eqn))]


def _inline(
    eqn: core.JaxprEqn, operands: Sequence[Any], nodes: list[Node], source: str
) -> list[Operand]:
    return _walk(*called(eqn), operands, nodes, source)


def _broadcast(nodes: list[Node], eqn: core.JaxprEqn, source: str, operand: Any) -> Any:
    """A bounded scalar operand in the shape of the result: a row needs its transpose."""
    shape = eqn.outvars[0].aval.shape  # pyright: ignore
    if not isinstance(operand, Ref) or nodes[operand.index].shape == shape:
        return operand
    spread = partial(jnp.broadcast_to, shape=shape)
    return _append(nodes, eqn, source, "broadcast_in_dim", (operand,), spread)


def _derived(
    nodes: list[Node],
    eqn: core.JaxprEqn,
    source: str,
    op: str,
    operands: Sequence[Operand],
    evaluate: Callable[..., Array],
    **params: Any,
) -> Ref:
    """Appends an operation that an equation was rewritten to."""
    values = (nodes[o.index] if isinstance(o, Ref) else o for o in operands)
    avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Node) else v for v in values]
    out = jax.eval_shape(evaluate, *avals)
    nodes.append(Node(op, tuple(operands), evaluate, params, out.shape, out.dtype, source))
    return Ref(len(nodes) - 1)


def _append(
    nodes: list[Node],
    eqn: core.JaxprEqn,
    source: str,
    op: str,
    operands: tuple,
    evaluate: Callable[..., Array],
    out: Any = None,
) -> Ref:
    aval: Any = (eqn.outvars[0] if out is None else out).aval
    nodes.append(Node(op, operands, evaluate, eqn.params, aval.shape, aval.dtype, source))
    return Ref(len(nodes) - 1)
