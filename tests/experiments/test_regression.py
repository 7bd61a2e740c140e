import contextlib
import dataclasses
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from bnncert import certify
from bnncert.sets import Box
from experiments.pipeline import training
from experiments.pipeline.evaluation import SoundnessError
from experiments.regression import main
from experiments.report import __main__ as report
from experiments.setup.config import from_dict
from experiments.setup.data import Split
from experiments.setup.methods import BBB, name_of
from experiments.setup.schedule import threat_schedule
from experiments.tasks.regression import data, evaluation, network, run, settings
from tests.experiments.test_report import Markup

TINY = (
    "--epochs 4 --hidden 4 --num-samples 3 --attack-steps 3 --curve-points 1 "
    "--evaluate validation --certify-method ibp"
).split()
FILES = {
    "config.json",
    "results.json",
    "figure.png",
    "report.html",
    "robust",
    "plain",
    *(
        f"{kind}-{name}.npz"
        for kind in ("posterior", "predictions")
        for name in ("robust", "plain")
    ),
}


def call(*arguments: str) -> tuple[int, str, str]:
    """The exit status of the command, what it printed, and its errors."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, printed.getvalue(), errors.getvalue()


OWN = {"sine": ["--inference.members", "2"], "diabetes": []}


def tiny(out: Path, problem: str, *options: str) -> dict[str, Any]:
    """The results of a tiny run that has to succeed."""
    status, _, errors = call(problem, *TINY, *OWN[problem], *options, "--out", str(out))
    assert status == 0, errors
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "new" / "diabetes"
    tiny(folder, "diabetes")
    return folder


@pytest.fixture(scope="module")
def sine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sine"
    tiny(folder, "sine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for child in value.values() for number in numbers(child)]
    if isinstance(value, list):
        return [number for child in value for number in numbers(child)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("problem", ["diabetes", "sine"])
def test_a_run_leaves_its_folder_and_ordered_numbers(
    problem: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(problem)
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == [problem]
    results = json.loads((folder / "results.json").read_text())
    assert np.isfinite(numbers(results)).all()
    for name in ("robust", "plain"):
        found = results[name]
        assert 0 < found["clean_rmse"] < found["attacked_rmse"] < found["certified_rmse"]
        assert 0 < found["attacked_half_width"] < found["certified_half_width"]
        assert found["covered_everywhere"] <= found["coverage"]
        assert found["coverage"] <= found["certified_interval_coverage"]
        assert found["interval_half_width"] < found["certified_interval_half_width"]
        curve = found["curve"]
        assert curve["eps"] == [0, results["eps"], 2 * results["eps"]]
        assert curve["certified_rmse"][1] == found["certified_rmse"]
        assert np.diff(curve["certified_rmse"]).min() > 0
        at_zero = [curve[f"{kind}_rmse"][0] for kind in ("attacked", "certified")]
        np.testing.assert_allclose(at_zero, found["clean_rmse"], rtol=1e-4)
        assert (found["expectation"] is None) == (results["inference"] == "ensemble")
        with np.load(folder / f"predictions-{name}.npz") as rows:
            errors = np.abs(rows["mean"] - rows["y"])
            np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), found["clean_rmse"])
    assert results["robust"] != results["plain"]
    for name in ("robust", "plain"):
        text = (folder / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["eps"] == 0 and lines[-1]["lam"] == 1
    known = from_dict(json.loads((folder / "config.json").read_text()), settings.Settings)
    assert known == settings.parse([problem, *TINY, *OWN[problem], "--out", str(folder)])


@pytest.mark.parametrize("problem", ["diabetes", "sine"])
def test_its_page_tells_its_numbers_and_what_could_mislead(
    problem: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(problem)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page, results = Markup(html), json.loads((folder / "results.json").read_text())
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)", html)
    assert "nan" not in page.text.split() and str(folder.parent) not in html
    for name in ("clean", "attacked", "certified"):
        rmse = results["robust"][f"{name}_rmse"] * results["target_sd"]
        assert f"{rmse:.3g}" in page.text[: page.text.index("Read with care")]
    assert "These are validation data" in page.text and "data are few." in page.text
    assert ("−log prior" in page.text) == (problem == "sine")  # whose networks have no KL
    assert ("Reach of E f of" in page.text) == (problem == "diabetes")
    assert (
        html.count("<figure") == html.count("<figcaption>") == (3 if problem == "diabetes" else 4)
    )
    assert f"python -m experiments.regression {problem} --inference" in page.text
    told = page.text[page.text.index("python -m experiments.regression") :]
    words = shlex.split(told[: told.index("Training took")])[3:]
    recorded = from_dict(json.loads((folder / "config.json").read_text()), settings.Settings)
    assert settings.parse(words) == dataclasses.replace(recorded, out=None)


def test_the_report_command_sends_a_regression_to_its_own(
    sine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(sine)]) == 1
    assert "python -m experiments.regression ... --resume" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_refused(sine: Path) -> None:
    before = contents(sine)
    status, _, errors = call("sine", *TINY, "--out", str(sine))
    assert status == 1
    assert f"{sine} is not empty" in errors and "Choose another --out" in errors
    assert contents(sine) == before
    status, _, errors = call("sine", *TINY, "--out", str(sine / "results.json"))
    assert status == 1 and "is a file" in errors


def test_a_seed_decides_the_numbers(sine: Path, tmp_path: Path) -> None:
    first = json.loads((sine / "results.json").read_text())["robust"]
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    only = ("--training", "robust")
    again = tiny(tmp_path / "again", "sine", *only)
    other = tiny(tmp_path / "other", "sine", *only, "--seed", "1")
    names = ("clean_rmse", "attacked_rmse", "certified_rmse", "log_likelihood")
    assert all(again["robust"][name] == first[name] for name in names)
    assert all(other["robust"][name] != first[name] for name in names)
    assert "plain" not in again
    assert (tmp_path / "again" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", settings.METHODS)
def test_each_method_learns(name: str, tmp_path: Path) -> None:
    """Trained plainly, each fits the sine much better than the best straight line does."""
    problem = data.load("sine")
    few = ["--inference.members", "2"] if name == "ensemble" else []
    asked = settings.parse(["sine", "--inference", name, "--epochs", "400", *few])
    model = network.build((16,), 1)
    fitted = run.learn(asked, model, problem.train, "plain", tmp_path / "plain")
    samples = fitted.posterior.sample(jax.random.key(0), 1 if name == "map" else 2)
    outputs = jax.vmap(lambda w: jax.vmap(lambda x: model.apply(w, x)[0])(problem.test.x))(samples)
    error = np.sqrt(np.mean((np.asarray(outputs).mean(0) - problem.test.y) ** 2))
    x, y = problem.test.x[:, 0], problem.test.y
    line = np.sqrt(np.mean((np.polyval(np.polyfit(x, y, 1), x) - y) ** 2))
    assert error < 0.75 * line
    with (tmp_path / "plain/metrics.jsonl").open() as lines:
        assert fitted.last["loss"] < json.loads(next(lines))["loss"]


def test_the_threat_of_robust_and_plain_training() -> None:
    asked = settings.parse(["diabetes", "--epochs", "10", "--lam", "0.25", "--train-eps", "0.2"])
    last = {}
    for name in settings.TRAININGS:
        at = threat_schedule(settings.train_config(asked, name), 5)
        assert [float(value) for value in at(0)] == [0, 1]
        last[name] = [round(float(value), 6) for value in at(49)]
    assert last == {"robust": [0.2, 0.25], "plain": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sin"], "unknown problem 'sin': did you mean 'sine'?"),
        (["--seed", "1"], "the problem comes first, got '--seed'"),
        (["sine", "--eps", "-0.1"], "--eps must be a radius"),
        (["sine", "--train-eps", "inf"], "--train-eps must be a radius"),
        (["sine", "--eps", "nan"], "got nan"),
        (["sine", "--eps", "1e30"], "a radius in [0, 100]"),
        (["sine", "--lam", "1.5"], "--lam must be a number in [0, 1], got 1.5"),
        (["sine", "--noise-scale", "0"], "--noise-scale must be a finite number > 0, got 0.0"),
        (["sine", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["sine", "--hidden", "8", "0"], "--hidden must be widths of at least 1"),
        (["diabetes", "--inference", "hmc"], "unknown inference method 'hmc'"),
        (["diabetes", "--training", "robst"], "did you mean 'robust'?"),
        (["diabetes", "--kl-weight", "0"], "use --inference map"),
        (["diabetes", "--epochs", "many"], "many"),
        (["diabetes", "--speed", "1"], "--speed"),
    ],
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    status, printed, errors = call(*arguments)
    assert status == 2
    assert said in errors and not printed


def test_help() -> None:
    status, printed, _ = call("--help")
    assert status == 0
    assert "standard deviations of each feature" in printed
    assert all(name in printed for name in (*settings.PRESETS, *settings.METHODS))
    assert call()[0] == 2
    status, printed, _ = call("sine", "--help")
    assert status == 0 and "--noise-scale" in printed and "--inference.members" in printed


def test_defaults_that_depend_on_the_method_give_way_to_options() -> None:
    assert settings.parse(["sine"]).kl_weight == 1.0
    assert settings.parse(["sine", "--inference", "bbb"]).kl_weight == 0.1
    assert settings.parse(["sine", "--inference=bbb", "--kl-weight", "0.5"]).kl_weight == 0.5
    assert settings.parse(["diabetes", "--inference", "ivon"]).learning_rate == 0.1
    own = settings.parse(["diabetes", "--inference.initial-scale", "0.3"])
    assert (name_of(own.inference), own.learning_rate) == ("bbb", 3e-3)
    assert own.inference == BBB(initial_scale=0.3)


def test_a_bound_that_is_cut_through_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = certify.mean_and_variance

    def too_narrow(*args: Any, **options: Any) -> certify.Moments:
        found = honest(*args, **options)
        center, radius = found.mean.center, 0.5 * found.mean.radius
        return found._replace(mean=Box(center - radius, center + radius))

    monkeypatch.setattr(certify, "mean_and_variance", too_narrow)
    status, _, errors = call("sine", *TINY, "--out", str(tmp_path / "run"))
    assert status == 1
    assert "lies outside what was certified" in errors
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    status, _, errors = call("sine", *TINY, "--learning-rate", "1e30", "--out", out)
    assert status == 1
    assert "became NaN or infinite at step" in errors and "Lower --learning-rate" in errors
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    sine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first training, and in the second one: the same numbers to the bit."""
    arguments = ["sine", *TINY, *OWN["sine"], "--out", str(tmp_path / "run")]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for module, name in ((run, "save_posterior"), (training, "_check_finite")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            resume = ["--resume"] if (tmp_path / "run").exists() else []
            status, _, errors = call(*arguments, *resume)
        assert status == 130
        assert "stopped; add --resume to the same command" in errors
    status, _, errors = call(*arguments, "--epochs", "5", "--resume")
    assert status == 1 and "epochs: 4 -> 5" in errors
    status, _, errors = call(*arguments, "--resume")
    assert status == 0, errors
    first, found = contents(sine), contents(tmp_path / "run")
    for name in ("posterior-robust.npz", "predictions-plain.npz", "figure.png"):
        assert found[name] == first[name]
    assert {name for name in found if "checkpoints" not in name} == {
        name for name in first if "checkpoints" not in name
    }


def columns(**changed: Any) -> evaluation.Columns:
    """Of two networks, 1 and 3, at three data: the mean is 2, its variance 1."""
    known = {"mean": 2.0, "variance": 1.0, "lower": 1.5, "upper": 3.0, "least": 0.25, "most": 4.0}
    known |= {"attacked_low": 1.75, "attacked_high": 2.5}
    rows = {name: np.full(3, float(value)) for name, value in (known | changed).items()}
    return rows | {"outputs": np.array([[1.0] * 3, [3.0] * 3])}


def test_numbers_of_a_predictive_that_is_known() -> None:
    y = np.array([2.0, 0.0, 9.0], np.float32)
    found = evaluation.measure(columns(), Split(np.zeros((3, 1), np.float32), y), 1.0, 0.1)
    density = (norm.pdf(y, 1.0) + norm.pdf(y, 3.0)) / 2
    np.testing.assert_allclose(found["log_likelihood"], np.log(density).mean())
    for name, errors in (
        ("clean", np.array([0.0, 2.0, 7.0])),
        ("attacked", np.array([0.5, 2.5, 7.25])),
        ("certified", np.array([1.0, 3.0, 7.5])),
    ):
        np.testing.assert_allclose(found[f"{name}_rmse"], np.sqrt(np.mean(errors**2)))
    assert (found["attacked_half_width"], found["certified_half_width"]) == (0.375, 0.75)
    np.testing.assert_allclose(found["interval_half_width"], 2 * np.sqrt(2))
    # [1.5 - 2 sqrt 5, 3 + 2 sqrt 5] = [-2.97, 7.47]; within 2 sqrt 1.25 = 2.24 of both ends
    np.testing.assert_allclose(found["certified_interval_half_width"], 0.75 + 2 * np.sqrt(5))
    fractions = ("coverage", "certified_interval_coverage", "covered_everywhere")
    np.testing.assert_allclose([found[name] for name in fractions], [2 / 3, 2 / 3, 1 / 3])
    assert found["expectation"] is None


@pytest.mark.parametrize(
    "changed",
    [
        {"attacked_high": 3.25},
        {"attacked_low": 1.25},
        {"lower": np.nan},
        {"variance": 4.5},
        {"variance": 0.125},
    ],
)
def test_what_lies_outside_its_bounds_is_an_error(changed: dict[str, float]) -> None:
    evaluation.check_reach(columns(), 0.1)
    with pytest.raises(SoundnessError, match=r"datum 0.* eps 0.1 \(3 data so\)"):
        evaluation.check_reach(columns(**changed), 0.1)


def test_an_attacked_error_above_the_certified_one_is_an_error() -> None:
    evaluation.errors(columns(), np.zeros(3), 0.1)
    with pytest.raises(SoundnessError, match="has a larger error than was certified"):
        evaluation.errors(columns(upper=2.25), np.zeros(3), 0.1)


def test_extremes_are_the_corners_of_a_linear_function_and_stay_in_the_box() -> None:
    slope = jnp.array([1.0, -2.0, 0.5])
    box = Box(jnp.array([0.0, 1.0, -1.0]), jnp.array([1.0, 3.0, 0.0]))
    low, high = evaluation.extremes(lambda x: slope @ x, box, box.center[None], steps=4)
    np.testing.assert_array_equal(low, [0.0, 3.0, -1.0])
    np.testing.assert_array_equal(high, [1.0, 1.0, 0.0])
    # of a function with a maximum inside, the best point on the way, not the last one
    peak = box.center + jnp.array([0.1, 0.3, -0.2])
    bump = lambda x: -jnp.sum((x - peak) ** 2)  # noqa: E731
    high = evaluation.extremes(bump, box, box.center[None], steps=7)[1]
    assert bump(high) >= bump(box.center)
    assert bool(((high >= box.lower) & (high <= box.upper)).all())


def test_problems_are_standardised_by_their_training_data() -> None:
    for name in data.PROBLEMS:
        problem = data.load(name)
        np.testing.assert_allclose(problem.train.x.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(problem.train.x.std(0), 1, atol=1e-5)
        np.testing.assert_allclose(
            [problem.train.y.mean(), problem.train.y.std()], [0, 1], atol=1e-5
        )
        assert abs(problem.test.y.mean()) > 1e-3  # not by its own
        rows = np.concatenate([problem.train.x, problem.validation.x, problem.test.x])
        assert len(np.unique(rows, axis=0)) == len(rows)  # no datum is in two splits
        assert problem.train.x.shape[1] == len(problem.features)


def test_the_sine_has_a_gap() -> None:
    problem = data.load("sine")
    for table in (problem.train, problem.validation, problem.test):
        x = table.x[:, 0] * problem.feature_sd[0] + problem.feature_mean[0]
        y = table.y * problem.target_sd + problem.target_mean
        assert not np.any((x > data.GAP[0] + 1e-5) & (x < data.GAP[1] - 1e-5))
        assert data.ENDS[0] <= x.min() and x.max() <= data.ENDS[1]
        np.testing.assert_allclose(np.std(y - np.sin(x)), data.NOISE, rtol=0.2)
