"""The posterior predictive as an attack sees it: log pi, and where a loss of it grows fastest.

With log p_s(c) = log softmax_c f(w_s, x) and log pi_c = logsumexp_s log p_s(c), a loss L of log pi
(in the place that logits have in attacks on one network) has the gradient

    grad L = sum_s sum_c  L_c r_s(c)  grad log p_s(c),     r_s(c) = p_s(c) / sum_t p_t(c)

L_c being its slope in log pi_c. The responsibilities r are known once log pi is: `loss_ascent`
sweeps twice over the samples, and keeps S C numbers in between. log pi is taken without the -log S
of the average, and is one of many: losses have to be the same for log pi + constant.

One loss needs a single sweep (`ascent`): the negative log-likelihood -log pi_y. With
m_s = logsumexp_{j != y} f_j - f_y, the log-odds against y under sample s,

    -grad log pi_y = sum_s sigma(m_s) sigma(-m_s) grad m_s / sum_s sigma(-m_s),

not the mean of the samples' gradients: a sample counts by how undecided it is. Weighing the
grad m_s by a softmax of log(sigma(m_s) sigma(-m_s)) gives the direction with neither underflow
where every sample is sure y is wrong (p ~ e^-200) nor loss of the gradient where all are sure of y.

Source: Carbone et al., "Robustness of Bayesian neural networks to gradient-based attacks",
NeurIPS 2020, equation 4 (attacks on the predictive).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bnncert._compiler.convolution import canonical
from bnncert._varying import axes_of, varying
from bnncert.sets import is_concrete
from bnncert.types import Apply, Params, Stacked

Loss = Callable[[Array], Array]
"""`loss(log pi (C,)) -> scalar`, the same for log pi + constant; attacks make it large."""


class AttackResult(NamedTuple):
    """The worst point that an attack found: an estimate of robustness from above, never a proof.

    Where the set is traced and empty (a negative radius, an x that is not finite or not in clip)
    there is no point, and nothing that looks as if an attack was withstood: x is NaN, predicted -1,
    broken True and margin -inf.

    Attributes:
        x: the point, of the input's shape, in the ball and in clip.
        predicted: the class chosen there: y, or the best rival if `broken`.
        broken: whether y is not the strict winner there; ties and NaN count as broken.
        margin: log pi_y - max_{j != y} log pi_j there, in nats; -inf where it was NaN.

    Example:
        >>> from bnncert.attack import fgsm
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> found = fgsm(lambda w, x: w @ x, w, jnp.array([0.5, 0.5]), 0, 0.125)
        >>> found.x.tolist(), bool(found.broken), found.margin.item()
        ([0.375, 0.625], False, 0.125)
    """

    x: Float[Array, "..."]
    predicted: Int[Array, ""]
    broken: Bool[Array, ""]
    margin: Float[Array, ""]


class Ascent(NamedTuple):
    """What one sweep over the samples adds up, in logs, for the steepest ascent of -log pi_y.

    Its gradient is exp(log_weight - log_probs[y]) direction.
    """

    log_probs: Array  # log sum_s p_s(c), shape (C,)
    log_weight: Array  # log sum_s sigma(m_s) sigma(-m_s)
    direction: Array  # the mean of grad m_s under these weights, of the input's shape


def ascent(
    apply: Apply, samples: Stacked, x: Array, y: ArrayLike, batch_size: int | None
) -> Ascent:
    """Returns the predictive at x, and the direction in which its loss at y grows.

    One sweep over the samples with running log-sum-exps: no activation or gradient is stacked over
    samples. Under `jax.vmap` over x it stays a loop over samples, with batched bodies.
    """

    def odds(params: Params, x: Array) -> tuple[Array, Array]:
        logits = apply(params, x)
        check_logits(logits, y)
        rivals = jnp.where(jnp.arange(logits.size) == y, -jnp.inf, logits)
        return jax.nn.logsumexp(rivals) - logits[y], logits

    gradient_of = canonical(jax.value_and_grad(odds, argnums=1, has_aux=True))

    def one(params: Params) -> Ascent:
        (m, logits), gradient = gradient_of(params, x)
        log_weight = jax.nn.log_sigmoid(m) + jax.nn.log_sigmoid(-m)
        return Ascent(jax.nn.log_softmax(logits), log_weight, gradient)

    def add(total: Ascent, new: Ascent) -> Ascent:
        """Add a chunk, its samples on the leading axis; directions stay weighted means."""
        log_probs = jnp.logaddexp(total.log_probs, jax.nn.logsumexp(new.log_probs, axis=0))
        log_weight = jnp.logaddexp(total.log_weight, jax.nn.logsumexp(new.log_weight))
        share = jnp.exp(new.log_weight - log_weight)
        direction = jnp.exp(total.log_weight - log_weight) * total.direction
        direction += jnp.tensordot(share, new.direction, axes=1, precision="highest")
        return Ascent(log_probs, log_weight, direction.astype(total.direction.dtype))

    first = jax.eval_shape(lambda s: one(jax.tree.map(lambda leaf: leaf[0], s)), samples)
    fill = (-jnp.inf, -jnp.inf, 0.0)  # sums of no sample
    nothing = [
        varying(jnp.full(a.shape, v, a.dtype), axes_of(a)) for a, v in zip(first, fill, strict=True)
    ]
    return _fold(one, add, Ascent(*nothing), samples, batch_size)


def loss_ascent(
    apply: Apply, samples: Stacked, x: Array, y: ArrayLike, loss: Loss, batch_size: int | None
) -> tuple[Array, Array]:
    """Returns the vector log pi (C,) at x, and the gradient of a loss of it; y is only checked.

    Two sweeps: one forward, one forward and backward. Nothing is lost where the samples are sure:
    slopes of a loss that is the same for log pi + constant sum to 0, and so does what softmax
    would take off them.
    """
    each = _log_each(apply, samples, x, y, batch_size)
    log_probs = jax.nn.logsumexp(each, axis=0)
    slope = jax.grad(lambda log_pi: loss(log_pi).astype(log_pi.dtype))(log_probs)
    # A class whose logits are -inf has no share, and no NaN of -inf + inf either.
    shares = slope * jnp.where(each > -jnp.inf, jnp.exp(each - log_probs), 0.0)

    def pulled(share: Array, params: Params, x: Array) -> Array:
        return jnp.vdot(share, jax.nn.log_softmax(apply(params, x)))

    gradient_of = canonical(jax.grad(pulled, argnums=2))

    def add(total: Array, new: Array) -> Array:
        return total + jnp.sum(new, axis=0).astype(total.dtype)

    def one(pair: tuple[Params, Array]) -> Array:
        return gradient_of(pair[1], pair[0], x)

    return log_probs, _fold(one, add, jnp.zeros_like(x), (samples, shares), batch_size)


def log_predictive(
    apply: Apply, samples: Stacked, x: Array, y: ArrayLike, batch_size: int | None
) -> Array:
    """Returns log pi (C,) at x, plus log S, by forward passes alone; y is only checked."""
    return jax.nn.logsumexp(_log_each(apply, samples, x, y, batch_size), axis=0)


def result_at(x: Array, log_probs: Array, y: ArrayLike) -> AttackResult:
    """Makes the report of a point where the predictive is log_probs, up to a constant."""
    rivals = jnp.where(jnp.arange(log_probs.size) == y, -jnp.inf, log_probs)
    margin = log_probs[y] - jnp.max(rivals)
    margin = jnp.where(jnp.isnan(margin), -jnp.inf, margin).astype(x.dtype)
    broken = ~(margin > 0)
    predicted = jnp.where(broken, jnp.argmax(rivals), y).astype(int)
    return AttackResult(x, predicted, broken, margin)


def none_yet(x: Array, y: ArrayLike, valid: Array | None = None) -> AttackResult:
    """Makes the report of an attack that has not looked yet: any point is worse.

    Where the set is not `valid` it is the report of an empty set, and nothing is worse than that.
    """
    worst = jnp.asarray(jnp.inf, x.dtype)
    none = AttackResult(x, jnp.asarray(y, int), jnp.asarray(False), worst)
    none = varying(none, axes_of(x, y, valid))
    if valid is None:
        return none
    empty = AttackResult(jnp.full_like(x, jnp.nan), jnp.asarray(-1), jnp.asarray(True), -worst)
    return jax.tree.map(partial(jnp.where, valid), none, empty)


def worse(new: AttackResult, old: AttackResult) -> AttackResult:
    """Returns the result of the smaller margin; of equal ones the old."""
    return jax.tree.map(lambda a, b: jnp.where(new.margin < old.margin, a, b), new, old)


def _log_each(
    apply: Apply, samples: Stacked, x: Array, y: ArrayLike, batch_size: int | None
) -> Array:
    """Evaluates every log p_s(c), shape (S, C)."""

    def log_probs(params: Params, x: Array) -> Array:
        logits = apply(params, x)
        check_logits(logits, y)
        return jax.nn.log_softmax(logits)

    forward = canonical(log_probs)
    # A batch of one would make grouped convolutions: it is a loop.
    size = None if (batch_size or 1) == 1 else batch_size
    return jax.lax.map(lambda params: forward(params, x), samples, batch_size=size)


def _fold(
    one: Callable, add: Callable, total: Any, samples: Stacked, batch_size: int | None
) -> Any:
    """Folds `add` over the samples' terms, in chunks; the last chunk may be shorter."""
    num = jax.tree.leaves(samples)[0].shape[0]
    size = min(batch_size or 1, num)
    whole = num // size * size

    def step(total: Any, chunk: Params) -> tuple[Any, None]:
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


def check_logits(logits: Array, y: ArrayLike) -> None:
    """Raises ValueError unless these are logits of one example and y is a class of theirs."""
    if logits.ndim != 1 or logits.size < 2:
        raise ValueError(
            f"apply returned shape {logits.shape} for one example; it must return logits (C,) of "
            "C >= 2 classes. x is one example, without a batch axis."
        )
    if is_concrete(y) and not 0 <= int(y) < logits.size:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"y = {y}: labels must be in 0..{logits.size - 1}.")
