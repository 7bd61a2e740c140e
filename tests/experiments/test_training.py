import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from bnncert import certify, likelihood
from bnncert.infer.map import MAPInfo
from bnncert.posterior import LowRank, MeanField, Samples
from bnncert.sets import ball
from bnncert.types import Algorithm, Batch, Threat
from experiments.pipeline import checkpoint, training
from experiments.pipeline.training import Trained, TrainingError, keep_epochs
from experiments.setup.config import RunConfig
from experiments.setup.data import Split, epoch_batches
from experiments.setup.methods import BBB, MAP, Inference
from experiments.setup.models import Model
from experiments.setup.presets import PRESETS
from experiments.setup.schedule import (
    kl_weight_schedule,
    learning_rate_schedule,
    power_schedule,
    threat_schedule,
)
from experiments.tasks import images as task

NUM, CLASSES = 10, 3
CLIP = 0.5
NONE_HELD = Split(np.zeros((0, 2, 2, 1), np.float32), np.zeros(0, np.int32))


def apply(params: Any, x: Any) -> jax.Array:
    return params["kernel"] @ jnp.ravel(x) + params["bias"]


def init(key: Any) -> Any:
    return {"kernel": 0.1 * jax.random.normal(key, (CLASSES, 4)), "bias": jnp.zeros(CLASSES)}


MODEL = Model(apply, init)


def images(num: int = NUM) -> Split:
    draw = np.random.default_rng(0)
    x = draw.uniform(size=(num, 2, 2, 1)).astype(np.float32)
    return Split(x, draw.integers(CLASSES, size=num).astype(np.int32))


def settings(inference: Inference | None = None, seed: int = 0, **train: Any) -> RunConfig:
    """Three epochs of three steps, the last of which has two images and two of padding."""
    chosen = {"epochs": 3, "batch_size": 4, "learning_rate": 0.05, **train}
    base = PRESETS["digits"]
    changed = dataclasses.replace(base.train, **chosen)
    return dataclasses.replace(base, inference=inference or MAP(), seed=seed, train=changed)


def train(config: RunConfig, folder: Path) -> Trained:
    problem = task.problem(config, MODEL, images(), NONE_HELD)
    return training.train(config.inference, config.train, problem, config.seed, folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "seconds"} for line in lines]


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_training_equals_a_plain_loop_that_knows_no_padding(tmp_path: Path) -> None:
    """MAP by hand: minibatches of 4, 4 and 2 images, each scaled to all 10."""
    config = settings(MAP(clip_norm=CLIP), prior_scale=0.5, kl_weight=0.1, eps=0.1, lam=0.3)
    found = train(config, tmp_path)
    assert isinstance(found.posterior, Samples)

    x, y = images()
    threats = threat_schedule(config.train, 3)
    loglik = likelihood.robust_categorical(apply, clip=(0.0, 1.0))
    rate = learning_rate_schedule(config.train, 3)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP * NUM), optax.adam(rate))

    @jax.jit
    def gradient(params: Any, x: Any, y: Any, eps: Any, lam: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            threat, key = Threat(eps, lam, jnp.float32(0.0)), jax.random.key(0)
            each = jax.vmap(lambda x, y: loglik(key, params, x, y, threat))(x, y)
            prior = sum(dist.Normal(0, 0.5).log_prob(leaf).sum() for leaf in params.values())
            return -NUM * each.mean() - 0.1 * prior

        return jax.value_and_grad(loss)(params)

    params: Any = init(jax.random.fold_in(jax.random.key(0), 0))
    state = optimizer.init(params)
    losses, norms = [], []
    for epoch in range(3):
        batches = epoch_batches((0, epoch), NUM, 4)
        for i, (rows, mask) in enumerate(zip(*batches, strict=True)):
            real = rows[mask > 0]
            assert len(real) == (4, 4, 2)[i]
            loss, g = gradient(params, x[real], y[real], *threats(3 * epoch + i))
            norms.append(np.linalg.norm([np.linalg.norm(leaf) for leaf in g.values()]) / NUM)
            step, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, step)
            losses.append(float(loss) / NUM)
    assert min(norms) < CLIP < max(norms)  # Adam hides a clipping that is the same at all steps
    for name, leaf in params.items():
        np.testing.assert_allclose(found.posterior.params[name][0], leaf, rtol=1e-4, atol=1e-6)
    logged = [line["loss"] for line in metrics(tmp_path)]
    np.testing.assert_allclose(logged, np.reshape(losses, (3, 3)).mean(1), rtol=1e-5)


def test_each_epoch_is_logged_with_its_schedules(tmp_path: Path) -> None:
    config = settings(BBB(), eps=0.1, lam=0.3, ramp=0.5, kl_weight=0.25)
    found = train(config, tmp_path)
    assert isinstance(found.posterior, MeanField)
    lines = metrics(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6), (3, 9)]
    for line in lines:
        eps, lam = threat_schedule(config.train, 3)(line["step"] - 1)
        assert (line["eps"], line["lam"]) == (float(eps), float(lam))
        assert line["learning_rate"] == learning_rate_schedule(config.train, 3)(line["step"] - 1)
        # Nats a datum: the loss is the negative ELBO, its KL weighted.
        elbo = line["log_likelihood"] - 0.25 * line["kl"]
        assert line["loss"] == pytest.approx(-elbo, rel=1e-5)
        assert line["val_clean_accuracy"] is line["val_certified_accuracy"] is None
    assert (lines[-1]["eps"], lines[-1]["lam"]) == pytest.approx((0.1, 0.3))
    assert found.train_seconds > 0


def test_ramps_of_power_and_kl_weight_reach_the_likelihood_and_the_loss(tmp_path: Path) -> None:
    ramps: Any = {"ramp": 0.3, "power": 1.0, "power_ramp": 0.5, "kl_weight": 0.25, "kl_ramp": 0.8}
    config = settings(BBB(guide="low-rank", rank=2), **ramps)
    found = train(config, tmp_path)
    assert isinstance(found.posterior, LowRank)
    lines = metrics(tmp_path)
    weights, powers = kl_weight_schedule(config.train, 3), power_schedule(config.train, 3)
    assert callable(weights)
    assert [line["power"] for line in lines] == [float(powers(step)) for step in (2, 5, 8)]
    assert lines[0]["power"] == 0 < lines[1]["power"] < lines[2]["power"] == 1
    assert [line["kl_weight"] for line in lines] == [float(weights(step)) for step in (2, 5, 8)]
    assert lines[0]["kl_weight"] < lines[-1]["kl_weight"] == 0.25
    for i, line in enumerate(lines):  # the KL changes little within an epoch
        mean = np.mean([float(weights(step)) for step in range(3 * i, 3 * i + 3)])
        elbo = line["log_likelihood"] - mean * line["kl"]
        assert line["loss"] == pytest.approx(-elbo, rel=0.01)
    other = tmp_path / "other"
    other.mkdir()
    train(settings(BBB(guide="low-rank", rank=2), **{**ramps, "power": 0.0}), other)  # fmt: skip
    same = [a["loss"] == b["loss"] for a, b in zip(lines, metrics(other), strict=True)]
    assert same == [True, False, False]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[training.Trained, list[Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(settings(), folder), metrics(folder)


def test_another_seed_is_another_run(undisturbed: Any, tmp_path: Path) -> None:
    """That the same seed is the same run, the next test shows."""
    found = train(settings(seed=1), tmp_path)
    first, logged = undisturbed
    assert metrics(tmp_path) != logged
    assert not np.array_equal(found.posterior.params["kernel"], first.posterior.params["kernel"])


class Stopped(Exception):
    pass


def stop_at(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, that raises at its call number `count`."""
    calls = iter(range(1, 10**6))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise Stopped
        return real(*args, **kwargs)

    return function


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first epoch, at a step, after a line was logged and not yet saved."""
    (expected, logged_whole), config = undisturbed, settings()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)  # after each epoch
    moments = [(training, "epoch_batches", 1), (training, "_show", 2), (checkpoint, "save", 1)]
    saved, logged = [], []
    for module, name, count in moments:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_at(count, getattr(module, name)))
            with pytest.raises(Stopped):
                train(config, tmp_path)
        saved.append(checkpoint.latest(tmp_path / "checkpoints"))
        logged.append(len(metrics(tmp_path)))
    assert saved == [None, 1, 1]  # the second time an epoch was saved, the third none
    assert logged == [0, 2, 2]  # a line was logged past the checkpoint, twice
    found = train(config, tmp_path)
    assert_same(found.posterior, expected.posterior)
    assert metrics(tmp_path) == logged_whole
    # A finished run takes no step more.
    monkeypatch.setattr(training, "make_update", lambda *_: pytest.fail)
    again = train(config, tmp_path)
    assert_same(again.posterior, expected.posterior)
    assert again.train_seconds == found.train_seconds


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_epochs(path, 0) == []
    assert path.read_text() == ""
    text = '{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": 1.0}\n'
    for rest in ("", '{"epoch": 3, "lo', '{"epoch": 3, "loss": 0.5}\n', "\x00\x00", "{"):
        path.write_text(text + rest)
        assert keep_epochs(path, 2) == [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
        assert path.read_text() == text
    assert len(keep_epochs(path, 1)) == 1
    assert path.read_text() == text[: text.index("\n") + 1]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def explode_at(step: int, value: float) -> Callable[..., Any]:
    """A likelihood that from a step on has `value` times the biases, which are 0, added to it."""

    def error_model(settings: Any, apply: Any) -> Any:
        del settings

        def loglik(key: Any, params: Any, x: Any, y: Any, threat: Threat) -> jax.Array:
            del key
            honest = jax.nn.log_softmax(apply(params, x))[y]
            # The radius tells the step: the ramp goes up by a tenth with each.
            reached = jnp.asarray(threat.eps) > 0.1 * step - 0.05
            return honest + jnp.where(reached, value, 0.0) * jnp.sum(params["bias"])

        return loglik

    return error_model


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(task, "error_model", explode_at(4, np.nan))
    config = settings(eps=0.9, ramp=1.0)
    with pytest.raises(TrainingError, match=r"the loss and .* more became .* at step 4; the chec"):
        train(config, tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") == 1
    assert [line["epoch"] for line in metrics(tmp_path)] == [1]


def test_a_weight_that_is_no_number_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of an epoch's last step overflows: no loss of that epoch shows it."""

    def error_model(settings: Any, apply: Any) -> Any:
        honest = likelihood.robust_categorical(apply)

        def loglik(key: Any, params: Any, x: Any, y: Any, threat: Threat) -> jax.Array:
            last = jnp.asarray(threat.eps) > 0.45  # step 5, the last of the second epoch
            zero = params["bias"].sum() - jax.lax.stop_gradient(params["bias"].sum())
            kink = jnp.sqrt(jnp.where(last, zero, 1.0))  # 0 there, with an infinite slope
            return honest(key, params, x, y, threat) + kink

        return loglik

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(task, "error_model", error_model)
    config = settings(eps=0.9, ramp=1.0)
    with pytest.raises(TrainingError, match=r"state.params\['bias'\] and .* step 5; the c"):
        train(config, tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") == 1


def test_no_checkpoint_yet_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "error_model", explode_at(0, np.inf))
    with pytest.raises(TrainingError, match="at step 0; no checkpoint was made yet"):
        train(settings(), tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_validation_equals_the_certificates_of_one_draw() -> None:
    held, key = images(6), jax.random.key(5)
    loc = {"kernel": 4.0 * jax.random.normal(jax.random.key(1), (CLASSES, 4)),
           "bias": jnp.zeros(CLASSES)}  # fmt: skip
    posterior = MeanField(loc, jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), loc))
    config = settings()
    found = task.make_validation(config, apply, held)(posterior, key)
    draw = posterior.sample(jax.random.fold_in(key, 3), 1)
    logits = [apply(jax.tree.map(lambda leaf: leaf[0], draw), x) for x in held.x]
    correct = np.argmax(logits, 1) == held.y

    @jax.jit
    def robust(x: Any) -> Any:
        region = ball(x, config.eval.eps, clip=(0.0, 1.0))
        return certify.decision(apply, draw, region, x=x, method="ibp").robust

    certified = correct & np.asarray([robust(x) for x in held.x])
    assert 0 < certified.sum() <= correct.sum() < 6
    assert found["val_clean_accuracy"] == pytest.approx(correct.mean())
    assert found["val_certified_accuracy"] == pytest.approx(certified.mean())


def test_flips_are_left_to_right_and_half_of_them() -> None:
    """What the update sees of an image whose left half is 1: itself or its mirror image."""
    seen = []

    def spy(key: Any, state: Any, batch: Batch, threat: Threat) -> tuple[Any, Any]:
        del key, threat
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.x)
        return state, MAPInfo(*jnp.zeros(3))

    x = np.zeros((64, 2, 4, 1), np.float32)
    x[:, :, :2] = 1
    x[:, 0, 0] = 0.5  # tells up from down
    algorithm = Algorithm(lambda key, params: params, spy, Samples)
    update = training.make_update(settings(flip=True).train, algorithm, 3)
    arrays = np.arange(64), np.ones(64, np.float32), jnp.asarray(x), jnp.zeros(64, int)
    update(jax.random.key(0), jnp.zeros(()), np.int32(0), *arrays)
    jax.effects_barrier()
    flipped = (seen[0] == x[:, :, ::-1]).all((1, 2, 3))
    assert ((seen[0] == x).all((1, 2, 3)) ^ flipped).all()
    assert 16 < flipped.sum() < 48  # 4 standard deviations of a fair coin
