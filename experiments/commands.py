"""What the commands on finished runs share: their options, and a result for each radius."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.evaluation import SoundnessError
from experiments.finished import Finished, Rows, already, finish, open_run
from experiments.report import write_report

NORMS = {"inf": jnp.inf, "2": 2}

Record = dict[str, Any]


def for_each_radius(
    options: argparse.Namespace,
    radii: Sequence[float] | None,
    result: Callable[[Finished, argparse.Namespace, float], Record],
    summary: Callable[[Record], str],
) -> int:
    """Opens the run, prints a line for each radius, and writes the report again.

    Args:
        options: of the command line, those of `add_common` among them.
        radii: the run's own where there are none.
        result: `(run, options, radius) -> record`, computed or read.
        summary: of a record, in a line.

    Returns:
        The exit status.
    """
    try:
        run = open_run(options.run, options.data_dir, options.images)
        for radius in radii or [run.config.eval.eps]:
            print(summary(result(run, options, radius)), flush=True)
        print(f"report: {write_report(run.folder)}")
    except (OSError, ValueError, SoundnessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def kept_or_computed(
    run: Finished,
    kind: str,
    name: str,
    settings: Mapping[str, Any],
    compute: Callable[[], tuple[Record, Rows]],
) -> Record:
    """The record of a result that is there, or else computed and written.

    Args:
        run: to which the result is added.
        kind: "certify" or "attack".
        name: of the result.
        settings: what decides the numbers.
        compute: `() -> (numbers, rows)`.

    Raises:
        SoundnessError: an image is certified and broken.
        ValueError: there is a result, or a part of one, of other settings.
    """
    found = already(run.folder, name, settings)
    if found is not None:
        return found
    started = time.monotonic()
    numbers, rows = compute()
    record = {
        "kind": kind,
        **settings,
        "num_samples": len(jax.tree.leaves(run.samples)[0]),
        **numbers,
        "seconds": time.monotonic() - started,
    }
    finish(run.folder, name, record, rows)
    return record


def of_norm(norm: str) -> str:
    """The norm in a file's name: nothing for l_inf."""
    return "" if norm == "inf" else f"l{norm}-"


def add_common(parser: argparse.ArgumentParser, flag: str) -> None:
    """Options that certificates and attacks share.

    Args:
        parser: to add them to.
        flag: that of the radii.
    """
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        flag,
        nargs="+",
        type=float,
        metavar="EPS",
        help="radii, in units of pixels in [0, 1] (default: the run's own)",
    )
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
    radii: Sequence[float] | None,
    flag: str,
) -> None:
    """Exits with status 2 and says what is wrong, if a number is."""
    for radius in radii or ():
        largest = 1.0 if options.norm == "inf" else float("inf")
        if not 0 <= radius <= largest or radius == float("inf"):
            parser.error(
                f"{flag} {radius:g}: a radius must be finite, not negative, and for the norm inf "
                "at most 1, the range of a pixel (8/255, not 8)"
            )
    if options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: at least 1")
