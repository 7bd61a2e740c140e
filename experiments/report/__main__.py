"""`python -m experiments.report`: rebuilds a run's report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..pipeline.evaluation import SoundnessError
from ..pipeline.locks import LockedError, locked
from ..setup.command import attempt, program, read
from .files import check_files, summary_picture, write_report


@dataclass(frozen=True)
class Options:
    """Write report.html of a finished run of images again: one page, which loads nothing else.

    A run writes it by itself, and so do certificates and attacks that are added; this is for a
    page of a newer version. A regression writes its own (its command with --resume).
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a finished run."""
    summary: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Also draw a picture for a README: test images and accuracy over eps (.png or .svg)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = read(Options, program("report"), arguments)

    def work() -> None:
        check_files(options.run)
        with locked(options.run):
            print(write_report(options.run))
        if options.summary:
            print(summary_picture(options.run, options.summary))

    return attempt(work, (OSError, ValueError, LockedError, SoundnessError), "nothing was changed")


if __name__ == "__main__":
    raise SystemExit(main())
