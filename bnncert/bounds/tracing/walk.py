"""A JAX function as a flat list of nodes: what bound propagation walks.

`trace(f, args, kwargs)` runs f once on abstract values and lists every operation that a set
reaches, in the order of execution. Operations on constants alone are evaluated at once (a constant
may be a tracer: that is how `vmap` over weights works), calls are inlined. Every other module sees

    Node(op, operands, evaluate, ...)        operands: Ref(index) of a node, or an array

and never a jaxpr: this module looks inside JAX for them (public API only, `jax.extend`), with the
help of its neighbours.

In rounded arithmetic (`Tracking`) what is computed of constants is an operation like any other: it
is bounded in a graph of its own, and the nodes that it flows into know of it (`constants.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core, source_info_util
from jaxtyping import Array, ArrayLike, PyTree

from bnncert._emptiness import settled
from bnncert._varying import axes_of, varying
from bnncert.bounds.graph.advice import instead_of
from bnncert.bounds.graph.constants import (
    Rounded,
    around,
    distance,
    is_float,
    rounds_nothing,
    unknown_among,
    values_of,
)
from bnncert.bounds.graph.nodes import (
    Graph,
    Node,
    UnsupportedPrimitiveError,
    graph_of,
    prune,
    unknown_constant,
)
from bnncert.bounds.graph.operands import Operand, Ref
from bnncert.bounds.graph.primitives import own_name
from bnncert.bounds.ops import Operation, operation_of
from bnncert.bounds.tracing.equations import (
    bind,
    called,
    has_plain_body,
    is_call,
    is_cast,
    is_matrix_product,
    multiplies,
    source_of,
    summed_on,
    with_literals,
)
from bnncert.bounds.tracing.fusion import fused
from bnncert.bounds.tracing.loops import LOOPS, unrolled
from bnncert.bounds.tracing.normalisation import normalised
from bnncert.bounds.tracing.parameters import refusal
from bnncert.bounds.tracing.randomness import advised, refuse_random_masks
from bnncert.bounds.tracing.recognition import Recognised, find_runs, is_logaddexp, recognise
from bnncert.bounds.tracing.rewriting import REWRITES
from bnncert.sets import Box, Set, check_set, is_set

# Operations that return their operand. `stop_gradient` must be one of them: its transpose is zero.
_IDENTITIES = (
    "stop_gradient",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "pvary",
)
# What looks at values and returns nothing.
_SEEN = ("debug_callback", "debug_print")
_FEW = 2**10
# Elementwise operations whose scalar operands JAX leaves to broadcast by themselves.
_PROMOTING = ("add", "sub", "mul", "div", "max", "min", "clamp", "pow", "logaddexp")


# A traceback into this file would hide the user's line.
source_info_util.register_exclusion(__file__)


class Tracking(NamedTuple):
    """What is to be known of constants in rounded arithmetic.

    Attributes:
        boxes: of all nodes of a graph whose sets are boxes of constants.
        histories: `(graph, those of its sets) -> one for each node`, as `Graph.histories`.
    """

    boxes: Callable[[Graph], list[Box]]
    histories: Callable[[Graph, Sequence[Any]], tuple[Any, ...]]


class _Place(NamedTuple):
    """Where an equation stands.

    Attributes:
        source: the user's line.
        summed: for each of its results, as `Node.summed`.
        tracking: None: constants are exact.
        operations: the user's own.
    """

    source: str = ""
    summed: Sequence[int] = ()
    tracking: Tracking | None = None
    operations: tuple[Operation, ...] = ()


def trace(
    f: Callable[..., PyTree],
    args: tuple,
    kwargs: dict[str, Any],
    tracking: Tracking | None = None,
    operations: Sequence[Operation] = (),
) -> Graph:
    """Lists the operations of `f(*args, **kwargs)` that the sets among its arguments reach.

    Args:
        f: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        tracking: for rounded arithmetic; None: what is computed of constants is exact.
        operations: the user's own, to be recognised where f calls their functions.

    Raises:
        ValueError: no set among the arguments, or an invalid one; dropout that was left on.
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
    with advised():
        closed, out_shape = jax.make_jaxpr(on_sets, return_shape=True)(*avals)
    refuse_random_masks(closed.jaxpr)
    nodes = [_input_node(aval, i) for i, aval in zip(where, avals, strict=True)]
    refs = [Ref(i) for i in range(len(nodes))]
    alone = [1] * len(closed.jaxpr.outvars)
    here = _Place("", alone, tracking, tuple(operations))
    outputs = _walk(closed.jaxpr, closed.consts, refs, nodes, here)
    found = normalised(fused(nodes), outputs, exact=tracking is None)
    live, outputs = _known(*prune(*found, len(inputs)))
    out_tree = jax.tree.structure(out_shape)
    inputs, valid = varying((inputs, valid), _axes(inputs, live))
    graph = graph_of(live, inputs, valid, outputs, in_tree, tuple(where), out_tree)
    if tracking is None:
        return graph
    return graph._replace(histories=tracking.histories(graph, [None] * len(inputs)))


def _known(nodes: Sequence[Node], outputs: tuple) -> tuple[tuple[Node, ...], tuple]:
    """The nodes, each with what is known of its operation."""
    return tuple(n._replace(operation=operation_of(n)) if n.refs else n for n in nodes), outputs


def _axes(inputs: Sequence[Set], nodes: Sequence[Node]) -> frozenset[str]:
    """The mesh axes that any value of a graph varies over.

    All of its values are to vary over all of them, so that each device transposes and
    differentiates by itself.
    """
    constants = [o for node in nodes for o in node.operands if not isinstance(o, Ref)]
    return axes_of(inputs, constants)


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
    outside: _Place,
) -> list[Any]:
    """Appends the bounded operations of one jaxpr to `nodes`; returns its outputs.

    Each call has its own environment: a function called twice is the same jaxpr object twice.
    Bodies that JAX keeps from an earlier trace have lost their user's line: then it is that of the
    call, `outside`.
    """
    jaxpr = with_literals(jaxpr)
    env: dict[core.Var, Any] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: core.Var | core.Literal) -> Any:
        if isinstance(atom, core.Literal):
            return np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore
        return env[atom]

    known = {v: c for v, c in env.items() if not isinstance(c, (Ref, Rounded))}
    runs, summed = find_runs(jaxpr, outside.operations), summed_on(jaxpr, outside.summed, known)
    ends = {run.last: run for run in runs.values()}
    skipped = -1
    for position, eqn in enumerate(jaxpr.eqns):
        run = runs.get(position)
        if run is not None and run.alone and isinstance(env.get(run.operand), Ref):
            skipped = max(skipped, run.last)
        source = source_of(eqn) or outside.source
        if position > skipped:
            operands = [read(atom) for atom in eqn.invars]
            here = outside._replace(source=source, summed=[summed.get(v, 1) for v in eqn.outvars])
            env.update(zip(eqn.outvars, _values(eqn, operands, nodes, here), strict=True))
        run = ends.get(position)
        if run is not None and isinstance(env.get(run.operand), Ref):
            # What it was computed from is dropped, where nothing else needs it.
            env[run.result] = _function(nodes, eqn, source, run.recognised, env[run.operand])
    return [read(atom) for atom in jaxpr.outvars]


def _values(
    eqn: core.JaxprEqn, operands: list[Any], nodes: list[Node], here: _Place
) -> Sequence[Any]:
    """The results of one equation: references where a set reaches it, else constants."""
    if is_cast(eqn):
        return operands
    if any(isinstance(o, Ref) for o in operands):
        return _step(eqn, operands, nodes, here)
    if _is_opened(eqn, here.tracking):
        return _inline(eqn, operands, nodes, here)
    return _constants(eqn, operands, here)


def _is_opened(eqn: core.JaxprEqn, tracking: Tracking | None) -> bool:
    """Whether a call on constants is walked through.

    One that multiplies, since the precision of that is ours; and in rounded arithmetic each that
    has no derivative of its own, since each operation is bounded by itself.
    """
    return has_plain_body(eqn) and (tracking is not None or multiplies(eqn))


def _constants(eqn: core.JaxprEqn, operands: Sequence[Any], here: _Place) -> list[Any]:
    """Evaluates an equation on constants; in rounded arithmetic, with how far off it may be."""
    values = values_of(operands)
    with jax.ensure_compile_time_eval() if _is_known(values) else nullcontext():
        out = bind(eqn)(*values)
    results = list(out) if eqn.primitive.multiple_results else [out]
    if here.tracking is None:
        return results
    op = own_name(eqn.primitive)
    exact = op != "" and not any(isinstance(o, Rounded) for o in operands)
    if exact and all(rounds_nothing(op, eqn.params, values, r) for r in results):
        return results
    unknown = unknown_among(operands)
    if unknown is not None and op != "select_n":
        return [unknown._replace(value=r, error=None) for r in results]
    nothing: list[Any] = [(None, None)] * len(results)
    found = _enclosed(eqn, operands, here, here.tracking) if is_float(results[0]) else nothing
    return [
        Rounded(value, box and distance(value, box), eqn.primitive.name, here.source, history)
        for value, (box, history) in zip(results, found, strict=True)
    ]


def _is_known(values: Sequence[Any]) -> bool:
    """Whether all are few numbers that are known, which `jit` would make unknown ones."""
    small = all(jnp.size(v) <= _FEW for v in values)
    return small and not any(isinstance(v, Tracer) for v in values)


def _enclosed(
    eqn: core.JaxprEqn, operands: Sequence[Any], here: _Place, tracking: Tracking
) -> Sequence[tuple[Box | None, Any]]:
    """Boxes around what an equation on constants computes (None: not known), and histories."""
    nothing = [(None, None)] * len(eqn.outvars)
    if own_name(eqn.primitive) == "select_n" and unknown_among(operands[:1]):
        cases = [around(o) for o in operands[1:]]  # whichever it is
        if any(case is None for case in cases):
            return nothing
        lowers, uppers = zip(*((case.lower, case.upper) for case in cases if case), strict=True)
        return [(Box(jnp.stack(lowers).min(0), jnp.stack(uppers).max(0)), None)]
    positions = [i for i, o in enumerate(operands) if isinstance(o, Rounded)]
    if not positions:  # one of them as a set is enough
        positions = [i for i, o in enumerate(operands) if is_float(o)][:1]
    sets = [around(operands[i]) for i in positions]
    if not positions or any(region is None for region in sets):
        return nothing
    inputs = tuple(region for region in sets if region is not None)
    nodes = [_input_node(_aval(region), i) for i, region in zip(positions, inputs, strict=True)]
    starts = [getattr(operands[i], "history", None) for i in positions]
    filled = list(operands)
    for ref, i in enumerate(positions):
        filled[i] = Ref(ref)
    try:
        results = _step(eqn, filled, nodes, here)
        live, outputs = _known(*prune(fused(nodes), results, len(inputs)))
        inputs = varying(inputs, _axes(inputs, live))
        graph = graph_of(live, inputs, None, outputs)
        graph = graph._replace(histories=tracking.histories(graph, starts))
        boxes = tracking.boxes(graph)
    except UnsupportedPrimitiveError:
        return nothing
    return [
        (boxes[o.index], graph.histories[o.index]) if isinstance(o, Ref) else (around(o), None)
        for o in outputs
    ]


def _function(
    nodes: list[Node], eqn: core.JaxprEqn, source: str, recognised: Recognised, operand: Ref
) -> Ref:
    """Appends a recognised function of one bounded value, which is brought to its shape before."""
    add = partial(_derived, nodes, eqn, source)
    own = nodes[operand.index].shape
    shape = jnp.broadcast_shapes(own, *map(jnp.shape, recognised.constants))
    if shape != own:
        operand = add("broadcast_in_dim", (operand,), partial(jnp.broadcast_to, shape=shape))
    operands = (operand, *recognised.constants)
    result = add(recognised.op, operands, recognised.function, **recognised.params)
    nodes[-1] = nodes[-1]._replace(operation=recognised.operation)
    return result


def _step(
    eqn: core.JaxprEqn, operands: list[Any], nodes: list[Node], here: _Place
) -> Sequence[Any]:
    """Appends one equation on bounded values; returns a reference for each of its results."""
    name, source = eqn.primitive.name, here.source
    if refused := refusal(eqn):
        raise UnsupportedPrimitiveError(
            f"primitive '{name}' over bounded values, called at "
            f"{source or 'a line inside JAX'}: {refused}"
        )
    if name in _IDENTITIES:
        return operands
    if is_call(eqn):
        bounded = [i for i, o in enumerate(operands) if isinstance(o, Ref)]
        recognised = recognise(eqn, values_of(operands[1:])) if bounded == [0] else None
        if recognised is not None:
            result = _function(nodes, eqn, source, recognised, operands[0])
            if len(operands) > 1:
                nodes[-1] = _tracked(nodes[-1], operands, nodes[-1].operands)
            return [result]
        if not is_logaddexp(eqn):
            return _inline(eqn, operands, nodes, here)
        name = "logaddexp"
    if own_name(eqn.primitive) in LOOPS:
        closed = unrolled(eqn, operands, source or "a line inside JAX")
        return _walk(closed.jaxpr, closed.consts, operands, nodes, here)
    plain = values_of(operands)
    if name in _PROMOTING:
        plain = [_broadcast(nodes, eqn, source, o) for o in plain]
    if is_matrix_product(eqn):
        plain = [_widened(nodes, eqn, source, o) for o in plain]
    start = len(nodes)
    results = _listed(name, eqn, plain, nodes, source)
    nodes[start:] = [
        _tracked(node, operands, plain)._replace(summed=max(here.summed, default=1))
        for node in nodes[start:]
    ]
    _check_tracked(operands, plain, nodes[start:])
    return results


def _listed(
    name: str, eqn: core.JaxprEqn, operands: list[Any], nodes: list[Node], source: str
) -> Sequence[Operand]:
    """Appends the nodes that one operation is listed as."""
    if name in REWRITES:
        add = partial(_derived, nodes, eqn, source)
        shape = eqn.invars[0].aval.shape  # pyright: ignore
        return REWRITES[name](add, operands, {**eqn.params, "operand": shape})
    add = partial(_append, nodes, eqn, source)
    if name in ("split", "unstack"):
        parts = bind(eqn)
        return [
            add(name, tuple(operands), lambda x, i=i: parts(x)[i], var)
            for i, var in enumerate(eqn.outvars)
        ]
    if name == "sort":
        return [add(name, tuple(operands), lambda x: bind(eqn)(x)[0])]
    if name == "top_k":
        places = add("top_k_places", tuple(operands), lambda x: bind(eqn)(x)[1], eqn.outvars[1])
        return [add(name, tuple(operands), lambda x: bind(eqn)(x)[0]), places]
    if name in _SEEN and not eqn.outvars:
        return []
    if eqn.primitive.multiple_results:
        raise UnsupportedPrimitiveError(
            f"no bound rule for primitive '{name}' over bounded values, called at "
            f"{source or 'a line inside JAX'}. {instead_of(name)}"
        )
    return [add(name, tuple(operands), bind(eqn))]


def _tracked(node: Node, operands: Sequence[Any], plain: Sequence[Any]) -> Node:
    """A node that knows which of its constants were computed.

    Args:
        node: whose constants are among `plain`.
        operands: of an equation.
        plain: what its nodes act on in their place.

    Raises:
        UnsupportedPrimitiveError: it is not known how far off one of them may be.
    """
    rounded = [(v, o) for v, o in zip(plain, operands, strict=True) if isinstance(o, Rounded)]
    found = tuple(next((o for v, o in rounded if v is own), None) for own in node.operands)
    unknown = unknown_among(found)
    if unknown is not None:
        raise unknown_constant(unknown, f"'{node.op}'")
    return node._replace(computed=found) if any(found) else node


def _check_tracked(operands: Sequence[Any], plain: Sequence[Any], nodes: Sequence[Node]) -> None:
    """Raises UnsupportedPrimitiveError where no node knows of a constant that was computed."""
    kept = [o for node in nodes for o in node.operands]
    for operand, value in zip(operands, plain, strict=True):
        if isinstance(operand, Rounded) and not any(value is o for o in kept):
            raise unknown_constant(operand, f"'{nodes[-1].op}' in another form")


def _inline(
    eqn: core.JaxprEqn, operands: Sequence[Any], nodes: list[Node], here: _Place
) -> list[Any]:
    return _walk(*called(eqn), operands, nodes, here)


def _broadcast(nodes: list[Node], eqn: core.JaxprEqn, source: str, operand: Any) -> Any:
    """A bounded scalar operand in the shape of the result: a row needs its transpose."""
    shape = eqn.outvars[0].aval.shape  # pyright: ignore
    if not isinstance(operand, Ref) or nodes[operand.index].shape == shape:
        return operand
    spread = partial(jnp.broadcast_to, shape=shape)
    return _append(nodes, eqn, source, "broadcast_in_dim", (operand,), spread)


def _widened(nodes: list[Node], eqn: core.JaxprEqn, source: str, operand: Any) -> Any:
    """An operand in the format that its products are summed in: exactly, and so are its bounds."""
    dtype = eqn.outvars[0].aval.dtype  # pyright: ignore
    if not isinstance(operand, Ref):
        return operand if operand.dtype == dtype else jnp.asarray(operand, dtype)
    if nodes[operand.index].dtype == dtype:
        return operand
    cast = partial(jax.lax.convert_element_type, new_dtype=dtype)
    return _derived(nodes, eqn, source, "convert_element_type", (operand,), cast)


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
