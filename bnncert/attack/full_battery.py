"""The battery: every attack on one example, and the worst point any of them found.

    pgd        cross-entropy, fixed steps
    apgd-ce    APGD on the cross-entropy
    apgd-dlr   APGD on the difference-of-logits ratio
    targeted   APGD on the targeted ratio, for the most likely other classes
    square     random search without gradients (p = inf)
    transfer   APGD on other networks, a `surrogate`: its point counts as the predictive judges it

No attack is the best at every point; robust accuracy under one alone is often far too high. The
worst over attacks is at each point no higher than under any of them, PGD with the same key and
steps among them: an estimate from above still, never a proof.

What is attacked is always the predictive over the samples that are given: the gradients are those
of the averaged likelihood. One network: samples stacked of one. Points that fool something else
(one sample, the network of the mean weights) are carried over by `transfer`.

Sources: Croce & Hein, ICML 2020 (AutoAttack, of which this is the like); Carbone et al.,
"Robustness of Bayesian neural networks to gradient-based attacks", NeurIPS 2020.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from bnncert._varying import axes_of, varying
from bnncert.attack._geometry import check_arguments, spread_out, usable
from bnncert.attack._predictive import AttackResult, log_predictive, none_yet, result_at, worse
from bnncert.attack.auto_pgd import apgd, targeted_apgd
from bnncert.attack.fgsm_pgd import pgd
from bnncert.attack.square_search import square
from bnncert.outputs import logits_of, look_at_ending
from bnncert.types import Apply, Key, Stacked


def strongest(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    steps: int = 20,
    restarts: int = 1,
    num_targets: int | None = None,
    queries: int = 200,
    surrogate: Stacked | None = None,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> AttackResult:
    """Finds the worst point of the whole battery on one example: that of the least margin.

        margin(x') = log pi_y(x') - max_{j != y} log pi_j(x'),    x' = argmin over attacks

    Args:
        key: a PRNG key; PGD is given this very key.
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        steps: of PGD and of each APGD, >= 1.
        restarts: of each attack, >= 1.
        num_targets: of the targeted attack, at most 9 by default.
        queries: of Square, for each restart; 0 leaves it out. It is left out for p = 2.
        surrogate: other networks, stacked, to find points with: for instance the mean weights,
            stacked by one.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        p: inf or 2.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`: nowhere of a greater margin than `pgd` with this key, steps and restarts.

    Raises:
        TypeError, ValueError: as the attacks.

    Cost: the sum of the attacks': about (8 + 3 num_targets) restarts x steps x S evaluations, and
    queries x restarts x S. Compiles each attack once: some seconds.

    Source: Croce & Hein, ICML 2020, section 5 (an ensemble of attacks).

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
        >>> found = strongest(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25, steps=5)
        >>> found.x.tolist(), bool(found.broken)
        ([0.25, 0.75], True)
    """
    found = battery(
        key,
        apply,
        samples,
        x,
        y,
        eps,
        outputs=outputs,
        steps=steps,
        restarts=restarts,
        num_targets=num_targets,
        queries=queries,
        surrogate=surrogate,
        clip=clip,
        p=p,
        batch_size=batch_size,
    )
    return reduce(lambda worst, new: worse(new, worst), found.values())


def battery(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    steps: int = 20,
    restarts: int = 1,
    num_targets: int | None = None,
    queries: int = 200,
    surrogate: Stacked | None = None,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> dict[str, AttackResult]:
    """Runs every attack of the battery on one example, each by its name.

    Args:
        key: a PRNG key; PGD is given this very key.
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        steps: of PGD and of each APGD, >= 1.
        restarts: of each attack, >= 1.
        num_targets: of the targeted attack, at most 9 by default.
        queries: of Square, for each restart; 0 leaves it out. It is left out for p = 2.
        surrogate: other networks, stacked, to find points with.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        p: inf or 2.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult` for each attack that p and the options allow.

    Raises:
        TypeError, ValueError: as the attacks; for negative queries.

    Cost: as `strongest`.

    Source: Croce & Hein, ICML 2020 (AutoAttack, of which this is the like).

    Example:
        >>> apply, w = lambda w, x: w @ x, jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
        >>> target = apply, w, jnp.array([0.5, 0.5]), 0, 0.25
        >>> sorted(jax.eval_shape(lambda: battery(jax.random.key(0), *target, steps=2)))
        ['apgd-ce', 'apgd-dlr', 'pgd', 'square', 'targeted']
    """
    if queries < 0:
        raise ValueError(f"queries = {queries}: it must be at least 0, which leaves Square out.")
    x = jnp.asarray(x)
    check_arguments(samples, x, y, eps, p)
    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    target = apply, samples, x, y, eps
    within = {"clip": clip, "batch_size": batch_size}
    usual = {"steps": steps, "restarts": restarts, "p": p, **within}
    found = {"pgd": pgd(key, *target, **usual)}  # with the key itself: the same points as alone
    keys = iter(jax.random.split(jax.random.fold_in(key, 1), 5))
    found["apgd-ce"] = apgd(next(keys), *target, loss="ce", **usual)
    found["apgd-dlr"] = apgd(next(keys), *target, loss="dlr", **usual)
    found["targeted"] = targeted_apgd(next(keys), *target, num_targets=num_targets, **usual)
    if queries and p == jnp.inf:
        options = {"queries": queries, "restarts": restarts, **within}
        found["square"] = square(next(keys), *target, **options)
    if surrogate is not None:
        other = apgd(next(keys), apply, surrogate, x, y, eps, loss="ce", **usual).x
        candidates = jnp.stack([jnp.asarray(x), other])
        carried = transfer(apply, samples, candidates, y, batch_size=batch_size)
        none = none_yet(candidates[0], y, usable(candidates[0], eps, clip, p))
        found["transfer"] = worse(carried, none)
    return found


def transfer(
    apply: Apply,
    samples: Stacked,
    candidates: Float[Array, "candidates ..."],
    y: Int[ArrayLike, ""],
    *,
    outputs: str = "logits",
    batch_size: int | None = None,
) -> AttackResult:
    """Finds, of points found elsewhere, the one at which this predictive does worst.

        margin(x') = log pi_y(x') - max_{j != y} log pi_j(x'),    x' = argmin over candidates

    Nothing is searched: the points are what attacks on other networks returned, `found.x`. Put the
    clean input among them, as every attack does.

    Args:
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        candidates: the points, stacked.
        y: the true class.
        outputs: as for `pgd`.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`, of the first candidate of least margin.

    Raises:
        TypeError, ValueError: as `pgd`; for no candidates.

    Cost: one evaluation of S networks for each candidate.

    Source: Carbone et al., NeurIPS 2020 (attacks carried between networks and their posterior).

    Example:
        >>> apply = lambda w, x: w @ x
        >>> mean = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
        >>> x = jnp.array([0.5, 0.5])
        >>> point = pgd(jax.random.key(0), apply, mean, x, 0, 0.25).x
        >>> deployed = jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> bool(transfer(apply, deployed, jnp.stack([x, point]), 0).broken)
        True
    """
    candidates = jnp.asarray(candidates)
    if candidates.ndim < 1 or not len(candidates):
        raise ValueError(f"candidates have shape {candidates.shape}: give one point or more.")
    check_arguments(samples, candidates, y, 0.0, jnp.inf, batch_size=batch_size)

    look_at_ending(apply, outputs, samples, candidates[0])
    apply = logits_of(apply, outputs)
    candidates = varying(candidates, axes_of(spread_out(apply, samples, candidates[0], y)))

    def add(worst: AttackResult, point: Array) -> tuple[AttackResult, None]:
        log_probs = log_predictive(apply, samples, point, y, batch_size)
        return worse(result_at(point, log_probs, y), worst), None

    return jax.lax.scan(add, none_yet(candidates[0], y), candidates)[0]
