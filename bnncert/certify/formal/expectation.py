"""Expectation bounds: E_w[f(w, x)] and E_w[softmax f(w, x)] over a set of inputs, q Gaussian.

The posterior is a factorised Gaussian on all of R^P: this is the *formal* tier, no weight is
truncated and no draw stands for it. `bnncert.certify.formal.moments` bounds means and variances
layer by layer. The last layer is taken together with the differences of outputs, y_j = f_j - f_c,
whose means are at most m_j and variances at most v_j:

    E softmax_c  >=  exp(-log(1 + sum_j e^m_j) - sum_j v_j / 4)             Jensen, twice
    E softmax_c  >=  1 - sum_j sup E sigma(y_j)
    E sigma(y)   <=  sigma(m) + v / 20
    E sigma(y)   <=  sigma(t) + (1 - sigma(t)) v / (v + (t - m)^2),  t > m  Cantelli

(softmax's log has a Hessian H with y' H y <= sum y_j^2 / 2, and sigma'' < 1/10). They are vacuous
where the v_j are far above the squares of the m_j: a posterior that has gone back to its prior
cannot be bounded so. `method="linear"` bounds the expected softmax another way
(`bnncert.certify.formal.expected_softmax`): from the tails of bounds that are linear in the
weights, which rows tighten, and which know any nonlinearity.

What holds is the expectation in real arithmetic; what is computed gives way by its own rounding.

Source: Adams, Patane, Lahijanian & Laurenti, "BNN-DP: Robustness Certification of Bayesian Neural
Networks via Dynamic Programming", ICML 2023 (the problem, and bounds by linear relaxation).
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert._emptiness import unbounded_unless
from bnncert.bounds.graph import Graph, Node, UnsupportedPrimitiveError
from bnncert.bounds.graph.operands import Ref
from bnncert.bounds.ops.affine import constant_magnitude, magnitude
from bnncert.bounds.ops.boxes import intersect
from bnncert.bounds.rounding import Precision, tracking
from bnncert.bounds.tracing import trace
from bnncert.certify.formal.expected_softmax import expected_softmax
from bnncert.certify.formal.moments import PRODUCTS, Value, moments, settled, unit_error
from bnncert.certify.inputs import check_region
from bnncert.posterior import MeanField
from bnncert.posterior.leaves import check_structure
from bnncert.sets import Box, Set
from bnncert.types import Apply, Params, Posterior


class Expectation(NamedTuple):
    """Bounds on a network's outputs in expectation over its weights, over a set of inputs.

    Attributes:
        outputs: a `Box` around E_w[f(w, x)], of the outputs' shape.
        deviation: upper bounds on the standard deviation of each output over w, of that shape.
        probabilities: a `Box` around E_w[softmax f(w, x)], of that shape (classes last and only).

    Example:
        >>> q = MeanField(jnp.array([1.0, -1.0]), jnp.array([0.1, 0.1]))
        >>> found = expectation(lambda w, x: w * x, q, Box(jnp.ones(1), jnp.ones(1)))
        >>> f"{float(found.deviation[0]):.2f}", bool(found.probabilities.lower[0] > 0.8)
        ('0.10', True)
    """

    outputs: Box
    deviation: Float[Array, "..."]
    probabilities: Box


def expectation(
    apply: Apply,
    posterior: Posterior,
    x_set: Set,
    *,
    method: str | Sequence[str] = "moments",
) -> Expectation:
    """Bounds the expected outputs and probabilities over a set of inputs.

        E softmax_c >= exp(-log(1 + sum_j e^m_j) - sum_j v_j / 4)
        E softmax_c >= 1 - sum_j sup E sigma(y_j)

    for means E y_j <= m_j and variances Var y_j <= v_j of y_j = f_j - f_c.

    Args:
        apply: `(params, x) -> outputs (C,)` for one example: affine layers, dense or convolutional,
            each weight used in one of them, and, by "moments", ReLU between.
        posterior: a factorised Gaussian; by "linear" alone a `LowRank` or `Gaussian` too.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        method: "moments", means and variances layer by layer, which bound the outputs as well;
            "linear", bounds linear in the weights, of the probabilities alone; or both, whose
            bounds are intersected.

    Returns:
        An `Expectation`, in real arithmetic. The class that the predictive chooses stays the same
        over the set where its `probabilities.lower` is above the others' `probabilities.upper`.
        Where the set is traced and empty nothing is said: (-inf, inf), inf and [0, 1].
        By "linear" alone so too of the outputs.

    Raises:
        TypeError: another posterior; x_set is not a set.
        ValueError: outputs that are not a vector; a posterior whose loc and scale do not match; an
            unknown method.
        UnsupportedPrimitiveError: an operation on random values that has no rule; weights that are
            used twice; arithmetic on weights that are not random.

    Cost: by "moments" seven evaluations of the network and C^2 rows of its last layer. Intervals
    over the set pass from layer to layer, so that it suits networks trained for IBP. By "linear"
    `bnncert.gaussian.margins` with C (C - 1) rows.

    Source: Adams et al., ICML 2023 (the problem, and bounds by linear relaxation).

    Example:
        >>> apply = lambda w, x: jnp.array([1.0, -1.0]) * jax.nn.relu(w * x)
        >>> posterior = MeanField(jnp.array([2.0]), jnp.array([0.1]))
        >>> found = expectation(apply, posterior, Box(jnp.array([0.9]), jnp.array([1.1])))
        >>> print(found.outputs.lower.round(2), found.outputs.upper.round(2))
        [ 1.8 -2.2] [ 2.2 -1.8]
        >>> print(found.deviation.round(2), f"{float(found.probabilities.lower[0]):.2f}")
        [0.11 0.11] 0.97
    """
    ways = [_METHODS[name] for name in _names(method)]
    check_region(x_set)
    found = [way(apply, posterior, x_set) for way in ways]
    boxes = [each.probabilities for each in found]
    return found[0]._replace(probabilities=reduce(intersect, boxes))


def _names(method: str | Sequence[str]) -> list[str]:
    """Lists the methods, "moments" first."""
    names = [method] if isinstance(method, str) else list(method)
    if not names or any(name not in _METHODS for name in names):
        raise ValueError(
            f"method = {method!r}: choose one of {', '.join(map(repr, _METHODS))}, or several."
        )
    return [name for name in _METHODS if name in names]


def _by_linear_bounds(apply: Apply, posterior: Posterior, x_set: Set) -> Expectation:
    """Bounds the probabilities by bounds that are linear in the weights."""
    probabilities = expected_softmax(apply, posterior, x_set)
    nothing = jnp.full_like(probabilities.lower, jnp.inf)
    return Expectation(Box(-nothing, nothing), nothing, probabilities)


def _by_moments(apply: Apply, posterior: Posterior, x_set: Set) -> Expectation:
    """Bounds outputs and probabilities by means and variances, layer by layer."""
    if not isinstance(posterior, MeanField):
        raise TypeError(
            f"the posterior is a {type(posterior).__name__}: expectation bounds are for a "
            "factorised Gaussian, bnncert.posterior.MeanField. For a LowRank or Gaussian, use "
            'method="linear"; for others, bnncert.certify.statistical.'
        )
    check_structure(posterior.loc, posterior.scale, "scale")
    graph = trace(apply, (_points(posterior), x_set), {}, tracking(Precision()))
    _check_constants(graph)
    output = graph.outputs[0]
    if len(graph.outputs) != 1 or not isinstance(output, Ref):
        raise ValueError("apply must return one array that depends on the weights or the input")
    shape = graph.nodes[output.index].shape
    if len(shape) != 1:
        raise ValueError(f"apply must return a vector of outputs; its value has shape {shape}")
    scales = [jnp.asarray(s) for s in priors.named(posterior.scale).values() if s is not None]
    values = moments(graph, scales)
    found = _at_the_output(graph, values, output.index)
    if graph.valid is None:
        return found
    one = jnp.ones_like(found.deviation)
    return Expectation(
        unbounded_unless(graph.valid, found.outputs),
        jnp.where(graph.valid, found.deviation, jnp.inf),
        jax.tree.map(partial(jnp.where, graph.valid), found.probabilities, Box(0 * one, one)),
    )


_METHODS = {"moments": _by_moments, "linear": _by_linear_bounds}


def _check_constants(graph: Graph) -> None:
    """Raises UnsupportedPrimitiveError for constants that apply computes: their rounding counts."""
    for node in graph.nodes:
        for constant in filter(None, node.computed):
            raise UnsupportedPrimitiveError(
                f"'{constant.op}' of weights that are not random, called at "
                f"{constant.source or 'a line inside JAX'}, is rounded, and flows into "
                f"'{node.op}': an expectation bound is exact in its constants. Compute it before, "
                "so that apply is given its result."
            )


def _points(posterior: MeanField) -> Params:
    """Makes params with a `Box` of one point for each random leaf."""
    scales = priors.named(posterior.scale)
    leaves = [
        leaf if scales[name] is None else Box(jnp.asarray(leaf), jnp.asarray(leaf))
        for name, leaf in priors.named(posterior.loc).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(posterior.loc), leaves)


class _Last(NamedTuple):
    """The layer before an output: `rows @ E h + offset` is the output's mean.

    Attributes:
        h: the values it acts on, flat.
        rows: shape (C, size of h).
        offset: shape (C,).
        size: shape (C,), of every sum that is made on the way with the magnitudes of its terms.
        terms: how many roundings one of them passes through.
    """

    h: Value
    rows: Array
    offset: Array
    size: Array
    terms: int


def _at_the_output(graph: Graph, values: list[Value], index: int) -> Expectation:
    """Bounds the outputs and, together with their differences, the probabilities."""
    out = values[index]
    unit = unit_error(out.own, 16)
    deviation = (1 + unit) * jnp.sqrt(out.own + jnp.square(out.shared))
    last = _last_layer(graph, values, index) if out.gaussian else None
    if last is None:
        means = _pairs(out.mean.upper, -out.mean.lower)
        means = means + unit * jnp.abs(means)
        shared = _pairs(out.shared, out.shared)
    else:
        means, shared = _differences(last)
    own = _pairs(out.own, out.own)
    if not out.independent:
        own = jnp.square(_pairs(jnp.sqrt(out.own), jnp.sqrt(out.own)))
    variances = (1 + unit) * (own + jnp.square(shared))
    return Expectation(out.mean, deviation, _probabilities(means, variances))


def _pairs(a: Array, b: Array) -> Array:
    """Puts a_j + b_c at (c, j)."""
    return a[None] + b[:, None]


def _last_layer(graph: Graph, values: list[Value], index: int) -> _Last | None:
    """Finds the one product with weights behind an output, with what is affine after it."""
    tail, source = {index}, None
    for i in range(index, -1, -1):
        node = graph.nodes[i]
        if i not in tail:
            continue
        if node.op == "input":
            if not values[i].weights and i != source:
                return None  # the input itself, past the layer
            continue
        if len(node.refs) == 2 and node.op in PRODUCTS:
            if source is not None:
                return None
            source = next(j for j in node.refs if not values[j].weights)
            tail |= {j for j in node.refs if j != source}
        elif node.op == "max":
            return None
        else:
            tail |= set(node.refs)
    if source is None:
        return None
    h = values[source]

    def replay(flat: Array) -> Array:
        known: dict[int, Array] = {source: flat.reshape(h.own.shape)}
        for i in sorted(tail):
            node = graph.nodes[i]
            if node.op == "input":
                known[i] = values[i].mean.center
            elif i != source:
                known[i] = node.evaluate(*node.fill([known[j] for j in node.refs]))
        return known[index]

    zero = jnp.zeros(h.own.size, h.own.dtype)
    sizes = {source: jnp.abs(h.mean.center) + h.mean.radius}
    for i in sorted(tail):
        if i != source:
            sizes[i] = _size(graph.nodes[i], values[i], [sizes[j] for j in graph.nodes[i].refs])
    terms = h.own.size + 2 * len(tail)
    return _Last(h, jax.jacrev(replay)(zero), replay(zero), sizes[index], terms)


def _size(node: Node, value: Value, operands: Sequence[Array]) -> Array:
    """Computes an input's magnitude, or what an operation makes of magnitudes and constants."""
    if node.op == "input":
        return jnp.abs(value.mean.center) + value.mean.radius
    if len(operands) == 2 and node.op in PRODUCTS:
        return node.evaluate(*operands)
    size = magnitude(node, *operands)
    return size + constant_magnitude(node, *operands) if node.has_constant else size


def _differences(last: _Last) -> tuple[Array, Array]:
    """Bounds E[f_j - f_c] and the deviation of E[f_j - f_c | past] from above, at (c, j)."""
    rows = _pairs(last.rows, -last.rows)
    h = settled(last.h)
    unit = unit_error(rows, last.terms)
    center, radius = h.mean.center.ravel(), h.mean.radius.ravel()
    error = 2 * unit * _pairs(last.size, last.size)
    means = _times(rows, center) + _pairs(last.offset, -last.offset)
    means = means + _times(jnp.abs(rows), radius) + error
    shared = jnp.sqrt(_times(jnp.square(rows), h.own.ravel()))
    return means, (1 + 2 * unit) * (shared + _times(jnp.abs(rows), h.shared.ravel()))


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _probabilities(means: Array, variances: Array) -> Box:
    """Bounds E softmax_c, from upper bounds on mean and variance of f_j - f_c, at (c, j)."""
    count = means.shape[0]
    other = ~jnp.eye(count, dtype=bool)
    means = jnp.where(other, means, 0.0)
    variances = jnp.where(other, variances, 0.0)
    unit = unit_error(means, count)
    # 1. From below: Jensen twice, or 1 less what the others have at most.
    exponent = jax.nn.logsumexp(means, axis=1) + 0.25 * variances.sum(1)
    by_jensen = (1 - unit) * jnp.exp(-(1 + unit) * exponent)
    each = jnp.where(other, _sigmoid_above(means, variances), 0.0)
    lower = jnp.clip(jnp.maximum(by_jensen, 1 - (1 + unit) * each.sum(1)), 0.0, 1.0)
    # 2. From above: 1 less what the others have at least, or sigma of one difference.
    rest = 1 - (1 - unit) * jnp.where(other, lower[None], 0.0).sum(1) + unit
    # sigma(f_c - f_j) is at (j, c)
    pairs = jnp.where(other, each.T, 1.0).min(1)
    return Box(lower, jnp.clip(jnp.minimum(rest, pairs), lower, 1.0))


_REACHES = np.geomspace(0.3, 300.0, 40)


def _sigmoid_above(mean: Array, variance: Array) -> Array:
    """Bounds E sigma(y) from above, for E y <= mean and Var y <= variance."""
    unit = unit_error(mean, 16)
    ahead = jnp.asarray(_REACHES, mean.dtype)[:, None, None] * jnp.sqrt(variance)
    least = jax.nn.sigmoid(jnp.maximum(mean + ahead, -40.0))
    tail = variance / jnp.maximum(variance + jnp.square(ahead), jnp.finfo(mean.dtype).tiny)
    by_cantelli = (least + (1 - least) * tail).min(0)
    by_curvature = jax.nn.sigmoid(jnp.maximum(mean, -40.0)) + 0.05 * variance
    return jnp.minimum((1 + unit) * jnp.minimum(by_cantelli, by_curvature), 1.0)
