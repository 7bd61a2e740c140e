"""The command `bnncert`, and what the package says of itself."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bnncert
from bnncert import __main__ as front
from experiments.report.fineprint import command as command_of
from experiments.setup.command import program
from experiments.setup.presets import parse

ROOT = Path(__file__).resolve().parents[1]

TYPED = {
    "/usr/bin/bnncert": "bnncert run",
    r"bnncert.exe": "bnncert run",
    "/site-packages/bnncert/__main__.py": "python -m bnncert run",
    str(ROOT / "experiments/run.py"): "python -m experiments.run",
    "a_script_of_yours.py": "python -m experiments.run",
}


@pytest.mark.parametrize("started", TYPED)
def test_what_is_printed_is_what_was_typed(
    started: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program("run") == TYPED[started]
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert f"usage: {TYPED[started]} PRESET" in capsys.readouterr().out
    line = command_of({"preset": "digits", "inference": "map", "seed": 1})
    assert line == f"{TYPED[started]} digits --inference map --seed 1"


def test_no_command_is_written_out_where_it_would_be_printed() -> None:
    """Docstrings and comments speak of a clone; strings that are printed ask `program`."""
    wings = ("setup", "pipeline", "report", "tasks")
    paths = [path for wing in wings for path in (ROOT / "experiments" / wing).rglob("*.py")]
    for path in [*paths, *(ROOT / "experiments").glob("*.py")]:
        code = re.sub(r'"""(.|\n)*?"""', "", path.read_text())
        assert "python -m experiments" not in code, path


def test_it_runs_outside_a_clone(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "bnncert", "regression", "sine", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage: python -m bnncert regression sine" in shown.stdout


def test_help_version_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in front.COMMANDS)
    assert front.main([]) == 2 and capsys.readouterr().out == overview
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bnncert {bnncert.__version__}\n"
    assert front.main(["rnu"]) == 2
    assert "unknown command 'rnu'. Known: run, certify" in capsys.readouterr().err


@pytest.mark.parametrize("name", front.COMMANDS)
def test_without_the_extra_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(module: str) -> None:
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(front, "import_module", without)
    assert front.main([name]) == 1
    printed = capsys.readouterr()
    assert 'pip install "bnncert[experiments]"' in printed.err and "tyro" in printed.err
    assert not printed.out


def test_a_fault_of_our_own_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise ImportError("cannot import name 'x'", name="bnncert.experiments.setup")

    monkeypatch.setattr(front, "import_module", broken)
    with pytest.raises(ImportError, match="cannot import"):
        front.main(["run"])


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]  # read from the package
    assert project["tool"]["hatch"]["version"]["path"] == "bnncert/__init__.py"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {bnncert.__version__}\n" in citation
    assert f"\nrepository-code: {project['project']['urls']['Source']}\n" in citation
    assert f"\n## [{bnncert.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
