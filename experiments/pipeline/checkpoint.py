"""Checkpoints of any pytree, by Orbax: a process killed at any moment leaves the last one whole.

A checkpoint is written to a temporary folder and then renamed, which is atomic; older ones go only
after that. NamedTuples, Optax states and typed PRNG keys come back as what they were.
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ..setup.logs import errors_only
from .writing import naming

KEEP = 2
"""Checkpoints that are kept: were the last one damaged on disk, the one before would be there."""


def save(folder: str | Path, step: int, state: Any) -> None:
    """Write a checkpoint and drop all but the last `KEEP`; returns when it is on disk.

    Args:
        folder: holds one subfolder a checkpoint; it is made if need be.
        step: names the checkpoint; larger than those before.
        state: a pytree of arrays.

    Raises:
        ValueError: there is a checkpoint of this step or a later one.
        WriteError: it cannot be written; nothing of it is left.
    """
    folder = _absolute(folder)
    last = latest(folder)
    if last is not None and step <= last:
        raise ValueError(f"{folder} has a checkpoint of step {last}; cannot save step {step} in it")
    # Orbax takes a folder whose removal was cut short for a later checkpoint, and saves nothing.
    for path in folder.glob("*"):
        if path.name.isdigit() and not _is_whole(path):
            shutil.rmtree(path)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEEP,
        enable_async_checkpointing=False,  # the caller goes on to report what was saved
        cleanup_tmp_directories=True,  # what a killed process left behind
    )
    with naming(folder), errors_only(level=logging.CRITICAL):
        try:
            with ocp.CheckpointManager(folder, options=options) as manager:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            for path in folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(path, ignore_errors=True)
            # The system's error is only told of in the text.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def latest(folder: str | Path) -> int | None:
    """Return the step of the last whole checkpoint, or None if there is none."""
    steps = [int(path.name) for path in _absolute(folder).glob("*") if _is_whole(path)]
    return max(steps, default=None)


def restore(folder: str | Path, template: Any, step: int | None = None) -> Any:
    """Read a checkpoint back.

    Args:
        folder: what `save` was given.
        template: a pytree of the structure, shapes, dtypes and devices of the saved state, such
            as a freshly initialised one.
        step: which checkpoint; None is the last.

    Returns:
        The saved state, with the template's structure.

    Raises:
        FileNotFoundError: there is no whole checkpoint (of this step).
        ValueError: the saved state has another structure than the template.
    """
    step = latest(folder) if step is None else step
    if step is None or not _is_whole(_absolute(folder) / str(step)):
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no whole {which} in {folder}; start the run afresh")
    with errors_only():
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(_absolute(folder), options=options) as manager:
            return manager.restore(step, args=ocp.args.StandardRestore(template))


def _absolute(folder: str | Path) -> Path:
    return Path(folder).expanduser().absolute()  # Orbax takes no relative paths


def _is_whole(path: Path) -> bool:
    # A folder appears with its metadata; it can lack them only while it is being removed.
    return path.name.isdigit() and (path / "_CHECKPOINT_METADATA").is_file()
