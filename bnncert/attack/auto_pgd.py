"""APGD: projected gradient descent that chooses its own step sizes, on the posterior predictive.

From x_0, with a step size that begins at eta = 2 eps, P the projection on the set, g the steepest
unit step of the loss in the norm p, and alpha = 3/4 (alpha = 1 in the first step),

    z = P(x_k + eta g(x_k)),   x_{k+1} = P(x_k + alpha (z - x_k) + (1 - alpha)(x_k - x_{k-1})).

At checkpoints w_j = ceil(p_j N) of the N steps, p_0 = 0, p_1 = 0.22 and
p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), eta is halved, and the search goes on from the best
point so far, if since the last checkpoint either

    1. fewer than 3/4 of the steps raised the loss, or
    2. neither was eta halved at that checkpoint, nor is the best loss any better.

So no step size has to be chosen: where fixed steps jump over a narrow valley for ever, these come
to rest in it. Losses: `bnncert.attack._losses`. Their best point steers the search; what is
returned is the point of least margin among all that were evaluated.

Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1 and section 4 (targeted APGD).
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from bnncert._varying import axes_of, varying
from bnncert.attack._geometry import (
    GEOMETRIES,
    Geometry,
    check_arguments,
    spread_out,
    starting_points,
    usable,
)
from bnncert.attack._losses import dlr, log_odds, targeted_dlr
from bnncert.attack._predictive import (
    AttackResult,
    ascent,
    log_predictive,
    loss_ascent,
    none_yet,
    result_at,
    worse,
)
from bnncert.outputs import logits_of, look_at_ending
from bnncert.types import Apply, Key, Stacked

LOSSES = ("ce", "dlr")
_MOMENTUM = 0.75
_ENOUGH = 0.75  # of the steps between checkpoints have to raise the loss


def apgd(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    loss: str = "dlr",
    steps: int = 50,
    restarts: int = 1,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> AttackResult:
    """Runs APGD on one example, and keeps the worst of all iterates and restarts.

        z = P(x_k + eta g(x_k)),   x_{k+1} = P(x_k + alpha (z - x_k) + (1 - alpha)(x_k - x_{k-1}))

    with a step size eta that is halved where the search comes to a halt (see the module). As `pgd`:
    the first restart begins at x itself, the others uniformly in the ball; batch with `jax.vmap`,
    under one `jax.jit`.

    Args:
        key: a PRNG key for the random starts.
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        loss: "ce" or "dlr" (`bnncert.attack._losses`).
        steps: gradient steps, >= 1; the schedule wants 20 or more.
        restarts: starting points, >= 1.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        p: inf or 2.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError, ValueError: as `pgd`; for another loss.

    Cost: restarts (steps + 1) S forward and backward passes; for "dlr" S forward passes more in
    each. Memory: that of `pgd`, and four points.

    Source: Croce & Hein, ICML 2020, algorithm 1.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> result = apgd(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25, loss="ce")
        >>> result.x.tolist(), bool(result.broken), result.margin.item()
        ([0.25, 0.75], True, -0.25)
    """
    x = jnp.asarray(x)
    counts = {"steps": steps, "restarts": restarts, "batch_size": batch_size}
    check_arguments(samples, x, y, eps, p, clip, **counts)
    if loss not in LOSSES:
        raise ValueError(f"loss = {loss!r}: choose one of {', '.join(LOSSES)}.")

    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    x = spread_out(apply, samples, x, key, y, eps, clip)
    none = none_yet(x, y, usable(x, eps, clip, p))

    def evaluate(point: Array, unused: Array) -> _Evaluated:
        if loss == "ce":
            here = ascent(apply, samples, point, y, batch_size)
            log_probs, direction = here.log_probs, here.direction
            return _evaluated(log_probs, direction, log_odds(log_probs, y))
        goal = partial(dlr, y=y)
        log_probs, direction = loss_ascent(apply, samples, point, y, goal, batch_size)
        return _evaluated(log_probs, direction, goal(log_probs))

    eps = jnp.asarray(eps, x.dtype)
    geometry = GEOMETRIES[p]
    starts = starting_points(key, geometry, x, eps, clip, restarts)
    targets = jnp.zeros(restarts, int)
    return _search(evaluate, geometry, (x, eps, clip), starts, targets, none, y, steps)


def targeted_apgd(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    num_targets: int | None = None,
    steps: int = 50,
    restarts: int = 1,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> AttackResult:
    """Runs APGD with the targeted DLR, once for each class that x is most likely taken for.

        maximise  -(z_y - z_t) / (z_1 - (z_3 + z_4)/2)    over the ball, for each target t

    Args:
        key: a PRNG key for the random starts.
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        num_targets: how many of the C - 1 other classes, the most probable at x first; at most 9
            by default. The worst over targets is kept: more of them only add candidates.
        steps: gradient steps for each target, >= 1.
        restarts: starting points for each target, >= 1.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        p: inf or 2.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError, ValueError: as `pgd`; for more targets than there are other classes.

    Cost: num_targets times that of `apgd` with "dlr".

    Source: Croce & Hein, ICML 2020, equation 7.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> found = targeted_apgd(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25)
        >>> found.x.tolist(), bool(found.broken)
        ([0.25, 0.75], True)
    """
    x = jnp.asarray(x)
    counts = {"steps": steps, "restarts": restarts, "batch_size": batch_size}
    check_arguments(samples, x, y, eps, p, clip, **counts)
    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    x = spread_out(apply, samples, x, key, y, eps, clip)
    none = none_yet(x, y, usable(x, eps, clip, p))
    log_probs = log_predictive(apply, samples, x, y, batch_size)
    rivals = log_probs.size - 1
    count = min(9, rivals) if num_targets is None else num_targets
    if not 1 <= count <= rivals:
        raise ValueError(f"num_targets = {num_targets}: choose 1..{rivals}, the other classes.")
    likely = jax.lax.top_k(jnp.where(jnp.arange(rivals + 1) == y, -jnp.inf, log_probs), count)[1]

    def evaluate(point: Array, target: Array) -> _Evaluated:
        goal = partial(targeted_dlr, y=y, target=target)
        log_probs, direction = loss_ascent(apply, samples, point, y, goal, batch_size)
        return _evaluated(log_probs, direction, goal(log_probs))

    eps = jnp.asarray(eps, x.dtype)
    geometry = GEOMETRIES[p]
    starts = starting_points(key, geometry, x, eps, clip, restarts)
    # Target by target, each from all starts.
    repeated = jnp.tile(starts, (count,) + (1,) * x.ndim)
    targets = jnp.repeat(likely, restarts)
    return _search(evaluate, geometry, (x, eps, clip), repeated, targets, none, y, steps)


class _Evaluated(NamedTuple):
    """What the search of APGD needs of a point.

    Attributes:
        log_probs: log pi (C,), up to a constant.
        direction: the loss's gradient; 0 where it is not finite: such a coordinate stays.
        value: of the loss; -inf for NaN, which is no progress.
    """

    log_probs: Array
    direction: Array
    value: Array


def _evaluated(log_probs: Array, direction: Array, value: Array) -> _Evaluated:
    finite = jnp.where(jnp.isfinite(direction), direction, 0.0)
    return _Evaluated(log_probs, finite, jnp.where(jnp.isnan(value), -jnp.inf, value))


class _Point(NamedTuple):
    x: Array
    direction: Array
    value: Array


class _State(NamedTuple):
    """Where the search of APGD stands between two steps.

    Attributes:
        here: the current iterate x_k.
        previous: x_{k-1}.
        best: the point of the greatest loss so far.
        step_size: eta.
        raised: steps since the last checkpoint that raised the loss.
        halved: whether eta was halved at the last checkpoint.
        best_then: the best loss at the last checkpoint.
        worst: the point of least margin so far, which is returned.
    """

    here: _Point
    previous: Array
    best: _Point
    step_size: Array
    raised: Array
    halved: Array
    best_then: Array
    worst: AttackResult


def _search(
    evaluate: Callable[[Array, Array], _Evaluated],
    geometry: Geometry,
    region: tuple[Array, Array, tuple[float, float] | None],
    starts: Array,
    targets: Array,
    none: AttackResult,
    y: ArrayLike,
    steps: int,
) -> AttackResult:
    """Searches from each start for its target, and keeps the first point of least margin.

    Iteration 0 takes no step: with the direction 0 it evaluates the start, in the one compiled
    body.
    """
    project = partial(geometry.project, *region)
    eps = region[1]

    def step(state: _State, now: tuple[Array, Array, Array, Array]) -> tuple[_State, None]:
        target, moves, alpha, window = now
        here = state.here
        # 1. A step along the gradient, with momentum.
        z = project(here.x + state.step_size * geometry.steepest(here.direction))
        x = here.x + alpha * (z - here.x) + (1 - alpha) * (here.x - state.previous)
        x = project(x.astype(z.dtype))
        # 2. What is found there, and whether it is the best so far.
        found = evaluate(x, target)
        new = _Point(x, found.direction.astype(x.dtype), found.value.astype(x.dtype))
        best = _choose(new.value > state.best.value, new, state.best)
        raised = state.raised + (moves & (new.value > here.value))
        # 3. At a checkpoint: is the step size too long? Then halve it, and go back to the best.
        idle = ~state.halved & (best.value <= state.best_then)
        check = window > 0
        halve = check & ((raised < _ENOUGH * window) | idle)
        return _State(
            here=_choose(halve, best, new),
            previous=here.x,
            best=best,
            step_size=jnp.where(halve, state.step_size / 2, state.step_size),
            raised=jnp.where(check, 0, raised),
            halved=jnp.where(check, halve, state.halved),
            # The start itself is the best there is before the first step.
            best_then=jnp.where(check | ~moves, best.value, state.best_then),
            worst=worse(result_at(x, found.log_probs, y), state.worst),
        ), None

    schedule = _schedule(steps, starts.dtype)

    def run(worst: AttackResult, begin: tuple[Array, Array]) -> tuple[AttackResult, None]:
        start, target = begin
        nowhere = _Point(start, jnp.zeros_like(start), jnp.asarray(-jnp.inf, start.dtype))
        no, zero = jnp.asarray(False), jnp.asarray(0)
        state = _State(nowhere, start, nowhere, 2 * eps, zero, no, nowhere.value, worst)
        state = varying(state, axes_of(starts, targets))
        every = (jnp.broadcast_to(target, (steps + 1,)), *schedule)
        return jax.lax.scan(step, state, every)[0].worst, None

    return jax.lax.scan(run, none, (starts, targets))[0]


def _choose(first: Array, a: _Point, b: _Point) -> _Point:
    return jax.tree.map(partial(jnp.where, first), a, b)


def _schedule(steps: int, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Lists for iterations 0 .. steps if one moves, its alpha, and the window it ends, or 0."""
    window = {b: b - a for a, b in itertools.pairwise(_checkpoints(steps))}
    moves = jnp.arange(steps + 1) > 0
    alpha = jnp.where(jnp.arange(steps + 1) > 1, _MOMENTUM, 1.0).astype(dtype)
    return moves, alpha, jnp.array([window.get(k, 0) for k in range(steps + 1)])


def _checkpoints(steps: int) -> list[int]:
    """Lists the checkpoints w_0 = 0, w_1, ..., increasing, the last at most `steps`.

    >>> _checkpoints(100)
    [0, 22, 41, 57, 70, 80, 87, 93, 99]
    """
    at, last = [0.0, 0.22], 0.22
    while last < 1:
        at.append(last := last + max(last - at[-2] - 0.03, 0.06))
    # Rounded first: ceil would take 22.000000000000004 for 23.
    counts = (math.ceil(round(fraction * steps, 9)) for fraction in at)
    return sorted({count for count in counts if count <= steps})
