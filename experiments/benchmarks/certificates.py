"""How long it takes to certify a test set, and how much memory.

    python -m experiments.benchmarks.certificates RUN --images 10000 --samples 32

Draws fresh samples of a finished run's posterior, certifies the predicted class of each image at
the run's radius, for float32, and prints seconds with and without compiling, and the process's peak
memory (all of it: JAX, the data and the samples too).
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bnncert import ball, certify

from ..pipeline.allocator import keep_freed_pages
from ..pipeline.finished import open_run
from ..setup.settings import PIXELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(arguments)
    keep_freed_pages()
    try:
        run = open_run(options.run, options.data_dir, options.images)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    samples = run.posterior.sample(jax.random.key(run.config.seed), options.samples)
    images, eps = run.test.x, run.config.eval.eps
    size = min(options.batch_size, len(images))
    for method in options.methods:

        @jax.jit
        def batch(samples: Any, x: Any, method: str = method) -> Any:
            def one(x: Any) -> Any:
                region = ball(x, eps, clip=PIXELS)
                found = certify.decision(run.apply, samples, region, x=x, method=method)
                return found.predicted, found.robust

            return jax.vmap(one)(x)

        started = time.perf_counter()
        jax.block_until_ready(batch(samples, images[:size]))
        first = time.perf_counter() - started
        right = 0
        started = time.perf_counter()
        for start in tqdm(range(0, len(images), size), desc=method, unit="batch"):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)
            predicted, robust = jax.device_get(batch(samples, images[rows]))
            number = min(size, len(images) - start)
            right += int((robust & (predicted == run.test.y[rows]))[:number].sum())
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
        print(
            f"{method}: {len(images)} images x {options.samples} samples at radius {eps:g}: "
            f"{right / len(images):.2%} certified in {seconds:.0f} s, and {first:.0f} s to compile "
            f"and for the first batch; at most {memory:.1f} GiB",
            flush=True,
        )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.certificates",
        description="Times the certificates of a finished run's posterior, and their memory.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    for name, default, text in (
        ("images", 10_000, "the first N test images"),
        ("samples", 32, "fresh samples of the posterior"),
        ("batch-size", 250, "images at once"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    methods = ("ibp", "crown-ibp", "crown")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["ibp", "crown-ibp"],
        choices=methods,
        help="bounds, one after the other (default: ibp crown-ibp)",
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="TFDS data folder")
    options = parser.parse_args(arguments)
    for name in ("images", "samples", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
