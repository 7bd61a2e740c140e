"""Every example runs, draws its picture, and says nothing that an attack contradicts."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
GALLERY = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")


def run(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[dict[str, Any], Path]:
    """Runs an example as a user would, smaller; its names, and its picture."""
    picture = folder / f"{name}.png"
    command = [f"{name}.py", "--quick", "--out", str(picture), *more]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = runpy.run_path(str(ROOT / f"examples/{name}.py"))
    plt.close("all")
    assert picture.stat().st_size > 1000
    return names, picture


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run("digits", tmp_path, monkeypatch)
    assert (names["certified"] <= names["attacked"]).all()
    assert (np.diff(names["certified"]) <= 0).all()


@pytest.mark.slow
def test_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run("any_model", tmp_path, monkeypatch)
    for box in names["boxes"].values():
        assert (names["logits"] >= box.lower - 1e-4).all()
        assert (names["logits"] <= box.upper + 1e-4).all()
    assert (names["curves"]["ibp"] <= names["curves"]["crown-ibp"]).all()


@pytest.mark.slow
def test_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("blackjax")
    names, _ = run("sampler", tmp_path, monkeypatch)
    assert (names["proved"] <= names["tried"]).all() and (names["proved"] > 0).any()


@pytest.mark.slow
def test_radii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run("radii", tmp_path, monkeypatch)
    assert len(names["radii"]) == 6
    assert all(((-1 <= found) & (found < 0.4)).all() for found in names["radii"].values())


@pytest.mark.slow
def test_safety(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run("safety", tmp_path, monkeypatch)
    assert names["found"].lower <= names["found"].upper
    assert (names["radius"] <= names["attacked"]).all()


def test_regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run("regression", tmp_path, monkeypatch)
    assert (names["lower"] <= names["mean"]).all() and (names["mean"] <= names["upper"]).all()


def test_each_is_short_public_and_in_the_gallery() -> None:
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 120, path
        assert not re.findall(r"^(?:from|import) bnncert\b(?! as bc$).*", source, re.MULTILINE)
        assert not re.findall(r"\bbc\.\w*\.?_\w+|experiments", source)  # public names alone
        picture = ROOT / f"docs/gallery/{path.stem}.png"
        assert picture.stat().st_size < 150_000
        assert f"](gallery/{path.stem}.png)" in GALLERY
        assert f"](../examples/{path.name})" in GALLERY


def cells(source: str) -> list[tuple[str, str]]:
    """The cells of a script in the percent format: their kind, and what they hold."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append((kind, body.strip("\n")))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_its_script(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    held = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    # When they differ: jupytext --update --to ipynb examples/NAME.py
    assert held == cells(path.with_suffix(".py").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_two_are_notebooks_too() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["digits", "safety"]
