"""Square: a random search with no gradients, on the posterior predictive, for l_inf balls.

Where gradients are zero, masked or wrong, an attack that only asks for values still works. From
stripes of +-eps along one axis of the image, query i proposes to overwrite a square window of the
perturbation, at a random place, by +eps or -eps, a sign for each channel, and keeps the proposal if
the margin of log pi falls. The window holds a fraction of all pixels that starts at `fraction` and
is halved at the queries 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 of 10,000 (in proportion,
for other budgets). Every proposal is cut to the set; the clean input is asked for first.

Inputs that are no images have no windows: there a random subset of the features is overwritten, a
sign for each.

Source: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, algorithms 1 and 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from bnncert._varying import axes_of, varying
from bnncert.attack._geometry import GEOMETRIES, check_arguments, spread_out, usable
from bnncert.attack._predictive import AttackResult, log_predictive, none_yet, result_at, worse
from bnncert.outputs import logits_of, look_at_ending
from bnncert.types import Apply, Key, Stacked

_HALVINGS = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]) / 10_000


def square(
    key: Key,
    apply: Apply,
    samples: Stacked,
    x: Float[Array, "..."],
    y: Int[ArrayLike, ""],
    eps: Float[ArrayLike, ""],
    *,
    outputs: str = "logits",
    queries: int = 500,
    fraction: float = 0.8,
    channels: int | None = -1,
    restarts: int = 1,
    clip: tuple[float, float] | None = None,
    batch_size: int | None = None,
) -> AttackResult:
    """Runs Square on one example, in the l_inf ball: the worst of all queries and restarts.

        d' = d, but +-eps on a random window;    d <- d'  if  margin(x + d') < margin(x + d)

    Args:
        key: a PRNG key for the proposals.
        apply: `apply(params, x) -> logits (C,)` for one example; no gradient of it is taken.
        samples: the S networks deployed, stacked.
        x: one input; for images, pixels in [0, 1]. Of two axes (rows, columns) or of three, with
            channels, it is an image.
        y: its true class.
        eps: radius in the units of x.
        outputs: as for `pgd`.
        queries: evaluations of the predictive for each restart, the clean input's included, >= 1.
        fraction: of the pixels that the first windows cover, in (0, 1].
        channels: the axis of channels of an x of three axes; None: x is no image, whatever its
            shape.
        restarts: independent searches, >= 1.
        clip: `(low, high)`, the range of the input's values, in which x lies.
        batch_size: samples evaluated at once, as in `pgd`.

    Returns:
        An `AttackResult`.

    Raises:
        TypeError, ValueError: as `pgd`; for a fraction or an axis out of range.

    Cost: restarts x queries x S forward passes. Memory: a few points; independent of queries.

    Source: Andriushchenko et al., ECCV 2020, algorithms 1 and 2.

    Example:
        >>> apply = lambda w, x: w @ x
        >>> w = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])  # S = 1: the logits are 2 x_0 and x_1
        >>> found = square(jax.random.key(0), apply, w, jnp.array([0.5, 0.5]), 0, 0.25, queries=50)
        >>> found.x.tolist(), bool(found.broken)
        ([0.25, 0.75], True)
    """
    x = jnp.asarray(x)
    counts = {"queries": queries, "restarts": restarts, "batch_size": batch_size}
    check_arguments(samples, x, y, eps, jnp.inf, clip, **counts)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: it must be in (0, 1].")
    look_at_ending(apply, outputs, samples, x)
    apply = logits_of(apply, outputs)
    x = spread_out(apply, samples, x, key, y, eps, clip)
    none = none_yet(x, y, usable(x, eps, clip, jnp.inf))
    image = channels is not None and x.ndim in (2, 3)
    if x.ndim == 3 and channels is not None and not -3 <= channels < 3:
        raise ValueError(f"channels = {channels}: an axis of x, in -3..2, or None.")
    eps = jnp.asarray(eps, x.dtype)
    project = partial(GEOMETRIES[jnp.inf].project, x, eps, clip)
    # Images: (rows, columns, channels) inside, whatever the layout outside.
    axis = channels if x.ndim == 3 and channels is not None else -1
    inner = jnp.moveaxis(x[..., None] if x.ndim == 2 else x, axis, -1) if image else x
    propose = _window if image else _subset
    sizes = jnp.asarray(_sizes(queries, fraction, inner.shape if image else (x.size,)))

    def back(signs: Array) -> Array:
        return jnp.moveaxis(signs, -1, axis).reshape(x.shape) if image else signs

    def query(
        carry: tuple[Array, AttackResult, Array, AttackResult], now: tuple[Array, Array]
    ) -> tuple[tuple[Array, AttackResult, Array, AttackResult], None]:
        key, here, signs, worst = carry
        i, size = now
        first, then = jax.random.split(jax.random.fold_in(key, i))
        # Query 0 is the clean input, 1 the stripes on all of it, the others overwrite a part.
        stripes = jnp.broadcast_to(_signs(first, (1, *inner.shape[1:])), inner.shape)
        inside, new = propose(first, then, size, inner.shape)
        proposal = jnp.where(i == 1, stripes, jnp.where(inside, new, signs))
        proposal = jnp.where(i == 0, 0.0, proposal).astype(x.dtype)
        point = project(x + eps * back(proposal))
        log_probs = log_predictive(apply, samples, point, y, batch_size)
        found = result_at(point, log_probs, y)
        # The stripes are where the search begins, even if the clean input is worse.
        kept = (found.margin < here.margin) | (i == 1)
        here = jax.tree.map(partial(jnp.where, kept), found, here)
        signs = jnp.where(kept, proposal, signs)
        return (key, here, signs, worse(found, worst)), None

    def search(worst: AttackResult, key: Array) -> tuple[AttackResult, None]:
        start = (key, none_yet(x, y), jnp.zeros(inner.shape, x.dtype), worst)
        start = varying(start, axes_of(x))
        return jax.lax.scan(query, start, (jnp.arange(queries), sizes))[0][3], None

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(restarts))
    return jax.lax.scan(search, none, keys)[0]


def _window(place: Key, signs: Key, size: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Draws which pixels a square of this side covers, and a sign for each channel."""
    inside = []
    for extent, key in zip(shape[:2], jax.random.split(place), strict=True):
        corner = jax.random.randint(key, (), 0, extent - size + 1)
        at = jnp.arange(extent)
        inside.append((at >= corner) & (at < corner + size))
    return (inside[0][:, None] & inside[1])[:, :, None], _signs(signs, (1, 1, shape[2]))


def _subset(place: Key, signs: Key, size: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Draws a subset of this many features, and a sign for each."""
    rank = jax.random.permutation(place, int(np.prod(shape))).reshape(shape)
    return rank < size, _signs(signs, shape)


def _signs(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _sizes(queries: int, fraction: float, shape: tuple[int, ...]) -> np.ndarray:
    """Lists for each query the side of an image's window, or else the number of features.

    >>> _sizes(10, 0.8, (100,)).tolist()
    [80, 5, 2, 1, 1, 1, 1, 1, 1, 1]
    """
    halvings = (np.arange(queries)[:, None] > _HALVINGS * queries).sum(1)
    part = fraction * 0.5**halvings
    if len(shape) == 1:
        return np.clip(np.rint(part * shape[0]), 1, shape[0]).astype(int)
    sides = np.rint(np.sqrt(part * shape[0] * shape[1]))
    return np.clip(sides, 1, min(shape[:2])).astype(int)
