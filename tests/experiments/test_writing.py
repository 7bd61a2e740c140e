"""One writer at a time, files that are whole or not there, and errors that say what to do."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attack, certify, regression, run
from experiments.pipeline import checkpoint, locks, writing
from experiments.pipeline.folder import open_folder
from experiments.pipeline.locks import LOCK, LockedError, locked
from experiments.pipeline.writing import WriteError, naming, whole, write_json, write_npz
from experiments.report import __main__ as report
from experiments.setup import presets
from experiments.setup.command import attempt
from experiments.tasks.regression import settings

REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from experiments.pipeline.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        says = rf"{tmp_path} is in use by process {os.getpid()} on .*\(kill {os.getpid()}\)"
        with pytest.raises(LockedError, match=says), locked(tmp_path):
            pass
    assert left(tmp_path) == []
    with locked(tmp_path), locked(tmp_path.parent):  # others are free
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"process {process.pid} on "), locked(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert left(tmp_path) == [LOCK]
    with locked(tmp_path):
        assert f"left by process {process.pid} on" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_the_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("17 elsewhere\n")
    says = f"by process 17 on elsewhere, another machine: .* remove {tmp_path / LOCK}"
    with pytest.raises(LockedError, match=says), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == "17 elsewhere\n"


def test_a_file_system_without_locks_goes_by_who_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locked(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        with locked(tmp_path):
            pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / LOCK).write_text(f"{dead.pid} {socket.gethostname()}\n")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("program", "parsed", "arguments"),
    [
        (run, presets.parse, ["digits", "--out", "{folder}", "--resume"]),
        (regression, settings.parse, ["sine", "--out", "{folder}", "--resume"]),
        (certify, None, ["{folder}"]),
        (attack, None, ["{folder}"]),
        (report, None, ["{folder}"]),
    ],
)
def test_every_command_refuses_a_folder_in_use(
    program: Any,
    parsed: Any,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [word.format(folder=tmp_path) for word in arguments]
    if parsed:
        with open_folder(parsed(arguments[:-1])):
            pass
    opened = SimpleNamespace(folder=tmp_path)
    monkeypatch.setattr(certify, "open_run", lambda *_: opened)
    monkeypatch.setattr(attack, "open_run", lambda *_: opened)
    monkeypatch.setattr(report, "check_files", lambda folder: None)
    before = left(tmp_path)
    with locked(tmp_path):
        assert program.main(arguments) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {tmp_path} is in use by process {os.getpid()}")
    assert len(errors.splitlines()) == 1 and left(tmp_path) == before


def full(*_: Any, **__: Any) -> None:
    """What the system says of a full disk: it names no path."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("write", "patched"),
    [
        (lambda path: write_json(path, {"new": 1}), (Path, "write_text")),
        (lambda path: write_npz(path, {"new": np.ones(3)}), (np, "savez_compressed")),
        (lambda path: write_json(path, {"new": 1}), (Path, "replace")),
    ],
)
def test_on_a_full_disk_the_old_file_stays(
    write: Any, patched: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(*patched, full)
        says = f"cannot write {path}: No space left on device; free some space there"
        with pytest.raises(WriteError, match=says):
            write(path)
    assert path.read_text() == "old" and left(tmp_path) == ["results"]
    write(path)
    assert path.read_bytes() != b"old"


def test_a_device_that_is_full_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left"):
        with naming(Path("/dev/full")), open("/dev/full", "w") as file:
            file.write("x")
    with pytest.raises(ValueError, match="not ours"), whole(tmp_path / "x"):
        raise ValueError("not ours")
    with pytest.raises(WriteError, match="cannot write inner"):  # the one that failed, once
        with naming(Path("outer")), naming(Path("inner")):
            full()


def test_a_checkpoint_without_space_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(3)})

    def exhausted(self: Any, step: int, **_: Any) -> None:
        (tmp_path / f"{step}.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space [os_error_code='28']")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", exhausted)
        with pytest.raises(WriteError, match=f"cannot write {tmp_path}: No space left on device"):
            checkpoint.save(tmp_path, 2, {"w": jnp.ones(3)})
    assert left(tmp_path) == ["1"]
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(3)})["w"].sum() == 3


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{file}/run", "Not a directory; a part of that path is a file: give another folder"),
        ("/proc/run", "give a folder that you may write to"),
    ],
)
def test_a_run_that_can_write_nothing_ends_in_one_line(
    place: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    out = place.format(file=tmp_path / "file")
    assert run.main(["digits", "--out", out]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: cannot write {out}: ") and says in output.err
    assert len(output.err.splitlines()) == 1 and not output.out
    assert left(tmp_path) == ["file"]


def test_a_full_disk_ends_a_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.np, "savez_compressed", full)
    assert attempt(lambda: write_npz(tmp_path / "a.npz", {}), (OSError,), "") == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: cannot write {tmp_path / 'a.npz'}: No space left")
    assert len(errors.splitlines()) == 1 and left(tmp_path) == []
