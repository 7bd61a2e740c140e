"""Keep a library's advice to its own developers out of a run's output."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_only(logger: str = "absl") -> Iterator[None]:
    """Let only errors through from a logger, and put its level back afterwards.

    >>> with errors_only("advice"):
    ...     logging.getLogger("advice").isEnabledFor(logging.WARNING)
    False
    """
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
