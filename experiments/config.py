"""Presets, one a data set and model, and the command line that varies them.

    python -m experiments.run PRESET [--inference NAME] [--seed N] [--train.epochs N] ...

The settings themselves, and what they have to be, are in `experiments.settings`.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from experiments.data import check_name
from experiments.settings import INFERENCES, EvalConfig, RunConfig, TrainConfig, validate

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
}


_NATURAL: dict[str, Any] = {"learning_rate": 0.1, "clip_step": 0.02}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "vogn": {"learning_rate": 0.3, "clip_step": 0.00667},
    "noisy-adam": _NATURAL,
    "ivon": _NATURAL,
    "sgld": {"learning_rate": 0.04},
    "sghmc": {"learning_rate": 0.006},
}
"""What each method's training has different from the preset's.

By a natural gradient no weight moves by more than 0.002 in a step, the learning rate of Adam
elsewhere: with steps of up to 0.5 the small CNN is at chance from the first epoch on. Without
momentum or a preconditioner, with steps as short as those, it stays there (`experiments/results`).
"""


def preset(name: str, inference: str | None = None) -> RunConfig:
    """A preset with the settings of an inference method; None is the preset's own.

    >>> preset("mnist-cnn", "ivon").inference
    'ivon'
    """
    base = PRESETS[name]
    inference = base.inference if inference is None else inference
    train = dataclasses.replace(base.train, **METHOD_SETTINGS.get(inference, {}))
    return dataclasses.replace(base, inference=inference, train=train)


def parse(args: Sequence[str] | None = None) -> RunConfig:
    """Read the command line into a checked config; a mistake exits with status 2 and says what.

    Args:
        args: the arguments after the program's name; None takes `sys.argv`.

    >>> config = parse(["digits", "--seed", "3", "--train.epochs", "5"])
    >>> config.seed, config.train.epochs, output_folder(config).name
    (3, 5, 'digits-bbb-seed3')
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0 if args else 2)
    name, *options = args
    if name.startswith("-"):
        _exit(f"the preset comes first, got '{name}'. Presets: {', '.join(PRESETS)}.")
    try:
        check_name(name, tuple(PRESETS), "preset")
    except ValueError as error:
        _exit(str(error))
    config = tyro.cli(
        RunConfig,
        prog=f"python -m experiments.run {name}",
        default=preset(name, _asked_inference(options)),
        args=options,
    )
    try:
        validate(config)
    except ValueError as error:
        _exit(str(error))
    return config


def _asked_inference(options: Sequence[str]) -> str | None:
    """The inference method a command line names: other defaults depend on it."""
    for option, value in zip(options, [*options, ""][1:], strict=True):
        flag, equals, same = option.partition("=")
        if flag == "--inference":
            named = same if equals else value
            return named if named in INFERENCES else None  # `validate` refuses the others
    return None


def output_folder(config: RunConfig) -> Path:
    """Return the folder the run writes: `out`, or its default."""
    default = Path("runs") / f"{config.preset}-{config.inference}-seed{config.seed}"
    return default if config.out is None else config.out


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _overview() -> str:
    presets = {
        name: f"{config.model} on {config.dataset}, certified at eps {config.eval.eps:.4g}, "
        f"{config.train.epochs} epochs"
        for name, config in PRESETS.items()
    }
    return (
        "usage: python -m experiments.run PRESET [--inference METHOD] [OPTIONS]\n\n"
        f"{RunConfig.__doc__}\n\npresets:\n{_rows(presets)}\n\n"
        f"inference methods ({RunConfig.inference} unless told):\n{_rows(INFERENCES)}\n\n"
        "Every setting is an option: python -m experiments.run PRESET --help lists them.\n"
        "digits needs no download and takes less than two minutes on two cores."
    )


def _rows(described: Mapping[str, str]) -> str:
    width = max(map(len, described))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in described.items())
