"""Bounds on an average over posterior samples, jointly: one adversarial input for all of them.

    min_x mean_i f(w_i, x)  >=  mean_i min_x f(w_i, x)

Bounded sample by sample, each gets its own worst input: the right side. Instead each sample is
relaxed, f(w_i, x) >= A_i x + b_i, and the *average* of the linear bounds is minimised over the set,
once. Intersected with the average of the separate bounds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bnncert.bounds.api import DEFAULT_BATCH_SIZE, LinearBounds, linear_bounds, linear_outputs
from bnncert.bounds.backward import Coefficients, Offset, Row, concretize
from bnncert.bounds.graph import trace
from bnncert.bounds.interval import intersect
from bnncert.bounds.sweeps import Options
from bnncert.emptiness import unbounded_unless
from bnncert.sets import Box, is_set
from bnncert.types import Samples


def mean_bound(
    f: Callable[..., PyTree],
    method: str = "crown-ibp",
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    lower_slope: str = "adaptive",
) -> Callable[..., PyTree]:
    """Bounds on the average of f(w_i, ...) over samples of its first argument.

    The same as `bound(lambda *args: mean_i f(w_i, *args))`, but for memory: samples are swept one
    after another. And never wider than the average of `bound(f)(w_i, ...)` by the same method.

    Args:
        f: `(params, *args) -> outputs`; e.g. a softmax of logits, or differences of them.
        method: "crown-ibp" or "crown".
        batch_size: rows of a backward pass at once.
        lower_slope: of a ReLU that crosses 0.

    Returns:
        `(samples, *args) -> outputs` with a `Box` for each leaf; leaves of `samples` have a leading
        axis S. Sets are among the args.

    Raises:
        ValueError: samples without a common leading axis; else as `bound`.

    Cost: S times `linear_bounds` and IBP, one sample at a time. Memory: that of one sample, and the
    linear bounds (outputs times coordinates of the sets), whatever S is.

    Example:
        >>> f = lambda w, x: jax.nn.relu(w * x)
        >>> w, x = jnp.array([1.0, -1.0]), Box(jnp.float32(-1.0), jnp.float32(1.0))
        >>> box = mean_bound(f, "crown")(w, x)
        >>> float(box.lower), float(box.upper)
        (0.0, 0.5)
    """
    linear_bounds(f, method, batch_size=batch_size, lower_slope=lower_slope)  # checks the options
    options = Options(batch_size, lower_slope)

    def bounded(samples: Samples, *args: Any) -> PyTree:
        num_samples = _num_samples(samples)
        first = jax.tree.map(lambda leaf: leaf[0], samples)
        whole = trace(f, (first, *args), {})

        def one(params: Any) -> tuple[list[list[LinearBounds]], list[Box]]:
            graph = trace(f, (params, *args), {})
            separate, variants = linear_outputs(graph, method, options)
            for planes in variants:
                separate = [
                    intersect(box, concretized(p, graph.inputs))
                    for box, p in zip(separate, planes, strict=True)
                ]
            return variants, separate

        def add(total: PyTree, params: Any) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, one(params)), None

        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first))
        total, _ = jax.lax.scan(add, zero, samples)
        variants, found = jax.tree.map(lambda leaf: leaf / num_samples, total)
        for planes in variants:
            found = [
                intersect(box, concretized(p, whole.inputs))
                for box, p in zip(found, planes, strict=True)
            ]
        found = (unbounded_unless(whole.valid, box) for box in found)
        return jax.tree.unflatten(whole.out_tree, found)

    return bounded


def concretized(bounds: LinearBounds, args: tuple) -> Box:
    """The extremes of linear bounds over their sets.

    Args:
        bounds: of one output leaf, as `linear_bounds` returns them.
        args: what `linear_bounds(f)` was called with, or the sets among them.
    """
    sets = [leaf for leaf in jax.tree.leaves(args, is_leaf=is_set) if is_set(leaf)]
    below, above = (jax.tree.leaves(side.A) for side in bounds)
    shape = bounds.lower.b.shape
    flat = [
        Coefficients(*(a.reshape(-1, *jnp.shape(region.center)) for a in pair))
        for *pair, region in zip(below, above, sets, strict=True)
    ]
    offsets = Offset(bounds.lower.b.reshape(-1), bounds.upper.b.reshape(-1))
    rows = Row(dict(enumerate(flat)), offsets)
    box = jax.vmap(lambda row: concretize(row, sets))(rows)
    return Box(box.lower.reshape(shape), box.upper.reshape(shape))


def _num_samples(samples: Samples) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"samples have leading axes {sorted(sizes)}: stack the weights, so that every leaf has "
            "the same leading axis S (bnncert.posterior.stack)."
        )
    return sizes.pop()[0]
