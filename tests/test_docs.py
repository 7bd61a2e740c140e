"""The documentation's code runs, prints what it says, and every public name is on the site."""

import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bnncert as bc

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>.*?) -->\n)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<printed>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
_NOT_RUN = "not run: "


class Block(NamedTuple):
    """A block of Python on a page; what it prints, where a block of text follows at once."""

    code: str
    printed: str | None
    reason: str  # why it is not run; empty: it is


def blocks(page: Path) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        mark = match["mark"] or ""
        assert not mark or mark.startswith(_NOT_RUN), f"{page.name}: what is <!-- {mark} -->?"
        found.append(Block(match["code"], match["printed"], mark.removeprefix(_NOT_RUN).strip()))
    return found


def relative(page: Path) -> str:
    return str(page.relative_to(DOCS))


WITH_CODE = [page for page in PAGES if blocks(page)]


def same(found: str, promised: str) -> bool:
    """Words are equal, and numbers nearly: another processor rounds otherwise."""
    words = [_NUMBER.sub("#", text).split() for text in (found, promised)]
    numbers = [list(map(float, _NUMBER.findall(text))) for text in (found, promised)]
    pairs = zip(*numbers, strict=False)
    return words[0] == words[1] and all(a == pytest.approx(b, rel=0.02) for a, b in pairs)


# What compiles the networks and samplers of many libraries; `test_readme.py` tries some of them.
SLOW = ("ten-lines.md",)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW), id=relative(p))
        for p in WITH_CODE
    ],
)
def test_the_code_of_a_page_runs_in_order_and_prints_what_it_says(page: Path) -> None:
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for number, block in enumerate(blocks(page)):
        if block.reason:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, f"{page.stem}.py", "exec"), names)
        if block.printed is not None:
            found = printed.getvalue()
            assert same(found, block.printed), f"block {number} printed\n{found}"


def test_all_but_a_few_blocks_run() -> None:
    for page in PAGES:
        found = blocks(page)
        fences = page.read_text(encoding="utf-8").count("```python")
        assert fences == len(found), f"{page.name}: a block of Python that is not found is not run"
        assert sum(bool(block.reason) for block in found) <= 2, page.name
    assert sum(len(blocks(page)) for page in PAGES) >= 25


def test_the_comparison_of_printed_numbers_can_fail() -> None:
    assert same("a 1.00 True", "a 1.01 True")
    assert not same("a 1.00 True", "a 1.10 True")
    assert not same("a 1.00 True", "a 1.00 False")
    assert not same("1 2", "1")


def public_names() -> list[str]:
    """All that the front door and its sub-packages list, by the names that are written."""
    found = []
    for door in ("bnncert", *(f"bnncert.{name}" for name in bc.__all__)):
        try:
            module = importlib.import_module(door)
        except ImportError:
            continue  # a name that is no module
        found += [f"{door}.{name}" for name in getattr(module, "__all__", [])]
    return found


def test_the_site_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason='the site is built by `pip install -e ".[docs]"`')
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("README.md", "zensical.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "bnncert").symlink_to(REPOSITORY / "bnncert")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "build" / "site"
    pages = [page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html")]
    there = {name for page in pages for name in re.findall(r'id="(bnncert[\w.]*)"', page)}
    assert set(public_names()) <= there, sorted(set(public_names()) - there)
