"""What can be certified about one finished run, at every tier.

    python -m experiments.studies.certificates RUN --out FILE [--parts radii ood ...]

Parts, each written to the file when it is done; the same command goes on with those that are not:

    radii        certified and attacked radius of each image (bisection, the exact tier)
    statistical  the posterior itself, from --draws draws: per image, and of all images at once
    expectation  the posterior itself, formally: E softmax over each ball, no draw and no truncation
    safety       P_safe of a few images: by boxes of weights (formal), and from draws, proved and
                 attacked (Clopper-Pearson)
    ood          the largest confidence in a ball around images of another data set, and how well
                 it separates them from test images: certified, as it is, and attacked

All by one radius, that of the run. Fractions are of all images; a misclassified image counts as
not certified, its radius as 0.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bnncert import attack, ball, certify, metrics
from bnncert.posterior import MeanField
from bnncert.types import Posterior

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.evaluation import SoundnessError
from ..pipeline.finished import Finished, open_run
from ..setup.data import load
from ..setup.methods import name_of
from ..setup.settings import PIXELS

LARGEST = 0.4
"""No larger radius is tried; it is the attacked radius of an image that withstands it."""

OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser, options = _parse(arguments)
    keep_freed_pages()
    try:
        run = open_run(options.run, options.data_dir, options.images)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    settings = {
        "inference": name_of(run.config.inference),
        "preset": run.config.preset,
        "eps": run.config.eval.eps,
        "num_images": len(run.test.y),
        "num_samples": run.config.eval.num_samples,
        **{name: getattr(options, name) for name in ("draws", "delta", "few", "method")},
    }
    record = {"settings": settings, "parts": {}}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        if record["settings"] != settings:
            parser.exit(1, f"error: {options.out} is of other settings: {record['settings']}\n")
    for name in options.parts:
        if name in record["parts"]:
            continue
        started = time.monotonic()
        found = PARTS[name](run, options)
        record["parts"][name] = {**found, "seconds": round(time.monotonic() - started, 1)}
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(options.out)
        print(name, json.dumps(record["parts"][name]), flush=True)
    return 0


def radii(run: Finished, options: argparse.Namespace) -> Row:
    """Certified and attacked radii of the deployed predictor."""
    key = jax.random.key(run.config.seed)

    def one(x: Any, y: Any) -> tuple[Any, Any, Any]:
        own = certify.radius(run.apply, run.samples, x, largest=LARGEST, clip=PIXELS,
                             method=options.method)  # fmt: skip
        other = certify.attacked_radius(key, run.apply, run.samples, x, own.predicted,
                                        largest=LARGEST, clip=PIXELS, steps=6)  # fmt: skip
        return own.predicted, own.radius, other.radius

    predicted, certified, attacked = _each(one, run.test, options, "radii")
    if (wrong := np.flatnonzero(certified > attacked)).size:
        raise SoundnessError(f"test image {wrong[0]}: an attack is nearer than the certificate")
    right = predicted == run.test.y
    own = np.where(right, certified, 0.0)
    return {
        "mean_certified_radius": float(own.mean()),
        "mean_attacked_radius": float(np.where(right, np.minimum(attacked, LARGEST), 0.0).mean()),
        "largest_radius_tried": LARGEST,
        "median_certified_radius": float(np.median(own)),
        "quartiles_of_certified_radius": np.quantile(own, [0.25, 0.75]).tolist(),
    }


def statistical(run: Finished, options: argparse.Namespace) -> Row:
    """The continuous posterior's decision, with confidence 1 - delta."""
    if (reason := _not_continuous(run.posterior)) is not None:
        return {"skipped": reason}
    key = jax.random.key(run.config.seed + 1)
    found: Row = {}
    for name, points in (("each", 1), ("all_at_once", len(run.test.y))):

        def one(x: Any, y: Any, points: int = points) -> tuple[Any, Any]:
            region = ball(x, run.config.eval.eps, clip=PIXELS)
            said = certify.statistical(
                key, run.apply, run.posterior, region, x=x, num_samples=options.draws,
                delta=options.delta, num_points=points, method="ibp",
            )  # fmt: skip
            least = jnp.where(jnp.arange(said.margins.size) == said.predicted, 1.0, said.margins)
            return said.robust & (said.predicted == y), least.min()

        certified, margin = _each(one, run.test, options, f"statistical, {name}")
        found[f"certified_accuracy_{name}"] = float(certified.mean())
        found[f"mean_margin_{name}"] = float(margin.mean())
    return {**found, "draws": options.draws, "confidence": 1 - options.delta}


def expectation(run: Finished, options: argparse.Namespace) -> Row:
    """E softmax over each ball, under the unbounded Gaussian."""
    if not isinstance(run.posterior, MeanField):
        return {"skipped": f"the posterior is a {type(run.posterior).__name__}"}

    def one(eps: float, x: Any, y: Any) -> tuple[Any, Any, Any]:
        found = certify.expectation(run.apply, run.posterior, ball(x, eps, clip=PIXELS))
        others = jnp.where(jnp.arange(found.deviation.size) == y, -1.0, found.probabilities.upper)
        lower = found.probabilities.lower[y]
        return lower > others.max(), lower, found.deviation.mean()

    rows = []
    for eps in (0.0, 0.5 * run.config.eval.eps, run.config.eval.eps):
        certified, lower, deviation = _each(
            partial(one, eps), run.test, options, f"expectation, eps {eps:g}"
        )
        rows.append(
            {
                "eps": eps,
                "certified_accuracy": float(certified.mean()),
                "mean_lower_probability_of_the_label": float(lower.mean()),
                "mean_deviation_bound_of_an_output": float(deviation.mean()),
            }
        )
    return {"rows": rows}


def safety(run: Finished, options: argparse.Namespace) -> Row:
    """P_safe of the first correctly classified images."""
    if (reason := _not_continuous(run.posterior)) is not None:
        return {"skipped": reason}
    eps, key = run.config.eval.eps, jax.random.key(run.config.seed + 2)
    classes = int(run.test.y.max()) + 1
    few = range(min(options.few, len(run.test.y)))
    rows = []
    for i in tqdm(few, desc="P_safe", unit="image"):
        x, y = jnp.asarray(run.test.x[i]), int(run.test.y[i])
        region = ball(x, eps, clip=PIXELS)

        def broken(params: Any, x: Any = x, y: int = y) -> Any:
            one = jax.tree.map(lambda leaf: leaf[None], params)
            return attack.pgd(key, run.apply, one, x, y, eps, clip=PIXELS, steps=10).broken

        drawn = certify.sampled_safety(
            key, run.posterior, num_samples=options.draws, delta=options.delta, broken=broken,
            proved=certify.proves_class(run.apply, region, y, method="ibp"), batch_size=8,
        )  # fmt: skip
        row = {"image": i, "sampled_lower": drawn.lower, "sampled_upper": drawn.upper}
        if isinstance(run.posterior, MeanField):
            stays = certify.class_stays(y, classes)
            boxes = certify.safety(
                key, run.apply, run.posterior, region, stays, method="ibp", num_boxes=4
            )
            row |= {"boxes_lower": boxes.lower, "boxes_upper": boxes.upper}
        rows.append(row)
    return {"rows": rows, "draws": options.draws, "confidence": 1 - options.delta}


def ood(run: Finished, options: argparse.Namespace) -> Row:
    """Detection of another data set by the confidence: certified, clean and attacked."""
    if run.config.dataset not in OTHER:
        return {"skipped": f"there is no other data set of {run.config.dataset}'s shape"}
    other = load(OTHER[run.config.dataset], options.data_dir or run.config.data_dir)
    images = type(run.test)(other.test.x[: len(run.test.y)], other.test.y[: len(run.test.y)])

    def probabilities(x: Any) -> Any:
        return jax.vmap(lambda w: jax.nn.softmax(run.apply(w, x)))(run.samples).mean(0)

    def confidence(x: Any) -> Any:
        return probabilities(x).max()

    def attacked(eps: float, x: Any) -> Any:
        """The largest confidence that 20 steps of projected gradient ascent meet."""

        def step(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            at, best = state
            value, slope = jax.value_and_grad(lambda v: jnp.log(confidence(v)))(at)
            moved = jnp.clip(at + eps / 8 * jnp.sign(slope), x - eps, x + eps)
            return jnp.clip(moved, *PIXELS), jnp.maximum(best, jnp.exp(value))

        return jax.lax.fori_loop(0, 21, step, (x, jnp.zeros(())))[1]

    def outside(eps: float, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        region = ball(x, eps, clip=PIXELS)
        found = certify.uncertainty(run.apply, run.samples, region, method="ibp")
        return confidence(x), attacked(eps, x), found.confidence.upper, found.entropy.lower

    inside = _each(lambda x, y: (confidence(x),), run.test, options, "test images")[0]
    rows = []
    for eps in (0.01, 0.5 * run.config.eval.eps, run.config.eval.eps):
        clean, found, upper, entropy = _each(
            partial(outside, eps), images, options, f"other images, eps {eps:g}"
        )
        if (clean > upper).any() or (found > upper).any():
            raise SoundnessError("a confidence above its certified bound")
        rows.append(
            {
                "eps": eps,
                "auroc_clean": _auroc(inside, clean),
                "auroc_attacked": _auroc(inside, found),
                "auroc_certified": _auroc(inside, upper),
                "mean_confidence": float(clean.mean()),
                "mean_confidence_attacked": float(found.mean()),
                "mean_confidence_certified": float(upper.mean()),
                "mean_entropy_lower": float(entropy.mean()),
            }
        )
    return {"other": OTHER[run.config.dataset], "rows": rows}


PARTS: dict[str, Callable[[Finished, argparse.Namespace], Row]] = {
    "radii": radii,
    "statistical": statistical,
    "expectation": expectation,
    "safety": safety,
    "ood": ood,
}


def _auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often the test images are the more confident."""
    return float(metrics.auroc(jnp.asarray(inside), jnp.asarray(outside)))


def _each(
    one: Callable[..., tuple[Any, ...]], images: Any, options: argparse.Namespace, label: str
) -> list[np.ndarray]:
    """Columns of what `one` says of each image and label."""
    many = jax.jit(jax.vmap(one))
    size = min(options.batch_size, len(images.y))
    found = []
    for start in tqdm(range(0, len(images.y), size), desc=label, unit="batch", leave=False):
        rows = np.minimum(np.arange(start, start + size), len(images.y) - 1)
        found.append(jax.device_get(many(images.x[rows], images.y[rows])))
    return [np.concatenate(column)[: len(images.y)] for column in zip(*found, strict=True)]


def _not_continuous(posterior: Posterior) -> str | None:
    name = type(posterior).__name__
    return f"the posterior is a finite set ({name})" if name in ("Samples", "Mixture") else None


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.certificates",
        description="Certifies a finished run at every tier; numbers go to a JSON file, part by "
        "part, and the same command goes on with the parts that are missing.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
                        help=f"which of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--method", default="ibp", choices=("ibp", "crown-ibp", "crown"),
                        help="bounds of the radii (default: ibp)")  # fmt: skip
    for name, default, text in (
        ("images", 1000, "the first N test images"),
        ("draws", 1000, "draws of the statistical tier"),
        ("few", 10, "images of P_safe"),
        ("batch-size", 64, "images at once"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    parser.add_argument("--delta", type=float, default=0.05,
                        help="probability that a statement is wrong (default: 0.05)")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="TFDS data folder")
    options = parser.parse_args(arguments)
    for name in ("images", "draws", "few", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if not 0 < options.delta < 1:
        parser.error(f"--delta {options.delta:g}: in (0, 1)")
    return parser, options


if __name__ == "__main__":
    raise SystemExit(main())
