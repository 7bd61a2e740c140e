"""The settings of a run: frozen dataclasses, what each has to be, and how JSON holds them.

Every field is an option of the command line; a field's docstring is its help.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.data import DATASETS, check_name
from experiments.models import MODELS

INFERENCES: dict[str, str] = {
    "map": "one network, the mode of the robust posterior",
    "bbb": "Bayes by Backprop: mean-field variational inference",
    "vogn": "natural gradients; curvature by squared gradients of single images",
    "noisy-adam": "natural gradients; curvature by squared gradients of minibatches",
    "ivon": "natural gradients; curvature by Price's theorem",
    "swag": "a Gaussian fitted to the last iterates of map",
    "ensemble": "several networks of map",
    "laplace": "map, then a Gaussian over the last layer",
    "sgld": "stochastic-gradient Langevin dynamics",
    "sghmc": "stochastic-gradient Hamiltonian Monte Carlo: sgld with momentum",
    "hmc": "bbb, then HMC on some of the images, started at its mean",
    "nuts": "bbb, then NUTS on some of the images, started at its mean",
}
"""Inference methods by their names on the command line."""

PIXELS = (0.0, 1.0)
"""The adversary stays in the range of pixels, in training, certificate and attack alike."""

LIKELIHOODS = ("certified", "attacked", "clean")
TRAIN_METHODS = ("ibp", "crown-ibp")
RANDOM_LAYERS = ("all", "last")
CURVATURES = ("fisher", "hessian")
GUIDES = ("mean-field", "low-rank")
CERTIFY_METHODS = ("ibp", "crown-ibp", "crown")


def _choice(names: Sequence[str]) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


@dataclass(frozen=True)
class TrainConfig:
    """How the posterior is trained."""

    epochs: int = 25
    """Passes over the training images."""
    batch_size: int = 128
    """Training images in a minibatch."""
    learning_rate: float = 2e-3
    """Step size at the start: Adam's, that of the natural gradient (vogn, noisy-adam, ivon), or of
    the gradient of the loss per image (sgld, sghmc)."""
    learning_rate_drops: tuple[float, ...] = (0.75, 0.9)
    """Where the learning rate drops, as fractions of training."""
    learning_rate_decay: float = 0.2
    """The factor the learning rate is multiplied by at each drop."""
    clip_norm: float = 10.0
    """Largest global norm of a gradient (nats per image per unit of parameter)."""
    prior_scale: float = 0.1
    """Standard deviation of the normal prior of each weight."""
    kl_weight: float = 0.02
    """Weight of KL(q || prior) in the ELBO; 1 is the ELBO itself, less tempers the posterior."""
    kl_ramp: float = 0.0
    """Fraction of training over which that weight goes linearly up, from a tenth of it (not sgld,
    sghmc); 0: it is constant."""
    initial_scale: float = 0.1
    """Posterior standard deviation at the start, relative to that of the weights' initialisation
    (sqrt(2 pi) / fan_in)."""
    eps: float = 0.1
    """Largest radius of the training threat: l_inf, in units of pixels in [0, 1]."""
    lam: float = 0.25
    """Weight of the clean term in the robust likelihood after the ramp; 1: an ordinary network."""
    power: float = 0.0
    """Exponent of the mixture of clean and worst-case likelihood: 0 geometric, 1 arithmetic."""
    power_ramp: float = 0.0
    """Fraction of training, after the ramp of eps, over which power goes linearly up from 0; 0: it
    is constant from the start."""
    warmup: float = 0.0
    """Fraction of training before the ramp, at eps 0 and lam 1."""
    ramp: float = 0.4
    """Fraction of training over which eps goes linearly up from 0, and lam down from 1."""
    likelihood: Annotated[str, _choice(LIKELIHOODS)] = "certified"
    """Error model: the certified worst case, one found by PGD (adversarial training), or none."""
    method: Annotated[str, _choice(TRAIN_METHODS)] = "ibp"
    """Bounds inside the certified likelihood."""
    attack_steps: int = 7
    """Steps of PGD inside the attacked likelihood."""
    random_layers: Annotated[str, _choice(RANDOM_LAYERS)] = "all"
    """Layers that have a posterior; the others are deterministic."""
    beta1: float = 0.9
    """Decay of the mean of gradients (vogn, noisy-adam, ivon)."""
    beta2: float = 0.999
    """Decay of the mean of curvatures (vogn, noisy-adam, ivon)."""
    clip_step: float = 1.0
    """Largest natural gradient of a weight, in its units (vogn, noisy-adam, ivon)."""
    members: int = 5
    """Networks of an ensemble."""
    collect_from: float = 0.75
    """Fraction of training after which weights are collected (swag, sgld, sghmc)."""
    collect: int = 40
    """Weights collected from there on, evenly (swag, sgld, sghmc)."""
    guide: Annotated[str, _choice(GUIDES)] = "mean-field"
    """Family of normals that bbb fits: of covariance diagonal, or diagonal plus low rank."""
    rank: int = 20
    """Rank of the covariance's other part: factors of bbb's low-rank guide, or deviations collected
    by swag; 0 (swag): diagonal."""
    friction: float = 0.1
    """Share of the momentum that a step of sghmc loses."""
    curvature: Annotated[str, _choice(CURVATURES)] = "fisher"
    """Of laplace: the empirical Fisher matrix, or the exact Hessian (slow beyond 2,000 weights)."""
    mcmc_images: int = 1000
    """Training images, the first ones, that hmc and nuts sample with: all of them in each step."""
    mcmc_warmup: int = 50
    """Draws of each chain that adapt, and are discarded (hmc, nuts)."""
    mcmc_samples: int = 8
    """Draws of each chain that are kept (hmc, nuts)."""
    mcmc_chains: int = 2
    """Chains side by side (hmc, nuts)."""
    mcmc_depth: int = 6
    """A draw takes 2^depth leapfrog steps (hmc), or at most one less (nuts)."""
    validation: int = 1000
    """Training images held out, to follow training on; 0 holds out none."""
    flip: bool = False
    """Flip training images left to right at random."""


@dataclass(frozen=True)
class EvalConfig:
    """How the trained posterior is certified and attacked."""

    eps: float = 0.1
    """Radius of the test threat: l_inf, in units of pixels in [0, 1]."""
    num_samples: int = 16
    """Posterior samples deployed; their average is the predictor that is certified."""
    attack_steps: int = 10
    """Steps of PGD."""
    attack_restarts: int = 1
    """Random starts of PGD."""
    certify_method: Annotated[str, _choice(CERTIFY_METHODS)] = "crown-ibp"
    """Bounds of the certificates."""
    curve_points: int = 9
    """Radii at which the curve of accuracy over eps is computed, 0 included."""
    curve_images: int = 500
    """Test images the curve is computed on."""
    batch_size: int = 256
    """Test images bounded or attacked at once; memory grows with it."""


@dataclass(frozen=True)
class RunConfig:
    """Train a certified Bayesian neural network, certify it, attack it, and report."""

    preset: tyro.conf.Suppress[str]
    """The preset this started from."""
    dataset: Annotated[str, _choice(DATASETS)]
    """Data set; all but digits are read from a folder prepared by TensorFlow Datasets."""
    model: Annotated[str, _choice(tuple(MODELS))]
    """Network: mlp (one hidden layer of 512), cnn (two convolutions, a hidden layer of 100), or
    cnn-bn (with batch-norm before each ReLU)."""
    inference: Annotated[str, _choice(tuple(INFERENCES))] = "bbb"
    """Inference method; its settings are under train, their defaults depend on it."""
    seed: int = 0
    """Fixes the initialisation, the order of the data, the posterior samples and the attack."""
    data_dir: Path | None = None
    """TFDS data folder. Default: TFDS's own, ~/tensorflow_datasets."""
    out: Path | None = None
    """Output folder, a new one. Default: runs/PRESET-INFERENCE-seedSEED."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def validate(config: RunConfig) -> None:
    """Raise a ValueError that names the option, its value and the way out, if one is wrong.

    >>> from experiments.config import PRESETS
    >>> validate(dataclasses.replace(PRESETS["digits"], seed=-1))
    Traceback (most recent call last):
    ValueError: --seed must be an integer in 0 .. 2**32 - 1, got -1
    """
    check_name(config.dataset, DATASETS, "data set")
    check_name(config.model, tuple(MODELS), "model")
    check_name(config.inference, tuple(INFERENCES), "inference method")
    check_name(config.train.likelihood, LIKELIHOODS, "likelihood")
    check_name(config.train.method, TRAIN_METHODS, "bound method of training")
    check_name(config.train.random_layers, RANDOM_LAYERS, "choice of random layers")
    check_name(config.eval.certify_method, CERTIFY_METHODS, "bound method of certificates")
    check_name(config.train.curvature, CURVATURES, "curvature of laplace")
    check_name(config.train.guide, GUIDES, "guide of bbb")
    for requirement, holds, options in _REQUIREMENTS:
        for option in options:
            value = _lookup(config, option)
            if not holds(value):
                raise ValueError(f"{_flag(option)} must be {requirement}, got {value}")
    if config.inference != "map" and config.train.kl_weight == 0:
        raise ValueError(
            f"--train.kl-weight must be > 0 with --inference {config.inference}, got 0: without "
            "its prior a posterior shrinks to a point; for that, use --inference map"
        )
    if config.inference in ("sgld", "sghmc") and config.train.kl_ramp:
        raise ValueError(
            f"--train.kl-ramp must be 0 with --inference {config.inference}, got "
            f"{config.train.kl_ramp}: a sampler has one target; collect later instead "
            "(--train.collect-from)"
        )
    if config.train.guide == "low-rank" and not config.train.rank:
        raise ValueError("--train.rank must be at least 2 with --train.guide low-rank, got 0")
    covered = config.train.warmup + config.train.ramp + config.train.power_ramp
    if covered > 1:
        raise ValueError(
            "--train.warmup and --train.ramp (and --train.power-ramp, which follows them) are "
            f"fractions of one training, got {covered} in all"
        )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as nested dicts that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(child) for name, child in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_dict(fields: Mapping[str, Any]) -> RunConfig:
    """Invert `to_dict`; a setting that is newer than the fields has its default.

    >>> from experiments.config import PRESETS
    >>> from_dict(to_dict(PRESETS["mnist-cnn"])) == PRESETS["mnist-cnn"]
    True
    """
    train = dict(fields["train"])
    train["learning_rate_drops"] = tuple(train["learning_rate_drops"])
    paths = {name: None if fields[name] is None else Path(fields[name])
             for name in ("data_dir", "out")}  # fmt: skip
    nested = {"train": TrainConfig(**train), "eval": EvalConfig(**fields["eval"])}
    return RunConfig(**{**fields, **paths, **nested})


_REQUIREMENTS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("an integer in 0 .. 2**32 - 1", lambda v: 0 <= v < 2**32, ("seed",)),
    (
        "at least 1",
        lambda v: v >= 1,
        (
            "train.epochs",
            "train.batch_size",
            "train.attack_steps",
            "train.members",
            "train.collect",
            "train.mcmc_images",
            "train.mcmc_chains",
            "train.mcmc_depth",
            "eval.num_samples",
            "eval.attack_restarts",
            "eval.curve_images",
            "eval.batch_size",
        ),
    ),
    ("at least 2", lambda v: v >= 2, ("eval.curve_points",)),
    (
        "at least 0",
        lambda v: v >= 0,
        ("train.validation", "train.mcmc_warmup", "eval.attack_steps"),
    ),
    ("at least 4, for R-hat", lambda v: v >= 4, ("train.mcmc_samples",)),
    ("0, or at least 2", lambda v: v == 0 or v >= 2, ("train.rank",)),
    ("a number in (0, 1]", lambda v: 0 < v <= 1, ("train.friction",)),
    ("a number in [0, 1)", lambda v: 0 <= v < 1, ("train.collect_from",)),
    (
        "a finite number > 0",
        lambda v: 0 < v < math.inf,
        (
            "train.learning_rate",
            "train.learning_rate_decay",
            "train.clip_norm",
            "train.clip_step",
            "train.prior_scale",
            "train.initial_scale",
        ),
    ),
    ("a finite number >= 0", lambda v: 0 <= v < math.inf, ("train.kl_weight",)),
    (
        "a radius in [0, 1], the range of a pixel (8/255, not 8)",
        lambda v: 0 <= v <= 1,
        ("train.eps", "eval.eps"),
    ),
    (
        "a number in [0, 1]",
        lambda v: 0 <= v <= 1,
        (
            "train.lam",
            "train.power",
            "train.warmup",
            "train.ramp",
            "train.kl_ramp",
            "train.power_ramp",
        ),
    ),
    ("a decay in [0, 1)", lambda v: 0 <= v < 1, ("train.beta1", "train.beta2")),
    (
        "increasing fractions between 0 and 1",
        lambda v: all(0 < drop < 1 for drop in v) and list(v) == sorted(v),
        ("train.learning_rate_drops",),
    ),
)
"""What each number has to be. Every comparison is written so that NaN fails it."""


def _lookup(config: RunConfig, option: str) -> Any:
    return functools.reduce(getattr, option.split("."), config)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
