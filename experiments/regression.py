"""Regressions from end to end, robust training beside plain.

    python -m experiments.regression {diabetes,sine} [--inference NAME] [--seed N] [--out DIR] ...

writes one new folder (`experiments.tasks.regression.run` says what is in it).
"""

from collections.abc import Sequence

from .pipeline.evaluation import SoundnessError
from .pipeline.locks import LockedError
from .pipeline.training import TrainingError
from .setup.command import RESUME, attempt
from .tasks.regression.run import run, summary
from .tasks.regression.settings import parse

EXPECTED = (OSError, TypeError, ValueError, TrainingError, SoundnessError, LockedError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    settings = parse(arguments)

    def work() -> None:
        folder, results = run(settings)
        print(f"{summary(results)}\nreport: {folder / 'report.html'}", flush=True)

    return attempt(work, EXPECTED, RESUME)


if __name__ == "__main__":
    raise SystemExit(main())
