"""What a run says: bars on a terminal, lines in a file, and compiling apart from progress."""

import contextlib
import io
import itertools
import sys
from typing import Any

import pytest
from tqdm import tqdm

from experiments.setup import logs
from experiments.setup.logs import SHORT, Lines, compiling, lines_in_files


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, steps: int = 3, stop: int | None = None) -> str:
    """What is written of a bar, with another line after it."""
    with contextlib.redirect_stderr(stream), lines_in_files():
        with contextlib.suppress(KeyboardInterrupt), tqdm(total=steps, desc="train") as bar:
            for step in range(steps):
                if step == stop:
                    raise KeyboardInterrupt
                bar.update()
        print("done", file=sys.stderr)
    return stream.getvalue()


def test_a_file_gets_lines_and_a_terminal_a_bar() -> None:
    text = shown(io.StringIO())
    assert "\r" not in text and "█" not in text
    first, last = text.splitlines()
    assert first.startswith("train: 100% 3/3 [") and last == "done"
    assert "\r" in shown(Terminal())
    assert shown(io.StringIO(), stop=2).splitlines()[0].startswith("train:  67% 2/3 [")


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(map(float, range(10**6)))
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = Lines(stream)
    for second in range(3000):
        lines.write(f"\rtrain: {second}/3000|###|")
    times = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert min(gaps) > logs.LEAST and gaps == sorted(gaps)
    assert 20 < len(times) < 50


def test_other_text_passes_through() -> None:
    stream = io.StringIO()
    lines: Any = Lines(stream)
    lines.write("\rtrain: 10% 1/10")
    print("warning:", "heed", file=lines)
    print(file=lines)
    assert stream.getvalue() == "warning: heed\ntrain: 10% 1/10\n"


def test_compiling_has_a_line_of_its_own_and_no_part_in_the_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    stream = Terminal()
    with tqdm(total=100, file=stream, delay=SHORT, desc="train", mininterval=0) as made:
        bar: Any = made
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = 0.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
        said = io.StringIO()
        with contextlib.redirect_stderr(said), compiling("the training step", bar, 1):
            now[0] += 3600.0
        assert said.getvalue() == "compiling the training step: 3600.0 s\n"
        bar.update()
        for _ in range(10):
            now[0] += 1.0
            bar.update()
        assert bar.n == 11 and bar.format_dict["rate"] == pytest.approx(1.0)
        assert bar.format_dict["elapsed"] == 10.0
    assert "11/100 [00:10<01:29" in stream.getvalue()


def test_nothing_is_said_of_a_bar_that_is_not_shown() -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), tqdm(total=3, disable=True) as bar:
        with compiling("certify", bar, 1):
            pass
    assert said.getvalue() == ""
