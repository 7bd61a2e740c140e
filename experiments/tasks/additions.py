"""What is added to a finished run of images, certificates and attacks: a result for each radius."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from ..pipeline.evaluation import SoundnessError
from ..pipeline.finished import Finished, Rows, already, finish
from ..pipeline.locks import LockedError, locked
from ..report.files import write_report
from ..setup.command import attempt
from ..setup.requirements import AtLeast1, one_of

NORMS = {"inf": jnp.inf, "2": 2}

Record = dict[str, Any]

Run = Annotated[
    tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="The folder of a finished run.")
]
Norm = Annotated[
    str,
    *one_of(
        "norm",
        tuple(NORMS),
        "What a radius measures: the largest change of a pixel (inf), or the change's Euclidean "
        "length (2).",
    ),
]
Images = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="N", help="The first N test images alone; by default all.", help_behavior_hint=""
    ),
]
BatchSize = Annotated[
    AtLeast1, tyro.conf.arg(metavar="N", help="Images at once; memory grows with it.")
]
DataDir = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="TFDS data folder; by default the one that the run read.",
        help_behavior_hint="",
    ),
]


def radii(alias: str) -> Any:
    """Metadata of an option for radii.

    Args:
        alias: its other name: certificates and attacks answer to both.
    """
    return tyro.conf.arg(
        metavar="EPS [EPS ...]",
        aliases=[alias],
        help="Radii, in units of pixels in [0, 1] (0.1, 2/255), a result each; by default "
        "the one that the run was tested at.",
        help_behavior_hint="",
    )


def for_each_radius(
    opened: Callable[[], Finished],
    chosen: Sequence[float],
    result: Callable[[Finished, float], Record],
    summary: Callable[[Record], str],
) -> int:
    """Opens the run, prints a line for each radius, and writes the report again.

    Args:
        opened: `() -> run`.
        chosen: radii; the run's own where there are none.
        result: `(run, radius) -> record`, computed or read.
        summary: of a record, in a line.

    Returns:
        The exit status.
    """

    def work() -> None:
        run = opened()
        with locked(run.folder):
            for radius in chosen or (run.config.eval.eps,):
                print(summary(result(run, radius)), flush=True)
            print(f"report: {write_report(run.folder)}")

    expected = (OSError, ValueError, SoundnessError, LockedError)
    return attempt(work, expected, "the same command goes on from here")


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


def check_radii(radii: Sequence[float], norm: str, flag: str) -> None:
    """Raise a ValueError that names a radius that is none.

    Args:
        radii: as they were asked for.
        norm: of the ball.
        flag: the option they were asked for by.
    """
    largest = 1.0 if norm == "inf" else float("inf")
    for radius in radii:
        if not 0 <= radius <= largest or radius == float("inf"):
            raise ValueError(
                f"{flag} {radius:g}: a radius must be finite, not negative, and for the norm inf "
                "at most 1, the range of a pixel (8/255, not 8)"
            )
