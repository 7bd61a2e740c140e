"""Decision robustness under a *continuous* posterior q, from independent draws of it.

The *statistical* tier. For w_1, ..., w_n drawn from q independently, and a class c,

    min_{x' in T} pi_c - pi_j  >=  E_q[ D_j(w) ],   D_j(w) = min_{x' in T} (softmax_c - softmax_j) f

by exchange of minimum and expectation, and the mean of n bounds on D_j, less a slack, is below
E_q[D_j] with confidence 1 - delta (`bnncert.certify.sampled.inequalities`).

Which class? D_j has to be a function of w alone. Were c read off the same draws, it would depend on
all of them; so c is chosen by a batch of its own (`num_pilot` draws), and the rest holds given c.
It need not be the class that pi itself would choose: where `robust` is said, it is.

How many statements? The C - 1 margins and both ends of the probability: C + 1, for each point and
each stage. All share delta, so that *everything* in the decisions holds together.

Independence. Each draw has a key of its own (`bnncert.certify.sampled.draws`). A generator's
numbers count as random, and q is the law of the weights that it returns.

Arithmetic: as `bnncert.certify.exact.decision`; pi is the expectation, over q, of the softmax of
the computed logits.

Source: Wicker et al., AISTATS 2021, section 6, whose bounds on the predictive these are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnncert.bounds.arithmetic import Rounding
from bnncert.bounds.methods import Method
from bnncert.certify.exact.decision import (
    Decision,
    arithmetic_name,
    class_bounds,
    rounding_slack,
)
from bnncert.certify.inputs import check_region, nominal_input
from bnncert.certify.sampled import inequalities
from bnncert.certify.sampled.draws import check_posterior, over_draws
from bnncert.outputs import classifier, look_at_ending, normalised, probabilities
from bnncert.posterior.leaves import draw_keys
from bnncert.sets import Box, Set
from bnncert.types import Apply, Key, Params, Posterior


def statistical(
    key: Key,
    apply: Apply,
    posterior: Posterior,
    x_set: Set,
    *,
    num_samples: int,
    x: Float[Array, "..."] | None = None,
    delta: float = 0.05,
    num_points: int = 1,
    num_stages: int = 1,
    num_pilot: int = 100,
    outputs: str = "logits",
    method: str | Method = "crown-ibp",
    rounding: Rounding = "outward",
    inequality: str = "best",
    batch_size: int | None = None,
) -> Decision:
    """Certifies the decision of a continuous posterior's predictive, with confidence 1 - delta.

        min_{x' in T} pi_c - pi_j  >=  E_q[ D_j(w) ],    D_j = min over T of softmax_c - softmax_j
        E_q[ D_j ]  >=  mean of n bounds on D_j - slack(n, delta)

    Args:
        key: a PRNG key. Under `vmap` over points one key for all will do: the union bound does not
            ask for independent points.
        apply: `(params, x) -> logits (C,)` for one example.
        posterior: what draws come from; not `Samples`.
        x_set: a `Box` or an `LpBall` of inputs, for one example; `jax.vmap` for a batch.
        num_samples: n, independent draws; take 1,000 or more.
        x: the nominal input, as for `decision`.
        delta: probability that anything said is wrong.
        num_points: how many points the statement unites over: 1 says it of each point by itself,
            the size of the test set says it of all of them together.
        num_stages: how many certificates are tried on a point, whose best is kept: of a cascade, or
            the radii that a bisection chooses from (`bnncert.certify.statistical_radius`).
        num_pilot: further draws, which choose the class.
        outputs: "logits" or "probabilities", as for `decision`; that draws are normalised is looked
            at in the further ones.
        method: of the bounds, as for `bnncert.bound`.
        rounding: as for `decision`.
        inequality: "best", "hoeffding" or "bernstein".
        batch_size: draws at once, as for `decision`.

    Returns:
        A `Decision` whose margins and probability have the slack taken off. As that of `decision`,
        it is not robust where a set is traced and empty, or does not hold a traced x.

    Raises:
        TypeError: a posterior of members, or no posterior; x_set is not a set.
        ValueError: a count or a delta out of range, an unknown inequality; else as `decision`.

    Cost: n draws and bounds of C margins, `num_pilot` draws and evaluations. Memory: `batch_size`
    draws and bounds, and n C numbers.
    Outside `jit` each call is traced and compiled anew, in a second or more: for many, jit it once,
    with `apply` fixed.

    Source: Wicker et al., AISTATS 2021, section 6; the slack, Hoeffding, 1963, and Maurer and
    Pontil, 2009.

    Example:
        >>> from bnncert.posterior import MeanField
        >>> apply = lambda p, x: p["w"] * x                             # logits (w_0 x, w_1 x)
        >>> q = MeanField({"w": jnp.array([3.0, -3.0])}, {"w": jnp.full(2, 0.1)})
        >>> near_one = Box(jnp.array([0.9]), jnp.array([1.1]))
        >>> found = statistical(jax.random.key(0), apply, q, near_one, num_samples=1000)
        >>> int(found.predicted), bool(found.robust), f"{float(found.confidence):.2f}"
        (0, True, '0.95')
    """
    check_posterior(posterior)
    check_region(x_set)
    inequalities.check(num_samples, delta, least=2)
    inequalities.check_inequality(inequality)
    counts = {
        "num_points": num_points,
        "num_stages": num_stages,
        "num_pilot": num_pilot,
        "batch_size": 1 if batch_size is None else batch_size,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: it must be at least 1.")
    # 1. The class, by draws of its own.
    pilot, main = jax.random.split(key)
    nominal, x_set = nominal_input(x, x_set)
    look_at_ending(apply, outputs, jax.eval_shape(lambda: posterior.sample(key, 1)), nominal)
    network = classifier(apply, outputs)
    further = draw_keys(pilot, num_pilot)
    each = over_draws(lambda w: network(w, nominal), posterior, further, batch_size)
    valid = normalised(each, outputs)
    average = probabilities(each, outputs).mean(0)
    predicted, classes = jnp.argmax(average), average.shape[0]
    bounded = class_bounds(network, outputs, method, rounding)

    def certify(params: Params) -> tuple[Array, Array, Array]:
        least, around = bounded(params, x_set, predicted)
        return least, around.lower, around.upper

    # 2. Bounds of each of n independent networks.
    draws = over_draws(certify, posterior, draw_keys(main, num_samples), batch_size)
    # 3. What their means give way by: chance, each of C + 1 statements at its share, and rounding.
    share = delta / (num_points * num_stages * (classes + 1))
    widths = (2.0, 1.0, 1.0)
    slacks = [
        inequalities.slack(d, share, width, inequality)
        for d, width in zip(draws, widths, strict=True)
    ]
    error = rounding_slack(rounding, average, num_samples)
    # 4. What is left is what holds.
    itself = jnp.arange(classes) == predicted
    least = jnp.where(valid, draws[0].mean(0) - slacks[0] - error, -1.0)
    margins = jnp.where(itself, 0.0, least)
    lower = jnp.maximum(draws[1].mean(0) - slacks[1] - 0.5 * error, 0.0)
    upper = draws[2].mean(0) + slacks[2] + 0.5 * error
    probability = Box(jnp.where(valid, lower, -jnp.inf), jnp.where(valid, upper, jnp.inf))
    one = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], posterior.sample(key, 1)))
    arithmetic = arithmetic_name(rounding, average.dtype, network, one, nominal)
    robust = jnp.all((margins > 0) | itself)
    return Decision(predicted, robust, margins, probability, jnp.asarray(stated(delta)), arithmetic)


def stated(delta: float) -> np.float32:
    """Computes the confidence 1 - delta, rounded down.

    Args:
        delta: probability of an error.

    Returns:
        A float32, at most 1 - delta.

    Example:
        >>> float(stated(0.05)) <= 0.95
        True
    """
    nearest = np.float32(1 - delta)
    return np.nextafter(nearest, np.float32(0)) if float(nearest) > 1 - delta else nearest
