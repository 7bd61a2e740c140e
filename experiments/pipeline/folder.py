"""The folder of a run: a new one, or that of the run to resume; its files are written whole."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..setup.config import Run, from_dict, options_of, output_folder, to_dict

PLACES = ("out", "data_dir", "resume")
"""Settings that decide where things are, and no number."""


def open_folder(config: Run) -> Path:
    """Makes the run's folder and its config.json, or finds the run to resume.

    Args:
        config: checked settings of any task.

    Raises:
        FileExistsError: the folder holds another run.
        FileNotFoundError: there is nothing to resume.
        ValueError: the run to resume has other settings.
    """
    folder = output_folder(config)
    recorded = folder / "config.json"
    if config.resume:
        if not recorded.exists():
            raise FileNotFoundError(
                f"no run to resume in {folder} (there is no config.json); leave out --resume to "
                "start one, or name its folder with --out"
            )
        _check_same(from_dict(json.loads(recorded.read_text()), type(config)), config)
        return folder
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    # A config.tmp alone is a run that was killed before it began.
    if folder.exists() and any(path.name != "config.tmp" for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty: it may hold another run, and nothing in it was touched. "
            "Choose another --out, or continue that run with --resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(recorded, to_dict(config))
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; one that is there is replaced, and never left half written."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays likewise, compressed."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


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
