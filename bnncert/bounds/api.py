"""`bound`: bound propagation as a transformation of any JAX function, like `jax.vmap`.

    g = bound(f, method)        g is called as f is, with sets in place of some arrays,
                                and returns f's outputs with a `Box` for each leaf

| method      | intermediate bounds         | output                               |
|-------------|-----------------------------|--------------------------------------|
| ibp         | intervals                   | intervals                            |
| forward     | forward linear bounds       | the same, intersected with ibp       |
| crown-ibp   | intervals                   | linear bounds, intersected with ibp  |
| crown       | linear bounds and intervals | linear bounds, intersected with both |
| alpha-crown | as crown, optimised         | as crown, optimised, intersected     |

A method is a name of this table, or an object that carries its options (`methods`). None of them
alone is always inside another, hence the intersections: the boxes of `alpha-crown` lie inside those
of `crown`, these inside those of `crown-ibp`, and these inside those of `ibp`.

Sources: Gowal et al. 2018 (IBP); Zhang et al., ICLR 2020 (CROWN-IBP); Zhang et al., NeurIPS 2018
(CROWN).
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bnncert._emptiness import unbounded_unless
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.graph import Graph, Ref
from bnncert.bounds.graph.constants import around
from bnncert.bounds.graph.nodes import unknown_constant
from bnncert.bounds.methods import LinearMethod, Method, linear_method_of, method_of
from bnncert.bounds.ops import Operation
from bnncert.bounds.plan import Options, make_plan
from bnncert.bounds.rows import Row, Steps, linear_rows, map_rows
from bnncert.bounds.tracing import trace
from bnncert.sets import Box

DEFAULT_BATCH_SIZE = 128
"""Rows of a backward pass at once; `vmap` multiplies it by its own batch."""


class Affine(NamedTuple):
    """`sum_i <A_i, x_i> + b`, one term for each set x_i.

    Attributes:
        A: the structure of `jax.jacobian`: a leaf of shape (*output, *set) for each set.
        b: the shape of the output.
    """

    A: PyTree[Array]
    b: Array


class LinearBounds(NamedTuple):
    """`lower(x) <= f(x) <= upper(x)` for all x in the sets."""

    lower: Affine
    upper: Affine


def bound(
    f: Callable[..., PyTree],
    method: str | Method = "crown-ibp",
    *,
    rounding: Rounding = "nearest",
    operations: Sequence[Operation] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Callable[..., PyTree]:
    """Bounds on the outputs of a function over sets of inputs, of weights, or of both.

        g(..., S, ...) = Box(lower, upper)   with   lower <= f(..., x, ...) <= upper  for all x in S

    Args:
        f: any JAX function of ONE example (no batch axis: use `jax.vmap` on the result), with any
            outputs.
        method: from fast to tight "ibp", "crown-ibp", "crown" or "alpha-crown"; "forward", which is
            for few inputs and many outputs. Or one with options of its own: `bnncert.IBP()`,
            `Forward()`, `CROWNIBP()`, `CROWN(lower_slope="zero")`, `AlphaCROWN(steps=100)`.
        rounding: "nearest", or `bnncert.Real()`: bounds of the function in real arithmetic,
            computed in the dtype of the sets; they may be cut by its rounding errors (float32: some
            1e-6 of the values). "outward", or `bnncert.Float()`: bounds of what the network
            computes in that dtype, and of the function in real arithmetic, by the model of
            `bnncert.bounds.rounding.model`; `Float(unit_roundoff=2**-11)` of a network that is less
            exact than its bounds.
        operations: of your own (`bnncert.operation`), each used where f calls its function.
        batch_size: rows of a backward pass at once; bounds memory. On an accelerator with memory to
            spare, more are faster.

    Returns:
        A function called as `f`, where any argument or any leaf inside one may be a `Box` or an
        `LpBall` in place of an array. All else is constant: arrays, tracers, strings, numbers,
        None. It returns f's outputs with a `Box` for each leaf (`Box(v, v)` where no set reaches
        it). It is pure: `jit`, `vmap`, `grad` and `shard_map` apply. At a set that is one point
        both ends are f there, up to the rounding of sums in another order; with "outward" they
        enclose it. An end is infinite where nothing is known: beside an overflow, or where f has no
        value; and both are where a set is traced and empty (lower > upper, a negative radius, NaN
        or infinite numbers).

    Raises:
        ValueError: an unknown method or rounding; when called: no set among the arguments,
            an empty one whose numbers are known; a sum too long for the unit roundoff.
        TypeError: when called: a set of integers.
        UnsupportedPrimitiveError: when called: an operation without a sound rule, or whose rounding
            is not known; names it, and the line of f that calls it.

    Cost: in evaluations of f: ibp 2 to 4, and up to 4 more where affine operations follow one
    another and are bounded as one (`bnncert.bounds.merging`; outward, 2 more); crown-ibp one
    backward pass for each output besides, crown one for each unit of each hidden layer after the
    first, and of the first where it is several affine operations that would exceed those 4;
    alpha-crown three times that for each step; forward one for each coordinate of the sets.
    Memory: `batch_size` times the widest layer; forward: the coordinates of the sets times that.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> f = lambda x: jax.nn.relu(x @ jnp.array([[1.0], [-2.0]]))
        >>> box = bound(f, "ibp")(Box(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.25])))
        >>> [round(float(v), 4) for v in (box.lower[0], box.upper[0])]
        [0.5, 2.0]
    """
    check_batch_size(batch_size)
    options = Options(batch_size, arithmetic_of(rounding), operations=tuple(operations))
    return _bounded(f, method_of(method), options)


def margin_bound(
    f: Callable[..., PyTree], method: str | Method, rounding: Rounding
) -> Callable[..., PyTree]:
    """`bound` of margins f_k - f_c: merged with the last layer whatever that costs."""
    options = Options(DEFAULT_BATCH_SIZE, arithmetic_of(rounding), margins=True)
    return _bounded(f, method_of(method), options)


def ibp(f: Callable[..., PyTree], **options: Any) -> Callable[..., PyTree]:
    """`bound(f, "ibp", ...)`: interval bound propagation."""
    return bound(f, "ibp", **options)


def crown(f: Callable[..., PyTree], **options: Any) -> Callable[..., PyTree]:
    """`bound(f, "crown", ...)`: backward linear bounds throughout."""
    return bound(f, "crown", **options)


def linear_bounds(
    f: Callable[..., PyTree],
    method: str | LinearMethod = "crown",
    *,
    rounding: Rounding = "nearest",
    operations: Sequence[Operation] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Callable[..., PyTree]:
    """The linear functions of the sets that enclose a function, before they are concretised.

        lower.A x + lower.b  <=  f(x)  <=  upper.A x + upper.b      for all x in the sets

    Args:
        f: as for `bound`.
        method: "crown-ibp" or "crown"; or `bnncert.CROWNIBP` or `CROWN` with options.
        rounding: as for `bound`: with "outward", what f computes lies between the exact values of
            the two functions.
        operations: as for `bound`.
        batch_size: as for `bound`.

    Returns:
        A function called as `f` that returns, for each output leaf, `LinearBounds(lower, upper)`;
        `A` has the structure of the arguments `(args, kwargs)`, arrays of shape (*output, *set)
        where these hold sets and None elsewhere. Weights that a chord eliminated appear in `b`,
        with A = 0. Where a side has no finite function (beside an overflow, or a logarithm of
        numbers that may be negative), A = 0 and b is infinite; likewise where
        a set is traced and empty. With "nearest" the inequalities are
        those of real arithmetic, and hold up to the rounding of A and b.

    Raises:
        ValueError, TypeError, UnsupportedPrimitiveError: as `bound`.

    Example:
        >>> import jax.numpy as jnp
        >>> g = linear_bounds(lambda x: 3.0 * x + 1.0)
        >>> found = g(Box(jnp.zeros(1), jnp.ones(1)))
        >>> (float(found.lower.A[0][0].squeeze()), float(found.lower.b[0]))
        (3.0, 1.0)
    """
    check_batch_size(batch_size)
    chosen = linear_method_of(method)
    options = Options(batch_size, arithmetic_of(rounding), operations=tuple(operations))

    @wraps(f)
    def linear(*args: Any, **kwargs: Any) -> PyTree:
        graph = traced(f, args, kwargs, options)
        _, variants = linear_outputs(graph, chosen, options)
        outputs = (_constant_unless(graph.valid, o) for o in variants[0])
        return jax.tree.unflatten(graph.out_tree, outputs)

    return linear


def traced(f: Callable[..., PyTree], args: tuple, kwargs: dict, options: Options) -> Graph:
    """The operations of `f(*args, **kwargs)`, for bounds with these options."""
    return trace(f, args, kwargs, options.arithmetic.tracking(), options.operations)


def linear_outputs(
    graph: Graph, method: LinearMethod, options: Options
) -> tuple[list[Box], list[list[LinearBounds]]]:
    """Intervals of the outputs, and for each variant of the relaxations their linear bounds."""
    intervals, steps = method.relaxed_on(make_plan(graph, options))
    variants = [
        [_linear_output(graph, o, way, options.batch_size) for o in graph.outputs]
        for way in steps.each()
    ]
    return [_output(o, intervals) for o in graph.outputs], variants


def _bounded(f: Callable[..., PyTree], method: Method, options: Options) -> Callable[..., PyTree]:
    @wraps(f)
    def bounded(*args: Any, **kwargs: Any) -> PyTree:
        graph = traced(f, args, kwargs, options)
        boxes = method.boxes(make_plan(graph, options))
        outputs = [unbounded_unless(graph.valid, _output(o, boxes)) for o in graph.outputs]
        return jax.tree.unflatten(graph.out_tree, outputs)

    return bounded


def _output(output: Any, boxes: list[Box]) -> Box:
    if isinstance(output, Ref):
        return boxes[output.index]
    box = around(output)
    if box is None:
        raise unknown_constant(output, "an output")
    return box


def _constant_unless(valid: Array | None, bounds: LinearBounds) -> LinearBounds:
    """The linear bounds, or infinite constants where a set is empty."""
    if valid is None:
        return bounds
    b = unbounded_unless(valid, Box(bounds.lower.b, bounds.upper.b))

    def constant(A: Array) -> Array:
        return jnp.where(valid, A, jnp.zeros_like(A))

    lower, upper = (jax.tree.map(constant, side.A) for side in bounds)
    return LinearBounds(Affine(lower, b.lower), Affine(upper, b.upper))


def _linear_output(graph: Graph, output: Any, steps: Steps, batch_size: int) -> LinearBounds:
    """Stacks the rows of one output leaf."""
    if not isinstance(output, Ref):
        box = _output(output, [])
        zeros = [
            jnp.zeros((*box.lower.shape, *graph.nodes[i].shape)) for i in range(len(graph.inputs))
        ]
        return LinearBounds(
            *(Affine(_by_argument(graph, zeros), end) for end in vars(box).values())
        )
    node = graph.nodes[output.index]

    def known_only(row: Row) -> tuple[list[Array], Array]:
        """Coefficients and offset; of a function that is not finite, 0 and -inf."""
        zeros = [jnp.zeros(graph.nodes[i].shape, node.dtype) for i in range(len(graph.inputs))]
        parts = [row.coefficients.get(i, z) for i, z in enumerate(zeros)]
        offset = row.offset - row.lost
        known = jnp.isfinite(offset)
        for part in parts:
            known &= jnp.isfinite(part).all()
        return [jnp.where(known, part, 0) for part in parts], jnp.where(known, offset, -jnp.inf)

    def one(unit: Array) -> Any:
        lower, upper = map(known_only, linear_rows(output.index, unit, steps))
        return lower, jax.tree.map(jnp.negative, upper)

    lower, upper = (
        Affine(
            _by_argument(graph, [a.reshape(*node.shape, *a.shape[1:]) for a in parts]),
            offset.reshape(node.shape),
        )
        for parts, offset in map_rows(one, node, batch_size)
    )
    return LinearBounds(lower, upper)


def _by_argument(graph: Graph, parts: list[Array]) -> PyTree:
    """Puts one array for each set in the place the set had among the arguments."""
    leaves: list[Any] = [None] * graph.in_tree.num_leaves
    for position, part in zip(graph.set_leaves, parts, strict=True):
        leaves[position] = part
    args, kwargs = jax.tree.unflatten(graph.in_tree, leaves)
    return (*args, kwargs) if kwargs else args


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError where no row at all would be swept at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least one row must be swept at once.")
