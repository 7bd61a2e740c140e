"""The natural-gradient step of a mean-field normal, which VOGN, noisy Adam and IVON share.

For q = N(loc, scale^2), a normal prior N(mu, tau^2) and the objective

    minimise   E_q[-log p(D | w)] + kl_weight KL(q || p)

write, per datum, g = E_q[gradient] and h = E_q[diagonal Hessian] of (1/N) sum_i -log p(y_i | x_i,
w), and d = kl_weight / (N tau^2) for the prior's share. Descent along the natural gradient of q's
natural parameters is a Newton step for loc, whose curvature is at the same time q's precision:

    loc     <-  loc - a (g + d (loc - mu)) / (h + d)
    scale^2  =  kl_weight / (N (h + d))
    h       <-  beta2 h + (1 - beta2) (estimate of h at a draw w ~ q)

At the fixed point g + d (loc - mu) = 0, and h is the expectation of its estimate under q: the
methods differ in this estimate alone, and so in the scale they converge to. Gradients are averaged
over time before they are divided (`beta1`, with debiasing). One draw serves a whole minibatch,
because behind the bounds on an input set there must stand one network.

Source: Khan and Rue, "The Bayesian Learning Rule", JMLR 2023, section 4; Khan et al., "Fast and
Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML 2018, section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bnncert import prior as priors
from bnncert.infer._minibatch import Schedule, check_settings, each_datum, initial_scales
from bnncert.posterior import MeanField
from bnncert.types import Algorithm, Batch, Key, LogLikelihood, Params, Prepare, Prior, Threat

Leaves = dict[str, Array]
"""Arrays by the name of a leaf of the params."""


class NaturalGradientState(NamedTuple):
    """The state of a natural-gradient method: what its next step needs.

    Attributes:
        loc: means of the random leaves, and the deterministic leaves, by name.
        curvature: h of each random leaf, per datum, without the prior.
        momentum: of `optax.ema`: the running mean of the gradients.
        opt_state: of the optimiser that takes the natural gradient.
        deterministic: of the optimiser of the deterministic leaves.
        step: how many updates were made.
    """

    loc: Leaves
    curvature: Leaves
    momentum: optax.OptState
    opt_state: optax.OptState
    deterministic: optax.OptState
    step: Array


class NaturalGradientInfo(NamedTuple):
    """What one update of a natural-gradient method saw, before its step.

    Attributes:
        loss: the negative ELBO, nats summed over the data.
        log_likelihood: E_q[log p(D | w)], estimated from the minibatch and the draws.
        kl: KL(q || p), unweighted.
    """

    loss: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    kl: Float[Array, ""]


class Draw(NamedTuple):
    """What a minibatch says at one draw of the weights, by name of the random leaves.

    Attributes:
        key: for what the estimate draws itself.
        offset: w - loc.
        scale: standard deviations of q.
        gradient: of the mean negative log-likelihood of the minibatch, per datum.
        batch: the minibatch.
        threat: what the error model guards against.
        pull: weights of the data, (batch,), to the gradient of their weighted sum of negative
            log-likelihoods; costs a backward pass.
        over: `over(function)`, for a function of one datum: its values at this draw, and what
            takes weights of their shape to the gradient of their weighted sum.
    """

    key: Key
    offset: Leaves
    scale: Leaves
    gradient: Leaves
    batch: Batch
    threat: Threat
    pull: Callable[[Array], Leaves]
    over: Callable[[Callable[..., Array]], tuple[Array, Callable[[Array], Leaves]]]


Estimate = Callable[[Draw], Leaves]
"""An estimate of the diagonal Hessian of the mean negative log-likelihood, from one draw."""

Smooth = Callable[[Array, Array, Array], Array]
"""`(h, estimate, d) -> h`, for one leaf."""


def moving_average(beta2: float) -> Smooth:
    """Makes the running mean of the curvature, h <- beta2 h + (1 - beta2) estimate.

    Args:
        beta2: decay, in [0, 1).

    Returns:
        `(h, estimate, d) -> h`.

    Raises:
        ValueError: a decay out of its range.
    """
    check_decay("beta2", beta2)
    return lambda h, estimate, damping: beta2 * h + (1 - beta2) * estimate


def build(
    estimate: Estimate,
    smooth: Smooth,
    log_likelihood: LogLikelihood,
    prior: Prior,
    *,
    num_data: int,
    optimizer: optax.GradientTransformation,
    kl_weight: float | Schedule = 1.0,
    initial_scale: float = 0.1,
    beta1: float = 0.9,
    num_particles: int = 1,
    deterministic: optax.GradientTransformation | None = None,
    prepare: Prepare | None = None,
) -> Algorithm:
    """Makes a natural-gradient method as an `Algorithm`; `vogn`, `noisy_adam` and `ivon` call it.

        loc <- loc - a (g + d (loc - mu)) / (h + d),    scale^2 = kl_weight / (N (h + d))

    Args:
        estimate: of the curvature, from one draw.
        smooth: takes an estimate into the running curvature.
        log_likelihood: of one datum, e.g. `bnncert.likelihood.robust_categorical(apply)`.
        prior: pytree of NumPyro distributions with the params' structure, normal on every random
            leaf; None for leaves that are deterministic.
        num_data: N, the size of the training set.
        optimizer: from Optax, given the natural gradient (g + d (loc - mu)) / (h + d), in units of
            the weights: `optax.sgd(a)`, with a schedule or `optax.clip` in its chain. a = 1 would
            be Newton's step.
        kl_weight: of KL(q || p), > 0; 1 is the ELBO. Or a schedule of the step.
        initial_scale: sd of the posterior at the start, relative to the root mean square of each
            leaf; never above the prior's.
        beta1: decay of the running mean of gradients, in [0, 1).
        num_particles: draws of the weights for each update; they are vmapped.
        deterministic: optimiser of the deterministic leaves, given the gradient of the negative
            log-likelihood, nats summed over the data; needed where there are any.
        prepare: `(params, x_batch) -> params`, applied to each draw: e.g. batch-norm statistics.

    Returns:
        `Algorithm(init, update, posterior)`; the posterior is a `MeanField`.

    Raises:
        ValueError: a number out of its range, deterministic leaves without an optimiser.
        NotImplementedError: a prior that is not normal, naming the leaf.
    """
    check_settings(prior, num_data, kl_weight, initial_scale)
    check_decay("beta1", beta1)
    if num_particles < 1:
        raise ValueError(f"num_particles = {num_particles}: draw at least one.")
    priors.normal_parameters(prior)  # raises if one is not normal
    fixed = sorted(priors.named(prior).keys() - priors.sites(prior).keys())
    if fixed and deterministic is None:
        raise ValueError(
            f"the leaves {fixed} have no prior: give the optimiser that trains them, e.g. "
            "deterministic=optax.adam(1e-3)."
        )
    settings = _Settings(
        log_likelihood,
        prior,
        num_data,
        kl_weight if callable(kl_weight) else lambda step: jnp.asarray(kl_weight, jnp.float32),
        optax.ema(beta1),
        optimizer,
        deterministic or optax.set_to_zero(),
        num_particles,
        prepare,
    )
    return Algorithm(
        partial(_init, settings, initial_scale),
        partial(_update, settings, estimate, smooth),
        partial(_posterior, settings),
    )


def check_decay(name: str, value: float) -> None:
    """Raises ValueError unless a decay lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} = {value}: it must be in [0, 1), e.g. 0.9.")


class _Settings(NamedTuple):
    log_likelihood: LogLikelihood
    prior: Prior
    num_data: int
    kl_weight: Schedule
    ema: optax.GradientTransformation
    optimizer: optax.GradientTransformation
    deterministic: optax.GradientTransformation
    num_particles: int
    prepare: Prepare | None


def _init(
    settings: _Settings, initial_scale: float, key: Key, params: Params
) -> NaturalGradientState:
    del key
    priors.check(settings.prior, params)
    leaves = priors.named(params)
    step = jnp.zeros((), jnp.int32)
    scales = initial_scales(settings.prior, params, initial_scale)
    loc = {name: leaves[name] for name in scales}
    fixed = {name: leaf for name, leaf in leaves.items() if name not in scales}
    damping = _damping(settings, step)
    weight = settings.kl_weight(step) / settings.num_data
    curvature = {
        name: jnp.maximum(weight / scale**2 - damping[name], 0).astype(scale.dtype)
        for name, scale in scales.items()
    }
    return NaturalGradientState(
        leaves,
        curvature,
        settings.ema.init(loc),
        settings.optimizer.init(loc),
        settings.deterministic.init(fixed),
        step,
    )


def _update(
    settings: _Settings,
    estimate: Estimate,
    smooth: Smooth,
    key: Key,
    state: NaturalGradientState,
    batch: Batch,
    threat: Threat,
) -> tuple[NaturalGradientState, NaturalGradientInfo]:
    """Draws the weights, estimates the curvature there, and takes one step."""
    # 1. The scale of q that belongs to the curvature, and the prior's share d of the precision.
    kl_weight = settings.kl_weight(state.step)
    damping, scale = _damping(settings, state.step), _scales(settings, state)
    # 2. At draws w ~ q: log-likelihood, gradient and an estimate of the curvature.
    observe = partial(_observe, settings, estimate, state, scale, batch, threat)
    keys = jax.random.split(key, settings.num_particles)
    each = observe(keys[0]) if settings.num_particles == 1 else jax.vmap(observe)(keys)
    if settings.num_particles > 1:
        each = jax.tree.map(lambda value: value.mean(0), each)
    log_likelihood, gradient, estimated = each

    # 3. h moves towards the estimate: the only line in which the methods differ, with 2.
    curvature = {
        name: smooth(h, estimated[name], damping[name]) for name, h in state.curvature.items()
    }
    # 4. The gradient is averaged over time, and then divided: a Newton step for loc.
    random = {name: state.loc[name] for name in curvature}
    fixed = {name: leaf for name, leaf in state.loc.items() if name not in curvature}
    average: Any
    average, momentum = settings.ema.update({n: gradient[n] for n in random}, state.momentum)
    centres, _ = priors.normal_parameters(settings.prior)
    natural = {
        name: (average[name] + d * (random[name] - centres[name])) / (curvature[name] + d)
        for name, d in damping.items()
    }
    steps, opt_state = settings.optimizer.update(natural, state.opt_state, random)
    # 5. Leaves without a prior have an optimiser of their own.
    summed = {name: settings.num_data * gradient[name] for name in fixed}
    fixed_steps, fixed_state = settings.deterministic.update(summed, state.deterministic, fixed)
    moved = {
        **cast(Any, optax.apply_updates(random, steps)),
        **cast(Any, optax.apply_updates(fixed, fixed_steps)),
    }

    kl = _posterior(settings, state).kl(settings.prior)
    info = NaturalGradientInfo(kl_weight * kl - log_likelihood, log_likelihood, kl)
    return NaturalGradientState(
        {name: moved[name] for name in state.loc},
        curvature,
        momentum,
        opt_state,
        fixed_state,
        state.step + 1,
    ), info


def _observe(
    settings: _Settings,
    estimate: Estimate,
    state: NaturalGradientState,
    scale: Leaves,
    batch: Batch,
    threat: Threat,
    key: Key,
) -> tuple[Array, Leaves, Leaves]:
    """Evaluates one draw: the log-likelihood (nats, all data), its gradient and its curvature."""
    draw_key, data_key, estimate_key = jax.random.split(key, 3)
    keys = dict(zip(scale, jax.random.split(draw_key, len(scale)), strict=True))
    offset = {
        name: s * jax.random.normal(keys[name], s.shape, s.dtype) for name, s in scale.items()
    }
    weights = {**state.loc, **{name: state.loc[name] + offset[name] for name in offset}}

    def over(function: Callable[..., Array]) -> tuple[Array, Callable[[Array], Leaves]]:
        def values(leaves: Leaves) -> Array:
            params = priors.unflatten(settings.prior, leaves)
            return each_datum(function, settings.prepare, data_key, params, batch, threat)

        found, pull = jax.vjp(values, weights)
        return found, lambda cotangent: pull(cotangent.astype(found.dtype))[0]

    terms, pull = over(settings.log_likelihood)
    size = batch.mask.sum()
    terms = jnp.where(batch.mask > 0, batch.mask * terms, 0.0)
    gradient = pull(-batch.mask / size)
    drawn = {name: gradient[name] for name in scale}
    draw = Draw(
        estimate_key,
        offset,
        scale,
        drawn,
        batch,
        threat,
        lambda data: pull(-batch.mask * data),
        over,
    )
    estimated = estimate(draw)
    return settings.num_data * terms.sum() / size, gradient, estimated


def _damping(settings: _Settings, step: Array) -> Leaves:
    """Computes d, the prior's share of the precision, in the units of h."""
    weight = settings.kl_weight(step) / settings.num_data
    _, widths = priors.normal_parameters(settings.prior)
    return {name: (weight / tau**2).astype(tau.dtype) for name, tau in widths.items()}


def _scales(settings: _Settings, state: NaturalGradientState) -> Leaves:
    """Computes q's standard deviations, sqrt(kl_weight / (N (h + d)))."""
    weight = settings.kl_weight(state.step) / settings.num_data
    damping = _damping(settings, state.step)
    return {
        name: jnp.sqrt(weight / (h + damping[name])).astype(h.dtype)
        for name, h in state.curvature.items()
    }


def _posterior(settings: _Settings, state: NaturalGradientState) -> MeanField:
    scales = _scales(settings, state)
    every = {name: scales.get(name) for name in state.loc}
    return MeanField(
        priors.unflatten(settings.prior, state.loc), priors.unflatten(settings.prior, every)
    )
