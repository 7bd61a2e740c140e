"""What decides a run: its settings in one frozen dataclass, what they exclude, and their JSON."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, overload, runtime_checkable

import tyro

from .command import program
from .data import DATASETS
from .methods import BBB, MAP, Checked, Inference, method_of, name_of
from .models import MODELS
from .requirements import Seed, check, one_of
from .settings import EvalConfig, TrainConfig
from .upgrade import upgraded

NETWORKS = (*MODELS, "auto")


def _is_in_a_file(name: str) -> bool:
    return ".py:" in name


@runtime_checkable
class Run(Protocol):
    """The settings of a run of any task: a frozen dataclass with these fields among others."""

    @property
    def preset(self) -> str:
        """What it started from."""
        ...

    @property
    def inference(self) -> Inference:
        """The method with its own settings."""
        ...

    @property
    def seed(self) -> int:
        """Of all that is random."""
        ...

    @property
    def out(self) -> Path | None:
        """The folder that it writes, or None for `output_folder`'s."""
        ...

    @property
    def resume(self) -> bool:
        """Whether it goes on with the run that is there."""
        ...


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(frozen=True)
class RunConfig:
    """Train a certified Bayesian neural network, certify it, attack it, and report."""

    preset: tyro.conf.Suppress[str]
    """The preset this started from."""
    dataset: Annotated[str, *one_of("data set", (*DATASETS, "my"))]
    """Data set; all but digits and my (--data) are read from a folder prepared by TensorFlow
    Datasets."""
    model: Annotated[str, *one_of("model", NETWORKS, place=("FILE.py:NAME", _is_in_a_file))]
    """Network: mlp (one hidden layer of 512), cnn (two convolutions, a hidden layer of 100), cnn-bn
    (with batch-norm before each ReLU), resnet (three residual blocks), your own, FILE.py:NAME (a
    module of Flax, NNX or Equinox), or auto: mlp for small images, cnn for others."""
    data: str | None = None
    """Your own data, with the preset my: FILE.npz (x, y), a folder of class folders of images,
    tfds:NAME or hf:NAME."""
    inference: Inference = field(default_factory=BBB)
    seed: Seed = 0
    """Fixes the initialisation, the order of the data, the posterior samples and the attack."""
    data_dir: Path | None = None
    """TFDS data folder. Default: TFDS's own, ~/tensorflow_datasets. Of your own data, the folder
    where --data is now, if it moved."""
    out: Path | None = None
    """Output folder, a new one. Default: runs/PRESET-INFERENCE-seedSEED."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""
    start: Path | None = None
    """Folder of a finished run of the same network, at the means of whose posterior training
    begins. Default: a random initialisation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def validate(config: RunConfig) -> None:
    """Raise a ValueError that names the option, its value and the way out, if one is wrong.

    >>> from experiments.setup.presets import PRESETS
    >>> validate(dataclasses.replace(PRESETS["digits"], seed=-1))
    Traceback (most recent call last):
    ValueError: --seed must be an integer in 0 .. 2**32 - 1, got -1
    """
    check(config)
    train, method = config.train, config.inference
    if (config.dataset == "my") != (config.data is not None):
        raise ValueError(
            f"--data names your own data, and goes with the preset my: {program('run')} my --data "
            "my.npz"
        )
    if not isinstance(method, MAP) and train.kl_weight == 0:
        raise ValueError(
            f"--train.kl-weight must be > 0 with --inference {name_of(method)}, got 0: without "
            "its prior a posterior shrinks to a point; for that, use --inference map"
        )
    if train.likelihood == "quantile" and not isinstance(method, BBB):
        raise ValueError(
            "--train.likelihood quantile is of a Gaussian posterior, and --inference "
            f"{name_of(method)} has single networks: use --inference bbb, or another likelihood"
        )
    if _is_in_a_file(config.model) and train.random_layers == "last":
        raise ValueError(
            "--train.random-layers last: which layer of a network of your own is the last is not "
            "known; leave it at all, or use --model mlp or cnn"
        )
    if isinstance(method, Checked):
        method.check(train)
    covered = train.warmup + train.ramp + train.power_ramp
    if covered > 1:
        raise ValueError(
            "--train.warmup and --train.ramp (and --train.power-ramp, which follows them) are "
            f"fractions of one training, got {covered} in all"
        )


def output_folder(config: Run) -> Path:
    """Return the folder the run writes: `out`, or its default."""
    name = f"{config.preset}-{name_of(config.inference)}-seed{config.seed}"
    return Path("runs") / name if config.out is None else config.out


def to_dict(config: Run) -> dict[str, Any]:
    """Return the config as nested dicts that JSON can hold; the method's has its name besides."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(child) for name, child in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    fields = plain(dataclasses.asdict(config))  # pyright: ignore[reportArgumentType]
    return fields | {"inference": {"name": name_of(config.inference), **fields["inference"]}}


def options_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_dict` returned as options by their dotted names; the method's name is `inference`.

    >>> options_of({"seed": 1, "inference": {"name": "swag", "rank": 2}, "eval": {"eps": 0.1}})
    {'seed': 1, 'inference': 'swag', 'inference.rank': 2, 'eval.eps': 0.1}
    """
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            inner = {f"{name}.{option}": child for option, child in options_of(value).items()}
            if name == "inference":
                flat[name] = inner.pop("inference.name")
            flat |= inner
        else:
            flat[name] = value
    return flat


@overload
def from_dict(fields: Mapping[str, Any]) -> RunConfig: ...
@overload
def from_dict(fields: Mapping[str, Any], kind: type[AnyRun]) -> AnyRun: ...
def from_dict(fields: Mapping[str, Any], kind: type[Any] = RunConfig) -> Any:
    """Invert `to_dict`, and read what earlier versions wrote (`experiments.setup.upgrade`).

    A setting that is newer than the fields has its default.

    Args:
        fields: from a config.json.
        kind: the dataclass of a task's settings.

    Raises:
        ValueError: a setting, or a method, that this version does not know; names it.

    >>> from experiments.setup.presets import PRESETS
    >>> from_dict(to_dict(PRESETS["mnist-cnn"])) == PRESETS["mnist-cnn"]
    True
    """
    fields = upgraded(fields)
    method = dict(fields["inference"])
    named = method_of(method.pop("name"))
    known = {name: value for name, value in fields.items() if name != "inference"}
    found = _built(kind, known, "")
    return dataclasses.replace(found, inference=_built(named, method, "inference."))


def _built(kind: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    """A dataclass from its fields; tuples were lists, and paths text."""
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise ValueError(
                f"the run's settings have {where}{name}, which this version does not know: use "
                "the version that wrote them, or remove it from config.json if it changes nothing"
            )
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _built(typing.cast(Any, hints[name]), value, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and hints[name] == Path | None:
            value = Path(value)
        values[name] = value
    return kind(**values)
