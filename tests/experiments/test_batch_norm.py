"""Batch-norm: statistics of the clean batch in training, frozen in what is certified and kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.posterior import Samples
from experiments.pipeline import posteriors
from experiments.pipeline.inference import Problem, build_algorithm
from experiments.setup import models
from experiments.setup.data import Dataset, Split
from experiments.setup.models import SmallCNN, freeze, of_module
from experiments.setup.presets import preset
from experiments.setup.settings import EvalConfig
from experiments.tasks import images as task

CLASSES, NUM = 3, 24
NETWORK = SmallCNN(CLASSES, (0.5,), (0.25,), channels=(2,), hidden=3, normalised=True)
MODEL = of_module(NETWORK, (4, 4, 1))


def images(seed: int, num: int = NUM) -> Split:
    """Bright in another row for each class, so that there is something to certify."""
    draw = np.random.default_rng(seed)
    y = draw.integers(CLASSES, size=num).astype(np.int32)
    x = draw.uniform(0, 0.3, size=(num, 4, 4, 1)).astype(np.float32)
    x[np.arange(num), y] += 0.6
    return Split(x, y)


DATASET = Dataset("fake", images(0), images(1, 10), ("a", "b", "c"), (0.5,), (0.25,))


def statistics(params: Any, x: Any) -> dict[str, np.ndarray]:
    """By hand, in float64: what each batch-norm sees over the images, layer after layer."""
    found, x = {}, (np.asarray(x, np.float64) - 0.5) / 0.25
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # SAME, for a kernel of 4 and a stride of 2
    cut = [[wide[:, i : i + 4, j : j + 4] for j in (0, 2)] for i in (0, 2)]
    x = np.einsum("ijnklc,klcf->nijf", np.array(cut), p["Conv_0"]["kernel"]) + p["Conv_0"]["bias"]
    for layer, dense in (("BatchNorm_0", "Dense_0"), ("BatchNorm_1", None)):
        axes = tuple(range(x.ndim - 1))
        mean, deviation = x.mean(axes), np.sqrt(x.var(axes) + models.EPSILON)
        found |= {f"{layer}/mean": mean, f"{layer}/deviation": deviation}
        x = (x - mean) / deviation * p[layer]["scale"] + p[layer]["bias"]
        if dense:
            flat = np.maximum(x, 0).reshape(len(x), -1)
            x = flat @ p[dense]["kernel"] + p[dense]["bias"]
    return found


def assert_frozen_on(params: Any, x: Any) -> None:
    for name, value in statistics(params, x).items():
        layer, leaf = name.split("/")
        np.testing.assert_allclose(params[layer][leaf], value, rtol=1e-4, atol=1e-5)


def test_prepare_fills_in_the_statistics_of_its_images() -> None:
    assert MODEL.prepare is not None
    params = MODEL.init(jax.random.key(0))
    affine = jax.random.uniform(jax.random.key(1), (2,), minval=0.5)
    params["BatchNorm_0"] |= {"scale": affine, "bias": affine - 1}
    first, second = (MODEL.prepare(params, jnp.asarray(images(seed).x)) for seed in (0, 1))
    assert_frozen_on(first, images(0).x)
    assert_frozen_on(second, images(1).x)
    with pytest.raises(AssertionError):
        assert_frozen_on(first, images(1).x)
    # and changes nothing else
    for layer, leaves in params.items():
        for name in leaves.keys() - {"mean", "deviation"}:
            assert (first[layer][name] == leaves[name]).all()


def test_a_model_without_batch_norm_has_nothing_to_freeze() -> None:
    plain = of_module(SmallCNN(CLASSES, (0.5,), (0.25,), channels=(2,), hidden=3), (4, 4, 1))
    assert plain.prepare is None
    samples = {"w": jnp.ones(2)}
    assert freeze(plain, samples, images(0).x) is samples


@pytest.mark.parametrize(("inference", "last"), [("bbb", False), ("ivon", True)])
def test_batch_norm_has_no_prior(inference: str, last: bool) -> None:
    config = preset("digits", inference)
    layers = "last" if last else "all"
    changed = dataclasses.replace(config.train, random_layers=layers)
    params = MODEL.init(jax.random.key(0))
    problem = Problem(MODEL, images(0), task.error_model(changed, MODEL.apply))
    algorithm = build_algorithm(config.inference, changed, problem, params, 3)
    posterior: Any = algorithm.posterior(algorithm.init(jax.random.key(1), params))
    scale = posterior.scale
    random = {layer for layer, leaves in scale.items() if leaves["bias"] is not None}
    assert random == ({"Dense_1"} if last else {"Conv_0", "Dense_0", "Dense_1"})
    assert all(scale[f"BatchNorm_{i}"][name] is None for i in (0, 1) for name in ("mean", "scale"))


def test_a_run_trains_certifies_and_keeps_frozen_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task.subject, "read", lambda *_: DATASET)
    monkeypatch.setattr(task.subject, "build", lambda *_: MODEL)
    base = preset("digits", "bbb")
    config = dataclasses.replace(
        base,
        out=tmp_path / "run",
        train=dataclasses.replace(
            base.train, epochs=30, batch_size=12, learning_rate=0.02, eps=0.05, validation=6
        ),
        eval=EvalConfig(
            eps=0.02, num_samples=3, attack_steps=2, curve_points=2, certify_method="ibp"
        ),
    )
    folder = task.run(config)
    results = json.loads((folder / "results.json").read_text())
    accuracies = [results[f"{name}_accuracy"] for name in ("certified", "attacked", "clean")]
    assert 0.5 < accuracies[0] <= accuracies[1] <= accuracies[2]

    kept = posteriors.load(folder / "posterior.npz")
    assert isinstance(kept, Samples) and kept.num_samples == 3
    train_set, _ = task.validation_split(DATASET.train, 6, task.SPLIT_SEED)
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], kept.params) for i in range(3)]
    for member in members:
        assert_frozen_on(member, train_set.x)
    assert (members[0]["BatchNorm_1"]["mean"] != members[1]["BatchNorm_1"]["mean"]).any()
    assert (members[0]["BatchNorm_0"]["scale"] != 1).any()  # trained
    # the file is the predictor: no training data, and no code that trained it
    each = jax.vmap(lambda p: jax.vmap(lambda x: jax.nn.softmax(MODEL.apply(p, x)))(DATASET.test.x))
    with np.load(folder / "certificates.npz") as certificates:
        np.testing.assert_allclose(each(kept.params).mean(0), certificates["probs"], rtol=1e-4)
