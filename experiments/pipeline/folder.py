"""The folder of a run: a new one, or that of the run to resume; one process at a time writes it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..setup.config import Run, from_dict, options_of, output_folder, to_dict
from .locks import LOCK, locked
from .writing import naming, write_json

PLACES = ("out", "data_dir", "resume")
"""Settings that decide where things are, and no number."""


@contextmanager
def open_folder(config: Run) -> Iterator[Path]:
    """Makes the run's folder and its config.json, or finds the run to resume; it is locked.

        with open_folder(config) as folder:
            ...

    Args:
        config: checked settings of any task.

    Raises:
        FileExistsError: the folder holds another run.
        FileNotFoundError: there is nothing to resume.
        LockedError: another process writes to it.
        ValueError: the run to resume has other settings.
        WriteError: it cannot be written to.
    """
    folder = output_folder(config)
    recorded = folder / "config.json"
    if config.resume:
        if not recorded.exists():
            raise FileNotFoundError(
                f"no run to resume in {folder} (there is no config.json); leave out --resume to "
                "start one, or name its folder with --out"
            )
        with locked(folder):
            _check_same(from_dict(json.loads(recorded.read_text()), type(config)), config)
            yield folder
        return
    _check_new(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _check_new(folder)  # nor did another process begin meanwhile
        write_json(recorded, to_dict(config))
        yield folder


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    # These alone are of a run that was killed before it began.
    begun = {LOCK, ".config.json.tmp"}
    if folder.exists() and any(path.name not in begun for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty: it may hold another run, and nothing in it was touched. "
            "Choose another --out, or continue that run with --resume"
        )


def _check_same(recorded: Run, asked: Run) -> None:
    """What decides the numbers must be as it was; folders may have moved."""
    before, now = options_of(to_dict(recorded)), options_of(to_dict(asked))
    changed = [
        f"{name}: {before[name]} -> {now[name]}"
        for name in now
        if name in before and name not in PLACES and before[name] != now[name]
    ]
    if changed:
        raise ValueError(
            f"--resume with other settings than the run's own ({'; '.join(changed)}); repeat its "
            "options, or start another run with another --out"
        )
