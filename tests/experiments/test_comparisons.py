"""Studies of finished runs: methods side by side, and certificates as a posterior widens."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.posterior import MeanField, Samples
from experiments.pipeline.posteriors import save
from experiments.setup.config import to_dict
from experiments.setup.data import load
from experiments.setup.models import build
from experiments.setup.presets import preset
from experiments.studies import methods, spread


def finished(folder: Path, inference: str = "bbb", **results: Any) -> Path:
    """A run's folder with the numbers of a run, and no network."""
    folder.mkdir()
    config = to_dict(dataclasses.replace(preset("digits", inference), seed=3))
    (folder / "config.json").write_text(json.dumps(config))
    known = {name: 1 for name in methods.KEPT}
    known |= {"inference": inference, "likelihood": "certified", "random_layers": "all"}
    known |= {"clean_accuracy": 0.9, "attacked_accuracy": 0.8, "certified_accuracy": 0.7}
    known |= {"nll": 0.25, "ece": 0.0125, "eps": 0.05, "curve": {"eps": []}}
    (folder / "results.json").write_text(json.dumps(known | results))
    return folder


def test_methods_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = finished(tmp_path / "a", likelihood="clean", certified_accuracy=0.0)
    second = finished(tmp_path / "b", "ivon", random_layers="last", posterior_scale=33.4)
    out = tmp_path / "rows.json"
    methods.main([str(first), str(second), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].startswith("| bbb, clean likelihood | 90.0% | 80.0% | 0.0% | 0.250 |")
    assert lines[1].startswith("| ivon, last layer | 90.0% | 80.0% | 70.0% |")
    assert "| 33 |" in lines[1]
    rows = json.loads(out.read_text())
    assert rows[1]["command"] == "python -m experiments.run digits --inference ivon --seed 3"
    assert all("curve" not in row for row in rows)
    assert out.with_suffix(".png").stat().st_size > 1000


def test_runs_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    first = finished(tmp_path / "a", eps=0.1)
    second = finished(tmp_path / "b", eps=0.2)
    out = tmp_path / "rows.json"
    with pytest.raises(ValueError, match=r"differ in eps \(0.1, 0.2\)"):
        methods.main([str(first), str(second), "--out", str(out)])
    assert not out.exists()
    (second / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="b is no finished run"):
        methods.main([str(first), str(second)])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean-field posterior about an untrained network, certified at a small radius."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = preset("digits")
    small = dataclasses.replace(config.eval, eps=1e-3, num_samples=3, certify_method="ibp")
    (folder / "config.json").write_text(
        json.dumps(to_dict(dataclasses.replace(config, eval=small)))
    )
    params = build("mlp", load("digits", None)).init(jax.random.key(0))
    deviations = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), params)
    save(folder / "posterior.npz", MeanField(params, deviations))
    return folder


def test_certificates_fall_as_a_posterior_widens(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "spread.json"
    arguments = ["--images", "60", "--factors", "0", "1", "1e4", "--out", str(out)]
    spread.main([str(run_folder), *arguments])
    (curve,) = json.loads(out.read_text())["curves"]
    still, trained, wide = (row["certified"] for row in curve["rows"])
    assert 0 < trained <= still and wide < trained
    assert curve["largest_factor"] == 1
    assert out.with_suffix(".png").stat().st_size > 1000


def test_widened_draws_keep_mean_and_noise() -> None:
    draws, mean = {"w": np.array([[1.0, 2.0], [3.0, 2.0]])}, {"w": np.array([2.0, 2.0])}
    np.testing.assert_array_equal(spread.widened(draws, mean, 0.0)["w"], [[2, 2], [2, 2]])
    np.testing.assert_array_equal(spread.widened(draws, mean, 3.0)["w"], [[-1, 2], [5, 2]])


def test_what_cannot_be_widened_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        spread.main([str(run_folder), "--factors", "0", "2"])
    (tmp_path / "config.json").write_text((run_folder / "config.json").read_text())
    save(tmp_path / "posterior.npz", Samples({"w": jnp.ones((2, 3))}))
    with pytest.raises(TypeError, match="a Samples is no Gaussian to widen"):
        spread.main([str(tmp_path)])
