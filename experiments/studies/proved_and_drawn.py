"""Both sides of P_safe of a posterior's images, proved, and draws that try the proofs.

    lower   1 - delta - sum_j Phi(-E_j / L_j), of the margins to all other classes over the ball
    upper   1 - the same for the opposite of one margin at one point x* of the ball

E_j and L_j are the mean and the Lipschitz constant of a bound on the margin to class j that is
linear in the weights (`bnncert.gaussian.margins`). x* is the worst point for the network of the
means that a battery of attacks finds; the upper bound holds for any point.

Draws. A network drawn from q is attacked at x*, and by gradient steps from it and from the image.
That no attack breaks it has a probability in [lower, upper], if both hold:

    { the class stays in the ball }  in  { no attack breaks it }  in  { the class stays at x* }

so the count of draws that withstand is binomial with a probability in that interval, for each
image; draws are shared by the images.

Sources: `bnncert.gaussian.margins`; Wicker et al., UAI 2020 (P_safe).
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom
from tqdm import tqdm

from bnncert import attack, ball, certify
from bnncert.gaussian import Margins, margins
from bnncert.gaussian.margins import METHODS
from bnncert.gaussian.weights import leaves_of
from bnncert.sets import Box
from bnncert.types import Apply

from ..pipeline.finished import Finished
from ..setup.data import Split
from ..setup.settings import PIXELS

SAFE, UNSAFE = 0.99, 0.01
"""A lower bound of at least one, or an upper bound of at most the other, decides an image."""

CHANCE = 1e-6
"""Of a count of draws, if what was proved holds: below it the count contradicts the proof."""

DRAWS_AT_ONCE = 32
"""Networks drawn between two steps of the progress bar."""

Row = dict[str, Any]


def add_bound_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of how P_safe is bounded."""
    parser.add_argument("--method", choices=METHODS,
                        help="how the bounds are found (default: crown for fully connected "
                        "networks, crown-ibp for others)")  # fmt: skip
    parser.add_argument("--rounding", choices=("outward", "nearest"), default="outward",
                        help="outward: sound for the float32 network; nearest: for the real one, "
                        "up to the bounds' own rounding (default: outward)")  # fmt: skip
    parser.add_argument("--delta", type=float, default=1e-3, metavar="P",
                        help="probability that hidden units leave their intervals: no P_safe is "
                        "proved above 1 - P (default: 0.001)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="images bounded at once (default: 8)")  # fmt: skip


class Subject(NamedTuple):
    """A posterior and what is asked of it.

    Attributes:
        name: of the file or folder.
        kind: "released", or "run".
        apply: one image to its logits.
        posterior: a Gaussian.
        images: with the class that has to stay for each.
        against: what that class is: the "label", or the "mean" network's.
        eps: l_inf radius, pixels in [0, 1].
        method: of the bounds.
        digest: of the file of the posterior.
    """

    name: str
    kind: str
    apply: Apply
    posterior: Any
    images: Split
    against: str
    eps: float
    method: str
    digest: str

    def row(self) -> Row:
        """What a row is of: rows of the same are not computed again."""
        kept = ("name", "kind", "eps", "method", "against", "digest")
        return {name: getattr(self, name) for name in kept} | {"images": len(self.images.y)}


def of_run(run: Finished, method: str | None = None) -> Subject:
    """A finished run's posterior at the radius of its tests, against the labels.

    Args:
        run: whose posterior is a Gaussian.
        method: of the bounds; of fully connected networks "crown" by default, else "crown-ibp".
    """
    method = method or ("crown" if run.config.model == "mlp" else "crown-ibp")
    return Subject(run.folder.resolve().name, "run", run.apply, run.posterior, run.test, "label",
                   run.config.eval.eps, method, digest(run.folder / "posterior.npz"))  # fmt: skip


def digest(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def proved_and_drawn(subject: Subject, options: argparse.Namespace) -> Row:
    """Proves what can be proved about each image that the mean network has right, and draws."""
    right = right_of(subject)
    x, y = (jnp.asarray(part[right]) for part in subject.images)
    label = f"{subject.name}, eps {subject.eps:g}"
    # 1. The worst point for the mean network, and the class that wins there.
    keys = jax.random.split(jax.random.key(options.seed), len(right))
    attacks = _Batches(partial(attacked, subject, options.attack_steps), 16, f"{label}: attacks")
    worst, rival, broken = attacks(keys, x, y)
    broken = np.asarray(broken)
    # 2. The ball, from below.
    bounds = partial(stays, subject, options)
    below = _Batches(bounds, options.batch_size, f"{label}: lower bounds")
    found = below(x, y)
    lower, ratio = found.probability(), np.asarray(found.mean / found.lipschitz).min(-1)
    # 3. The point, from above.
    upper, at = np.ones(len(right)), np.flatnonzero(broken)
    if at.size:
        above = _Batches(partial(breaks, subject, options), options.batch_size, f"{label}: upper")
        upper[at] = 1 - above(worst[at], y[at], rival[at]).probability()
    # 4. Draws: of the open images too, unless there is nothing to try.
    proved = (lower > 0) | (upper < 1)
    each = -(-options.draws // int(proved.sum())) if proved.any() else 0
    counts = np.zeros(len(right), int)
    if each:
        key = jax.random.key(options.seed + 1)
        counts = drawn(subject, (x, y, worst), each, key, label)
    against = contradicted(counts, each, lower, upper) | (lower > upper)
    safe, unsafe = lower >= SAFE, upper <= UNSAFE
    ratio = np.clip(np.nan_to_num(ratio.astype(float)), -1e9, 1e9)  # JSON has no infinity
    return {
        "weights": sum(leaf.loc.size for leaf in leaves_of(subject.posterior).values()),
        "correct": len(right),
        "attack_leaves": int(len(right) - broken.sum()),
        "safe": int(safe.sum()),
        "unsafe": int(unsafe.sum()),
        "open": int((~safe & ~unsafe).sum()),
        "median_ratio": float(np.median(ratio)),
        "seconds_an_image": below.seconds,
        "seconds_to_compile": below.compiling,
        "draws_each": each,
        "pairs": int(each * proved.sum()),
        "fewest_where_safe": int(counts[safe].min()) if safe.any() else None,
        "most_where_unsafe": int(counts[unsafe].max()) if unsafe.any() else None,
        "contradicted": right[against].tolist(),
        "each": {
            "image": right.tolist(),
            "broken": broken.astype(int).tolist(),
            "lower": (np.floor(lower * 1e6) / 1e6).tolist(),
            "upper": (np.ceil(upper * 1e6) / 1e6).tolist(),
            "ratio": np.round(ratio, 3).tolist(),
            "withstood": counts.tolist(),
        },
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def right_of(subject: Subject) -> np.ndarray:
    """Says which images the network of the means has right.

    Raises:
        ValueError: none of them.
    """
    mean = partial(subject.apply, subject.posterior.moments()[0])
    found = np.asarray(jax.lax.map(mean, subject.images.x, batch_size=256).argmax(-1))
    right = np.flatnonzero(found == subject.images.y)
    if not len(right):
        raise ValueError(
            f"{subject.name}: the network of the means has none of {len(found)} images right: is "
            "it a network of these classes, on pixels in [0, 1], row by row?"
        )
    return right


def stays(subject: Subject, options: argparse.Namespace, x: Any, y: Any) -> Margins:
    """Bounds all margins of a class over the ball."""
    classes = jax.eval_shape(subject.apply, subject.posterior.loc, x).size
    matrices = np.stack([certify.class_stays(c, classes).matrix for c in range(classes)])
    return margins(
        subject.apply, subject.posterior, ball(x, subject.eps, clip=PIXELS),
        jnp.asarray(matrices)[y], jnp.zeros(classes - 1),
        method=subject.method, rounding=options.rounding, delta=options.delta,
    )  # fmt: skip


def breaks(subject: Subject, options: argparse.Namespace, x: Any, y: Any, rival: Any) -> Margins:
    """Bounds the margin of another class over the one that should stay, at one point."""
    classes = jax.eval_shape(subject.apply, subject.posterior.loc, x).size
    unit = jnp.eye(classes)
    return margins(
        subject.apply, subject.posterior, Box(x, x), (unit[rival] - unit[y])[None], jnp.zeros(1),
        method=subject.method, rounding=options.rounding, delta=options.delta,
    )  # fmt: skip


def attacked(subject: Subject, steps: int, key: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """The worst point for the mean network: it, the best other class there, whether that wins."""
    one = jax.tree.map(lambda leaf: leaf[None], subject.posterior.moments()[0])
    found = attack.strongest(
        key, subject.apply, one, x, y, subject.eps, clip=PIXELS, steps=steps, queries=0
    )
    logits = subject.apply(subject.posterior.moments()[0], found.x)
    rival = jnp.argmax(jnp.where(jnp.arange(logits.size) == y, -jnp.inf, logits))
    return found.x, rival, found.broken


def drawn(
    subject: Subject, images: tuple[Any, Any, Any], draws: int, key: Any, label: str
) -> np.ndarray:
    """Counts the draws that an attack leaves, for each image.

    Args:
        subject: whose posterior.
        images: x, the class that has to stay, and a point of the ball to begin from as well.
        draws: of networks, each attacked at all images.
        key: of the draws.
        label: of the progress bar.
    """
    eps = subject.eps

    def withstands(params: Any, x: Any, y: Any, worst: Any) -> Any:
        def margin(at: Any) -> Any:
            logits = subject.apply(params, at)
            rivals = jnp.where(jnp.arange(logits.size) == y, -jnp.inf, logits)
            return logits[y] - rivals.max()

        def descend(at: Any) -> Any:
            least = jnp.asarray(jnp.inf)
            for step in (2 * eps, eps / 2):
                value, slope = jax.value_and_grad(margin)(at)
                least = jnp.minimum(least, value)
                at = jnp.clip(at - step * jnp.sign(slope), x - eps, x + eps).clip(*PIXELS)
            return jnp.minimum(least, margin(at))

        return jnp.minimum(descend(x), descend(worst)) > 0

    def network(key: Any) -> Any:
        params = jax.tree.map(lambda leaf: leaf[0], subject.posterior.sample(key, 1))
        rows = jax.lax.map(lambda row: withstands(params, *row), images, batch_size=256)
        return rows.astype(jnp.int32)

    @jax.jit
    def some(keys: Any, counted: Any) -> Any:
        return (jax.lax.map(network, keys) * counted[:, None]).sum(0)

    counts = np.zeros(len(images[1]), int)
    with tqdm(total=draws, desc=f"{label}: draws", unit="draw", leave=False) as bar:
        for start in range(0, draws, DRAWS_AT_ONCE):
            places = np.arange(start, start + DRAWS_AT_ONCE)
            keys = jax.vmap(partial(jax.random.fold_in, key))(places)
            with jax.default_matmul_precision("highest"):  # the float32 network
                counts += np.asarray(some(keys, jnp.asarray(places < draws, jnp.int32)))
            bar.update(min(DRAWS_AT_ONCE, draws - start))
    return counts


def contradicted(
    withstood: np.ndarray, draws: int, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """Says which counts have a chance below 1e-6 wherever in [lower, upper] the probability is.

    >>> contradicted(np.array([980, 900, 10, 40]), 1000, np.array([0.99, 0.99, 0, 0]),
    ...              np.array([1, 1, 0.01, 0.01])).tolist()
    [False, True, False, True]
    """
    fewer = binom.cdf(withstood, draws, lower)
    more = binom.sf(withstood - 1, draws, upper)
    return (fewer < CHANCE) | (more < CHANCE)


class _Batches:
    """A function of one image, compiled for batches of one shape; and how long that takes.

    Attributes:
        seconds: for each image, once it is compiled.
        compiling: seconds of the compilation.
    """

    def __init__(self, one: Callable[..., Any], size: int, label: str) -> None:
        self.one, self.size, self.label = one, size, label
        self.seconds = self.compiling = 0.0

    def __call__(self, *columns: Any) -> Any:
        """Stacks what the function gives for all rows of the columns."""
        num = len(columns[0])
        size = min(self.size, num)
        started = time.monotonic()
        batch = [column[:size] for column in columns]
        many = jax.jit(jax.vmap(self.one)).lower(*batch).compile()
        self.compiling = time.monotonic() - started
        found, started = [], time.monotonic()
        with tqdm(total=num, desc=self.label, unit="image", leave=False) as bar:
            for start in range(0, num, size):
                # One shape for one compile: the last batch repeats its last image.
                rows = np.minimum(np.arange(start, start + size), num - 1)
                found.append(jax.block_until_ready(many(*(column[rows] for column in columns))))
                bar.update(min(size, num - start))
        self.seconds = (time.monotonic() - started) / (len(found) * size)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num], *found)
