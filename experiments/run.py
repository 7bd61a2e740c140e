"""One whole run: train, evaluate, certify, attack, report.

    python -m experiments.run PRESET [--inference NAME] [--seed N] [--data-dir DIR] [--out DIR] ...

writes one new folder (`experiments.tasks.images` says what is in it).
"""

from collections.abc import Sequence

from .pipeline.allocator import keep_freed_pages
from .pipeline.evaluation import SoundnessError
from .pipeline.locks import LockedError
from .pipeline.training import TrainingError
from .setup.command import RESUME, attempt
from .setup.presets import parse
from .tasks import images

EXPECTED = (OSError, TypeError, ValueError, TrainingError, SoundnessError, LockedError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(arguments)
    keep_freed_pages()

    def work() -> None:
        print(f"report: {images.run(config) / 'report.html'}")

    return attempt(work, EXPECTED, RESUME)


if __name__ == "__main__":
    raise SystemExit(main())
