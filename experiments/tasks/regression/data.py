"""The two regressions, split and standardised: ten features with a target, and a noisy sine.

    x = (features - mean of the training features) / their standard deviation, feature by feature

and likewise y: statistics of the *training* split alone, so that nothing is learned from the
others. A radius eps therefore moves every feature by up to eps standard deviations of itself.

`diabetes` is the data of scikit-learn, in its original units. `sine` is generated:

    target = sin(feature) + N(0, NOISE^2),   feature uniform in [-4, 6] without [0.4, 2.9]

whose gap no training point fills: a posterior should be less certain there.

Source: Efron et al., "Least angle regression", Annals of Statistics 2004 (diabetes).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ...setup.data import Split

SPLIT_SEED = 0
"""The splits, and the sine's points, are the same for every seed: a seed varies the run."""

NOISE = 0.1
"""Standard deviation of the sine's noise."""

ENDS, GAP = (-4.0, 6.0), (0.4, 2.9)
"""Where the sine's features lie, and where none of them does; radians."""


class Regression(NamedTuple):
    """A regression, with what brings it back to its own units.

    Attributes:
        name: one of `PROBLEMS`, or a table's.
        train: what posteriors see.
        validation: what settings are chosen on.
        test: what is reported.
        features: their names.
        feature_mean: of the training features, in their own units.
        feature_sd: likewise.
        target: what it is, in words, with its unit.
        target_mean: of the training targets, in that unit.
        target_sd: likewise.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    features: tuple[str, ...]
    feature_mean: Float[np.ndarray, " features"]
    feature_sd: Float[np.ndarray, " features"]
    target: str
    target_mean: float
    target_sd: float


def load(name: str) -> Regression:
    """The problem of a name, the same at every call.

    Args:
        name: "diabetes" or "sine".

    >>> diabetes = load("diabetes")
    >>> [len(table.y) for table in (diabetes.train, diabetes.validation, diabetes.test)]
    [264, 89, 89]
    >>> bool(abs(diabetes.train.x.mean(0)).max() < 1e-5), len(load("sine").train.y)
    (True, 120)
    """
    return PROBLEMS[name]()


def _diabetes() -> Regression:
    from sklearn.datasets import load_diabetes

    data: Any = load_diabetes(scaled=False)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    held = len(order) // 5 + 1
    parts = order[2 * held :], order[held : 2 * held], order[:held]
    target = "disease progression after a year (score)"
    return standardised(
        "diabetes",
        [(data.data[part], data.target[part]) for part in parts],
        tuple(data.feature_names),
        target,
    )


def _sine() -> Regression:
    rng = np.random.default_rng(SPLIT_SEED)

    def draw(num: int) -> tuple[np.ndarray, np.ndarray]:
        left, right = GAP[0] - ENDS[0], ENDS[1] - GAP[1]
        u = rng.uniform(0, left + right, num)
        x = np.where(u < left, ENDS[0] + u, GAP[1] + u - left)
        return x[:, None], np.sin(x) + NOISE * rng.normal(size=num)

    parts = [draw(num) for num in (120, 100, 200)]
    return standardised("sine", parts, ("x (radians)",), "y = sin x + noise")


def standardised(
    name: str,
    parts: list[tuple[np.ndarray, np.ndarray]],
    features: tuple[str, ...],
    target: str,
) -> Regression:
    """Make a regression of training, validation and test data in their own units.

    Args:
        name: of the problem.
        parts: features and targets of the three splits.
        features: their names.
        target: what it is, in words.
    """
    (x, y), *_ = parts
    mean, sd = x.mean(0), x.std(0)
    target_mean, target_sd = float(y.mean()), float(y.std())
    train, validation, test = (
        Split(
            ((x - mean) / sd).astype(np.float32),
            ((y - target_mean) / target_sd).astype(np.float32),
        )
        for x, y in parts
    )
    return Regression(
        name, train, validation, test, features, mean, sd, target, target_mean, target_sd
    )


PROBLEMS = {"diabetes": _diabetes, "sine": _sine}
