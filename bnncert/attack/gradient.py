"""Gradient attacks on the posterior predictive: FGSM and PGD.

The network attacked is the one deployed, pi(x') = (1/S) sum_s softmax f(w_s, x'), and the attack
looks for the point of a ball around x where the true class y wins by least:

    minimise  margin(x') = log pi_y(x') - max_{j != y} log pi_j(x')    over |x' - x|_p <= eps,

ascending the negative log-likelihood -log pi_y. With m_s = logsumexp_{j != y} f_j - f_y, the
log-odds against y under sample s, its gradient is one sum over samples,

    -grad log pi_y = sum_s sigma(m_s) sigma(-m_s) grad m_s / sum_s sigma(-m_s),

not the mean of the samples' gradients: a sample counts by how undecided it is. Weighing the
grad m_s by a softmax of log(sigma(m_s) sigma(-m_s)) gives the direction with neither underflow
where every sample is sure y is wrong (p ~ e^-200) nor loss of the gradient where all are sure of y.

An attack that fails proves nothing; one that succeeds proves that the network is not robust at x.

Sources: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015 (FGSM);
Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018 (PGD);
Carbone et al., "Robustness of Bayesian neural networks to gradient-based attacks", NeurIPS 2020,
equation 4 (attacks on the predictive).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from optax import projections

from bnncert.bounds.convolution import canonical
from bnncert.sets import ball, check_clip, check_radius, is_concrete
from bnncert.types import Apply, Key, Params, Samples


class AttackResult(NamedTuple):
    """The worst point an attack found: an estimate of robustness from above, never a proof.

    Attributes:
        x: the point, of the input's shape, in the ball and in clip.
        predicted: the class chosen there: y, or the best rival if `broken`.
        broken: whether y is not the strict winner there; ties and NaN count as broken.
        margin: log pi_y - max_{j != y} log pi_j there, in nats; -inf where it was NaN.
    """

    x: Float[Array, "..."]
    predicted: Int[Array, ""]
    broken: Bool[Array, ""]
    margin: Float[Array, ""]


def pgd(
    key: Key,
    apply: Apply,
    samples: Samples,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    steps: int = 20,
    step_size: Float[ArrayLike, ""] | None = None,
    restarts: int = 1,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> AttackResult:
    """Projected gradient descent on one example: the worst of all iterates and restarts.

    The first restart begins at x itself, so the clean input is among the candidates; the others
    begin uniformly in the ball. With one key and one `step_size`, more steps or more restarts only
    add candidates. Batch with `jax.vmap` over key, x and y, and call it under one `jax.jit`: run
    outside, it compiles anew at each call. `eps` may be traced: another radius costs no compile.

    Args:
        key: a PRNG key for the random starts.
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        steps: gradient steps, >= 1.
        step_size: length of a step in the norm p, in the units of x; 2.5 eps / steps by default.
        restarts: starting points, >= 1.
        clip: `(low, high)`, the range of the input's values; an x outside it stays a candidate.
        p: inf (steps along the gradient's sign) or 2 (along the gradient).
        batch_size: samples evaluated at once, one by default; dense layers gain from more. On CPU
            convolutions do not (`vmap` over kernels makes grouped ones), and inside a loop XLA
            runs them fast only in the layout NHWC with kernels HWIO, forwards and backwards.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError: for an integer x or a y that is no integer.
        ValueError: for a bad radius, count, p or clip, samples that are not stacked, a label that
            names no class.

    Cost: restarts (steps + 1) S forward and backward passes. Memory, times the batch under `vmap`:
    (restarts + batch_size) |x| + batch_size A, A being what a backward pass keeps of its forward
    pass; besides the samples, which are shared, independent of S and of steps.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> result = pgd(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25)
        >>> result.x.tolist(), bool(result.broken), result.margin.item()
        ([0.25, 0.75], True, -0.25)
    """
    x = jnp.asarray(x)
    _check(samples, x, y, eps, p, steps=steps, restarts=restarts, batch_size=batch_size)
    eps = jnp.asarray(eps, x.dtype)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    check_radius(step_size, "step_size")
    geometry = _GEOMETRIES[p]
    project = partial(geometry.project, x, eps, clip)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(restarts))
    starts = jax.vmap(lambda k: project(x + eps * geometry.draw(k, x)))(keys).at[0].set(x)

    def move(x: Array, direction: Array) -> Array:
        return project((x + step_size * geometry.steepest(direction)).astype(x.dtype))

    return _search(lambda x: _ascent(apply, samples, x, y, batch_size), move, starts, y, steps)


def fgsm(
    apply: Apply,
    samples: Samples,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    clip: tuple[float, float] | None = None,
    batch_size: int | None = None,
) -> AttackResult:
    """The fast gradient sign method: x + eps sign(-grad log pi_y), or x itself if that is worse.

    Args:
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        clip: `(low, high)`, the range of the input's values.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError, ValueError: as `pgd`.

    Cost: 2 S forward and backward passes.
    """
    unused = jax.random.key(0)  # a single start is x itself
    return pgd(
        unused, apply, samples, x, y, eps, steps=1, step_size=eps, clip=clip, batch_size=batch_size
    )


class _Ascent(NamedTuple):
    """Sums over samples, in logs; -grad log pi_y = exp(log_weight - log_probs[y]) direction."""

    log_probs: Array  # log sum_s p_s(c), shape (C,)
    log_weight: Array  # log sum_s sigma(m_s) sigma(-m_s)
    direction: Array  # the mean of grad m_s under these weights, of the input's shape


def _ascent(
    apply: Apply, samples: Samples, x: Array, y: ArrayLike, batch_size: int | None
) -> _Ascent:
    """The predictive at x and the direction in which its loss at y grows.

    One sweep over the samples with running log-sum-exps: no activation or gradient is stacked over
    samples. Under `jax.vmap` over x it stays a loop over samples, with batched bodies.
    """

    def odds(params: Params, x: Array) -> tuple[Array, Array]:
        logits = apply(params, x)
        _check_logits(logits, y)
        rivals = jnp.where(jnp.arange(logits.size) == y, -jnp.inf, logits)
        return jax.nn.logsumexp(rivals) - logits[y], logits

    gradient_of = canonical(jax.value_and_grad(odds, argnums=1, has_aux=True))

    def one(params: Params) -> _Ascent:
        (m, logits), gradient = gradient_of(params, x)
        log_weight = jax.nn.log_sigmoid(m) + jax.nn.log_sigmoid(-m)
        return _Ascent(jax.nn.log_softmax(logits), log_weight, gradient)

    def add(total: _Ascent, new: _Ascent) -> _Ascent:
        """Add a chunk, its samples on the leading axis; directions stay weighted means."""
        log_probs = jnp.logaddexp(total.log_probs, jax.nn.logsumexp(new.log_probs, axis=0))
        log_weight = jnp.logaddexp(total.log_weight, jax.nn.logsumexp(new.log_weight))
        share = jnp.exp(new.log_weight - log_weight)
        direction = jnp.exp(total.log_weight - log_weight) * total.direction
        direction += jnp.tensordot(share, new.direction, axes=1, precision="highest")
        return _Ascent(log_probs, log_weight, direction.astype(total.direction.dtype))

    first = jax.eval_shape(lambda s: one(jax.tree.map(lambda leaf: leaf[0], s)), samples)
    fill = (-jnp.inf, -jnp.inf, 0.0)  # sums of no sample
    nothing = [jnp.full(a.shape, v, a.dtype) for a, v in zip(first, fill, strict=True)]
    return _fold(one, add, _Ascent(*nothing), samples, batch_size)


def _fold(
    one: Callable, add: Callable, total: _Ascent, samples: Samples, batch_size: int | None
) -> _Ascent:
    """Fold `add` over the samples' terms, in chunks; the last chunk may be shorter."""
    num = jax.tree.leaves(samples)[0].shape[0]
    size = min(batch_size or 1, num)
    whole = num // size * size

    def step(total: _Ascent, chunk: Params) -> tuple[_Ascent, None]:
        if size == 1:  # without vmap: a plain convolution, not a group of one
            term = one(jax.tree.map(lambda leaf: leaf[0], chunk))
            return add(total, jax.tree.map(lambda leaf: leaf[None], term)), None
        return add(total, jax.vmap(one)(chunk)), None

    shape = (whole // size, size)
    chunks = jax.tree.map(lambda a: a[:whole].reshape(*shape, *a.shape[1:]), samples)
    total, _ = jax.lax.scan(step, total, chunks)
    if whole < num:
        total, _ = step(total, jax.tree.map(lambda leaf: leaf[whole:], samples))
    return total


def _search(
    evaluate: Callable[[Array], _Ascent],
    move: Callable[[Array, Array], Array],
    starts: Array,
    y: ArrayLike,
    steps: int,
) -> AttackResult:
    """Descend from each start; keep the first point of least margin among all evaluated.

    The last evaluation computes a direction that nobody follows: one backward pass in steps + 1,
    for a single compiled body.
    """

    def iterate(carry: tuple[Array, AttackResult], _: None) -> tuple[Any, None]:
        x, worst = carry
        here = evaluate(x)
        new = _result(x, here.log_probs, y)
        worst = jax.tree.map(partial(jnp.where, new.margin < worst.margin), new, worst)
        # a coordinate whose gradient is not finite stays where it is, inside the ball
        finite = jnp.where(jnp.isfinite(here.direction), here.direction, 0.0)
        return (move(x, finite), worst), None

    def descend(worst: AttackResult, start: Array) -> tuple[AttackResult, None]:
        (_, worst), _ = jax.lax.scan(iterate, (start, worst), length=steps + 1)
        return worst, None

    none_yet = AttackResult(
        starts[0], jnp.asarray(y, int), jnp.asarray(False), jnp.asarray(jnp.inf, starts.dtype)
    )
    return jax.lax.scan(descend, none_yet, starts)[0]


def _result(x: Array, log_probs: Array, y: ArrayLike) -> AttackResult:
    rivals = jnp.where(jnp.arange(log_probs.size) == y, -jnp.inf, log_probs)
    margin = log_probs[y] - jnp.max(rivals)
    margin = jnp.where(jnp.isnan(margin), -jnp.inf, margin).astype(x.dtype)
    broken = ~(margin > 0)
    predicted = jnp.where(broken, jnp.argmax(rivals), y).astype(int)
    return AttackResult(x, predicted, broken, margin)


class _Geometry(NamedTuple):
    """What depends on the norm: the set, its steepest unit step, a draw in its unit ball."""

    project: Callable[[Array, Array, tuple[float, float] | None, Array], Array]
    steepest: Callable[[Array], Array]
    draw: Callable[[Key, Array], Array]


def _project_box(x: Array, eps: Array, clip: tuple[float, float] | None, point: Array) -> Array:
    box: Any = ball(x, eps, clip=clip)  # float for float the box that certificates speak of
    return projections.projection_box(point, box.lower, box.upper)


def _project_l2(x: Array, eps: Array, clip: tuple[float, float] | None, point: Array) -> Array:
    unit = projections.projection_l2_ball((point - x) / jnp.where(eps > 0, eps, 1.0), 1.0)
    point = x + eps * unit
    if clip is None:
        return point
    low, high = check_clip(clip)
    # x is in this range, so moving towards the range moves towards x: the ball is not left
    return projections.projection_box(point, jnp.minimum(low, x), jnp.maximum(high, x))


def _normalize(direction: Array) -> Array:
    largest = jnp.max(jnp.abs(direction))
    direction = direction / jnp.where(largest > 0, largest, 1.0)  # squares of 1e-30 would be 0
    return direction / jnp.maximum(jnp.linalg.norm(direction), 1.0)


def _draw_box(key: Key, x: Array) -> Array:
    return jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)


def _draw_l2(key: Key, x: Array) -> Array:
    return jax.random.ball(key, x.size, 2, (), x.dtype).reshape(x.shape)


_GEOMETRIES = {
    jnp.inf: _Geometry(_project_box, jnp.sign, _draw_box),
    2: _Geometry(_project_l2, _normalize, _draw_l2),
}


def _check(
    samples: Samples, x: Array, y: ArrayLike, eps: ArrayLike, p: float | int, **counts: int | None
) -> None:
    """Checks the arguments at the public edge, values where they are known."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x has dtype {x.dtype}: an attack moves floating-point values. For images, scale "
            "them first: x.astype(jnp.float32) / 255."
        )
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise TypeError(f"y has dtype {jnp.result_type(y)}: a label is an integer.")
    for name, value in {"y": y, "eps": eps}.items():
        if shape := jnp.shape(value):
            raise ValueError(f"{name} has shape {shape}: give one example, jax.vmap a batch.")
    check_radius(eps)
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1.")
    if p not in _GEOMETRIES:
        raise ValueError(f"p = {p}: choose 2 or jnp.inf.")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "samples must be stacked params, every leaf with the same leading axis of S >= 1 "
            f"networks; leading axes found: {sorted(lengths)}. One network: add an axis to each "
            "leaf, jax.tree.map(lambda w: w[None], params)."
        )


def _check_logits(logits: Array, y: ArrayLike) -> None:
    if logits.ndim != 1 or logits.size < 2:
        raise ValueError(
            f"apply returned shape {logits.shape} for one example; it must return logits (C,) of "
            "C >= 2 classes. x is one example, without a batch axis."
        )
    if is_concrete(y) and not 0 <= int(y) < logits.size:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"y = {y}: labels must be in 0..{logits.size - 1}.")
