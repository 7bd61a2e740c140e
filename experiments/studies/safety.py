"""P_safe of posteriors that others released, and of runs of ours: proved on both sides, and drawn.

    python -m experiments.studies.safety --posteriors DIR --runs RUN ... --data-dir DIR --out FOLDER

    P_safe = Prob_{w ~ q}( the class stays over the whole l_inf ball )

For each image that the network of the posterior's means has right, with F_j = E_j - noise of
deviation L_j a bound on the margin to class j (`bnncert.gaussian.margins`):

    lower   1 - delta - sum_j Phi(-E_j / L_j), of all margins over the ball;       safe >= .99
    upper   1 - the same for the opposite of one margin at one point x*, the      unsafe <= .01
            worst that a battery of attacks on the mean network finds
    open    the rest

Both are proofs, for the float32 network by `--rounding outward`. Then they are put to the test:
networks are drawn from q and each is attacked in the ball, at x* and by gradient steps from it and
from the image. The share of draws that withstand estimates a probability in [lower, upper], so
that a count which a binomial of either has with a probability below 1e-6 contradicts a proof, and
ends the command with status 1.

Writes safety.json (a row as soon as it is done: the same command goes on with those that are
missing), safety.md and safety.png.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bnncert.posterior import Gaussian, LowRank, MeanField
from bnncert.sets import Box
from bnncert.types import Apply
from experiments.pipeline.allocator import keep_freed_pages
from experiments.pipeline.finished import open_run
from experiments.setup.data import Split, load
from experiments.setup.settings import PIXELS
from experiments.studies import released

SAFE, UNSAFE = 0.99, 0.01
"""A lower bound of at least one, or an upper bound of at most the other, decides an image."""

CHANCE = 1e-6
"""Of a count of draws, if what was proved holds: below it the count contradicts the proof."""

DRAWS_AT_ONCE = 32
"""Networks drawn between two steps of the progress bar."""

Row = dict[str, Any]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, options = _parse(arguments)
    keep_freed_pages()
    settings = {name: getattr(options, name) for name in ("rounding", "delta", "draws", "seed")}
    settings["steps"] = options.attack_steps
    path = options.out / "safety.json"
    rows: list[Row] = []
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            parser.error(
                f"{path} is of other settings, {record['settings']}: name a new folder with --out, "
                "or repeat them"
            )
        rows = record["rows"]
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for subject in subjects(options):
            asked = subject.row()
            row = next((row for row in rows if asked.items() <= row.items()), None)
            if row is None:
                row = asked | certified(subject, options)
                rows.append(row)
                write(path, settings, rows)
            print(summary(row), flush=True)
            if row["contradicted"]:
                parser.exit(1, f"error: {_contradiction(row)}\n")
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"error: {error}\n")
    path.with_suffix(".md").write_text(table(rows) + "\n")
    print(f"\n{table(rows)}\n\n{sum(row['pairs'] for row in rows):,} attacked draws contradict nothing")
    return 0


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """Every posterior at every radius, one after the other.

    Raises:
        OSError, ValueError, TypeError: what is not there, cannot be read, or is no Gaussian.
    """
    files: list[Path] = []
    if options.posteriors is not None:
        if not options.posteriors.is_dir():
            raise FileNotFoundError(f"--posteriors {options.posteriors}: there is no such folder")
        files = sorted(options.posteriors.glob("*.npz"))
        if not files:
            raise FileNotFoundError(
                f"--posteriors {options.posteriors}: there is no .npz file in it. The module "
                "experiments.studies.released says what they hold"
            )
    posteriors = [released.read(file) for file in files]  # before anything is computed
    test = load("mnist", options.data_dir).test if files else None
    for file, posterior in zip(files, posteriors, strict=True):
        known = released.KNOWN.get(file.stem, released.Setting())
        images = _first(test, options.images or known.images)
        if known.against == "mean":
            mean = jax.vmap(partial(released.apply, posterior.loc))(images.x)
            images = Split(images.x, np.asarray(mean.argmax(-1), np.int32))
        for eps in options.eps or known.eps:
            yield Subject(file.stem, "released", released.apply, posterior, images, known.against,
                          eps, options.method or "crown", _digest(file))  # fmt: skip
    for folder in options.runs:
        run = open_run(folder, options.data_dir, options.images or 1000)
        if not isinstance(run.posterior, MeanField | LowRank | Gaussian):
            raise TypeError(
                f"{folder}: its posterior is a {type(run.posterior).__name__}, and no Gaussian. "
                "What it deploys is certified by python -m experiments.certify"
            )
        dense = run.config.model == "mlp"
        method = options.method or ("crown" if dense else "crown-ibp")
        for eps in options.eps or (run.config.eval.eps,):
            yield Subject(folder.resolve().name, "run", run.apply, run.posterior, run.test,
                          "label", eps, method, _digest(folder / "posterior.npz"))  # fmt: skip


def certified(subject: Subject, options: argparse.Namespace) -> Row:
    """Proves what can be proved about each image that the mean network has right, and draws."""
    x, y = (jnp.asarray(part) for part in subject.images)
    mean = subject.posterior.moments()[0]
    right = np.flatnonzero(np.asarray(jax.vmap(partial(subject.apply, mean))(x).argmax(-1) == y))
    x, y = x[right], y[right]
    label = f"{subject.name}, eps {subject.eps:g}"
    # 1. The worst point for the mean network, and the class that wins there.
    keys = jax.random.split(jax.random.key(options.seed), len(right))
    attacks = _Batches(partial(attacked, subject, options.attack_steps), 16, f"{label}: attacks")
    worst, rival, broken = attacks(keys, x, y)
    # 2. The ball, from below.
    bounds = partial(stays, subject, options)
    below = _Batches(bounds, options.batch_size, f"{label}: lower bounds")
    found = below(x, y)
    lower, ratio = found.probability(), (found.mean / found.lipschitz).min(-1)
    # 3. The point, from above.
    upper, at = np.ones(len(right)), np.flatnonzero(broken)
    if at.size:
        above = _Batches(partial(breaks, subject, options), options.batch_size, f"{label}: upper")
        upper[at] = 1 - above(worst[at], y[at], rival[at]).probability()
    # 4. Draws, of what is proved.
    proved = np.flatnonzero((lower > 0) | (upper < 1))
    each = -(-options.draws // max(len(proved), 1)) if len(proved) else 0
    withstood = np.zeros(len(proved), int)
    if each:
        images = x[proved], y[proved], worst[proved]
        withstood = drawn(subject, images, each, jax.random.key(options.seed + 1), label)
    against = contradicted(withstood, each, lower[proved], upper[proved]) | (
        lower[proved] > upper[proved]
    )
    safe, unsafe = lower >= SAFE, upper <= UNSAFE
    observed = np.full(len(right), np.nan)
    observed[proved] = withstood / max(each, 1)
    return {
        "weights": sum(leaf.loc.size for leaf in leaves_of(subject.posterior).values()),
        "correct": len(right),
        "attack_leaves": int(len(right) - broken.sum()),
        "safe": int(safe.sum()),
        "unsafe": int(unsafe.sum()),
        "open": int((~safe & ~unsafe).sum()),
        "median_ratio": float(np.median(ratio)) if len(right) else None,
        "seconds_an_image": below.seconds,
        "seconds_to_compile": below.compiling,
        "draws_each": each,
        "pairs": each * len(proved),
        "least_observed_where_safe": float(observed[safe].min()) if safe.any() else None,
        "contradicted": right[proved[against]].tolist(),
        "each": {
            "image": right.tolist(),
            "broken": np.asarray(broken).astype(int).tolist(),
            "lower": (np.floor(lower * 1e6) / 1e6).tolist(),
            "upper": (np.ceil(upper * 1e6) / 1e6).tolist(),
            "ratio": np.round(ratio.astype(float), 3).tolist(),
            "withstood": [None if np.isnan(share) else round(share * each) for share in observed],
        },
    }


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
        """Stacks what the function gives for all rows of the columns, as host arrays."""
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
                found.append(jax.device_get(many(*(column[rows] for column in columns))))
                bar.update(min(size, num - start))
        self.seconds = (time.monotonic() - started) / (len(found) * size)
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *found)


def write(path: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes the settings and the rows, a line each."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"settings": {json.dumps(settings)}, "rows": [\n{lines}\n]}}\n')
    temporary.replace(path)


def summary(row: Row) -> str:
    """A row in a sentence."""
    text = (
        f"{row['name']}, eps {row['eps']:g}, {row['method']}: of {row['correct']} right, "
        f"{row['safe']} safe, {row['unsafe']} unsafe, {row['open']} open; "
        f"{row['seconds_an_image']:.3g} s an image"
    )
    return text + ("; VACUOUS: nothing is proved of any image" if _vacuous(row) else "")


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| posterior | weights | eps | bounds | images | right | attack leaves | P_safe >= .99 "
        "| <= .01 | open | median E/L | s an image | s to compile | attacked draws "
        "| fewest that withstand, of the safe |",
        "|---" * 15 + "|",
    ]
    for row in rows:
        ratio, least = row["median_ratio"], row["least_observed_where_safe"]
        lines.append(
            f"| {row['name']} | {row['weights']:,} | {row['eps']:g} | {row['method']} "
            f"| {row['images']:,} | {row['correct']} | {row['attack_leaves']} | {row['safe']} "
            f"| {row['unsafe']} | {row['open']} | {'-' if ratio is None else f'{ratio:.3g}'} "
            f"| {row['seconds_an_image']:.2g} | {row['seconds_to_compile']:.1f} "
            f"| {row['pairs']:,} | {'-' if least is None else f'{least:.2%}'} |"
        )
    return "\n".join(lines)


def _vacuous(row: Row) -> bool:
    return not any(row["each"]["lower"]) and min(row["each"]["upper"], default=1) == 1


def _contradiction(row: Row) -> str:
    places = [row["each"]["image"].index(i) for i in row["contradicted"]]
    image, lower, upper, withstood = (
        row["each"][name][places[0]] for name in ("image", "lower", "upper", "withstood")
    )
    return (
        f"{row['name']}, eps {row['eps']:g}: test image {image} has P_safe in [{lower:g}, "
        f"{upper:g}] by proof, but an attack left {withstood} of {row['draws_each']} draws "
        f"({len(places)} images so): a bound, the attack or the draws are wrong; please report "
        "this with the posterior"
    )


def _first(test: Any, images: int) -> Split:
    if images > len(test.y):
        raise ValueError(f"--images {images}: the test set has {len(test.y)}")
    return Split(test.x[:images], test.y[:images])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    known = "; ".join(
        f"{name}: eps {', '.join(f'{eps:g}' for eps in setting.eps)}, {setting.images} images, "
        + ("the mean network's class" if setting.against == "mean" else "labels")
        for name, setting in {**released.KNOWN, "any other": released.Setting()}.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.safety",
        description="Bounds the probability, over a Gaussian posterior, that an image's class "
        "stays over a whole l_inf ball, from below and above, and tries the bounds against "
        "attacked draws. Writes safety.json, safety.md and safety.png; the same command goes on "
        "with rows that are missing. Ends with status 1 if a draw contradicts a proof.",
        epilog=f"Settings of released posteriors. {known}.",
    )
    parser.add_argument("--posteriors", type=Path, metavar="DIR",
                        help="folder of released posteriors: every .npz file in it, ReLU networks "
                        "of 784 pixels and 10 classes, arrays layer{i}/{kernel,bias}/{loc,scale}, "
                        "kernels (in, out)")  # fmt: skip
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN",
                        help="folders of finished runs, at the radius that each was tested at")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="TFDS data folder")
    parser.add_argument("--out", type=Path, default=Path("runs/safety"), metavar="FOLDER",
                        help="where the files go (default: runs/safety)")  # fmt: skip
    parser.add_argument("--eps", type=float, nargs="+", default=[], metavar="E",
                        help="l_inf radii for all that is given, pixels in [0, 1] (default: those "
                        "below, and the runs' own)")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N",
                        help="the first N test images (default: those below; 1000 of a run)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS,
                        help="how the bounds are found (default: crown; crown-ibp for runs with "
                        "convolutions)")  # fmt: skip
    parser.add_argument("--rounding", choices=("outward", "nearest"), default="outward",
                        help="outward: sound for the float32 network; nearest: for the real one, "
                        "up to the bounds' own rounding (default: outward)")  # fmt: skip
    parser.add_argument("--delta", type=float, default=1e-3, metavar="P",
                        help="probability that hidden units leave their intervals: no lower bound "
                        "is above 1 - P (default: 0.001)")  # fmt: skip
    for name, default, text in (
        ("draws", 200_000, "attacked draws for each posterior and radius, divided among the images "
         "of which something is proved; 0: none"),
        ("attack-steps", 20, "of each attack on the mean network"),
        ("batch-size", 8, "images bounded at once"),
        ("seed", 0, "of attacks and draws"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.posteriors is None and not options.runs:
        parser.error("nothing to certify: give --posteriors DIR, --runs RUN, or both")
    for name, least in (("images", 1), ("draws", 0), ("attack_steps", 1), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if not 0 < options.delta < 1:
        parser.error(f"--delta {options.delta:g}: in (0, 1), e.g. 0.001")
    if not all(0 <= eps <= 1 for eps in options.eps):
        parser.error(f"--eps {' '.join(map(str, options.eps))}: in [0, 1], pixels are")
    return parser, options


if __name__ == "__main__":
    raise SystemExit(main())
