"""A task of somebody's own: two classes of points in the plane, from a command line to results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from bnncert import certify, likelihood
from bnncert.sets import ball
from experiments.pipeline import training
from experiments.pipeline.deployment import deploy
from experiments.pipeline.folder import open_folder
from experiments.pipeline.inference import Problem, refine
from experiments.pipeline.training import train
from experiments.pipeline.writing import write_json
from experiments.setup import command
from experiments.setup.data import Split
from experiments.setup.methods import BBB, METHODS, Inference, name_of
from experiments.setup.models import Model
from experiments.setup.requirements import Positive, Seed
from experiments.setup.settings import TrainConfig


@dataclass(frozen=True)
class Settings:
    """Tell the points on the right from those on the left, certifiably."""

    preset: tyro.conf.Suppress[str] = "points"
    inference: Inference = field(default_factory=BBB)
    seed: Seed = 0
    """Of all that is random."""
    out: Path | None = None
    """Output folder."""
    resume: bool = False
    """Go on."""
    radius: Positive = 0.1
    """Of the certificates."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=40, eps=0.1, lam=0.5))


def parse(arguments: Sequence[str]) -> Settings:
    named, options = command.inference(arguments, tuple(METHODS))
    default = Settings(inference=METHODS[named]() if named else BBB())
    return command.read(Settings, "python -m points", options, default=default)


def points(seed: int, num: int) -> Split:
    x = np.random.default_rng(seed).uniform(-1, 1, (num, 2)).astype(np.float32)
    return Split(x, (x[:, 0] > 0).astype(np.int32))


def init(key: Any) -> Any:
    first, second = jax.random.split(key)
    return {
        "Dense_0": {"kernel": jax.random.normal(first, (8, 2)), "bias": jnp.zeros(8)},
        "Dense_1": {"kernel": 0.3 * jax.random.normal(second, (2, 8)), "bias": jnp.zeros(2)},
    }


def apply(params: Any, x: Any) -> jax.Array:
    hidden = jax.nn.relu(params["Dense_0"]["kernel"] @ x + params["Dense_0"]["bias"])
    return params["Dense_1"]["kernel"] @ hidden + params["Dense_1"]["bias"]


def run(settings: Settings) -> dict[str, Any]:
    with open_folder(settings) as folder:
        return learned(settings, folder)


def learned(settings: Settings, folder: Path) -> dict[str, Any]:
    problem = Problem(Model(apply, init, dense=True), points(0, 64), LIKELIHOOD)
    method, test = settings.inference, points(1, 50)
    trained = train(method, settings.train, problem, settings.seed, folder)
    posterior, _ = refine(method, settings.train, problem, trained.posterior, settings.seed)
    samples = deploy(posterior, 4, settings.seed)

    @jax.jit
    @jax.vmap
    def decide(x: Any) -> certify.Decision:
        return certify.decision(apply, samples, ball(x, settings.radius), x=x, method="ibp")

    found = decide(test.x)
    correct = np.asarray(found.predicted) == test.y
    robust = correct & np.asarray(found.robust)
    results = {
        "inference": name_of(method),
        "clean_accuracy": float(correct.mean()),
        "certified_accuracy": float(robust.mean()),
    }
    write_json(folder / "results.json", results)
    return results


LIKELIHOOD = likelihood.robust_categorical(apply)


@pytest.mark.parametrize("options", [[], ["--inference", "laplace"]])
def test_it_learns_and_is_certified(options: list[str], tmp_path: Path) -> None:
    learned = ["--train.learning-rate", "0.03", "--train.batch-size", "16"]
    found = run(parse([*options, *learned, "--out", str(tmp_path / "run")]))
    assert found["clean_accuracy"] > 0.9
    assert 0.6 < found["certified_accuracy"] < found["clean_accuracy"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--train.epochs", "5", "--out"]
    whole = run(parse([*arguments, str(tmp_path / "whole")]))
    stopped = [*arguments, str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(training, "_mean", fail_at(4, training._mean))
        with pytest.raises(KeyboardInterrupt):
            run(parse(stopped))
    with pytest.raises(FileExistsError, match="--resume"):
        run(parse(stopped))
    with pytest.raises(ValueError, match=r"radius: 0.1 -> 0.2"):
        run(parse([*stopped, "--resume", "--radius", "0.2"]))
    assert run(parse([*stopped, "--resume"])) == whole
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    first, second = ([json.loads(line)["loss"] for line in log.splitlines()] for log in logs)
    assert first == second and len(first) == 5


def fail_at(count: int, real: Any) -> Any:
    """`real`, that is stopped at a call."""
    calls = iter(range(1, 10**6))

    def function(*args: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return real(*args)

    return function


def test_mistakes_are_those_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for options, says in (
        (["--radius", "0"], "--radius must be a finite number > 0, got 0.0"),
        (["--inference", "ensemble", "--inference.members", "0"], "--inference.members must be"),
        (["--inference", "bb"], "did you mean 'bbb'?"),
    ):
        with pytest.raises(SystemExit) as exit:
            parse(options)
        assert exit.value.code == 2
        assert says in capsys.readouterr().err
