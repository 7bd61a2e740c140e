"""One writer at a time: a lock on a folder that lasts as long as the process that took it.

The lock is the kernel's (`flock`), on a file of the folder that says who holds it. A process that
is killed loses it with its life; the file that it leaves behind is taken over.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from .writing import naming

try:
    import fcntl
except ImportError:  # not of this system: the file's text is left to go by
    fcntl = None

LOCK = ".lock"
"""The file's name in the folder."""


class LockedError(RuntimeError):
    """Another process writes to the folder; names both, and the way out."""


class Holder(NamedTuple):
    """Who wrote a lock's file."""

    pid: int
    host: str


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder meanwhile.

    Args:
        folder: there already.

    Raises:
        LockedError: another process holds it, here or on another machine.
        WriteError: the folder cannot be written to.
    """
    path = folder / LOCK
    with naming(folder):
        file = _taken(path)
    try:
        with naming(folder):
            file.write(f"{os.getpid()} {socket.gethostname()}\n")
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: whoever opened it meanwhile finds it gone
        _close(file)


def _taken(path: Path) -> IO[str]:
    """The file, locked and empty."""
    while True:
        file = path.open("a+")
        try:
            _lock(path, file)
            if _is_at(path, file):
                _check_left(path, _holder(file))
                file.truncate(0)
                return file
        except BaseException:
            _close(file)
            raise
        _close(file)  # its last holder removed it between opening and locking


def _lock(path: Path, file: IO[str]) -> None:
    try:
        if fcntl is None:
            raise OSError("no locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        holder = _holder(file)
    except OSError:  # a file system without locks: only the file's text is left to go by
        holder = _holder(file)
        if holder is None or not _is_here(holder) or not _is_alive(holder.pid):
            return
    end = f"end it (kill {holder.pid})" if holder and _is_here(holder) else "end it"
    raise LockedError(
        f"{path.parent} is in use by {_named(holder)}, and two writers would spoil each other's "
        f"files: wait until it is done, {end}, or choose another folder"
    )


def _check_left(path: Path, holder: Holder | None) -> None:
    """What a holder left that is not there any more, as far as this machine can tell."""
    if holder is None:
        return
    if not _is_here(holder):  # not every network file system tells of locks of other machines
        raise LockedError(
            f"{path.parent} is in use by {_named(holder)}, another machine: wait until it is done, "
            f"or, if it does not run any more, remove {path}"
        )
    said = f"{path.parent}: its lock was left by {_named(holder)}, which has ended; taken over"
    print(said, file=sys.stderr)


def _holder(file: IO[str]) -> Holder | None:
    file.seek(0)
    words = file.read().split()
    return Holder(int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else None


def _close(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: what is left in the buffer has no place
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _named(holder: Holder | None) -> str:
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}"


def _is_here(holder: Holder) -> bool:
    return holder.host == socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
