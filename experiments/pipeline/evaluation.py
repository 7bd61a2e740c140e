"""Evaluation: what is deployed, certified and attacked, image by image.

One predictor throughout: the average over the same posterior samples, on the same sets (the l_inf
ball clipped to the range of pixels). Every image is attacked, the certified ones too, so that

    certified  =>  not broken  =>  clean correct

can be checked point by point; a violation stops the run.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from bnncert import attack, certify, metrics
from bnncert.sets import ball
from bnncert.types import Apply

from ..setup.data import Split
from ..setup.logs import SHORT, compiling
from ..setup.settings import PIXELS, EvalConfig

OnBatch = Callable[[np.ndarray, np.ndarray, np.ndarray, np.float32], Any]
"""`(images, labels, positions, eps) -> pytree` with the images as the leading axis."""


TIE = 1e-4
"""Nats: an image this near a tie may be classified either way by two programs that round apart."""

_COLUMNS = {"clean": "clean_correct", "attacked": "attacked_correct", "certified": "certified"}
"""Accuracy -> the column of certificates.npz it is the mean of."""


class SoundnessError(AssertionError):
    """A certified image was broken, or a misclassified one certified: a bound is wrong."""


class Evaluated(NamedTuple):
    """What a run reports.

    Attributes:
        results: numbers for `results.json`.
        certificates: arrays for `certificates.npz`, one row an image.
        attacked: the attacks' images, (N, H, W, C).
    """

    results: dict[str, Any]
    certificates: dict[str, np.ndarray]
    attacked: np.ndarray


def evaluate(
    config: EvalConfig, apply: Apply, samples: PyTree, test: Split, seed: int
) -> Evaluated:
    """Certifies and attacks every test image, and measures calibration.

    Args:
        config: radius, attack, bounds.
        apply: `(params, x) -> logits` for one image.
        samples: the deployed weights, stacked.
        test: the images.
        seed: of the attack's random starts.

    Returns:
        Numbers and arrays.

    Raises:
        SoundnessError: certified <= attacked <= clean is violated at an image; names it.
    """
    started = time.monotonic()
    key = jax.random.key(seed)
    size = min(config.batch_size, len(test.y))
    probs = predict(apply, samples, test, size)  # (S, N, C)
    average = probs.mean(0)
    label = np.asarray(test.y)
    certify_all = _certifier(config, apply, samples)
    attack_all = _attacker(config, apply, samples, key)
    certified = _over(certify_all, test, size, config.eps, "certify")
    attacked = _over(attack_all, test, size, config.eps, "attack")
    order = _order(certified, attacked, label)
    check_order(order, config.eps)
    rivals = np.where(np.eye(average.shape[1], dtype=bool)[certified.predicted], np.inf, 0.0)
    certificates = {
        "label": label,
        "predicted": certified.predicted,
        **order,
        "robust": certified.robust,
        "margin": (certified.margins + rivals).min(1),
        "probability_lower": certified.probability.lower,
        "probability_upper": certified.probability.upper,
        "attacked_predicted": attacked.predicted,
        "attacked_margin": attacked.margin,
        "probs": average,
        "mutual_information": np.asarray(metrics.mutual_information(jnp.asarray(probs))),
    }
    outcome = jnp.asarray(average), jnp.asarray(label)
    results = {
        "eps": config.eps,
        "num_test": len(label),
        "num_samples": probs.shape[0],
        **{f"{name}_accuracy": float(order[column].mean()) for name, column in _COLUMNS.items()},
        "nll": float(metrics.nll(*outcome)),
        "brier": float(metrics.brier(*outcome)),
        "ece": float(metrics.ece(*outcome)),
        "predictive_entropy": float(np.mean(metrics.predictive_entropy(jnp.asarray(probs)))),
        "mutual_information": float(np.mean(certificates["mutual_information"])),
        "curve": accuracy_over_eps(config, certify_all, attack_all, test, size),
        "certify_method": config.certify_method,
        "attack": describe_attack(config),
        "arithmetic": certified.arithmetic,
        "tier": "exact",
        "evaluate_seconds": time.monotonic() - started,
    }
    return Evaluated(results, certificates, attacked.x)


def certified_accuracy(
    config: EvalConfig, apply: Apply
) -> Callable[[PyTree, Split], tuple[float, float]]:
    """Clean and certified accuracy as a function of deployed samples, without an attack.

    Args:
        config: radius, bounds and batch size.
        apply: `(params, x) -> logits` for one image.

    Returns:
        `(samples, test) -> (clean, certified)`, of stacked weights and images; compiled once.
    """
    decide = _decisions(config, apply)

    def accuracies(samples: PyTree, test: Split) -> tuple[float, float]:
        size = min(config.batch_size, len(test.y))
        decision = _over(lambda x, y, i, eps: decide(samples, x, eps), test, size, config.eps)
        correct = decision.predicted == test.y
        return float(correct.mean()), float((correct & decision.robust).mean())

    return accuracies


def describe_attack(config: EvalConfig) -> str:
    """The attack in words: name, steps, restarts."""
    if not config.attack_steps:
        return "none"
    plural = "" if config.attack_restarts == 1 else "s"
    return f"PGD, {config.attack_steps} steps, {config.attack_restarts} restart{plural}"


def check_order(certificates: dict[str, np.ndarray], eps: float) -> None:
    """Raises SoundnessError unless certified => not broken => clean correct, at every image."""
    chain = (
        ("certified", "attacked_correct", "is certified, but the attack changed its class"),
        ("attacked_correct", "clean_correct", "withstood the attack, but is misclassified clean"),
    )
    for strong, weak, what in chain:
        wrong = np.flatnonzero(certificates[strong] & ~certificates[weak])
        if len(wrong):
            raise SoundnessError(
                f"test image {wrong[0]} {what} at eps {eps} ({len(wrong)} images so): a bound or "
                "an attack is wrong; please report this with the run's config.json"
            )


def accuracy_over_eps(
    config: EvalConfig, certify_all: OnBatch, attack_all: OnBatch, test: Split, size: int
) -> dict[str, Any]:
    """Clean, attacked and certified accuracy on the first images, for radii from 0 to twice eps."""
    part = Split(test.x[: config.curve_images], test.y[: config.curve_images])
    radii = np.linspace(0.0, 2 * config.eps, config.curve_points)
    curve: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for eps in tqdm(radii, desc="curve", unit="radius"):
        decision = _over(certify_all, part, size, eps)
        result = _over(attack_all, part, size, eps)
        order = _order(decision, result, part.y)
        check_order(order, float(eps))
        for name, column in _COLUMNS.items():
            curve[name].append(float(order[column].mean()))
    return {
        "eps": radii.tolist(),
        **curve,
        "num_images": len(part.y),
        "attack_steps": config.attack_steps,
    }


def predict(apply: Apply, samples: PyTree, test: Split, size: int) -> np.ndarray:
    """Class probabilities of each sample on each image, (S, N, C); compiled once for `apply`."""
    found = _over(lambda x, y, i, eps: _probs(apply, samples, x), test, size, 0.0, "predict")
    return np.swapaxes(found, 0, 1)


@partial(jax.jit, static_argnums=0)
def _probs(apply: Apply, samples: PyTree, x: Any) -> Any:
    def one(params: PyTree) -> Any:
        return jax.nn.softmax(jax.vmap(apply, (None, 0))(params, x))

    return jnp.swapaxes(jax.lax.map(one, samples), 0, 1)  # the images first


def _order(
    decision: certify.Decision, result: attack.AttackResult, label: np.ndarray
) -> dict[str, np.ndarray]:
    """What the three accuracies count, image by image, each from its own computation."""
    correct = np.asarray(decision.predicted == label)
    # The clean image is among the attack's candidates: beyond a tie, unbroken has to mean correct.
    withstood = ~result.broken & (correct | (result.margin > TIE))
    return {
        "clean_correct": correct,
        "attacked_correct": np.asarray(withstood),
        "certified": np.asarray(decision.robust & correct),
    }


def _certifier(config: EvalConfig, apply: Apply, samples: PyTree) -> OnBatch:
    decide = _decisions(config, apply)
    return lambda x, y, i, eps: decide(samples, x, eps)


def _decisions(config: EvalConfig, apply: Apply) -> Callable[..., certify.Decision]:
    @jax.jit
    def batch(samples: PyTree, x: Any, eps: Any) -> certify.Decision:
        def one(x: Any) -> certify.Decision:
            region = ball(x, eps, clip=PIXELS)
            return certify.decision(apply, samples, region, x=x, method=config.certify_method)

        return jax.vmap(one)(x)

    return batch


def _attacker(config: EvalConfig, apply: Apply, samples: PyTree, key: Any) -> OnBatch:
    steps, restarts, step_size = config.attack_steps, config.attack_restarts, None
    if not steps:  # the clean image alone: one step of length 0 from there, and no random start
        steps, restarts, step_size = 1, 1, 0.0

    @jax.jit
    def batch(key: Any, samples: PyTree, x: Any, y: Any, i: Any, eps: Any) -> attack.AttackResult:
        def one(x: Any, y: Any, i: Any) -> attack.AttackResult:
            return attack.pgd(
                jax.random.fold_in(key, i),
                apply,
                samples,
                x,
                y,
                eps,
                steps=steps,
                step_size=step_size,
                restarts=restarts,
                clip=PIXELS,
            )

        return jax.vmap(one)(x, y, i)

    return lambda x, y, i, eps: batch(key, samples, x, y, i, eps)


def _over(run: OnBatch, test: Split, size: int, eps: float, name: str | None = None) -> Any:
    """Runs over a test set in batches of one shape; stacks what comes back, in NumPy.

    The last batch repeats the last image, and loses the copies again.
    """
    num, parts = len(test.y), []
    with tqdm(total=num, desc=name, unit="image", disable=name is None, delay=SHORT) as bar:
        for start in range(0, num, size):
            rows = np.minimum(np.arange(start, start + size), num - 1)
            count = min(size, num - start)
            what = compiling(f"{name} and running its first batch", bar, count)
            with what if not start else nullcontext():
                found = run(test.x[rows], test.y[rows], rows, np.float32(eps))
                parts.append(jax.tree.map(np.asarray, found))
            bar.update(count)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *parts)
