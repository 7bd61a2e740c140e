"""The options of a regression, their presets, and the command line.

Every field of `Settings` is an option; its docstring is its help. Radii are in standard deviations
of each feature, over the training data, and targets are standardised likewise.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from experiments.setup.config import RunConfig
from experiments.setup.methods import BBB, IVON, MAP, Ensemble, Inference
from experiments.setup.requirements import check_name
from experiments.setup.settings import CERTIFY_METHODS, TRAIN_METHODS, EvalConfig, TrainConfig

INFERENCES: dict[str, str] = {
    "map": "one network, the mode of the robust posterior",
    "bbb": "Bayes by Backprop: mean-field variational inference",
    "ivon": "natural gradients; curvature by Price's theorem",
    "ensemble": "several networks of map",
}
TRAININGS = ("robust", "plain")
SPLITS = ("test", "validation")


def _choice(names: Sequence[str]) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


@dataclass(frozen=True)
class Settings:
    """Train a certified Bayesian regression, robust and plain, bound it, attack it, and draw it."""

    preset: tyro.conf.Suppress[str]
    """The problem: a key of `PRESETS`."""
    inference: Annotated[str, _choice(tuple(INFERENCES))] = "bbb"
    """Inference method."""
    training: Annotated[str, _choice((*TRAININGS, "both"))] = "both"
    """With the robust likelihood, the plain one (lam 1: an ordinary network), or one after the
    other with the same seed."""
    evaluate: Annotated[str, _choice(SPLITS)] = "test"
    """Which data the results are about; settings are chosen on validation, and test is looked at
    once."""
    seed: int = 0
    """Fixes initialisation, order of the data, posterior samples and attack; not the splits."""
    out: Path | None = None
    """Output folder, a new one. Default: runs/PRESET-INFERENCE-seedSEED."""
    eps: float = 0.1
    """Radius of the certificates and attacks: l_inf, in standard deviations of each feature."""
    train_eps: float = 0.1
    """Largest radius of the robust likelihood, in the same units."""
    lam: float = 0.5
    """Weight of the clean term in the robust likelihood after the ramp."""
    power: float = 0.0
    """Exponent of the mixture of clean and worst-case likelihood: 0 geometric, 1 arithmetic."""
    ramp: float = 0.5
    """Fraction of training over which the radius goes linearly up from 0, and lam down from 1."""
    noise_scale: float = 0.7
    """Standard deviation of the noise around the network, in standard deviations of the target."""
    method: Annotated[str, _choice(TRAIN_METHODS)] = "ibp"
    """Bounds inside the robust likelihood."""
    hidden: tuple[int, ...] = (50,)
    """Widths of the hidden layers."""
    epochs: int = 300
    """Passes over the training data, of each training."""
    batch_size: int = 64
    """Training data in a minibatch."""
    learning_rate: float = 3e-3
    """Adam's step size at the start (ivon: that of the natural gradient)."""
    prior_scale: float = 0.5
    """Standard deviation of the normal prior of each weight."""
    kl_weight: float = 0.1
    """Weight of KL(q || prior) in the ELBO (map, ensemble: of the log prior); 1 is the ELBO itself,
    less tempers the posterior (sine: 0.1 with bbb and ivon)."""
    initial_scale: float = 0.1
    """Posterior standard deviation at the start, relative to that of the weights' initialisation
    (bbb, ivon)."""
    members: int = 10
    """Networks of an ensemble."""
    num_samples: int = 32
    """Posterior samples deployed; their average is the predictor (ensemble: all members)."""
    certify_method: Annotated[str, _choice(CERTIFY_METHODS)] = "crown-ibp"
    """Bounds of the certificates."""
    attack_steps: int = 20
    """Gradient-sign steps of the attack from each start."""
    attack_restarts: int = 2
    """Starts of the attack: the datum itself, then random ones."""
    curve_points: int = 4
    """Radii of the curve of errors up to eps; as many lie between eps and twice eps."""


PRESETS: dict[str, Settings] = {
    "diabetes": Settings("diabetes"),
    "sine": Settings(
        "sine",
        inference="ensemble",
        eps=0.05,
        train_eps=0.05,
        noise_scale=0.2,  # what its noise is, standardised
        hidden=(32, 32),
        epochs=2000,
        batch_size=120,
        kl_weight=1.0,
    ),
}
DESCRIBED = {
    "diabetes": "442 patients, ten features (scikit-learn's, built in)",
    "sine": "a generated noisy sine of one feature, with a gap in it",
}
_IVON: dict[str, Any] = {"learning_rate": 0.1, "kl_weight": 0.1}
METHOD_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("diabetes", "ivon"): _IVON,
    ("sine", "ivon"): _IVON,
    ("sine", "bbb"): {"kl_weight": 0.1},
}
"""What an inference method has different from the preset's."""


def run_config(settings: Settings, training: str) -> RunConfig:
    """What schedules, methods and deployment of `experiments` go by, for one of `TRAININGS`.

    >>> plain = run_config(PRESETS["sine"], "plain").train
    >>> plain.eps, plain.lam
    (0.0, 1.0)
    """
    robust = training == "robust"
    train = TrainConfig(
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
    deployed = EvalConfig(num_samples=settings.num_samples)
    methods: dict[str, Inference] = {
        "map": MAP(),
        "bbb": BBB(initial_scale=settings.initial_scale),
        "ivon": IVON(initial_scale=settings.initial_scale),
        "ensemble": Ensemble(members=settings.members),
    }
    names = settings.preset, settings.preset, "mlp", methods[settings.inference]
    return RunConfig(*names, seed=settings.seed, train=train, eval=deployed)


def to_dict(settings: Settings) -> dict[str, Any]:
    """What decides a run's numbers, as JSON can hold it."""
    fields = dataclasses.asdict(settings) | {"hidden": list(settings.hidden)}
    del fields["out"]
    return fields


def output_folder(settings: Settings) -> Path:
    """The folder a run writes: `out`, or its default."""
    name = f"{settings.preset}-{settings.inference}-seed{settings.seed}"
    return Path("runs") / name if settings.out is None else settings.out


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line into checked settings; a mistake exits with status 2 and says what.

    Args:
        arguments: those after the program's name; None takes `sys.argv`.

    >>> found = parse(["sine", "--seed", "3"])
    >>> found.seed, str(output_folder(found))
    (3, 'runs/sine-ensemble-seed3')
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0 if arguments else 2)
    name, *options = arguments
    if name.startswith("-"):
        _exit(f"the problem comes first, got '{name}'. Problems: {', '.join(PRESETS)}.")
    try:
        check_name(name, tuple(PRESETS), "problem")
    except ValueError as error:
        _exit(str(error))
    program = f"python -m experiments.regression {name}"
    settings = tyro.cli(Settings, prog=program, default=PRESETS[name], args=options)
    if own := METHOD_DEFAULTS.get((name, settings.inference)):
        base = dataclasses.replace(PRESETS[name], **own)
        settings = tyro.cli(Settings, prog=program, default=base, args=options)
    try:
        validate(settings)
    except ValueError as error:
        _exit(str(error))
    return settings


def validate(settings: Settings) -> None:
    """Raise a ValueError that names the option, its value and the way out, if one is wrong.

    >>> validate(dataclasses.replace(PRESETS["sine"], eps=-1.0))
    Traceback (most recent call last):
    ValueError: --eps must be a radius in [0, 100], in standard deviations of each feature
    (try 0.1), got -1.0
    """
    check_name(settings.inference, tuple(INFERENCES), "inference method")
    check_name(settings.training, (*TRAININGS, "both"), "training")
    check_name(settings.evaluate, SPLITS, "split")
    check_name(settings.method, TRAIN_METHODS, "bound method of training")
    check_name(settings.certify_method, CERTIFY_METHODS, "bound method of certificates")
    for requirement, holds, options in _REQUIREMENTS:
        for option in options:
            value = getattr(settings, option)
            if not holds(value):
                flag = "--" + option.replace("_", "-")
                raise ValueError(f"{flag} must be {requirement}, got {value}")
    if settings.inference in ("bbb", "ivon") and settings.kl_weight == 0:
        raise ValueError(
            f"--kl-weight must be > 0 with --inference {settings.inference}, got 0: without its "
            "prior a posterior shrinks to a point; for that, use --inference map"
        )


_REQUIREMENTS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("an integer in 0 .. 2**32 - 1", lambda v: 0 <= v < 2**32, ("seed",)),
    (
        "at least 1",
        lambda v: v >= 1,
        (
            "epochs",
            "batch_size",
            "members",
            "num_samples",
            "attack_steps",
            "attack_restarts",
            "curve_points",
        ),
    ),
    (
        "widths of at least 1, one a hidden layer (try 32 32)",
        lambda v: len(v) > 0 and min(v) > 0,
        ("hidden",),
    ),
    (
        "a radius in [0, 100], in standard deviations of each feature (try 0.1)",
        lambda v: 0 <= v <= 100,
        ("eps", "train_eps"),
    ),
    ("a number in [0, 1]", lambda v: 0 <= v <= 1, ("lam", "power", "ramp")),
    (
        "a finite number > 0",
        lambda v: 0 < v < math.inf,
        ("noise_scale", "learning_rate", "prior_scale", "initial_scale"),
    ),
    ("a finite number >= 0", lambda v: 0 <= v < math.inf, ("kl_weight",)),
)
"""What each number has to be. Every comparison is written so that NaN fails it."""


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _overview() -> str:
    def rows(described: dict[str, str]) -> str:
        return "\n".join(f"  {name:<10}{text}" for name, text in described.items())

    return (
        "usage: python -m experiments.regression {diabetes,sine} [OPTIONS]\n\n"
        f"{Settings.__doc__}\n\nproblems:\n{rows(DESCRIBED)}\n\n"
        f"inference methods (diabetes: {PRESETS['diabetes'].inference}, sine: "
        f"{PRESETS['sine'].inference}, unless told):\n{rows(INFERENCES)}\n\n"
        "Radii are in standard deviations of each feature over the training data.\n"
        "Every setting is an option: python -m experiments.regression sine --help lists them.\n"
        "Either problem takes about a minute on one core, and downloads nothing."
    )
