"""Presets, one a data set and model, and the command line that varies them.

python -m experiments.run PRESET [--inference NAME] [--seed N] [--train.epochs N] ...
"""

import dataclasses
from collections.abc import Sequence

from . import command
from .config import RunConfig, validate
from .methods import METHODS, method_of, name_of
from .requirements import flag
from .settings import EvalConfig, TrainConfig
from .upgrade import MOVED, place_of

PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(
        "digits",
        dataset="digits",
        model="mlp",
        train=TrainConfig(epochs=60, eps=0.06, lam=0.5, validation=0),
        eval=EvalConfig(eps=0.05, attack_restarts=2, curve_images=360),
    ),
    "mnist-mlp": RunConfig(
        "mnist-mlp",
        dataset="mnist",
        model="mlp",
        train=TrainConfig(epochs=30, eps=0.12, lam=0.1),
        eval=EvalConfig(eps=0.1),
    ),
    "mnist-cnn": RunConfig(
        "mnist-cnn",
        dataset="mnist",
        model="cnn",
        train=TrainConfig(epochs=30, eps=0.15, lam=0.1),
        eval=EvalConfig(eps=0.1, certify_method="ibp"),
    ),
    "fashion-mlp": RunConfig(
        "fashion-mlp",
        dataset="fashion_mnist",
        model="mlp",
        train=TrainConfig(epochs=20, eps=0.11, lam=0.25),
        eval=EvalConfig(eps=0.1),
    ),
    "fashion-cnn": RunConfig(
        "fashion-cnn",
        dataset="fashion_mnist",
        model="cnn",
        train=TrainConfig(epochs=20, eps=0.11, lam=0.25),
        eval=EvalConfig(eps=0.1, certify_method="ibp"),
    ),
    "cifar-cnn": RunConfig(
        "cifar-cnn",
        dataset="cifar10",
        model="cnn",
        train=TrainConfig(epochs=20, eps=0.0085, lam=0.25, flip=True),
        eval=EvalConfig(eps=2 / 255, certify_method="ibp"),
    ),
    "my": RunConfig(
        "my",
        dataset="my",
        model="auto",
        train=TrainConfig(epochs=30, eps=10 / 255, lam=0.25, validation=0),
        eval=EvalConfig(eps=8 / 255),
    ),
}


def preset(name: str, inference: str | None = None) -> RunConfig:
    """A preset with an inference method; None is the preset's own.

    >>> preset("mnist-cnn", "ivon").train.learning_rate
    0.1
    """
    base = PRESETS[name]
    usual = name_of(base.inference)
    kind = method_of(inference or usual)
    # The steps of some methods are in other units than Adam's.
    rate = getattr(kind, "learning_rate", base.train.learning_rate)
    train = dataclasses.replace(base.train, learning_rate=rate)
    method = base.inference if inference in (None, usual) else kind()
    return dataclasses.replace(base, inference=method, train=train)


def parse(arguments: Sequence[str] | None = None) -> RunConfig:
    """Read the command line into a checked config; a mistake exits with status 2 and says what.

    Args:
        arguments: those after the program's name; None takes `sys.argv`.

    >>> config = parse(["digits", "--seed", "3", "--train.epochs", "5"])
    >>> config.seed, config.train.epochs, config.train.eps
    (3, 5, 0.06)
    """
    name, options = command.first(arguments, tuple(PRESETS), "preset", _overview)
    named, options = command.inference(options, tuple(METHODS))
    _refuse_moved(options, named)
    default = preset(name, named)
    return command.read(
        RunConfig,
        f"{command.program('run')} {name}",
        options,
        default=default,
        validate=validate,
        description=command.description(RunConfig, name_of(default.inference), tuple(METHODS)),
    )


def _refuse_moved(options: Sequence[str], inference: str | None) -> None:
    """Options that once held for every method, and are now those of the ones that use them."""
    for option in options:
        word = option.partition("=")[0]
        field = word.removeprefix("--train.").replace("-", "_")
        if word.startswith("--train.") and field in MOVED:
            places = place_of(field)
            its = {name: places[name] for name in places if name == inference} or places
            now = ", ".join(f"--inference {name} {flag(path)}" for name, path in its.items())
            command.refuse(f"{word} is an option of the methods that use it now: {now}")


def _overview() -> str:
    presets = {
        name: f"{config.model} on {config.dataset}, certified at eps {config.eval.eps:.4g}, "
        f"{config.train.epochs} epochs"
        for name, config in PRESETS.items()
    } | {"my": "your own images, --data FILE.npz or FOLDER, certified at eps 8/255, 30 epochs"}
    typed = command.program("run")
    return (
        f"usage: {typed} PRESET [--inference METHOD] [OPTIONS]\n\n"
        f"{RunConfig.__doc__}\n\npresets:\n{command.rows(presets)}\n\n"
        f"inference methods (bbb unless told):\n{command.methods(tuple(METHODS))}\n\n"
        f"Every setting is an option: {typed} PRESET --help lists them, with\n"
        "those of the method (--inference NAME).\n"
        "digits needs no download and takes less than two minutes on two cores."
    )
