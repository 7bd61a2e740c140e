"""What a run says while it works: progress that a log can hold, and no library's advice."""

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

from tqdm import tqdm

LEAST, MOST = 10.0, 300.0
"""Seconds between two lines of progress: a tenth of the time that has passed, within these."""


@contextmanager
def errors_only(logger: str = "absl", level: int = logging.ERROR) -> Iterator[None]:
    """Let only errors through from a logger, and put its level back afterwards.

    Args:
        logger: its name.
        level: the least that is let through; `logging.CRITICAL` where errors are raised besides.

    >>> with errors_only("advice"):
    ...     logging.getLogger("advice").isEnabledFor(logging.WARNING)
    False
    """
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def lines_in_files() -> Iterator[None]:
    """Progress bars become lines, now and then, where the errors do not go to a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(cast(Any, Lines(sys.stderr))):
        yield


class Lines:
    r"""A stream on which a bar that draws itself anew, after a carriage return, is a plain line.

    >>> out = Lines(sys.stdout)
    >>> for text in ("\rtrain:  50%|####    | 1/2", "\rtrain: 100%|########| 2/2", "\n"):
    ...     _ = out.write(text)
    train: 100% 2/2
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._began = self._said = time.monotonic()
        self._bar, self._shown, self._line_is_open = "", "", False

    def write(self, text: str) -> int:
        """As of any stream; of a bar, its last state, and one before it now and then."""
        now = time.monotonic()
        if text.startswith("\r"):
            self._bar = re.sub(r"\|[^|]*\|", "", text.rpartition("\r")[2]).strip()
            if now - self._said > min(max(LEAST, 0.1 * (now - self._began)), MOST):
                self._put_bar(now)
        elif text == "\n" and self._bar and not self._line_is_open:
            self._put_bar(now)
        elif text:
            self._stream.write(text)
            self._said = now
            self._line_is_open = not text.endswith("\n")
        return len(text)

    def _put_bar(self, now: float) -> None:
        done, _, _ = self._bar.partition("[")  # what follows are times
        if self._bar and done != self._shown:
            self._stream.write(f"{self._bar}\n")
            self._stream.flush()
        self._bar, self._shown, self._said = "", done, now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def compiling(what: str, bar: tqdm, count: int) -> Iterator[None]:
    """Says how long a first call takes, which compiles: of the bar's estimate it is no part.

    Args:
        what: is compiled, in words.
        bar: made with `delay=SHORT`, so that it appears after this line.
        count: of the bar's units that the call does; the caller adds them as ever.
    """
    started = time.monotonic()
    if not bar.disable:
        print(f"compiling {what}: ", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if not bar.disable:
            print(f"{time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    bar.unpause()
    bar.initial = bar.last_print_n = bar.n + count


SHORT = 1e-3
"""Seconds that a bar waits before it appears."""
