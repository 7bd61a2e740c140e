import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import tyro

from bnncert.types import Algorithm
from experiments.setup import config as cfg
from experiments.setup import methods, upgrade
from experiments.setup.config import RunConfig
from experiments.setup.methods import METHODS, Task, name_of
from experiments.setup.presets import PRESETS, parse, preset
from experiments.setup.requirements import AtLeast1, OneOf, Requirement
from experiments.tasks.regression.settings import Settings


def with_option(option: str, value: object, base: Any = PRESETS["digits"]) -> Any:
    head, _, rest = option.partition(".")
    inner = with_option(rest, value, getattr(base, head)) if rest else value
    return dataclasses.replace(base, **{head: inner})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    options = ["--data", "my.npz"] if name == "my" else []
    config = dataclasses.replace(PRESETS[name], data=options[1] if options else None)
    cfg.validate(config)
    assert config.preset == name
    assert parse([name, *options]) == config
    moved = dataclasses.replace(config, data_dir=Path("a/b"), out=Path("c"))
    assert cfg.from_dict(json.loads(json.dumps(cfg.to_dict(moved)))) == moved


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_valid_and_survive_json(name: str) -> None:
    config = preset("mnist-mlp", name)
    cfg.validate(config)
    fields = json.loads(json.dumps(cfg.to_dict(config)))
    assert fields["inference"]["name"] == name == name_of(config.inference)
    assert cfg.from_dict(fields) == config == parse(["mnist-mlp", "--inference", name])


def test_a_config_written_before_a_setting_existed_has_its_default() -> None:
    fields = cfg.to_dict(PRESETS["digits"])
    for name in ("kl_ramp", "power_ramp"):
        del fields["train"][name]
    del fields["inference"]["guide"]
    assert cfg.from_dict(fields) == PRESETS["digits"]


def test_a_setting_or_method_that_is_not_known_is_named() -> None:
    for place, name in (("train", "train.xyzzy"), ("inference", "inference.xyzzy")):
        fields = cfg.to_dict(PRESETS["digits"])
        fields[place]["xyzzy"] = 1
        with pytest.raises(ValueError, match=rf"have {name}, which .* config.json"):
            cfg.from_dict(fields)
    for name in ("xyzzy", {"name": "xyzzy"}):
        with pytest.raises(ValueError, match="unknown inference method 'xyzzy'"):
            cfg.from_dict({**cfg.to_dict(PRESETS["digits"]), "inference": name})


EARLIER: dict[str, Any] = {
    "beta1": 0.8,
    "beta2": 0.99,
    "clip_step": 0.5,
    "clip_norm": 5.0,
    "initial_scale": 0.2,
    "members": 3,
    "collect_from": 0.5,
    "collect": 7,
    "guide": "low-rank",
    "rank": 9,
    "friction": 0.3,
    "curvature": "hessian",
    "mcmc_images": 11,
    "mcmc_warmup": 12,
    "mcmc_samples": 13,
    "mcmc_chains": 4,
    "mcmc_depth": 5,
}
"""What `train` held of every method, each other than its default."""

_START = {"initial_scale": 0.2, "clip_norm": 5.0, "guide": "low-rank", "rank": 9}
_GUIDED = _START | {"fit_prior": False}
_STEPS = {"initial_scale": 0.2, "clip_step": 0.5, "beta1": 0.8, "beta2": 0.99}
_CHAINS = {"images": 11, "warmup": 12, "samples": 13, "chains": 4, "depth": 5, "start": _GUIDED}
NOW: dict[str, dict[str, Any]] = {
    "map": {"clip_norm": 5.0},
    "bbb": _GUIDED,
    "vogn": _STEPS,
    "noisy-adam": _STEPS,
    "ivon": _STEPS,
    "swag": {"clip_norm": 5.0, "collect_from": 0.5, "collect": 7, "rank": 9},
    "ensemble": {"members": 3, "member": {"clip_norm": 5.0}},
    "laplace": {"curvature": "hessian", "mode": {"clip_norm": 5.0}},
    "sgld": {"collect_from": 0.5, "collect": 7},
    "sghmc": {"collect_from": 0.5, "collect": 7, "friction": 0.3},
    "hmc": _CHAINS,
    "nuts": _CHAINS,
}


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_earlier_versions_are_read(name: str) -> None:
    expected = preset("digits", name)
    fields = cfg.to_dict(expected)
    earlier = {**fields, "inference": name, "train": {**fields["train"], **EARLIER}}
    found = cfg.from_dict(json.loads(json.dumps(earlier)))
    assert dataclasses.asdict(found.inference) == NOW[name]  # pyright: ignore[reportArgumentType]
    assert dataclasses.replace(found, inference=expected.inference) == expected
    # Whatever was a method's is now in the methods that use it, and said to be there.
    assert EARLIER.keys() == upgrade.MOVED.keys()
    assert all(upgrade.place_of(field) for field in EARLIER)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train.members", "3"], "now: --inference ensemble --inference.members"),
        (["--train.mcmc-depth=3"], "now: --inference hmc --inference.depth, --inference nuts"),
        (["--inference", "swag", "--train.rank", "3"], "now: --inference swag --inference.rank\n"),
        (["--inference", "nuts", "--train.guide", "low-rank"], "--inference.start.guide\n"),
    ],
)
def test_an_option_that_has_moved_says_where(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["digits", *arguments])
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.kl-ramp": "0.2", "inference": "sgld"}, "--train.kl-ramp must be 0"),
        (
            {"inference.guide": "low-rank", "inference.rank": "0"},
            "--inference.rank must be at least 2",
        ),
        ({"train.ramp": "0.6", "train.power-ramp": "0.5"}, "fractions of one training, got 1.1"),
        ({"train.kl-weight": "0"}, "--train.kl-weight must be > 0 with --inference bbb, got 0"),
        (
            {"train.likelihood": "quantile", "inference": "map"},
            "--train.likelihood quantile is of a Gaussian posterior, and --inference map",
        ),
    ],
)
def test_settings_that_exclude_one_another(
    changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for name, value in changes.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit):
        parse(["digits", *options])
    assert message in capsys.readouterr().err


def test_the_presets_of_the_contract_exist() -> None:
    ours = ["digits", "mnist-mlp", "mnist-cnn", "fashion-mlp", "fashion-cnn", "cifar-cnn"]
    assert list(PRESETS) == [*ours, "my"]
    assert {"map", "bbb"} <= set(METHODS)
    assert PRESETS["cifar-cnn"].eval.eps == 2 / 255
    assert PRESETS["cifar-cnn"].train.flip


def fields_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every option of a dataclass, those of the dataclasses in it too, with its type."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        inner = dataclasses.is_dataclass(hint)
        found |= fields_of(hint, f"{prefix}{name}.") if inner else {prefix + name: hint}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_field_has_help_and_is_an_option(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["digits", "--inference", method, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    options = fields_of(METHODS[method], "inference.") | fields_of(RunConfig)
    for name in options:
        flag = "--" + name.replace("_", "-")
        assert (flag + " " in text or flag + "," in text) == (name != "preset"), flag
    said = " ".join(text.replace("│", " ").split())
    assert "units of pixels in [0, 1]" in said
    assert not re.findall(r"--\S+ [A-Z]+ \(default", said)  # an option without help
    assert (METHODS[method].__doc__ or "").splitlines()[0] in said


@dataclass(frozen=True)
class Mine:
    """Somebody's own method."""

    speed: AtLeast1 = 3
    """Of it."""
    kind: Annotated[str, tyro.conf.arg(help="Which.")] = "good"

    def build(self, task: Task) -> Algorithm:
        raise NotImplementedError


def test_a_further_method_is_a_class_and_a_line_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "mine", Mine)
    config = parse(["digits", "--inference", "mine", "--inference.speed", "5"])
    assert config.inference == Mine(speed=5)
    assert cfg.output_folder(config).name == "digits-mine-seed0"
    assert cfg.from_dict(json.loads(json.dumps(cfg.to_dict(config)))) == config
    with pytest.raises(SystemExit):
        parse(["digits", "--inference", "mine", "--inference.speed", "0"])
    assert "--inference.speed must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "mine        Somebody's own method" in capsys.readouterr().out


def test_options_override(tmp_path: Path) -> None:
    options = "--inference map --seed 4 --resume --train.flip --eval.attack-steps 7"
    drops = ["--train.learning-rate-drops", "0.5", "0.6"]
    config = parse(["mnist-cnn", *options.split(), *drops, "--data-dir", str(tmp_path)])
    assert (name_of(config.inference), config.seed, config.data_dir, config.resume) == (
        "map",
        4,
        tmp_path,
        True,
    )
    assert config.train.learning_rate_drops == (0.5, 0.6)
    assert config.train.flip
    assert config.eval.attack_steps == 7
    assert config.train.eps == PRESETS["mnist-cnn"].train.eps
    assert cfg.output_folder(config) == Path("runs/mnist-cnn-map-seed4")
    assert cfg.output_folder(dataclasses.replace(config, out=tmp_path)) == tmp_path


def test_defaults_that_depend_on_the_method_give_way_to_options() -> None:
    assert parse(["digits", "--inference", "vogn"]).train.learning_rate == 0.3
    asked = parse(["digits", "--train.learning-rate", "0.01", "--inference=vogn"])
    assert asked.train.learning_rate == 0.01
    assert asked.inference == methods.VOGN(clip_step=0.00667)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["minst-cnn"], "unknown preset 'minst-cnn': did you mean 'mnist-cnn'?"),
        (["--seed", "1", "digits"], "the preset comes first"),
        (["digits", "--inference", "bbc"], "did you mean 'bbb'?"),
        (["digits", "--inference"], "unknown inference method ''"),
        (["digits", "--dataset", "minst"], "did you mean 'mnist'?"),
        (["digits", "--train.eps", "nan"], "--train.eps must be a radius in [0, 1]"),
        (["digits", "--train.epoch", "3"], "--train.epochs"),
        (["digits", "--train.epochs", "many"], "many"),
    ],
)
def test_a_mistake_exits_and_says_what(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(args)
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert says in output.err + output.out


def test_no_arguments_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse([])
    assert exit.value.code == 2
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("seed", [-1, 2**32]),
        ("train.epochs", [0, -3]),
        ("train.batch_size", [0]),
        ("train.learning_rate", [0.0, -1.0, NAN, INF]),
        ("train.learning_rate_decay", [0.0, NAN]),
        ("train.learning_rate_drops", [(0.9, 0.5), (0.0,), (0.5, 1.0), (NAN,)]),
        ("inference.clip_norm", [0.0, NAN]),
        ("train.prior_scale", [0.0, -0.1, NAN]),
        ("train.kl_weight", [-1.0, NAN, INF]),
        ("inference.initial_scale", [0.0, NAN]),
        ("train.eps", [-0.1, NAN, 8.0]),
        ("train.lam", [-0.1, 1.1, NAN]),
        ("train.power", [-0.1, 1.1, NAN]),
        ("train.power_ramp", [-0.1, 1.1, NAN]),
        ("train.kl_ramp", [-0.1, 1.1, NAN]),
        ("train.warmup", [-0.1, 1.1, NAN]),
        ("train.ramp", [-0.1, 1.1, NAN]),
        ("train.validation", [-1]),
        ("eval.eps", [-0.1, NAN, 2.0]),
        ("eval.num_samples", [0]),
        ("eval.attack_steps", [-1]),
        ("eval.attack_restarts", [0]),
        ("eval.curve_points", [1]),
        ("eval.curve_images", [0]),
        ("eval.batch_size", [0]),
    ],
)
def test_validate_names_the_option_and_the_value(option: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValueError) as raised:
            cfg.validate(with_option(option, value))
        assert f"--{option.replace('_', '-')} must be" in str(raised.value)
        assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("method", "option", "values"),
    [
        ("ivon", "beta1", [1.0, NAN]),
        ("ivon", "beta2", [-0.1, NAN]),
        ("vogn", "clip_step", [0.0, NAN]),
        ("swag", "rank", [1, -2]),
        ("swag", "collect_from", [1.0, NAN]),
        ("sgld", "collect", [0]),
        ("sghmc", "friction", [0.0, 1.5, NAN]),
        ("ensemble", "members", [0]),
        ("ensemble", "member.clip_norm", [0.0]),
        ("hmc", "samples", [3]),
        ("hmc", "images", [0]),
        ("nuts", "warmup", [-1]),
        ("nuts", "start.rank", [1]),
    ],
)
def test_settings_of_methods_are_named_as_well(
    method: str, option: str, values: list[object]
) -> None:
    for value in values:
        wrong = with_option(f"inference.{option}", value, preset("digits", method))
        with pytest.raises(ValueError) as raised:
            cfg.validate(wrong)
        assert f"--inference.{option.replace('_', '-')} must be" in str(raised.value)
        assert str(value) in str(raised.value)


@pytest.mark.parametrize("kind", [RunConfig, Settings, *METHODS.values()])
def test_every_number_has_a_requirement_and_every_name_its_choices(kind: type[Any]) -> None:
    """A numeric option added without one would accept NaN or a negative value."""
    for name, hint in fields_of(kind).items():
        told = {type(one) for one in getattr(hint, "__metadata__", ())}
        plain = hint.__origin__ if hasattr(hint, "__metadata__") else hint
        if plain in (int, float, tuple[float, ...]):
            assert Requirement in told, name
        if plain is str and name != "preset":
            assert OneOf in told, name


def test_warmup_and_ramp_fit_into_training() -> None:
    train = dataclasses.replace(PRESETS["digits"].train, warmup=0.7, ramp=0.7)
    with pytest.raises(ValueError, match=r"warmup and --train.ramp .* got 1.4"):
        cfg.validate(dataclasses.replace(PRESETS["digits"], train=train))


@pytest.mark.parametrize(
    "field", ["dataset", "model", "train.likelihood", "eval.certify_method", "inference.guide"]
)
def test_unknown_names_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"unknown .* 'xyzzy'"):
        cfg.validate(with_option(field, "xyzzy"))


def test_each_inference_method_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"{name} " in text and methods.about(name) in text for name in METHODS)
    assert all(len(methods.about(name)) > 20 for name in METHODS)
