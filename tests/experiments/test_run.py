import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bnncert import certify
from bnncert.posterior import Samples
from experiments.pipeline.folder import open_folder
from experiments.pipeline.inference import Problem
from experiments.pipeline.posteriors import load as load_posterior
from experiments.pipeline.training import Trained
from experiments.run import main
from experiments.setup import data
from experiments.setup.config import from_dict
from experiments.setup.presets import parse
from experiments.tasks import images

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = (
    "--train.epochs 3 --eval.num-samples 2 --eval.attack-steps 2 --eval.attack-restarts 1 "
    "--eval.certify-method ibp --eval.curve-points 2 --eval.curve-images 50"
).split()
FILES = {
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "results.json",
    "certificates.npz",
    "posterior.npz",
    "gallery.npz",
    "report.html",
}


def digits(out: Path, *options: str) -> tuple[int, str, str]:
    """A tiny run: its exit status, what it printed, and its errors."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            status = main(["digits", *TINY, *options, "--out", str(out)])
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def bbb(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "bbb"
    status, printed, errors = digits(folder)
    assert status == 0, errors
    return folder, printed


@pytest.fixture(scope="module")
def map_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "map"
    status, _, errors = digits(folder, "--inference", "map", "--train.validation", "100")
    assert status == 0, errors
    return folder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def timeless(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if "seconds" not in name}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [timeless(json.loads(line)) for line in lines]


def arrays(folder: Path, name: str = "certificates.npz") -> dict[str, np.ndarray]:
    with np.load(folder / name) as file:
        return dict(file)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_run(a: Path, b: Path) -> None:
    """The same numbers to the bit, but for times."""
    assert timeless(read(a)) == timeless(read(b))
    assert metrics(a) == metrics(b)
    for name in ("certificates.npz", "gallery.npz", "posterior.npz"):
        first, second = arrays(a, name), arrays(b, name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            np.testing.assert_array_equal(value, second[key], err_msg=f"{name}: {key}")


def test_a_run_leaves_its_folder(bbb: tuple[Path, str]) -> None:
    folder, printed = bbb
    assert {path.name for path in folder.iterdir()} == FILES
    config = from_dict(json.loads((folder / "config.json").read_text()))
    assert config == parse(["digits", *TINY, "--out", str(folder)])
    assert str(folder / "report.html") in printed
    assert "<html" in (folder / "report.html").read_text()[:300]
    for name in ("clean", "attacked", "certified"):
        assert f"{read(folder)[f'{name}_accuracy']:.2%}" in printed
    lines = metrics(folder)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 12), (2, 24), (3, 36)]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_results_have_the_names_others_read(bbb: tuple[Path, str], map_: Path) -> None:
    names = (
        "eps num_test num_samples clean_accuracy attacked_accuracy certified_accuracy nll ece "
        "mutual_information kl_weight posterior_scale seconds_per_epoch inference preset seed"
    ).split()
    for folder, inference in ((bbb[0], "bbb"), (map_, "map")):
        results = read(folder)
        assert set(names) <= set(results)
        numbers = [value for value in results.values() if isinstance(value, int | float)]
        assert len(numbers) > 15
        assert np.isfinite(numbers).all()
        assert (results["inference"], results["preset"], results["seed"]) == (
            inference,
            "digits",
            0,
        )
        assert results["num_test"] == 360
        assert 0 < results["certified_accuracy"] <= results["attacked_accuracy"]
        assert results["attacked_accuracy"] <= results["clean_accuracy"] <= 1
        assert results["clean_accuracy"] > 0.5  # it has learned: chance is .1
        assert results["seconds_per_epoch"] > 0


def test_a_posterior_has_a_spread_and_one_network_has_none(
    bbb: tuple[Path, str], map_: Path
) -> None:
    spread, point = read(bbb[0]), read(map_)
    assert (spread["num_samples"], point["num_samples"]) == (2, 1)
    assert spread["posterior_scale"] > 0
    assert spread["mutual_information"] > 0
    assert point["posterior_scale"] == point["mutual_information"] == 0
    assert spread["kl"] > 0
    assert point["kl"] is None
    # Validation images were held out of one run, and followed.
    assert all(line["val_clean_accuracy"] is None for line in metrics(bbb[0]))
    last = metrics(map_)[-1]
    assert 0 <= last["val_certified_accuracy"] <= last["val_clean_accuracy"] <= 1
    assert last["step"] == 3 * -(-1337 // 128)


def test_certificates_and_gallery_agree_with_the_results(bbb: tuple[Path, str]) -> None:
    results, rows, gallery = read(bbb[0]), arrays(bbb[0]), arrays(bbb[0], "gallery.npz")
    test = data.load("digits").test
    assert all(len(values) == 360 for values in rows.values())
    np.testing.assert_array_equal(rows["label"], test.y)
    np.testing.assert_array_equal(rows["clean_correct"], rows["predicted"] == test.y)
    np.testing.assert_array_equal(rows["certified"], rows["robust"] & rows["clean_correct"])
    np.testing.assert_array_equal(rows["robust"], rows["margin"] > 0)
    assert (rows["certified"] <= rows["attacked_correct"]).all()
    assert (rows["attacked_correct"] <= rows["clean_correct"]).all()
    for rate, column in (
        ("clean", "clean_correct"),
        ("attacked", "attacked_correct"),
        ("certified", "certified"),
    ):
        assert results[f"{rate}_accuracy"] == rows[column].mean()
    np.testing.assert_allclose(rows["probs"].sum(1), 1, rtol=1e-5)
    chosen = rows["probs"].max(1)
    assert (rows["probability_lower"] <= chosen + 1e-5).all()
    assert (chosen <= rows["probability_upper"] + 1e-5).all()
    index = gallery["index"]
    np.testing.assert_array_equal(gallery["image"], test.x[index])
    assert (np.abs(gallery["attacked"] - gallery["image"]) <= results["eps"] + 1e-6).all()
    curve = results["curve"]
    assert curve["eps"] == [0.0, 2 * results["eps"]]
    assert curve["clean"][0] == rows["clean_correct"][:50].mean()


KILLED = """
import os, signal, sys
from experiments.pipeline import checkpoint, evaluation, training
from experiments import run

training.CHECKPOINT_SECONDS = -1.0  # after each epoch


def die_at(count, real):
    calls = []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return function


{patch}
run.main(sys.argv[1:])
"""
IN_TRAINING = "checkpoint.save = die_at(2, checkpoint.save)"  # epoch 2 is logged, not yet saved
IN_EVALUATION = "evaluation._attacker = die_at(1, evaluation._attacker)"


def killed(patch: str, *arguments: str) -> None:
    """Runs the command line in a process of its own that gets a SIGKILL on the way."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", KILLED.format(patch=patch), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_a_run_killed_twice_ends_with_the_numbers_of_an_undisturbed_one(
    bbb: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ["digits", *TINY, "--out", str(folder)]
    killed(IN_TRAINING, *arguments)
    assert len(metrics(folder)) == 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "step": 3')  # and the line that was being written
    before = contents(folder)

    # Without --resume it is a folder that holds another run.
    status, _, errors = digits(folder)
    assert status == 1
    assert "is not empty" in errors
    assert "--resume" in errors
    assert contents(folder) == before

    killed(IN_EVALUATION, *arguments, "--resume")
    assert len(metrics(folder)) == 3
    assert not (folder / "results.json").exists()

    status, printed, errors = digits(folder, "--resume")
    assert status == 0, errors
    assert "train: 100%" in errors
    assert_same_run(folder, bbb[0])
    assert str(folder / "report.html") in printed
    assert {path.name for path in folder.iterdir()} == FILES


def test_resuming_a_finished_run_writes_the_same_again(map_: Path) -> None:
    before, log = contents(map_), metrics(map_)
    (map_ / "report.html").unlink()
    status, _, errors = digits(map_, "--inference", "map", "--train.validation", "100", "--resume")
    assert status == 0, errors
    after = contents(map_)
    assert after.keys() == before.keys()
    timed = {"results.json", "report.html"}  # these tell how long the evaluation took
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= timed
    assert timeless(json.loads(before["results.json"])) == timeless(read(map_))
    assert metrics(map_) == log


def test_another_seed_gives_other_numbers(map_: Path, tmp_path: Path) -> None:
    options = ("--inference", "map", "--train.validation", "100", "--seed", "1")
    status, _, errors = digits(tmp_path / "run", *options)
    assert status == 0, errors
    assert read(tmp_path / "run")["seed"] == 1
    assert read(tmp_path / "run")["nll"] != read(map_)["nll"]
    assert metrics(tmp_path / "run") != metrics(map_)
    # The images, held out or not, are the same: a seed varies the run, not the task.
    np.testing.assert_array_equal(arrays(tmp_path / "run")["label"], arrays(map_)["label"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train.eps", "0.07"], "train.eps: 0.06 -> 0.07"),
        (["--seed", "5"], "seed: 0 -> 5"),
        (["--inference", "map"], "inference: bbb -> map"),
        (["--eval.num-samples", "4"], "eval.num_samples: 2 -> 4"),
        (["--train.learning-rate-drops", "0.5"], "train.learning_rate_drops: [0.75, 0.9] -> [0.5]"),
    ],
)
def test_resume_with_other_settings_names_them(
    bbb: tuple[Path, str], options: list[str], says: str
) -> None:
    before = contents(bbb[0])
    status, printed, errors = digits(bbb[0], "--resume", *options)
    assert (status, printed) == (1, "")
    assert says in errors
    assert contents(bbb[0]) == before


def test_a_moved_run_may_be_resumed(bbb: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bbb[0] / "config.json").read_bytes())
    with open_folder(parse(["digits", *TINY, "--resume", "--out", str(tmp_path)])) as folder:
        assert folder == tmp_path


def test_nothing_to_resume(tmp_path: Path) -> None:
    status, _, errors = digits(tmp_path / "absent", "--resume")
    assert status == 1
    assert "no run to resume" in errors
    assert not (tmp_path / "absent").exists()


def test_a_run_begins_at_the_means_of_another(
    bbb: tuple[Path, str], map_: Path, tmp_path: Path
) -> None:
    """At a step of nearly 0 it stays there; a quantile likelihood trains it on."""
    options = ("--train.epochs", "1", "--train.learning-rate", "1e-12")
    status, _, errors = digits(
        tmp_path / "on", "--start", str(bbb[0]), "--train.likelihood", "quantile", *options
    )
    assert status == 0, errors
    here, there = (load_posterior(f / "posterior.npz") for f in (tmp_path / "on", bbb[0]))
    for a, b in zip(jax.tree.leaves(here.loc), jax.tree.leaves(there.loc), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    status, _, errors = digits(tmp_path / "mode", "--start", str(map_), *options)
    assert status == 0, errors
    status, _, errors = digits(tmp_path / "x", "--start", str(tmp_path / "none"), *options)
    assert status != 0 and "there is no" in errors and not (tmp_path / "x").exists()
    status, _, errors = digits(tmp_path / "y", "--start", str(bbb[0]), "--model", "cnn", *options)
    assert status != 0 and "of other layers" in errors and not (tmp_path / "y").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, resume: list[str]) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    status, _, errors = digits(tmp_path, *resume)
    assert status == 1
    assert str(tmp_path) in errors
    assert contents(tmp_path) == {"thesis.txt": b"all of it"}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    status, _, errors = digits(tmp_path / "run")
    assert status == 1
    assert "is a file; choose another --out" in errors
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digit"], "did you mean 'digits'?"),
        (["digits", "--dataset", "cifar"], "did you mean 'cifar10'?"),
        (["digits", "--inference", "bb"], "did you mean 'bbb'?"),
        (["digits", "--eval.eps", "-0.1"], "--eval.eps must be a radius in [0, 1]"),
        (["digits", "--eval.eps", "nan"], "got nan"),
        (["digits", "--train.eps", "nan"], "got nan"),
    ],
)
def test_a_mistake_on_the_command_line_makes_no_folder(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert says in output.err + output.out
    assert not (tmp_path / "run").exists()


def test_an_absent_data_folder_says_how_to_prepare_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "nowhere"
    out = ["--out", str(tmp_path / "run")]
    assert main(["mnist-cnn", "--data-dir", str(folder), *out]) == 1
    errors = capsys.readouterr().err
    assert "download_and_prepare()" in errors
    assert 'pip install "bnncert[prepare]"' in errors
    assert str(folder) in errors
    assert list(tmp_path.iterdir()) == []


def _integer_images(split: data.Split) -> data.Split:
    return split._replace(x=np.asarray(split.x * 16, np.uint8))


def _a_label_too_high(split: data.Split) -> data.Split:
    return split._replace(y=np.where(np.arange(len(split.y)) == 3, 10, split.y))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_integer_images, "images have dtype uint8; radii are in units of pixels in [0, 1]"),
        (_a_label_too_high, "labels lie in 0 .. 10; 10 classes need 0 .. 9"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(
    damage: Callable[[data.Split], data.Split],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, test, names = data._digits()
    monkeypatch.setattr(data, "_digits", lambda: (damage(train), test, names))
    status, _, errors = digits(tmp_path / "run")
    assert status == 1
    assert says in errors
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    status, printed, errors = digits(
        tmp_path / "run", "--inference", "map", "--train.learning-rate", "1e30"
    )
    assert status == 1
    assert "at step" in errors
    assert "--train.learning-rate" in errors
    assert "report" not in printed
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_violated_order_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that calls everything robust must not end in a report."""

    def untrained(method: Any, settings: Any, problem: Problem, *_: Any) -> Trained:
        params = problem.model.init(jax.random.key(0))
        return Trained(Samples(jax.tree.map(lambda leaf: leaf[None], params)), 0.0, 0.0, {})

    honest = certify.decision

    def liar(*args: Any, **kwargs: Any) -> certify.Decision:
        found = honest(*args, **kwargs)
        return dataclasses.replace(found, robust=found.predicted >= 0)

    monkeypatch.setattr(images, "train", untrained)
    monkeypatch.setattr(certify, "decision", liar)
    status, _, errors = digits(tmp_path / "run", "--eval.eps", "0.5")
    assert status == 1
    assert "is certified, but the attack changed its class" in errors
    assert not (tmp_path / "run" / "results.json").exists()
