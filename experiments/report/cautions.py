"""What of a run's numbers could be taken for more than it is, and why: a sentence for each."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..setup.command import program
from .document import percent_interval
from .figures import radius_text

AGREEING = 0.05
"""Mutual information over predictive entropy: under this the samples agree."""

FEW, SHORT = 1000, 20
"""Images under which an interval is told, and steps under which an attack is short."""

NEAR = 0.1
"""Of the way from guessing to no error: an accuracy under this is hardly better than guessing."""


def cautions(results: Mapping[str, Any], num_classes: int) -> Sequence[str]:
    """The sentences that hold for a run, as HTML.

    Args:
        results: of results.json.
        num_classes: of the data.
    """
    r = results
    steps = r["curve"].get("attack_steps")
    guess = 1 / num_classes
    found = {
        _no_radius: r["eps"] == 0,
        _farther: r["eps"] > 1.001 * (r.get("train_eps") or r["eps"]),
        _few: r["num_test"] < FEW,
        _guessing: r["clean_accuracy"] < guess + NEAR * (1 - guess),
        _unattacked: steps == 0,
        _short: steps is not None and 0 < steps < SHORT,
        _agreeing: r["num_samples"] > 1 and _disagreement(r) < AGREEING,
    }
    return [say(r, guess) for say, holds in found.items() if holds]


def _disagreement(r: Mapping[str, Any]) -> float:
    known = r.get("mutual_information"), r.get("predictive_entropy")
    if None in known or not known[1]:
        return 1.0
    return known[0] / known[1]  # pyright: ignore[reportOptionalOperand]


def _no_radius(r: Mapping[str, Any], guess: float) -> str:
    return (
        "<b>The radius is 0.</b> Nothing is perturbed: an image counts as certified if it is "
        "classified correctly, and nothing is said of robustness."
    )


def _farther(r: Mapping[str, Any], guess: float) -> str:
    return (
        f"<b>Tested farther out than trained.</b> Training went up to radius "
        f"{radius_text(r['train_eps'])}, and the test radius is {radius_text(r['eps'])}: where few "
        "images are certified, that may be why."
    )


def _few(r: Mapping[str, Any], guess: float) -> str:
    return (
        f"<b>{r['num_test']:,} test images are few.</b> As a sample of others like them, the "
        "certified accuracy lies, with 95% confidence, within "
        f"{percent_interval(r['certified_accuracy'], r['num_test'])}%: a difference "
        "of that size between two runs may be chance."
    )


def _guessing(r: Mapping[str, Any], guess: float) -> str:
    return (
        f"<b>It classifies hardly better than guessing</b> ({100 * guess:.0f}%). A network that "
        "always answers the same is robust everywhere: certificates mean little here."
    )


def _unattacked(r: Mapping[str, Any], guess: float) -> str:
    return (
        "<b>No attack was tried.</b> The attacked accuracy is the clean one, and the images "
        "between it and the certified accuracy are simply undecided."
    )


def _short(r: Mapping[str, Any], guess: float) -> str:
    steps = r["curve"]["attack_steps"]
    return (
        f"<b>The attack is short</b> ({steps} step{'' if steps == 1 else 's'}): the accuracy under "
        "attack is an upper bound on the robust one, and may be a loose one. "
        f"<code>{program('attack')}</code> tries stronger attacks on the same images."
    )


def _agreeing(r: Mapping[str, Any], guess: float) -> str:
    weight, scale = r.get("kl_weight"), r.get("posterior_scale")
    reasons = []
    if r.get("lam", 1) < 1:
        reasons.append("robust training rewards samples that stay on one side of each boundary")
    if weight is not None and weight < 1:
        reasons.insert(
            0,
            f"the KL weight of {weight:g} tempers the posterior, as if every image had been seen "
            f"{1 / weight:,.0f} times" if weight > 0 else "the KL term has no weight",
        )  # fmt: skip
    why = f"Usual reasons, which hold here: {'; '.join(reasons)}." if reasons else ""
    wide = scale is not None and scale > 0.1
    though = (
        f" That the weights themselves are spread (a median deviation of {scale:.2g} of their "
        "size) does not contradict it: their noise may cancel where many are added up."
        if wide
        else ""
    )
    return (
        f"<b>The {r['num_samples']} samples agree on nearly everything</b>: mutual information of "
        f"{r['mutual_information']:.4f} nats, of a predictive entropy of "
        f"{r['predictive_entropy']:.3f}. What uncertainty there is lies in the label, not in "
        "the weights: their average is hardly more than one network, and disagreement "
        "between them "
        f"will not warn of an unfamiliar image. {why}{though}"
    )
