"""`python -m experiments.report`: rebuilds a run's report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..setup.command import attempt, program, read
from .files import summary_picture, write_report


@dataclass(frozen=True)
class Options:
    """Rebuild report.html, one self-contained page, from a finished run's files."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The folder of a finished run."""
    summary: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also draw a picture for a README: test images and accuracy over eps (.png or .svg)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = read(Options, program("report"), arguments)

    def work() -> None:
        print(write_report(options.run))
        if options.summary:
            print(summary_picture(options.run, options.summary))

    return attempt(work, (FileNotFoundError, ValueError), "nothing was changed")


if __name__ == "__main__":
    raise SystemExit(main())
