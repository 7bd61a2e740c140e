"""The study of P_safe: what it reads, what it proves, and what it does if draws disagree."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.gaussian import Margins
from bnncert.posterior import MeanField, Samples
from experiments.pipeline.posteriors import save
from experiments.setup.config import to_dict
from experiments.setup.data import Dataset, Split, load
from experiments.setup.models import build
from experiments.setup.presets import preset
from experiments.studies import proved_and_drawn, released, safety

QUICK = ["--images", "6", "--attack-steps", "2", "--draws", "120", "--batch-size", "6"]


def arrays(key: int = 0, scale: float = 1e-3, templates: np.ndarray | None = None) -> Any:
    """A network 784-10-10: a unit for each class, and its logit; or random weights."""
    random = np.random.default_rng(key)
    first = random.normal(size=(784, 10)) / 28 if templates is None else templates.T / 30
    loc = {
        "layer0/kernel": first,
        "layer0/bias": np.full(10, 0.1),
        "layer1/kernel": np.eye(10) + 0.01 * random.normal(size=(10, 10)),
        "layer1/bias": np.zeros(10),
    }
    return {f"{name}/loc": part.astype(np.float32) for name, part in loc.items()} | {
        f"{name}/scale": np.full(part.shape, scale, np.float32) for name, part in loc.items()
    }


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """One image a class, of few pixels that are 1: the "mnist" of these tests are six of them."""
    random = np.random.default_rng(1)
    images = (random.uniform(size=(10, 784)) < 0.2).astype(np.float32)
    split = Split(images[:6].reshape(6, 28, 28, 1), np.arange(6, dtype=np.int32))
    names = tuple(map(str, range(10)))
    found = Dataset("mnist", split, split, names, (0.0,), (1.0,))
    monkeypatch.setattr(safety, "load", lambda name, folder: found)
    return images


def test_a_released_posterior_is_the_network_it_was_saved_from(tmp_path: Path) -> None:
    saved = arrays()
    np.savez(tmp_path / "net.npz", **saved)
    read = released.read(tmp_path / "net.npz")
    x = np.random.default_rng(2).uniform(size=(28, 28, 1)).astype(np.float32)
    hidden = np.maximum(x.ravel() @ saved["layer0/kernel/loc"] + saved["layer0/bias/loc"], 0)
    logits = hidden @ saved["layer1/kernel/loc"] + saved["layer1/bias/loc"]
    np.testing.assert_allclose(released.apply(read.loc, jnp.asarray(x)), logits, rtol=1e-5)
    assert read.scale["layer1"]["kernel"].shape == (10, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1/bias/scale": None}, "net.npz lacks layer1/bias/scale; it has layer0/bias/loc"),
        ({"layer0/kernel/loc": np.zeros((10, 784))}, r"shape \(10, 784\).* transpose them"),
        ({"layer1/bias/loc": np.zeros(3)}, r"layer1/bias/loc has shape \(3,\), and not \(10,\)"),
        ({"layer0/bias/scale": np.zeros(10)}, "layer0/bias/scale has values that are not positive"),
        ({"layer0/bias/loc": np.full(10, np.nan)}, "layer0/bias/loc has values that are not fin"),
        ({"conv/kernel/loc": np.zeros(2)}, "no fully connected layer: conv/kernel/loc"),
    ],
)
def test_a_file_that_is_no_such_posterior_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changed = {name: part for name, part in (arrays() | change).items() if part is not None}
    np.savez(tmp_path / "net.npz", **changed)
    with pytest.raises(ValueError, match=message):
        released.read(tmp_path / "net.npz")


def test_what_is_no_npz_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.npz").write_text("weights")
    with pytest.raises(ValueError, match=r"net\.npz is no \.npz file of numbers"):
        released.read(tmp_path / "net.npz")


def test_images_are_decided_where_templates_stay_apart(
    templates: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    np.savez(tmp_path / "net.npz", **arrays(templates=templates))
    out = tmp_path / "out"
    arguments = ["--posteriors", str(tmp_path), "--out", str(out), *QUICK]
    assert safety.main([*arguments, "--eps", "0.01", "0.9"]) == 0
    near, far = json.loads((out / "safety.json").read_text())["rows"]
    assert (near["correct"], near["safe"], near["attack_leaves"]) == (6, 6, 6)
    assert (far["safe"], far["unsafe"], far["attack_leaves"]) == (0, 6, 0)
    assert near["fewest_where_safe"] == near["draws_each"] == 20
    assert far["most_where_unsafe"] == 0 and far["pairs"] == 120
    assert near["weights"] == 784 * 10 + 10 + 10 * 10 + 10
    assert (out / "safety.png").stat().st_size > 10_000
    assert (out / "safety.md").read_text().count("\n") == 4
    assert "6 safe, 0 unsafe, 0 open" in capsys.readouterr().out

    def not_again(*_: Any) -> Any:
        raise AssertionError("a row that is there is computed again")

    monkeypatch.setattr(safety, "proved_and_drawn", not_again)
    assert safety.main([*arguments, "--eps", "0.9"]) == 0
    with pytest.raises(SystemExit) as stopped:
        safety.main([*arguments, "--delta", "0.002"])
    assert stopped.value.code == 2
    assert "is of other settings" in capsys.readouterr().err


def test_a_network_that_has_no_image_right_is_refused(
    templates: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "net.npz", **arrays(templates=np.roll(templates, 1, axis=0)))
    with pytest.raises(SystemExit) as stopped:
        safety.main(["--posteriors", str(tmp_path), "--out", str(tmp_path / "out"), *QUICK])
    assert stopped.value.code == 1
    assert "net: the network of the means has none of 6 images right" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wide_posterior_leaves_images_open_and_draws_agree(
    templates: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "net.npz", **arrays(templates=templates, scale=0.03))
    out = tmp_path / "out"
    arguments = ["--posteriors", str(tmp_path), "--out", str(out), "--eps", "0.1", *QUICK]
    assert safety.main(arguments) == 0
    (row,) = json.loads((out / "safety.json").read_text())["rows"]
    assert row["open"] > 0 and row["safe"] + row["unsafe"] + row["open"] == row["correct"]
    assert all(lower <= upper for lower, upper in zip(*_sides(row), strict=True))


def _sides(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    return row["each"]["lower"], row["each"]["upper"]


def test_a_bound_that_draws_contradict_ends_with_status_1(
    templates: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def too_good(*_: Any) -> Margins:
        return Margins(jnp.full(9, 9.0), jnp.ones(9), 1e-3)

    monkeypatch.setattr(proved_and_drawn, "stays", too_good)
    np.savez(tmp_path / "net.npz", **arrays(templates=templates))
    out = tmp_path / "out"
    arguments = ["--posteriors", str(tmp_path), "--out", str(out), "--eps", "0.9", *QUICK]
    for _ in range(2):  # also where the row is there already
        with pytest.raises(SystemExit) as stopped:
            safety.main(arguments)
        assert stopped.value.code == 1
        assert "an attack left 0 of 20 draws (6 images so)" in capsys.readouterr().err
    (row,) = json.loads((out / "safety.json").read_text())["rows"]
    assert row["contradicted"] == [0, 1, 2, 3, 4, 5]


def test_counts_that_contradict_have_the_chance_they_are_said_to_have() -> None:
    """20 of 20 draws withstand with probability .5^20 = 9.5e-7, if P_safe is .5; 19 with 2e-5."""
    counts, half = np.array([20, 19, 1, 0]), np.full(4, 0.5)
    assert proved_and_drawn.contradicted(counts, 20, half, np.ones(4)).tolist() == [
        False, False, False, True,
    ]  # fmt: skip
    assert proved_and_drawn.contradicted(counts, 20, np.zeros(4), half).tolist() == [
        True, False, False, False,
    ]  # fmt: skip


def test_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(preset("digits"), seed=1)
    params = build(config.model, load("digits")).init(jax.random.key(0))
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "results.json").write_text("{}")
    save(run / "posterior.npz", MeanField(params, jax.tree.map(lambda w: 0 * w + 1e-6, params)))
    out = tmp_path / "out"
    images = ["--images", "60", *QUICK[2:]]
    assert safety.main(["--runs", str(run), "--out", str(out), "--eps", "1e-5", *images]) == 0
    (row,) = json.loads((out / "safety.json").read_text())["rows"]
    assert (row["name"], row["kind"], row["images"]) == ("mine", "run", 60)
    assert 0 < row["safe"] <= row["correct"] < 60  # the network is not trained
    save(run / "posterior.npz", Samples(jax.tree.map(lambda w: w[None], params)))
    with pytest.raises(SystemExit) as stopped:
        safety.main(["--runs", str(run), "--out", str(tmp_path / "other"), *QUICK])
    assert stopped.value.code == 1
    assert "is a Samples, and no Gaussian" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --posteriors DIR, --runs RUN, or both"),
        (["--posteriors", "nowhere"], "--posteriors nowhere: there is no such folder"),
        (["--posteriors", "."], "there is no .npz file in it"),
        (["--runs", "nowhere"], "there is no folder nowhere"),
        (["--posteriors", ".", "--delta", "0"], "--delta 0: in (0, 1)"),
        (["--posteriors", ".", "--images", "0"], "--images 0: at least 1"),
        (["--posteriors", ".", "--eps", "25"], "--eps 25.0: in [0, 1]"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        safety.main(arguments)
    assert stopped.value.code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_posterior_of_earlier_work(shared: Path, shared_data: Path, tmp_path: Path) -> None:
    source = shared / "posteriors" / "uai_1_64.npz"
    if not source.is_file():
        pytest.skip(f"no {source}: the authors' files carry no licence, and are not in the project")
    (tmp_path / source.name).write_bytes(source.read_bytes())
    arguments = ["--posteriors", str(tmp_path), "--data-dir", str(shared_data)]
    arguments += ["--eps", "0.025", "--draws", "3600", "--out", str(tmp_path / "out")]
    assert safety.main(arguments) == 0
    (row,) = json.loads((tmp_path / "out/safety.json").read_text())["rows"]
    assert (row["correct"], row["safe"], row["unsafe"], row["open"]) == (36, 31, 5, 0)
