"""Bounds on an average over posterior samples, jointly: one adversarial input for all of them.

    min_x mean_i f(w_i, x)  >=  mean_i min_x f(w_i, x)

Bounded sample by sample, each gets its own worst input: the right side. Instead each sample is
relaxed, f(w_i, x) >= A_i x + b_i, and the *average* of the linear bounds is minimised over the set,
once. Intersected with the average of the separate bounds.

Rounding. With `rounding="outward"`, what each network computes of f lies above A_i x + b_i, taken
exactly (`linear_bounds`), for every x of the set, and so does f in real arithmetic. What follows
is the bounds' own arithmetic, of unit roundoff u and smallest normal number t (`rounding`).
Each entry of an average over S samples passes through S sums, in any order, and the division, which
may be a product with the rounded 1/S: with n = S + 8 and one more for each set,

    |fl(mean A_i) - mean A_i|  <=  gamma(n) mean |A_i| + n t,     b_i and the separate ends likewise

and for all x of the set, m_k the largest |x_k| there, the averaged row so is off by

    gamma(n) mean ( max <|A_i|, |x|> + |b_i| )  +  n t (1 + sum_k m_k)

at most. It is a mean over samples: each offset b_i gives way by its own part of it before the sum,
twice that for the roundings of the part, of b_i less it, and of the last sum with the row's
extreme. Averages cancel, parts do not: that is why it is taken from each sample. The extremes over
the set are those of a sample's own row, over the same widened set (`rounding.outward_set`): of a
box, gamma of its size of each |A_k| m_k; of a ball, of |A|_q |c|_p, and of its radius. So nothing
but floating-point numbers, whatever their origin, is asked of A there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bnncert._emptiness import unbounded_unless
from bnncert._varying import axes_of, varying
from bnncert.bounds.api import (
    DEFAULT_BATCH_SIZE,
    Affine,
    LinearBounds,
    linear_bounds,
    linear_outputs,
    traced,
)
from bnncert.bounds.arithmetic import Rounding, arithmetic_of
from bnncert.bounds.methods import LinearMethod, linear_method_of
from bnncert.bounds.ops.boxes import drop_nan, hull, intersect
from bnncert.bounds.ops.extremes import magnitude
from bnncert.bounds.plan import Options
from bnncert.bounds.rounding import Precision, widened
from bnncert.bounds.rounding.model import gamma
from bnncert.bounds.rows import Row, concretize
from bnncert.sets import Box, LpBall, Set
from bnncert.types import Stacked


def mean_bound(
    f: Callable[..., PyTree],
    method: str | LinearMethod = "crown-ibp",
    *,
    rounding: Rounding = "nearest",
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Callable[..., PyTree]:
    """Bounds on the average of f(w_i, ...) over samples of its first argument.

    The same as `bound(lambda *args: mean_i f(w_i, *args))`, but for memory: samples are swept one
    after another. And never wider than the average of `bound(f)(w_i, ...)` by the same method, up
    to the rounding of averages.

    Args:
        f: `(params, *args) -> outputs`; e.g. a softmax of logits, or differences of them.
        method: "crown-ibp" or "crown"; or `bnncert.CROWNIBP` or `CROWN` with options.
        rounding: as for `bnncert.bound`: "outward" holds for the exact average of what the networks
            compute, and for real arithmetic; by "nearest", rounding may cut the bounds.
        batch_size: rows of a backward pass at once.

    Returns:
        `(samples, *args) -> outputs` with a `Box` for each leaf; leaves of `samples` have a leading
        axis S. Sets are among the args.

    Raises:
        ValueError: samples without a common leading axis; with "outward", more of them than the
            dtype can average; else as `bound`.

    Cost: S times `linear_bounds` and IBP, one sample at a time. Memory: that of one sample, and the
    linear bounds (outputs times coordinates of the sets), whatever S is.

    Example:
        >>> f = lambda w, x: jax.nn.relu(w * x)
        >>> w, x = jnp.array([1.0, -1.0]), Box(jnp.float32(-1.0), jnp.float32(1.0))
        >>> box = mean_bound(f, "crown")(w, x)
        >>> float(box.lower), float(box.upper)
        (0.0, 0.5)
    """
    linear_bounds(f, method, rounding=rounding, batch_size=batch_size)  # which checks the options
    arithmetic, chosen = arithmetic_of(rounding), linear_method_of(method)
    options = Options(batch_size, arithmetic)

    def bounded(samples: Stacked, *args: Any) -> PyTree:
        count = _num_samples(samples)
        first = jax.tree.map(lambda leaf: leaf[0], samples)
        graph = traced(f, (first, *args), {}, options)
        sets = [arithmetic.region(graph, region) for region in graph.inputs]
        sizes = [arithmetic.region(graph, _magnitudes(region)) for region in graph.inputs]

        def charged(found: Any, precision: Precision) -> Any:
            variants, boxes = found
            charged = [[_before_average(p, sizes, count) for p in planes] for planes in variants]
            return charged, [_ends_before_average(box, count) for box in boxes]

        def one(params: Any) -> tuple[list[list[LinearBounds]], list[Box]]:
            own = traced(f, (params, *args), {}, options)
            found, variants = linear_outputs(own, chosen, options)
            for planes in variants:
                found = _intersected(found, planes, sets)
            return arithmetic.allow((variants, found), charged)

        def add(total: PyTree, params: Any) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, one(params)), None

        shapes = jax.eval_shape(one, first)
        zero = jax.tree.map(lambda s: varying(jnp.zeros(s.shape, s.dtype), axes_of(s)), shapes)
        total, _ = jax.lax.scan(add, zero, samples)
        variants, found = jax.tree.map(lambda leaf: leaf / count, total)
        found = [drop_nan(box) for box in found]  # an end that overflowed either way
        for planes in variants:
            found = _intersected(found, planes, sets)
        found = [unbounded_unless(graph.valid, box) for box in found]
        return jax.tree.unflatten(graph.out_tree, found)

    return bounded


def concretized(bounds: LinearBounds, sets: Sequence[Set]) -> Box:
    """The extremes of linear bounds over their sets.

    Args:
        bounds: of one output leaf, as `linear_bounds` returns them.
        sets: those among the arguments, in order.
    """

    def rows(side: Affine) -> Row:
        leaves = zip(jax.tree.leaves(side.A), sets, strict=True)
        parts = [a.reshape(-1, *jnp.shape(region.center)) for a, region in leaves]
        offset = side.b.reshape(-1)
        return Row(dict(enumerate(parts)), offset, jnp.zeros_like(offset))

    above = jax.tree.map(jnp.negative, bounds.upper)
    both = rows(bounds.lower), rows(above)
    box = jax.vmap(lambda lower, upper: concretize(lower, upper, sets))(*both)
    return jax.tree.map(lambda end: end.reshape(bounds.lower.b.shape), box)


def _intersected(
    boxes: Sequence[Box], planes: Sequence[LinearBounds], sets: Sequence[Set]
) -> list[Box]:
    pairs = zip(boxes, planes, strict=True)
    return [intersect(box, concretized(bounds, sets)) for box, bounds in pairs]


def _before_average(bounds: LinearBounds, sizes: Sequence[Set], count: int) -> LinearBounds:
    """A sample's linear bounds, their offsets moved outward by its part of what averages lose.

    Args:
        bounds: of one output leaf.
        sizes: for each set, one that holds the magnitudes |x| of its points.
        count: the number of samples.
    """
    relative, absolute = _average_error(jax.tree.leaves(bounds), count + len(sizes))
    reach = sum(jnp.sum(1 + magnitude(hull(region))) for region in sizes)

    def error(side: Affine) -> Array:
        size = jax.tree.map(jnp.abs, side)
        most = concretized(LinearBounds(size, size), sizes).upper
        return (relative * most + absolute * (1 + reach)).astype(side.b.dtype)

    (below, low), (above, high) = bounds
    return LinearBounds(
        Affine(below, low - error(bounds.lower)), Affine(above, high + error(bounds.upper))
    )


def _ends_before_average(box: Box, count: int) -> Box:
    return widened(box, *_average_error([box.lower], count))


def _average_error(leaves: Sequence[Array], count: int) -> tuple[float, float]:
    """Twice gamma(n), and n t, of the least exact of some arrays."""
    infos = [jnp.finfo(leaf.dtype) for leaf in leaves]
    unit = 0.5 * max(float(info.eps) for info in infos)
    return 2 * gamma(count + 8, unit), 8 * (count + 8) * max(float(info.tiny) for info in infos)


def _magnitudes(region: Set) -> Set:
    """A set that holds |x|, elementwise, of every x of a set."""
    if isinstance(region, LpBall):
        return LpBall(jnp.abs(region.center), region.eps, region.p)
    size = magnitude(region)
    return Box(size, size)


def _num_samples(samples: Stacked) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"samples have leading axes {sorted(sizes)}: stack the weights, so that every leaf has "
            "the same leading axis S (bnncert.posterior.stack)."
        )
    return sizes.pop()[0]
