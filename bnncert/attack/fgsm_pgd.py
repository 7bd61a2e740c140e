"""Gradient attacks on the posterior predictive: FGSM and PGD.

The network attacked is the one deployed, pi(x') = (1/S) sum_s softmax f(w_s, x'), and the attack
looks for the point of a ball around x where the true class y wins by least:

    minimise  margin(x') = log pi_y(x') - max_{j != y} log pi_j(x')    over |x' - x|_p <= eps,

ascending the negative log-likelihood (`bnncert.attack._predictive`), with P the projection on the
ball and g the steepest unit step in the norm p,

    x_{k+1} = P( x_k + step_size g( -grad log pi_y(x_k) ) ).

An attack that fails proves nothing; one that succeeds proves that the network is not robust at x.

Sources: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015 (FGSM);
Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018 (PGD).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from bnncert.attack._geometry import (
    GEOMETRIES,
    check_arguments,
    spread_out,
    starting_points,
    usable,
)
from bnncert.attack._predictive import Ascent, AttackResult, ascent, none_yet, result_at, worse
from bnncert.outputs import logits_of, look_at_ending
from bnncert.sets import check_radius
from bnncert.types import Apply, Key, Stacked


def pgd(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    steps: int = 20,
    step_size: Float[ArrayLike, ""] | None = None,
    restarts: int = 1,
    clip: tuple[float, float] | None = None,
    p: float | int = jnp.inf,
    batch_size: int | None = None,
) -> AttackResult:
    """Descends by projected gradients on one example: the worst of all iterates and restarts.

        minimise  log pi_y - max_{j != y} log pi_j    by    x <- P(x + step_size g(-grad log pi_y))

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
        outputs: what apply returns: "logits", one of two classes z being (0, z), or
            "probabilities", as for `bnncert.certify.decision`; what is attacked of these are their
            logarithms, whose gradient is lost where a probability rounds to 0: of two networks of
            the same predictor, the one that returns logits is attacked as well or better.
        steps: gradient steps, >= 1.
        step_size: length of a step in the norm p, in the units of x; 2.5 eps / steps by default.
        restarts: starting points, >= 1.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        p: inf (steps along the gradient's sign) or 2 (along the gradient).
        batch_size: samples evaluated at once, one by default; dense layers gain from more. On CPU
            convolutions do not (`vmap` over kernels makes grouped ones), and inside a loop XLA
            runs them fast only in the layout NHWC with kernels HWIO, forwards and backwards.

    Returns:
        An `AttackResult`; where the set is traced and empty, `broken` is True.

    Raises:
        TypeError: for an integer x or a y that is no integer.
        ValueError: for a bad radius, count, p or clip, an x that is known not to be finite or not
            to lie in clip, samples that are not stacked, a label that names no class.

    Cost: restarts (steps + 1) S forward and backward passes. Memory, times the batch under `vmap`:
    (restarts + batch_size) |x| + batch_size A, A being what a backward pass keeps of its forward
    pass; besides the samples, which are shared, independent of S and of steps.

    Source: Madry et al., ICLR 2018, section 2.1; on the predictive, Carbone et al., NeurIPS 2020.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> result = pgd(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25)
        >>> result.x.tolist(), bool(result.broken), result.margin.item()
        ([0.25, 0.75], True, -0.25)
    """
    x = jnp.asarray(x)
    counts = {"steps": steps, "restarts": restarts, "batch_size": batch_size}
    check_arguments(samples, x, y, eps, p, clip, **counts)
    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    x = spread_out(apply, samples, x, key, y, eps, clip, step_size)
    none = none_yet(x, y, usable(x, eps, clip, p))
    eps = jnp.asarray(eps, x.dtype)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    check_radius(step_size, "step_size")
    geometry = GEOMETRIES[p]
    project = partial(geometry.project, x, eps, clip)
    starts = starting_points(key, geometry, x, eps, clip, restarts)

    def move(x: Array, direction: Array) -> Array:
        return project((x + step_size * geometry.steepest(direction)).astype(x.dtype))

    return _search(lambda x: ascent(apply, samples, x, y, batch_size), move, starts, none, y, steps)


def fgsm(
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    clip: tuple[float, float] | None = None,
    batch_size: int | None = None,
) -> AttackResult:
    """Takes one step along the gradient's sign to the edge of the ball, or none if that is worse.

        x' = P( x + eps sign(-grad log pi_y(x)) )

    Args:
        apply: `apply(params, x) -> logits (C,)` for one example.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1].
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError, ValueError: as `pgd`.

    Cost: 2 S forward and backward passes.

    Source: Goodfellow et al., ICLR 2015, section 4.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> fgsm(apply, w, jnp.array([0.5, 0.5]), 0, 0.25).x.tolist()
        [0.25, 0.75]
    """
    unused = jax.random.key(0)  # a single start is x itself
    return pgd(
        unused, apply, samples, x, y, eps, outputs=outputs, steps=1, step_size=eps, clip=clip,
        batch_size=batch_size,
    )  # fmt: skip


def _search(
    evaluate: Callable[[Array], Ascent],
    move: Callable[[Array, Array], Array],
    starts: Array,
    none: AttackResult,
    y: ArrayLike,
    steps: int,
) -> AttackResult:
    """Descends from each start, and keeps the first point of least margin among all evaluated.

    The last evaluation computes a direction that nobody follows: one backward pass in steps + 1,
    for a single compiled body.
    """

    def iterate(carry: tuple[Array, AttackResult], _: None) -> tuple[Any, None]:
        x, worst = carry
        here = evaluate(x)
        worst = worse(result_at(x, here.log_probs, y), worst)
        # a coordinate whose gradient is not finite stays where it is, inside the ball
        finite = jnp.where(jnp.isfinite(here.direction), here.direction, 0.0)
        return (move(x, finite), worst), None

    def descend(worst: AttackResult, start: Array) -> tuple[AttackResult, None]:
        (_, worst), _ = jax.lax.scan(iterate, (start, worst), length=steps + 1)
        return worst, None

    return jax.lax.scan(descend, none, starts)[0]
