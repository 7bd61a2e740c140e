"""Certify a finished run again: by other bounds, at other radii, in another norm.

    python -m experiments.certify RUN --method crown --radius 0.05 0.1
    python -m experiments.certify RUN --method ibp crown-ibp crown      # each on what is left open

Writes certify-METHOD-RADIUS.npz and .json into the run's folder, a pair for each radius, and shows
them in its report.html. What is certified is the predictor that the run deployed; certificates of
images that an attack of the same folder broke stop it with an error. Stopped, the same command goes
on where it was.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnncert import certify
from bnncert.bounds.api import METHODS
from bnncert.sets import ball
from experiments.evaluation import SoundnessError
from experiments.finished import Finished, Rows, Stage, already, finish, in_stages, open_run
from experiments.report import write_report
from experiments.settings import PIXELS

NORMS = {"inf": jnp.inf, "2": 2}

_BEST = {
    "robust": np.logical_or,
    "margin": np.maximum,
    "probability_lower": np.maximum,
    "probability_upper": np.minimum,
}
"""How what two methods prove of an image is put together: both hold."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        run = open_run(options.run, options.data_dir, options.images)
        for radius in options.radius or [run.config.eval.eps]:
            print(summary(certified(run, options, radius)), flush=True)
        print(f"report: {write_report(run.folder)}")
    except (OSError, ValueError, SoundnessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def certified(run: Finished, options: argparse.Namespace, radius: float) -> dict[str, Any]:
    """Certifies every image at one radius, and writes the result; one that is there is kept.

    Raises:
        SoundnessError: an image that an attack broke was certified.
        ValueError: there is a result, or a part of one, of other settings.
    """
    norm = "" if options.norm == "inf" else f"l{options.norm}-"
    name = f"certify-{'+'.join(options.method)}-{norm}{radius:g}"
    settings = {
        "method": options.method,
        "eps": radius,
        "norm": options.norm,
        "num_images": len(run.test.y),
    }
    found = already(run.folder, name, settings)
    if found is not None:
        return found
    started = time.monotonic()
    stages = {method: _stage(run, method, radius, options.norm) for method in options.method}
    rows = in_stages(run, name, settings, stages, _open, _BEST, options.batch_size)
    rows["label"], correct = run.test.y, rows["predicted"] == run.test.y
    rows["certified"] = rows["robust"] & correct
    places = rows["stage"][rows["certified"]]
    record = {
        "kind": "certify",
        **settings,
        "num_samples": len(jax.tree.leaves(run.samples)[0]),
        "clean_accuracy": float(correct.mean()),
        "certified_accuracy": float(rows["certified"].mean()),
        "certified_by": {m: int(np.sum(places == i)) for i, m in enumerate(options.method)},
        "tier": "exact",
        "arithmetic": "float32",
        "seconds": time.monotonic() - started,
    }
    finish(run.folder, name, record, rows)
    return record


def summary(record: dict[str, Any]) -> str:
    """A result in one line."""
    norm = "" if record["norm"] == "inf" else f" (l{record['norm']})"
    return (
        f"{', '.join(record['method'])} at radius {record['eps']:g}{norm}: "
        f"{record['certified_accuracy']:.2%} of {record['num_images']} images certified, "
        f"{record['clean_accuracy']:.2%} classified correctly; {record['seconds']:.0f} s"
    )


def _stage(run: Finished, method: str, radius: float, norm: str) -> Stage:
    clip = PIXELS if norm == "inf" else None  # an l2 ball is not cut: more is proved

    @jax.jit
    def batch(samples: Any, x: Any) -> certify.Decision:
        def one(x: Any) -> certify.Decision:
            region = ball(x, radius, p=NORMS[norm], clip=clip)
            return certify.decision(run.apply, samples, region, x=x, method=method)

        return jax.vmap(one)(x)

    def compute(x: np.ndarray, y: np.ndarray, i: np.ndarray) -> Rows:
        found = batch(run.samples, x)
        margins = np.array(found.margins)
        margins[np.arange(len(x)), np.asarray(found.predicted)] = np.inf
        return {
            "predicted": np.asarray(found.predicted),
            "robust": np.asarray(found.robust),
            "margin": margins.min(1),
            "probability_lower": np.asarray(found.probability.lower),
            "probability_upper": np.asarray(found.probability.upper),
            "correct": np.asarray(found.predicted) == y,
        }

    return compute


def _open(rows: Rows) -> np.ndarray:
    return ~rows["robust"] & rows["correct"]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.certify",
        description="Certify the test images of a finished run: by other bounds, at other radii. "
        "Results are added to the run's folder and report; what the run wrote is not changed.",
        epilog="Stopped with Ctrl-C, the same command goes on where it was.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--method",
        nargs="+",
        default=["crown-ibp"],
        choices=METHODS,
        help="bounds; several are a cascade, each on the images that the ones before it leave "
        "open: cheap ones first (default: crown-ibp)",
    )
    parser.add_argument(
        "--radius",
        nargs="+",
        type=float,
        metavar="EPS",
        help="radii, in units of pixels in [0, 1] (default: the run's own)",
    )
    add_common(parser)
    options = parser.parse_args(arguments)
    if len(set(options.method)) < len(options.method):
        parser.error(f"--method {' '.join(options.method)}: name each once")
    check_common(parser, options, options.radius or (), "--radius")
    return options


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that certificates and attacks share."""
    parser.add_argument(
        "--norm", default="inf", choices=NORMS, help="norm of the ball (default: inf)"
    )
    parser.add_argument("--images", type=int, metavar="N", help="the first N test images alone")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="images at once; memory grows with it (default: 128)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="TFDS data folder (default: the run's own)"
    )


def check_common(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    radii: Sequence[float],
    flag: str,
) -> None:
    """Exits with status 2 and says what is wrong, if a number is."""
    for radius in radii:
        largest = 1.0 if options.norm == "inf" else float("inf")
        if not 0 <= radius <= largest or radius == float("inf"):
            parser.error(
                f"{flag} {radius:g}: a radius must be finite, not negative, and for the norm inf "
                "at most 1, the range of a pixel (8/255, not 8)"
            )
    if options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: at least 1")


if __name__ == "__main__":
    raise SystemExit(main())
