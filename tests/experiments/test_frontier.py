"""The study of spread: posteriors widen, what is proved shrinks, and what cannot be is refused."""

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
from experiments.studies import frontier


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits: random features, a least-squares layer, a narrow posterior."""
    config = preset("digits")
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, eps=1e-3))
    data = load("digits")
    params = build(config.model, data).init(jax.random.key(0))
    dense = sorted(params, key=lambda name: int(name.split("_")[1]))
    features = data.train.x.reshape(len(data.train.y), -1)
    features = (features - np.asarray(data.mean)) / np.asarray(data.std)
    for name in dense[:-1]:
        params[name]["kernel"] = 3 * params[name]["kernel"]
        features = np.maximum(features @ params[name]["kernel"] + params[name]["bias"], 0)
    target = np.eye(10)[data.train.y] - 0.1
    solved = np.linalg.lstsq(
        features.T @ features + 0.1 * np.eye(features.shape[1]), features.T @ target
    )[0]
    params[dense[-1]]["kernel"] = jnp.asarray(10 * solved, jnp.float32)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "results.json").write_text("{}")
    scale = jax.tree.map(lambda w: jnp.full_like(w, 1e-5), params)
    save(folder / "posterior.npz", MeanField(params, scale))
    return folder


def test_what_is_proved_falls_as_the_posterior_widens(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--images", "43", "--refine", "1", "--out", str(tmp_path / "out")]
    arguments += ["--factors", "1e-3", "1e5"]
    assert frontier.main(arguments) == 0
    record = json.loads((tmp_path / "out/frontier.json").read_text())
    (curve,) = record["curves"]
    rows = {row["factor"]: row for row in curve["rows"]}
    assert len(rows) == 4 and {1e-3, 1.0, 1e5} < set(rows) and list(rows) == sorted(rows)
    safe, certified, information = (
        [row[name] for row in rows.values()] for name in ("safe", "certified", "information")
    )
    for shares in (safe, certified):
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.5 and shares[-1] == 0
    assert information == sorted(information)
    assert safe[0] <= curve["correct"] and record["images"] == 43
    assert rows[1.0]["accuracy"] == pytest.approx(curve["correct"])
    assert (tmp_path / "out/frontier.png").stat().st_size > 10_000
    assert (tmp_path / "out/frontier.md").read_text().count("| mine |") == 4
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        frontier.main(arguments)
    assert stopped.value.code == 2
    assert "frontier.json exists: name another folder" in capsys.readouterr().err


def test_a_posterior_that_is_no_mean_field_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "swag"
    other.mkdir()
    for name in ("config.json", "results.json"):
        (other / name).write_text((run / name).read_text())
    save(other / "posterior.npz", Samples({"w": jnp.ones((2, 3))}))
    with pytest.raises(SystemExit) as stopped:
        frontier.main([str(run), str(other), "--images", "9", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "swag: its posterior is a Samples" in said and "--inference bbb or ivon" in said
    assert not (tmp_path / "out").exists()


def test_widened_draws_have_the_same_noise() -> None:
    q = MeanField({"w": jnp.array([1.0, 2.0]), "b": jnp.ones(1)}, {"w": jnp.ones(2), "b": None})
    key = jax.random.key(0)
    one, four = q.sample(key, 3), frontier.widened(q, 4.0).sample(key, 3)
    np.testing.assert_allclose(four["w"] - q.loc["w"], 4 * (one["w"] - q.loc["w"]), rtol=1e-5)
    np.testing.assert_array_equal(four["b"], one["b"])


def test_factors_are_added_where_a_curve_falls() -> None:
    def row(factor: float) -> dict[str, Any]:
        safe, certified = float(factor < 3), float(factor < 20)
        return {"factor": factor, "safe": safe, "certified": certified}

    found = [part["factor"] for part in frontier.measure(row, [100.0, 1.0, 10.0, 1.0], 30)]
    assert found[0] == 1 and found[-1] == 100 and found == sorted(set(found))
    for fall in (3, 20):
        place = int(np.searchsorted(found, fall))
        assert np.log(found[place] / found[place - 1]) <= frontier.OPEN
    assert len(found) < 20  # the flat parts are left as they are


def test_a_flat_curve_and_a_single_factor_are_left_as_they_are() -> None:
    def row(factor: float) -> dict[str, Any]:
        return {"factor": factor, "safe": 0.5, "certified": 0.9}

    assert len(frontier.measure(row, [1.0, 10.0], 5)) == 2
    assert len(frontier.measure(row, [1.0], 5)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["a/mine", "b/mine"], "two runs are called mine"),
        (["nowhere", "--factors", "0", "1"], "--factors 0.0 1.0: finite numbers above 0"),
        (["nowhere", "--images", "0"], "--images 0: at least 1"),
        (["nowhere", "--delta", "0.01"], "--delta 0.01: in (0, 0.01)"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        frontier.main(arguments)
    assert stopped.value.code
    assert message in " ".join(capsys.readouterr().err.split())
