import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert import attack, certify
from bnncert.sets import ball
from experiments.pipeline import evaluation
from experiments.pipeline.evaluation import (
    Evaluated,
    SoundnessError,
    check_order,
    evaluate,
    predict,
)
from experiments.setup.data import Split
from experiments.setup.settings import EvalConfig

NUM, CLASSES = 7, 3
PIXELS = (0.0, 1.0)
CONFIG = EvalConfig(
    eps=0.1,
    attack_steps=3,
    attack_restarts=2,  # the second starts at random
    certify_method="ibp",
    curve_points=3,
    curve_images=5,
    batch_size=3,
)


def apply(params: Any, x: Any) -> jax.Array:
    hidden = jax.nn.relu(params["inner"] @ jnp.ravel(x))
    return params["outer"] @ hidden


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SAMPLES = {"inner": jnp.asarray(draw(0, 4, 6, 4)), "outer": jnp.asarray(draw(1, 4, CLASSES, 6))}
IMAGES = np.random.default_rng(2).uniform(size=(NUM, 2, 2, 1)).astype(np.float32)


def member(s: int) -> dict[str, jax.Array]:
    return {name: leaf[s] for name, leaf in SAMPLES.items()}


def _labels() -> np.ndarray:
    """Mostly what the predictor says, so that each outcome has its images; one is wrong."""
    probs = np.mean([[jax.nn.softmax(apply(member(s), x)) for x in IMAGES] for s in range(4)], 0)
    labels = np.argmax(probs, 1).astype(np.int32)
    labels[3] = (labels[3] + 1) % CLASSES
    return labels


TEST = Split(IMAGES, _labels())


@pytest.fixture(scope="module")
def evaluated() -> Evaluated:
    return evaluate(CONFIG, apply, SAMPLES, TEST, seed=0)


def test_predictions_equal_a_plain_loop() -> None:
    found = predict(apply, SAMPLES, TEST, 3)  # 3 + 3 + 1 images
    expected = [[jax.nn.softmax(apply(member(s), x)) for x in IMAGES] for s in range(4)]
    assert found.shape == (4, NUM, CLASSES)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_every_image_is_certified_and_attacked_as_if_alone(evaluated: Evaluated) -> None:
    """Batches of 3, of which the last holds one image: neither their size nor padding shows."""
    certificates = evaluated.certificates
    assert all(len(rows) == NUM for rows in certificates.values())
    assert evaluated.attacked.shape == IMAGES.shape

    @jax.jit
    def alone(i: Any, x: Any, y: Any) -> Any:
        region = ball(x, CONFIG.eps, clip=PIXELS)
        decision = certify.decision(apply, SAMPLES, region, x=x, method="ibp")
        key = jax.random.fold_in(jax.random.key(0), i)
        found = attack.pgd(key, apply, SAMPLES, x, y, CONFIG.eps, steps=3, restarts=2, clip=PIXELS)
        return decision, found

    for i, (x, y) in enumerate(zip(*TEST, strict=True)):
        decision, found = alone(i, x, y)
        assert certificates["predicted"][i] == decision.predicted
        assert certificates["robust"][i] == decision.robust
        rivals = np.delete(np.asarray(decision.margins), int(decision.predicted))
        np.testing.assert_allclose(certificates["margin"][i], rivals.min(), atol=1e-5)
        np.testing.assert_allclose(
            certificates["probability_lower"][i], decision.probability.lower, atol=1e-5
        )
        assert certificates["attacked_correct"][i] == ~found.broken
        assert certificates["attacked_predicted"][i] == found.predicted
        np.testing.assert_allclose(certificates["attacked_margin"][i], found.margin, atol=1e-4)
        np.testing.assert_allclose(evaluated.attacked[i], found.x, atol=1e-5)


def test_numbers_follow_from_the_certificates(evaluated: Evaluated) -> None:
    results, certificates = evaluated.results, evaluated.certificates
    probs, label = certificates["probs"].astype(float), TEST.y
    np.testing.assert_array_equal(certificates["clean_correct"], probs.argmax(1) == label)
    assert certificates["clean_correct"].sum() == NUM - 1  # the one with the wrong label
    np.testing.assert_array_equal(
        certificates["certified"], certificates["robust"] & certificates["clean_correct"]
    )
    assert 0 < results["certified_accuracy"] < results["clean_accuracy"]  # outcomes differ here
    for rate, column in [
        ("clean", "clean_correct"),
        ("attacked", "attacked_correct"),
        ("certified", "certified"),
    ]:
        assert results[f"{rate}_accuracy"] == certificates[column].mean()
    np.testing.assert_allclose(
        results["nll"], -np.log(probs[np.arange(NUM), label]).mean(), rtol=1e-5
    )
    entropy = -(probs * np.log(probs)).sum(1)
    np.testing.assert_allclose(results["predictive_entropy"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        results["mutual_information"], certificates["mutual_information"].mean(), rtol=1e-5
    )
    assert (results["num_test"], results["num_samples"], results["eps"]) == (NUM, 4, 0.1)
    assert results["attack"] == "PGD, 3 steps, 2 restarts"


def test_the_order_holds_and_bounds_hold_where_the_attack_ended(evaluated: Evaluated) -> None:
    certificates = evaluated.certificates
    assert (certificates["certified"] <= certificates["attacked_correct"]).all()
    assert (certificates["attacked_correct"] <= certificates["clean_correct"]).all()
    assert (np.abs(evaluated.attacked - IMAGES) <= CONFIG.eps + 1e-6).all()
    assert evaluated.attacked.min() >= 0
    assert evaluated.attacked.max() <= 1
    there = predict(apply, SAMPLES, Split(evaluated.attacked, TEST.y), NUM).mean(0)
    chosen = there[np.arange(NUM), certificates["predicted"]]
    assert (chosen >= certificates["probability_lower"] - 1e-5).all()
    assert (chosen <= certificates["probability_upper"] + 1e-5).all()
    others = np.where(np.eye(CLASSES)[certificates["predicted"]] > 0, -np.inf, there).max(1)
    assert (chosen - others >= certificates["margin"] - 1e-5).all()


def test_the_curve_starts_clean_and_stays_in_order(evaluated: Evaluated) -> None:
    curve = evaluated.results["curve"]
    np.testing.assert_allclose(curve["eps"], [0.0, 0.1, 0.2])
    assert curve["num_images"] == 5
    assert curve["clean"] == [0.8, 0.8, 0.8]  # image 3 of 5 has the wrong label
    assert curve["certified"][0] == curve["attacked"][0] == 0.8  # at radius 0
    assert np.all(np.asarray(curve["certified"]) <= curve["attacked"])
    assert np.all(np.asarray(curve["attacked"]) <= curve["clean"])
    assert np.all(np.diff(curve["certified"]) <= 0)  # IBP is monotone in the set
    first = evaluated.certificates["certified"][:5].mean()
    assert curve["certified"][1] == pytest.approx(first)


def test_no_attack_is_the_clean_image() -> None:
    config = dataclasses.replace(CONFIG, attack_steps=0, curve_points=2)
    found = evaluate(config, apply, SAMPLES, TEST, seed=0)
    np.testing.assert_array_equal(found.attacked, IMAGES)
    assert found.results["attacked_accuracy"] == found.results["clean_accuracy"]
    assert found.results["attack"] == "none"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("attacked_correct", "test image 2 is certified, but the attack changed its class"),
        ("clean_correct", "test image 2 withstood the attack, but is misclassified clean"),
    ],
)
def test_a_violation_of_the_order_names_the_image(changed: str, says: str) -> None:
    names = ("certified", "attacked_correct", "clean_correct")
    certificates = {name: np.ones(4, bool) for name in names}
    check_order(certificates, 0.1)
    certificates[changed][2] = False
    with pytest.raises(SoundnessError, match=f"{says} at eps 0.1"):
        check_order(certificates, 0.1)


def _everything_is_robust(*args: Any, **kwargs: Any) -> certify.Decision:
    honest = _decision(*args, **kwargs)
    return dataclasses.replace(honest, robust=jnp.ones_like(honest.robust))


def _nothing_is_broken(*args: Any, **kwargs: Any) -> attack.AttackResult:
    honest = _pgd(*args, **kwargs)
    return honest._replace(broken=jnp.zeros_like(honest.broken), margin=jnp.ones(()))


_decision, _pgd = certify.decision, attack.pgd


@pytest.mark.parametrize(
    ("module", "name", "liar", "says"),
    [
        (certify, "decision", _everything_is_robust, "is certified, but the attack"),
        (attack, "pgd", _nothing_is_broken, "test image 3 withstood the attack, but"),
    ],
)
@pytest.mark.parametrize("where", ["evaluate", "curve"])
def test_a_bound_or_an_attack_that_lies_stops_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, liar: Any, says: str, where: str
) -> None:
    wide = dataclasses.replace(CONFIG, eps=0.5, attack_steps=10, curve_points=2)
    monkeypatch.setattr(module, name, liar)
    with pytest.raises(SoundnessError, match=says):
        if where == "evaluate":
            evaluate(wide, apply, SAMPLES, TEST, seed=0)
        else:
            run = evaluation._certifier(wide, apply, SAMPLES)
            search = evaluation._attacker(wide, apply, SAMPLES, jax.random.key(0))
            evaluation.accuracy_over_eps(wide, run, search, TEST, NUM)
