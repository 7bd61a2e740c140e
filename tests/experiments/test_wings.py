"""The wings of the house: a module imports from its own wing and the ones before it alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_imports import ROOT, imported, relative

WINGS = ("setup", "pipeline", "report", "tasks")
MODULES = sorted(path for wing in WINGS for path in (ROOT / "experiments" / wing).rglob("*.py"))
COMMANDS = ("run", "certify", "attack", "report", "regression")
HERE = "experiments."


def package(path: Path) -> str:
    """The package that a module's relative imports start from."""
    return ".".join(path.parent.relative_to(ROOT).parts)


def later(path: Path, source: str) -> set[str]:
    """What a module imports that does not come before it: later wings, the commands, studies."""
    wing = path.relative_to(ROOT / "experiments").parts[0]
    earlier = {f"experiments.{name}" for name in WINGS[: WINGS.index(wing) + 1]}
    ours = {name for name in imported(source, package(path)) if f"{name}.".startswith(HERE)}
    return {name for name in ours if ".".join(name.split(".")[:2]) not in earlier}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_to_earlier_wings(path: Path) -> None:
    assert not later(path, path.read_text())


def test_the_check_can_fail() -> None:
    here = ROOT / "experiments/pipeline/x.py"
    assert later(here, "from experiments.report import page") == {"experiments.report.page"}
    assert later(here, "from ..report import page") == {"experiments.report.page"}
    assert later(here, "from experiments import run") == {"experiments.run"}
    assert later(here, "from .. import run") == {"experiments.run"}
    assert not later(here, "from ..setup.data import load\nfrom . import y\nimport numpy")


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "experiments").glob("*.py")], ids=relative)
def test_what_the_wheel_carries_needs_nothing_that_it_leaves_out(path: Path) -> None:
    left_out = ("benchmarks", "results", "studies")
    names = imported(path.read_text(), package(path))
    assert not {n for n in names if f"{n}.".startswith(tuple(f"{HERE}{p}." for p in left_out))}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_what_it_does_not_know(name: str) -> None:
    first = "sine" if name == "regression" else "digits"
    module = [sys.executable, "-m", f"experiments.{name}", first]
    shown = subprocess.run([*module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: python -m experiments.{name}" in shown.stdout
    refused = subprocess.run([*module, "--xyzzy"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2
    assert "--xyzzy" in refused.stderr and not refused.stdout
