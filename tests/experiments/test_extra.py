"""Without the extra `experiments`, a command says in one line what to install."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import NEEDED

ROOT = Path(__file__).resolve().parents[2]

HIDDEN = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


import importlib.util

known = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {hidden} else known(name, *rest)
sys.meta_path.insert(0, Hidden())
"""
"""A sitecustomize.py that hides modules from a Python that starts."""


def without(modules: set[str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(HIDDEN.format(hidden=modules))
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["run", "certify", "attack", "report", "regression"])
def test_a_command_names_the_extra_in_one_line(name: str, tmp_path: Path) -> None:
    found = without({"tyro", "orbax"}, tmp_path, "-m", f"experiments.{name}", "digits")
    assert found.returncode == 1 and not found.stdout
    assert len(found.stderr.splitlines()) == 1
    assert "(orbax-checkpoint, tyro)" in found.stderr
    assert 'pip install -e ".[experiments]"' in found.stderr


def test_an_import_raises(tmp_path: Path) -> None:
    found = without({"tyro"}, tmp_path, "-c", "import experiments")
    assert found.returncode == 1 and "ImportError: experiments need" in found.stderr


def test_what_is_needed_is_in_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["experiments"]
    assert {*NEEDED.values()} <= {re.split(r"[><=!~]", line)[0] for line in extra}
