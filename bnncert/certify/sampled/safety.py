"""Probabilistic robustness of a *continuous* posterior q, from independent draws of it.

    P_safe = Prob_{w ~ q}( f(w, .) is safe on all of T )

The *statistical* tier, for networks that are too large for boxes of weights. A network that bounds
prove safe is safe, and one that an attack breaks is not:

    Prob(proved)  <=  P_safe  <=  1 - Prob(broken)

Of n independent draws the numbers proved and broken are binomial, and Clopper and Pearson bound
their probabilities from below (`bnncert.certify.sampled.inequalities`). Whatever share of q neither
proof nor attack decides is the gap that more draws do not close.

Source: Cardelli et al., "Statistical guarantees for the robustness of Bayesian neural networks",
IJCAI 2019, section 4 (P_safe by sampling, there by Chernoff bounds).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from bnncert._emptiness import is_valid
from bnncert.bounds import bound
from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.margins import margin_bounds
from bnncert.bounds.methods import Method
from bnncert.certify.inputs import check_region
from bnncert.certify.sampled import inequalities
from bnncert.certify.sampled.draws import check_posterior, over_draws
from bnncert.outputs import classifier
from bnncert.posterior.leaves import draw_keys
from bnncert.sets import Box, Set
from bnncert.types import Apply, Key, Params, Posterior


class SampledSafety(NamedTuple):
    """What independent draws say of P_safe, in float64 on the host, rounded outward.

    Attributes:
        lower: P_safe is at least this, by the draws proved safe; 0 where no proof was asked for.
        upper: P_safe is at most this, by the draws broken; 1 where no attack was asked for.
        proved: how many draws were proved safe.
        broken: how many were broken.
        num_samples: draws.
        confidence: of both bounds together.

    Example:
        >>> from bnncert.posterior import MeanField
        >>> q = MeanField(jnp.zeros(()), jnp.ones(()))
        >>> key, count = jax.random.key(0), 100
        >>> found = sampled_safety(key, q, num_samples=count, proved=lambda w: w < 1.0)
        >>> found.lower < found.proved / count < found.upper == 1.0
        True
    """

    lower: float
    upper: float
    proved: int
    broken: int
    num_samples: int
    confidence: float


def sampled_safety(
    key: Key,
    posterior: Posterior,
    *,
    num_samples: int,
    proved: Callable[[Params], Array] | None = None,
    broken: Callable[[Params], Array] | None = None,
    delta: float = 0.05,
    batch_size: int | None = None,
) -> SampledSafety:
    """Bounds the probability that a network drawn from q is safe, with confidence 1 - delta.

        Prob(proved)  <=  P_safe  <=  1 - Prob(broken)
        Prob(proved)  >=  the p at which Prob( Binomial(n, p) >= number proved ) = delta / 2

    Args:
        key: a PRNG key.
        posterior: what draws come from; not `Samples`.
        num_samples: independent draws; take 1,000 or more.
        proved: `params -> bool`, true only of a network proved safe: `proves_class`,
            `proves_outputs`. It gives the lower bound.
        broken: `params -> bool`, true only of a network proved unsafe, by a point that an attack
            found. It gives the upper bound.
        delta: probability that a bound is wrong; each of two has half of it.
        batch_size: draws at once; one by default.

    Returns:
        A `SampledSafety`.

    Raises:
        TypeError: a posterior of members, or no posterior.
        ValueError: neither `proved` nor `broken`; a count or a delta out of range.
        RuntimeError: a network that was both proved safe and broken: one of them is wrong.

    Cost: n draws, each with one proof and one attack; one compilation a call. Memory: `batch_size`
    draws with their proofs.

    Source: Cardelli et al., IJCAI 2019, section 4; Clopper and Pearson, Biometrika 1934.

    Example:
        >>> from bnncert import attack, ball
        >>> from bnncert.posterior import MeanField
        >>> apply = lambda p, x: p["w"] * x                             # logits (w_0 x, w_1 x)
        >>> q = MeanField({"w": jnp.array([1.0, 0.0])}, {"w": jnp.ones(2)})
        >>> key, x, eps = jax.random.key(0), jnp.array([1.0]), 0.5
        >>> def broken(params):
        ...     one = jax.tree.map(lambda leaf: leaf[None], params)
        ...     return attack.pgd(key, apply, one, x, 0, eps, steps=5).broken
        >>> found = sampled_safety(
        ...     key, q, num_samples=1000, proved=proves_class(apply, ball(x, eps), 0), broken=broken
        ... )
        >>> found.lower < 0.7602 < found.upper                          # Phi(1 / sqrt 2)
        True
    """
    check_posterior(posterior)
    inequalities.check(num_samples, delta, least=1)
    if proved is None and broken is None:
        raise ValueError("give proved (for the lower bound), broken (for the upper), or both.")
    never = jnp.zeros((), bool)

    def judge(params: Params) -> tuple[Array, Array]:
        safe, unsafe = (never if f is None else jnp.asarray(f(params)) for f in (proved, broken))
        return safe, unsafe

    @jax.jit
    def verdicts(posterior: Posterior, key: Key) -> tuple[Array, Array]:
        return over_draws(judge, posterior, draw_keys(key, num_samples), batch_size)

    safe, unsafe = (np.asarray(v) for v in verdicts(posterior, key))
    if safe.shape != (num_samples,) or unsafe.shape != (num_samples,):
        raise ValueError(
            f"proved and broken returned shapes {safe.shape[1:]} and {unsafe.shape[1:]} for one "
            "network; each must return one boolean."
        )
    if (both := safe & unsafe).any():
        raise RuntimeError(
            f"{both.sum()} of {num_samples} networks were proved safe and broken: a bound is "
            "unsound, or proof and attack speak of different sets (the same eps, clip and label?)."
        )
    k, m = int(safe.sum()), int(unsafe.sum())
    asked = None if proved is None else k, None if broken is None else m
    lower, upper = _bounds(asked[0], asked[1], num_samples, delta)
    return SampledSafety(lower, upper, k, m, num_samples, 1 - delta)


def proves_class(
    apply: Apply,
    x_set: Set,
    label: Int[Array, ""] | int,
    *,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
) -> Callable[[Params], Array]:
    """Makes `params -> bool`: is one network proved to choose a class on the whole set, strictly?

        max over T of f_j - f_label < 0    for all j

    Args:
        apply: `(params, x) -> logits (C,)` for one example.
        x_set: a `Box` or an `LpBall` of inputs, for one example.
        label: the class.
        outputs: what apply returns, "logits" or "probabilities": of one number, which class it
            speaks for (`bnncert.certify.decision`); of C, the largest is chosen of either.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`; by "nearest" what is proved is proved up to rounding.

    Returns:
        The predicate, for `sampled_safety`.

    Raises:
        TypeError: x_set is not a set. The predicate: as `bnncert.bound`.

    Cost: a call bounds C margins.

    Source: as the method's, e.g. Zhang et al., NeurIPS 2018 (CROWN).

    Example:
        >>> safe = proves_class(lambda w, x: w * x, Box(jnp.array([0.5]), jnp.array([1.0])), 0)
        >>> bool(safe(jnp.array([1.0, -1.0]))), bool(safe(jnp.array([-1.0, 1.0])))
        (True, False)
    """
    check_region(x_set)
    network = classifier(apply, outputs)
    bounded = margin_bounds(network, method, rounding=rounding)

    def predicate(params: Params) -> Array:
        classes = jax.eval_shape(lambda s: network(params, s.center), x_set).shape[0]
        margins = bounded(params, x_set, jnp.asarray(label))
        return jnp.all((margins.upper < 0) | (jnp.arange(classes) == label))

    return predicate


def proves_outputs(
    apply: Apply,
    x_set: Set,
    within: Box,
    *,
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
) -> Callable[[Params], Array]:
    """Makes `params -> bool`: are one network's outputs proved to stay in a box (regression)?

        within.lower <= min over T of f,    max over T of f <= within.upper

    Args:
        apply: `(params, x) -> outputs` for one example.
        x_set: a `Box` or an `LpBall` of inputs, for one example.
        within: the box of safe outputs, which broadcasts with them.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `bnncert.bound`; by "nearest" what is proved is proved up to rounding.

    Returns:
        The predicate, for `sampled_safety`.

    Raises:
        TypeError: x_set is not a set. The predicate: as `bnncert.bound`.

    Cost: a call bounds the outputs.

    Source: as the method's, e.g. Zhang et al., NeurIPS 2018 (CROWN).

    Example:
        >>> inputs, within = Box(jnp.zeros(1), jnp.ones(1)), Box(-jnp.ones(1), jnp.ones(1))
        >>> safe = proves_outputs(lambda w, x: w * x, inputs, within)
        >>> bool(safe(jnp.array([0.9]))), bool(safe(jnp.array([1.1])))
        (True, False)
    """
    check_region(x_set)
    bounded = bound(apply, method, rounding=rounding)

    def predicate(params: Params) -> Array:
        box = bounded(params, x_set)
        inside = (box.lower >= within.lower) & (box.upper <= within.upper)
        return jnp.all(inside) & is_valid(x_set)  # of an empty set nothing is proved

    return predicate


def _bounds(
    proved: int | None, broken: int | None, num_samples: int, delta: float
) -> tuple[float, float]:
    """Bounds P_safe from counts; None where nothing was asked for, which then needs no delta."""
    share = delta if proved is None or broken is None else delta / 2
    bounds = [
        0.0 if count is None else inequalities.clopper_pearson(count, num_samples, share)
        for count in (proved, broken)
    ]
    return bounds[0], min(float(np.nextafter(1 - bounds[1], 2.0)), 1.0)
