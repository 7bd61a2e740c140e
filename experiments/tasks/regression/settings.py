"""The options of a regression, their presets, and the command line.

Every field of `Settings` is an option; its docstring is its help. Radii are in standard deviations
of each feature, over the training data, and targets are standardised likewise.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ...setup import command
from ...setup.methods import BBB, IVON, MAP, Ensemble, Inference, name_of
from ...setup.requirements import (
    AtLeast1,
    NotNegative,
    Positive,
    Requirement,
    Seed,
    Share,
    check,
    one_of,
)
from ...setup.settings import CERTIFY_METHODS, TRAIN_METHODS, TrainConfig

METHODS: dict[str, Inference] = {
    "map": MAP(),
    "bbb": BBB(),
    "ivon": IVON(),
    "ensemble": Ensemble(members=10),
}
"""What regressions are trained by, with the settings that they start from."""

TRAININGS = ("robust", "plain")
SPLITS = ("test", "validation")

Radius = Annotated[
    float,
    Requirement(
        "a radius in [0, 100], in standard deviations of each feature (try 0.1)",
        lambda v: 0 <= v <= 100,
    ),
]
Widths = Annotated[
    tuple[int, ...],
    Requirement(
        "widths of at least 1, one a hidden layer (try 32 32)",
        lambda v: len(v) > 0 and min(v) > 0,
    ),
]


@dataclass(frozen=True)
class Settings:
    """Train a certified Bayesian regression, robust and plain, bound it, attack it, and report."""

    preset: tyro.conf.Suppress[str]
    """The problem: a key of `PRESETS`."""
    inference: Inference = field(default_factory=BBB)
    training: Annotated[str, *one_of("training", (*TRAININGS, "both"))] = "both"
    """With the robust likelihood, the plain one (lam 1: an ordinary network), or one after the
    other with the same seed."""
    data: Path | None = None
    """Your own table, with the problem table: a .csv file with a header, and numbers below it."""
    target: str | None = None
    """The column of the table that is to be predicted; all others are features."""
    evaluate: Annotated[str, *one_of("split", SPLITS)] = "test"
    """Which data the results are about; settings are chosen on validation, and test is looked at
    once."""
    seed: Seed = 0
    """Fixes initialisation, order of the data, posterior samples and attack; not the splits."""
    out: Path | None = None
    """Output folder, a new one. Default: runs/PRESET-INFERENCE-seedSEED."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""
    eps: Radius = 0.1
    """Radius of the certificates and attacks: l_inf, in standard deviations of each feature."""
    train_eps: Radius = 0.1
    """Largest radius of the robust likelihood, in the same units."""
    lam: Share = 0.5
    """Weight of the clean term in the robust likelihood after the ramp."""
    power: Share = 0.0
    """Exponent of the mixture of clean and worst-case likelihood: 0 geometric, 1 arithmetic."""
    ramp: Share = 0.5
    """Fraction of training over which the radius goes linearly up from 0, and lam down from 1."""
    noise_scale: Positive = 0.7
    """Standard deviation of the noise around the network, in standard deviations of the target."""
    method: Annotated[str, *one_of("bound method of training", TRAIN_METHODS)] = "ibp"
    """Bounds inside the robust likelihood."""
    hidden: Widths = (50,)
    """Widths of the hidden layers."""
    epochs: AtLeast1 = 300
    """Passes over the training data, of each training."""
    batch_size: AtLeast1 = 64
    """Training data in a minibatch."""
    learning_rate: Positive = 3e-3
    """Adam's step size at the start (ivon: that of the natural gradient)."""
    prior_scale: Positive = 0.5
    """Standard deviation of the normal prior of each weight."""
    kl_weight: NotNegative = 0.1
    """Weight of KL(q || prior) in the ELBO (map, ensemble: of the log prior); 1 is the ELBO itself,
    less tempers the posterior (sine: 0.1 with bbb and ivon)."""
    num_samples: AtLeast1 = 32
    """Posterior samples deployed; their average is the predictor (ensemble: all members)."""
    certify_method: Annotated[str, *one_of("bound method of certificates", CERTIFY_METHODS)] = (
        "crown-ibp"
    )
    """Bounds of the certificates."""
    attack_steps: AtLeast1 = 20
    """Gradient-sign steps of the attack from each start."""
    attack_restarts: AtLeast1 = 2
    """Starts of the attack: the datum itself, then random ones."""
    curve_points: AtLeast1 = 4
    """Radii of the curve of errors up to eps; as many lie between eps and twice eps."""


PRESETS: dict[str, Settings] = {
    "diabetes": Settings("diabetes"),
    "sine": Settings(
        "sine",
        inference=METHODS["ensemble"],
        eps=0.05,
        train_eps=0.05,
        noise_scale=0.2,  # what its noise is, standardised
        hidden=(32, 32),
        epochs=2000,
        batch_size=120,
        kl_weight=1.0,
    ),
    "table": Settings("table"),
}
DESCRIBED = {
    "diabetes": "442 patients, ten features (scikit-learn's, built in)",
    "sine": "a generated noisy sine of one feature, with a gap in it",
    "table": "your own: --data FILE.csv --target COLUMN",
}
KL_WEIGHTS = {("sine", "bbb"): 0.1, ("sine", "ivon"): 0.1}
"""Where a method's is another than its preset's."""


def preset(name: str, inference: str | None = None) -> Settings:
    """A preset with an inference method; None is the preset's own.

    >>> preset("sine", "ivon").kl_weight, preset("sine", "ivon").learning_rate
    (0.1, 0.1)
    """
    base = PRESETS[name]
    method = base.inference if inference is None else METHODS[inference]
    return dataclasses.replace(
        base,
        inference=method,
        learning_rate=getattr(method, "learning_rate", base.learning_rate),
        kl_weight=KL_WEIGHTS.get((name, name_of(method)), base.kl_weight),
    )


def train_config(settings: Settings, training: str) -> TrainConfig:
    """What schedules and methods go by, for one of `TRAININGS`.

    >>> plain = train_config(PRESETS["sine"], "plain")
    >>> plain.eps, plain.lam
    (0.0, 1.0)
    """
    robust = training == "robust"
    return TrainConfig(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        prior_scale=settings.prior_scale,
        kl_weight=settings.kl_weight,
        eps=settings.train_eps if robust else 0.0,
        lam=settings.lam if robust else 1.0,
        power=settings.power,
        ramp=settings.ramp,
        method=settings.method,
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line into checked settings; a mistake exits with status 2 and says what.

    Args:
        arguments: those after the program's name; None takes `sys.argv`.

    >>> found = parse(["sine", "--seed", "3", "--inference.members", "4"])
    >>> found.seed, found.inference.members
    (3, 4)
    """
    name, options = command.first(arguments, tuple(PRESETS), "problem", _overview)
    named, options = command.inference(options, tuple(METHODS))
    default = preset(name, named)
    return command.read(
        Settings,
        f"{command.program('regression')} {name}",
        options,
        default=default,
        validate=validate,
        description=command.description(Settings, name_of(default.inference), tuple(METHODS)),
    )


def validate(settings: Settings) -> None:
    """Raise a ValueError that names the option, its value and the way out, if one is wrong.

    >>> validate(dataclasses.replace(PRESETS["sine"], eps=-1.0))
    Traceback (most recent call last):
    ValueError: --eps must be a radius in [0, 100], in standard deviations of each feature
    (try 0.1), got -1.0
    """
    check(settings)
    told = [settings.data is not None, settings.target is not None]
    if told != [settings.preset == "table"] * 2:
        raise ValueError(
            "--data and --target name your own table and its target, and go with the problem "
            f"table: {command.program('regression')} table --data my.csv --target COLUMN"
        )
    if isinstance(settings.inference, BBB | IVON) and settings.kl_weight == 0:
        raise ValueError(
            f"--kl-weight must be > 0 with --inference {name_of(settings.inference)}, got 0: "
            "without its prior a posterior shrinks to a point; for that, use --inference map"
        )


def _overview() -> str:
    typed = command.program("regression")
    return (
        f"usage: {typed} {{diabetes,sine,table}} [OPTIONS]\n\n"
        f"{Settings.__doc__}\n\nproblems:\n{command.rows(DESCRIBED)}\n\n"
        f"inference methods (sine: ensemble, others: bbb, unless told):\n"
        f"{command.methods(tuple(METHODS))}\n\n"
        "Radii are in standard deviations of each feature over the training data.\n"
        f"Every setting is an option: {typed} sine --help lists them.\n"
        "diabetes and sine take about a minute each on one core, and download nothing."
    )
