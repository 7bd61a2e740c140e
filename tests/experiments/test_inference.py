"""Every inference method a run can name: it trains, it is deployed, and it is what it says."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import posterior
from bnncert.infer import swag
from bnncert.types import Batch
from experiments.pipeline import checkpoint, inference, training
from experiments.pipeline.deployment import deploy
from experiments.pipeline.inference import Problem, refine
from experiments.pipeline.training import Trained
from experiments.setup.config import RunConfig
from experiments.setup.data import Split
from experiments.setup.methods import METHODS, Refining
from experiments.setup.models import Model
from experiments.setup.presets import preset
from experiments.tasks import images as task

NUM, CLASSES = 20, 3
NONE_HELD = Split(np.zeros((0, 2, 2, 1), np.float32), np.zeros(0, np.int32))


def apply(params: Any, x: Any) -> jax.Array:
    hidden = jax.nn.relu(params["Dense_0"] @ x.reshape(-1))
    return params["Dense_1"] @ hidden


def init(key: Any) -> Any:
    first, second = jax.random.split(key)
    return {
        "Dense_0": jax.random.normal(first, (3, 4)),
        "Dense_1": jax.random.normal(second, (CLASSES, 3)),
    }


MODEL = Model(apply, init)


def images() -> Split:
    draw = np.random.default_rng(0)
    x = draw.uniform(size=(NUM, 2, 2, 1)).astype(np.float32)
    return Split(x, draw.integers(CLASSES, size=NUM).astype(np.int32))


def problem(config: RunConfig, model: Model = MODEL) -> Problem:
    return task.problem(config, model, images(), NONE_HELD)


def train(config: RunConfig, folder: Path) -> Trained:
    learned = problem(config)
    return training.train(config.inference, config.train, learned, config.seed, folder)


SMALL = {"members": 3, "collect": 4, "rank": 2}
CHAINS = {"images": 20, "warmup": 30, "samples": 4, "depth": 2}


def settings(name: str, method: Any = None, **train: Any) -> RunConfig:
    base = preset("digits", name)
    own = {field.name for field in dataclasses.fields(METHODS[name])}  # pyright: ignore[reportArgumentType]
    asked = {**SMALL, **CHAINS, **(method or {})}
    changed = dataclasses.replace(
        base.inference,  # pyright: ignore[reportArgumentType]
        **{field: asked[field] for field in asked.keys() & own},
    )
    few = dataclasses.replace(base.train, epochs=4, batch_size=8, **train)
    return dataclasses.replace(base, inference=changed, train=few)


KINDS = {
    "map": (posterior.Samples, 1),
    "ensemble": (posterior.Samples, 3),
    "swag": (posterior.LowRank, 16),
    "laplace": (posterior.Gaussian, 16),
    "sgld": (posterior.Samples, 3),
    "sghmc": (posterior.Samples, 3),
    "hmc": (posterior.Samples, 8),
    "nuts": (posterior.Samples, 8),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_and_is_deployed(name: str, tmp_path: Path) -> None:
    config = settings(name)
    trained = train(config, tmp_path)
    found, report = refine(
        config.inference, config.train, problem(config), trained.posterior, config.seed
    )
    kind, number = KINDS.get(name, (posterior.MeanField, 16))
    assert isinstance(found, kind)
    samples = deploy(found, config.eval.num_samples, config.seed)
    assert jax.tree.map(jnp.shape, samples) == {
        "Dense_0": (number, 3, 4),
        "Dense_1": (number, CLASSES, 3),
    }
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(samples))
    fixed = name == "laplace"  # its first layer is one, all others differ from member to member
    if number > 1:
        assert bool((samples["Dense_0"][0] == samples["Dense_0"][-1]).all()) == fixed
        assert bool((samples["Dense_1"][0] != samples["Dense_1"][1]).any())
    assert bool(report) == (name in ("laplace", "hmc", "nuts"))
    assert all(np.isfinite(value) for value in report.values())


ONE_STAGE = [name for name, kind in METHODS.items() if not issubclass(kind, Refining)]


@pytest.mark.parametrize("name", ONE_STAGE)
def test_each_method_goes_on_from_a_checkpoint_as_if_never_stopped(
    name: str, tmp_path: Path
) -> None:
    config = settings(name, {"collect_from": 0.25})
    params, (x, y) = {"Dense_0": jnp.ones((CLASSES, 4)) / 4}, map(jnp.asarray, images())
    model = Model(lambda params, x: params["Dense_0"] @ x.reshape(-1), lambda key: params)
    algorithm = inference.build_algorithm(
        config.inference, config.train, problem(config, model), params, 3
    )
    update = jax.jit(algorithm.update)
    batch, threat = Batch(x, y, jnp.ones(NUM)), inference.Threat(jnp.float32(0.1), jnp.float32(0.5))
    start = state = algorithm.init(jax.random.key(1), params)
    for step in range(8):
        if step == 5:
            checkpoint.save(tmp_path, step, state)
        state, _ = update(jax.random.key(step), state, batch, threat)
    restored = checkpoint.restore(tmp_path, start)
    for step in range(5, 8):
        restored, _ = update(jax.random.key(step), restored, batch, threat)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), restored, state)
    assert all(jax.tree.leaves(equal))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, state)
    assert any(jax.tree.leaves(moved))


def test_swag_collects_from_the_stated_fraction_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    build = swag.build

    def spy(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return build(*args, **options)

    monkeypatch.setattr(swag, "build", spy)
    config = settings("swag", {"collect_from": 0.5})
    inference.build_algorithm(
        config.inference, config.train, problem(config), init(jax.random.key(0)), 3
    )
    assert (seen["start"], seen["every"], seen["rank"]) == (6, 1, 2)


@pytest.mark.parametrize("name", ["bbb", "ivon", "sgld"])
def test_the_last_layer_alone_may_be_random(name: str, tmp_path: Path) -> None:
    config = settings(name, random_layers="last")
    trained = train(config, tmp_path)
    samples = deploy(trained.posterior, config.eval.num_samples, config.seed)
    moved = (samples["Dense_0"] != init(jax.random.fold_in(jax.random.key(0), 0))["Dense_0"]).any()
    assert bool(moved)  # trained, by the likelihood
    assert bool((samples["Dense_1"][0] != samples["Dense_1"][1]).any())
    if name != "sgld":  # its samples are states, each with the body of its time
        assert bool((samples["Dense_0"][0] == samples["Dense_0"][1]).all())


def test_the_error_model_is_the_one_asked_for() -> None:
    """At the same weights: the certified worst case is below an attacked one, that below clean."""
    params, (x, y) = init(jax.random.key(1)), images()
    threat = inference.Threat(jnp.float32(0.2), jnp.float32(0.0), jnp.float32(0.0))

    def value(name: str) -> float:
        model = task.error_model(settings("bbb", likelihood=name).train, apply)
        return float(model(jax.random.key(2), params, jnp.asarray(x[0]), jnp.asarray(y[0]), threat))

    order = [value(name) for name in ("certified", "attacked", "clean")]
    assert order[0] < order[1] < order[2]
