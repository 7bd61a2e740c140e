"""Certified and attacked radii: how large a ball around an input keeps its decision.

With B(r) = { x' : |x' - x|_p <= r }, and r* the least radius at which the decision at x is lost,

    certified radius   the largest r tried at which a certificate covers B(r)       <=  r*
    attacked radius    the least distance of a point tried that changes the class   >=  r*

Both by bisection on the grid k * largest / 2^steps. A certificate at r covers all smaller balls,
whatever the bounds say there: bounds need not be monotone in r for a certified radius to hold, only
for bisection to find the largest one on the grid. An attack is no proof: its radius says that r* is
no larger, never that it is as large.

A bisection looks at its own results before it chooses the next radius: any of 2^steps - 1 radii may
be tried. A statement from draws (`bnncert.certify.statistical`) unites over all of them.

Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017 (least
distances of attacks, by bisection); certified radii by bisection are folklore.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from bnncert._varying import axes_of, varying
from bnncert.attack import AttackResult, pgd, transfer
from bnncert.attack._geometry import spread_out
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import Method
from bnncert.certify.exact.decision import Decision, decision
from bnncert.certify.sampled.decision import statistical
from bnncert.gaussian import leaves_of, margins
from bnncert.outputs import logits_of, look_at_ending, watched
from bnncert.posterior.leaves import check_stacked
from bnncert.sets import Set, ball, check_radius
from bnncert.types import Apply, Key, Posterior, Stacked


class CertifiedRadius(NamedTuple):
    """A radius up to which the decision is certified.

    Attributes:
        predicted: the class chosen at x.
        radius: no point of the closed ball of this radius changes it; 0 if none was certified.
        robust: whether any radius was.
        confidence: 1.0 (a proof about deployed samples, by "nearest" up to rounding), or 1 - delta.

    Example:
        >>> apply, w = lambda w, x: w * x, jnp.array([[1.0, -1.0]])     # logits (x, -x)
        >>> found = radius(apply, w, jnp.array([0.5]), largest=1.0, steps=2)
        >>> found.radius.item(), bool(found.robust)
        (0.25, True)
    """

    predicted: Int[Array, ""]
    radius: Float[Array, ""]
    robust: Bool[Array, ""]
    confidence: Float[Array, ""]


class AttackedRadius(NamedTuple):
    """The nearest point that an attack found on which a class is lost: an estimate, no proof.

    Attributes:
        radius: its distance from the input; inf if none was found.
        x: the point; the input itself if none was found.
        broken: whether one was found.

    Example:
        >>> apply, w = lambda w, x: w * x, jnp.array([[1.0, -1.0]])     # logits (x, -x)
        >>> key, x = jax.random.key(0), jnp.array([0.5])
        >>> found = attacked_radius(key, apply, w, x, 0, largest=1.0, steps=2)
        >>> found.radius.item(), bool(found.broken)
        (0.5, True)
    """

    radius: Float[Array, ""]
    x: Float[Array, "..."]
    broken: Bool[Array, ""]


def radius(
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    *,
    largest: float,
    steps: int = 8,
    p: float | int = jnp.inf,
    clip: tuple[float, float] | None = None,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    batch_size: int | None = None,
) -> CertifiedRadius:
    """Certifies a radius at which the posterior predictive keeps its decision: the exact tier.

        r = largest k * largest / 2^steps tried at which `decision` covers { x' : |x' - x|_p <= r }

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        samples: the deployed weights, stacked: every leaf has a leading axis S.
        x: one input; `jax.vmap` for a batch.
        largest: no radius as large is tried, in the units of x.
        steps: of the bisection; the radius is a multiple of largest / 2^steps.
        p: of the norm: inf, 2 or 1.
        clip: the range of inputs, for p = inf.
        outputs: "logits" or "probabilities", as for `bnncert.certify.decision`.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.certify.decision`.
        batch_size: as for `bnncert.certify.decision`.

    Returns:
        A `CertifiedRadius`: 0, and not robust, where x is traced and not finite or not in `clip`.

    Raises:
        TypeError: an integer x.
        ValueError: a largest radius that is not positive and finite, steps out of 1..20; as
            `bnncert.ball` and `bnncert.certify.decision`.

    Cost: steps times `bnncert.certify.decision`, compiled once. Memory: as one.
    Outside `jit` each call is traced and compiled anew, in a second or more: for many, jit it once,
    with `apply` fixed.

    Source: Wicker et al., AISTATS 2021, section 6, at each radius; bisection is folklore.

    Example:
        >>> apply = lambda w, x: w * x                                  # logits (x, -x)
        >>> found = radius(apply, jnp.array([[1.0, -1.0]]), jnp.array([0.5]), largest=1.0)
        >>> int(found.predicted), float(found.radius)
        (0, 0.49609375)
    """

    def certify(region: Set) -> Decision:
        return decision(
            apply, samples, region, x=x, outputs=outputs, method=method, rounding=rounding,
            batch_size=batch_size,
        )  # fmt: skip

    return _bisected(certify, x, largest, steps, p, clip)


def statistical_radius(
    key: Key,
    apply: Apply,
    posterior: Posterior,
    x: Float[Array, "..."],
    *,
    largest: float,
    num_samples: int,
    steps: int = 5,
    p: float | int = jnp.inf,
    clip: tuple[float, float] | None = None,
    **options: Any,
) -> CertifiedRadius:
    """Certifies a radius for a continuous posterior's decision, with confidence 1 - delta.

        r = largest k * largest / 2^steps tried at which `statistical` covers the ball,
        each of the 2^steps - 1 radii at confidence 1 - delta / (2^steps - 1)

    Args:
        key: as for `bnncert.certify.statistical`; every radius sees the same draws.
        apply: as for `radius`.
        posterior: as for `bnncert.certify.statistical`.
        x: one input.
        largest: as for `radius`.
        num_samples: independent draws at each radius; take 1,000 or more.
        steps: as for `radius`; the slack grows with the logarithm of 2^steps.
        p: as for `radius`.
        clip: as for `radius`.
        options: of `bnncert.certify.statistical`: delta, num_points, outputs and others.

    Returns:
        A `CertifiedRadius`.

    Raises:
        TypeError, ValueError: as `radius` and `bnncert.certify.statistical`.

    Cost: steps times `bnncert.certify.statistical`, compiled once.

    Source: as `bnncert.certify.statistical`; the union over radii is Boole's inequality.

    Example:
        >>> from bnncert.posterior import MeanField
        >>> apply = lambda p, x: p["w"] * x                             # logits (w_0 x, w_1 x)
        >>> q = MeanField({"w": jnp.array([3.0, -3.0])}, {"w": jnp.full(2, 0.1)})
        >>> found = statistical_radius(
        ...     jax.random.key(0), apply, q, jnp.array([1.0]), largest=2.0, num_samples=1000
        ... )
        >>> 0.8 < float(found.radius) < 1, f"{float(found.confidence):.2f}"
        (True, '0.95')
    """
    _check(largest, steps)

    def certify(region: Set) -> Decision:
        return statistical(
            key, apply, posterior, region, x=x, num_samples=num_samples,
            num_stages=2**steps - 1, **options,
        )  # fmt: skip

    return _bisected(certify, x, largest, steps, p, clip)


def posterior_radius(
    apply: Apply,
    posterior: Posterior,
    x: Float[Array, "..."],
    *,
    largest: float,
    probability: float = 0.99,
    steps: int = 8,
    p: float | int = jnp.inf,
    clip: tuple[float, float] | None = None,
    method: str | Method = "crown",
    rounding: Rounding = "outward",
    delta: float = 1e-3,
) -> CertifiedRadius:
    """Certifies a radius within which most networks of a Gaussian posterior keep one class.

        r = largest k * largest / 2^steps tried at which
            Prob_{w ~ q}( argmax f(w, x') = c for all |x' - x|_p <= r )  >=  probability

    with c the class of the network at the posterior's means: the formal tier.

    Args:
        apply: `(params, x) -> logits (C,)` for one example; one logit z of two classes is (0, z).
        posterior: a `bnncert.posterior.MeanField`, `LowRank` or `Gaussian`.
        x: one input; `jax.vmap` for a batch.
        largest: as for `radius`.
        probability: of the networks, in (0, 1 - delta).
        steps: as for `radius`.
        p: as for `radius`.
        clip: as for `radius`.
        method: as for `bnncert.gaussian.margins`.
        rounding: as for `bnncert.gaussian.margins`.
        delta: as for `bnncert.gaussian.margins`.

    Returns:
        A `CertifiedRadius`, of confidence 1: a proof (by "nearest", up to rounding).

    Raises:
        TypeError: another posterior.
        ValueError: a probability out of range; as `radius` and `bnncert.gaussian.margins`.

    Cost: steps times `bnncert.gaussian.margins`, compiled once.

    Source: `bnncert.gaussian.margins`; bisection is folklore.

    Example:
        >>> from bnncert.posterior import MeanField
        >>> apply = lambda p, x: p["w"] * x                             # logits (w_0 x, w_1 x)
        >>> q = MeanField({"w": jnp.array([3.0, -3.0])}, {"w": jnp.full(2, 0.1)})
        >>> found = posterior_radius(apply, q, jnp.array([1.0]), largest=2.0)
        >>> int(found.predicted), 0.8 < float(found.radius) < 1
        (0, True)
    """
    if not 0 < probability < 1 - delta:
        raise ValueError(
            f"probability = {probability}: give one between 0 and 1 - delta = {1 - delta}."
        )
    q: Any = posterior
    leaves_of(q)  # raises for another posterior
    network, x = watched(apply, "logits"), jnp.asarray(x)
    logits = network(q.loc, x)
    predicted, classes = jnp.argmax(logits), logits.size

    def certify(region: Set) -> _Kept:
        unit = jnp.eye(classes, dtype=region.center.dtype)
        rows = unit[predicted] - unit, jnp.zeros(classes, unit.dtype)
        found = margins(network, q, region, *rows, method=method, rounding=rounding, delta=delta)
        lost = jnp.where(
            (found.mean > 0) & (found.mean < jnp.inf) & (found.lipschitz < jnp.inf),
            ndtr(-(1 - 1e-4) * found.mean / found.lipschitz),  # less than rounding may take
            1.0,
        )
        total = jnp.sum(jnp.where(jnp.arange(classes) == predicted, 0.0, lost))
        kept = (1 + 1e-3) * (delta + total) <= (1 - 1e-6) * (1 - probability)
        return _Kept(predicted, kept, jnp.ones(()))

    return _bisected(certify, x, largest, steps, p, clip)


class _Kept(NamedTuple):
    """Holds what a bisection reads off a certificate."""

    predicted: Int[Array, ""]
    robust: Bool[Array, ""]
    confidence: Float[Array, ""]


def attacked_radius(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    *,
    largest: float,
    steps: int = 8,
    p: float | int = jnp.inf,
    clip: tuple[float, float] | None = None,
    outputs: str = "logits",
    attack: Callable[..., AttackResult] = pgd,
    **options: Any,
) -> AttackedRadius:
    """Finds how near an attack comes with a point on which the predictive does not choose a class.

        min |x' - x|_p over the points x' found with argmax pi(x') != y

    Args:
        key: a PRNG key for random starts.
        apply: as for `radius`.
        samples: as for `radius`.
        x: one input.
        y: the class; the predicted one, for the other side of a certified radius.
        largest: radius of the largest ball that is searched.
        steps: of the bisection.
        p: of the norm, as for the attack.
        clip: the range of inputs.
        outputs: "logits" or "probabilities", as for `radius`; the attack is given logits of the
            same predictor.
        attack: called as `attack(key, apply, samples, x, y, eps, p=, clip=, **options)`.
        options: of the attack.

    Returns:
        An `AttackedRadius`: 0 and broken, where x is traced and not finite or not in `clip`.

    Raises:
        TypeError, ValueError: as the attack; a bad largest radius or number of steps.

    Cost: steps + 1 attacks, compiled once.

    Source: Carlini and Wagner, S&P 2017, section V.

    Example:
        >>> apply = lambda w, x: w * x                                  # logits (x, -x)
        >>> samples, x = jnp.array([[1.0, -1.0]]), jnp.array([0.5])
        >>> found = attacked_radius(jax.random.key(0), apply, samples, x, 0, largest=1.0)
        >>> 0.5 <= float(found.radius) < 0.51
        True
    """
    _check(largest, steps)
    x = jnp.asarray(x)
    check_stacked(samples)
    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    x = spread_out(apply, samples, x, key, y, largest, clip)
    clean = transfer(apply, samples, x[None], y)

    def step(i: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        low, high, nearest, broken = state
        # The whole ball first: without a point in it there is nothing to halve.
        eps = jnp.where(i == 0, high, 0.5 * (low + high))
        here = jax.random.fold_in(key, i)
        found = attack(here, apply, samples, x, y, eps, p=p, clip=clip, **options)
        return (
            jnp.where(found.broken, low, eps),
            jnp.where(found.broken, eps, high),
            jnp.where(found.broken, found.x, nearest),
            broken | found.broken,
        )

    start = jnp.zeros((), x.dtype), jnp.asarray(largest, x.dtype), x, clean.broken
    start = varying(start, axes_of(x))
    _, _, nearest, broken = jax.lax.fori_loop(0, steps + 1, step, start)
    nearest = jnp.where(clean.broken, x, nearest)
    # No point lies in an empty ball: what is said of it is the least there is to say.
    nearest = jnp.where(jnp.isnan(nearest), x, nearest)
    distance = jnp.linalg.norm((nearest - x).ravel(), p)
    distance = jnp.where(jnp.isnan(distance), 0.0, distance)
    return AttackedRadius(jnp.where(broken, distance, jnp.inf), nearest, broken)


def _bisected(
    certify: Callable[[Set], Decision | _Kept],
    x: Float[Array, "..."],
    largest: float,
    steps: int,
    p: float | int,
    clip: tuple[float, float] | None,
) -> CertifiedRadius:
    _check(largest, steps)
    x = jnp.asarray(x)

    def at(place: Array) -> Decision | _Kept:
        return certify(ball(x, unit * place.astype(x.dtype), p=p, clip=clip))

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        place, _, _ = state
        middle = place + (2 ** (steps - 1) >> i)
        found = at(middle)
        return jnp.where(found.robust, middle, place), found.predicted, found.confidence

    unit = jnp.asarray(largest / 2**steps, x.dtype)
    shapes = jax.eval_shape(at, jnp.zeros((), int))
    place = varying(jnp.zeros((), int), axes_of(shapes.robust))
    blank = (
        varying(jnp.zeros(s.shape, s.dtype), axes_of(s))
        for s in (shapes.predicted, shapes.confidence)
    )
    place, predicted, confidence = jax.lax.fori_loop(0, steps, step, (place, *blank))
    return CertifiedRadius(predicted, unit * place.astype(x.dtype), place > 0, confidence)


def _check(largest: float, steps: int) -> None:
    check_radius(largest, "largest")
    if not largest > 0:
        raise ValueError(f"largest = {largest}: give the radius of the largest ball to try.")
    if not 1 <= steps <= 20:
        raise ValueError(f"steps = {steps}: give 1 to 20 halvings.")
