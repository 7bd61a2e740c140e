"""The settings that every run has, whatever its method: of training, and of evaluation.

Every field is an option of the command line: its docstring is the help, its type says what the
value has to be (`experiments.setup.requirements`).
"""

from dataclasses import dataclass
from typing import Annotated

from .requirements import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    NotNegative,
    PixelRadius,
    Positive,
    Requirement,
    Share,
    one_of,
)

PIXELS = (0.0, 1.0)
"""The adversary stays in the range of pixels, in training, certificate and attack alike."""

LIKELIHOODS = ("certified", "quantile", "attacked", "clean")
TRAIN_METHODS = ("ibp", "crown-ibp")
RANDOM_LAYERS = ("all", "last")
CERTIFY_METHODS = ("ibp", "crown-ibp", "crown")

Drops = Annotated[
    tuple[float, ...],
    Requirement(
        "increasing fractions between 0 and 1",
        lambda v: all(0 < drop < 1 for drop in v) and list(v) == sorted(v),
    ),
]


@dataclass(frozen=True)
class TrainConfig:
    """How the posterior is trained."""

    epochs: AtLeast1 = 25
    """Passes over the training images."""
    batch_size: AtLeast1 = 128
    """Training images in a minibatch."""
    learning_rate: Positive = 2e-3
    """Step size at the start, of the steps that the inference method takes: its default depends on
    the method."""
    learning_rate_drops: Drops = (0.75, 0.9)
    """Where the learning rate drops, as fractions of training."""
    learning_rate_decay: Positive = 0.2
    """The factor the learning rate is multiplied by at each drop."""
    prior_scale: Positive = 0.1
    """Standard deviation of the normal prior of each weight."""
    kl_weight: NotNegative = 0.02
    """Weight of KL(q || prior) in the ELBO; 1 is the ELBO itself, less tempers the posterior."""
    kl_ramp: Share = 0.0
    """Fraction of training over which that weight goes linearly up, from a tenth of it; 0: it is
    constant."""
    eps: PixelRadius = 0.1
    """Largest radius of the training threat: l_inf, in units of pixels in [0, 1]."""
    lam: Share = 0.25
    """Weight of the clean term in the robust likelihood after the ramp; 1: an ordinary network."""
    power: Share = 0.0
    """Exponent of the mixture of clean and worst-case likelihood: 0 geometric, 1 arithmetic."""
    power_ramp: Share = 0.0
    """Fraction of training, after the ramp of eps, over which power goes linearly up from 0; 0: it
    is constant from the start."""
    warmup: Share = 0.0
    """Fraction of training before the ramp, at eps 0 and lam 1."""
    ramp: Share = 0.4
    """Fraction of training over which eps goes linearly up from 0, and lam down from 1."""
    likelihood: Annotated[str, *one_of("likelihood", LIKELIHOODS)] = "certified"
    """Error model: the certified worst case of a draw, or of all but a small share of the
    posterior, without draws (quantile); one found by PGD (adversarial training); or none."""
    depth: NotNegative = 3.0
    """Of the quantile likelihood: how many deviations below their means margins are taken."""
    method: Annotated[str, *one_of("bound method of training", TRAIN_METHODS)] = "ibp"
    """Bounds inside the certified likelihood."""
    attack_steps: AtLeast1 = 7
    """Steps of PGD inside the attacked likelihood."""
    random_layers: Annotated[str, *one_of("choice of random layers", RANDOM_LAYERS)] = "all"
    """Layers that have a posterior; the others are deterministic."""
    validation: AtLeast0 = 1000
    """Training images held out, to follow training on; 0 holds out none."""
    flip: bool = False
    """Flip training images left to right at random."""


@dataclass(frozen=True)
class EvalConfig:
    """How the trained posterior is certified and attacked."""

    eps: PixelRadius = 0.1
    """Radius of the test threat: l_inf, in units of pixels in [0, 1]."""
    num_samples: AtLeast1 = 16
    """Posterior samples deployed; their average is the predictor that is certified."""
    attack_steps: AtLeast0 = 10
    """Steps of PGD."""
    attack_restarts: AtLeast1 = 1
    """Random starts of PGD."""
    certify_method: Annotated[str, *one_of("bound method of certificates", CERTIFY_METHODS)] = (
        "crown-ibp"
    )
    """Bounds of the certificates."""
    curve_points: AtLeast2 = 9
    """Radii at which the curve of accuracy over eps is computed, 0 included."""
    curve_images: AtLeast1 = 500
    """Test images the curve is computed on."""
    batch_size: AtLeast1 = 256
    """Test images bounded or attacked at once; memory grows with it."""
