"""What became of each test image: certified, undecided, broken by the attack, or misclassified.

The four outcomes partition the test set, and the three accuracies are sums of them:

    certified accuracy = certified
    attacked accuracy  = certified + undecided
    clean accuracy     = certified + undecided + broken

so clean >= attacked >= certified, image by image. The robust accuracy nobody can compute
exactly lies between the certified and the attacked one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Outcome(NamedTuple):
    """A name, a symbol that does without colour, and the meaning in plain words."""

    name: str
    symbol: str
    meaning: str


OUTCOMES = (
    Outcome("certified", "✓", "proved to stay correct everywhere in the ball"),
    Outcome("undecided", "?", "the attack failed, and there is no proof either"),
    Outcome("broken", "✗", "correct, until the attack changed the class"),
    Outcome("misclassified", "≠", "wrong even without an attack"),
)

Certificates = Mapping[str, np.ndarray]
"""The arrays of a run's certificates.npz, each with one entry per test image."""


def outcomes(certificates: Certificates) -> Int[np.ndarray, "images"]:
    """The outcome of each test image, as an index into `OUTCOMES`.

    Args:
        certificates: `certified`, `attacked_correct` and `clean_correct`, bools of shape (N,).

    Returns:
        Integers of shape (N,).

    Raises:
        ValueError: an image is certified but broken, or survives the attack but is wrong without
            one. Proof and attack then speak of different networks or sets.
    """
    certified, survives, correct = (
        np.asarray(certificates[name], bool)
        for name in ("certified", "attacked_correct", "clean_correct")
    )
    violated = np.flatnonzero((certified & ~survives) | (survives & ~correct))
    if violated.size:
        raise ValueError(
            f"the order certified <= attacked <= clean is violated at test images "
            f"{violated[:5].tolist()} ({violated.size} in all): certificate and attack do not "
            "speak of the same network and ball. Evaluate the run again."
        )
    return np.select([certified, survives, correct], [0, 1, 2], 3)


def by_class(certificates: Certificates, num_classes: int) -> Int[np.ndarray, "classes outcomes"]:
    """How many test images of each true class had each outcome; rows sum to the class's size."""
    counts = np.zeros((num_classes, len(OUTCOMES)), int)
    np.add.at(counts, (np.asarray(certificates["label"]), outcomes(certificates)), 1)
    return counts


def pick(certificates: Certificates, *, each: int = 8) -> Int[np.ndarray, "picked"]:
    """Test images for a picture grid: the first `each` of every outcome, in test set order.

    The first ones rather than the prettiest: the grid is a sample, not a selection.
    """
    outcome = outcomes(certificates)
    return np.concatenate([np.flatnonzero(outcome == o)[:each] for o in range(len(OUTCOMES))])
