"""Files that are written whole or not at all, and errors that say which could not be, and why.

A full disk and a folder that may not be written to are no defects of a run: they end it in one line
that names the path and the way out.
"""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FULL = "free some space there; the same command then goes on where it was (a run: with --resume)"
FORBIDDEN = "give a folder that you may write to"
WAYS_OUT = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: FORBIDDEN,
    errno.ENOENT: FORBIDDEN,  # a folder that was removed meanwhile, or one of /proc
    errno.ENOTDIR: "a part of that path is a file: give another folder",
}


class WriteError(OSError):
    """Something could not be written; names the path, the reason and the way out."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a path in the error of a write that fails: the system's own often does not.

    >>> with naming(Path("results.json")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    experiments.pipeline.writing.WriteError: cannot write results.json: No space left on device;
    free some space there; the same command then goes on where it was (a run: with --resume)
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        way_out = f"; {WAYS_OUT[error.errno]}" if error.errno in WAYS_OUT else ""
        raise WriteError(f"cannot write {path}: {error.strerror or error}{way_out}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; it is removed on failure.

    A reader sees the old file or the new one, whatever happens to the writer.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            yield unfinished
            unfinished.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with whole(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays whole, compressed."""
    with whole(path) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, **arrays)
