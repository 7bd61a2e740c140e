import dataclasses
import json
import typing
from pathlib import Path

import pytest

from experiments import config as cfg
from experiments import inference
from experiments import settings as stg


def with_option(option: str, value: object) -> stg.RunConfig:
    base = cfg.PRESETS["digits"]
    *section, name = option.split(".")
    if not section:
        return dataclasses.replace(base, **{name: value})
    part = dataclasses.replace(getattr(base, section[0]), **{name: value})
    return dataclasses.replace(base, **{section[0]: part})


@pytest.mark.parametrize("name", cfg.PRESETS)
def test_presets_are_valid_and_survive_json(name: str) -> None:
    config = cfg.PRESETS[name]
    stg.validate(config)
    assert config.preset == name
    assert cfg.parse([name]) == config
    moved = dataclasses.replace(config, data_dir=Path("a/b"), out=Path("c"))
    assert stg.from_dict(json.loads(json.dumps(stg.to_dict(moved)))) == moved


def test_a_config_written_before_a_setting_existed_has_its_default() -> None:
    fields = stg.to_dict(cfg.PRESETS["digits"])
    for name in ("kl_ramp", "power_ramp", "guide"):
        del fields["train"][name]
    assert stg.from_dict(fields) == cfg.PRESETS["digits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.kl-ramp": "0.2", "inference": "sgld"}, "--train.kl-ramp must be 0"),
        ({"train.guide": "low-rank", "train.rank": "0"}, "--train.rank must be at least 2"),
        ({"train.ramp": "0.6", "train.power-ramp": "0.5"}, "fractions of one training, got 1.1"),
    ],
)
def test_settings_that_exclude_one_another(
    changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for name, value in changes.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit):
        cfg.parse(["digits", *options])
    assert message in capsys.readouterr().err


def test_the_presets_of_the_contract_exist() -> None:
    expected = ["digits", "mnist-mlp", "mnist-cnn", "fashion-mlp", "fashion-cnn", "cifar-cnn"]
    assert list(cfg.PRESETS) == expected
    assert {"map", "bbb"} <= set(stg.INFERENCES)
    assert cfg.PRESETS["cifar-cnn"].eval.eps == 2 / 255
    assert cfg.PRESETS["cifar-cnn"].train.flip


def test_every_field_has_help_and_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cfg.parse(["digits", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for prefix, kind in [
        ("", stg.RunConfig),
        ("train.", stg.TrainConfig),
        ("eval.", stg.EvalConfig),
    ]:
        for field in dataclasses.fields(kind):
            flag = "--" + (prefix + field.name).replace("_", "-")
            if field.name in ("train", "eval"):
                continue
            assert (flag + " " in text or flag + "," in text) == (field.name != "preset"), flag
    assert "units of pixels in [0, 1]" in " ".join(text.replace("│", " ").split())


def test_options_override(tmp_path: Path) -> None:
    options = "--inference map --seed 4 --resume --train.flip --eval.attack-steps 7"
    drops = ["--train.learning-rate-drops", "0.5", "0.6"]
    config = cfg.parse(["mnist-cnn", *options.split(), *drops, "--data-dir", str(tmp_path)])
    assert (config.inference, config.seed, config.data_dir, config.resume) == (
        "map",
        4,
        tmp_path,
        True,
    )
    assert config.train.learning_rate_drops == (0.5, 0.6)
    assert config.train.flip
    assert config.eval.attack_steps == 7
    assert config.train.eps == cfg.PRESETS["mnist-cnn"].train.eps
    assert cfg.output_folder(config) == Path("runs/mnist-cnn-map-seed4")
    assert cfg.output_folder(dataclasses.replace(config, out=tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["minst-cnn"], "unknown preset 'minst-cnn': did you mean 'mnist-cnn'?"),
        (["--seed", "1", "digits"], "the preset comes first"),
        (["digits", "--inference", "bbc"], "did you mean 'bbb'?"),
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
        cfg.parse(args)
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert says in output.err + output.out


def test_no_arguments_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cfg.parse([])
    assert exit.value.code == 2
    text = capsys.readouterr().out
    assert all(name in text for name in cfg.PRESETS)


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
        ("train.clip_norm", [0.0, NAN]),
        ("train.prior_scale", [0.0, -0.1, NAN]),
        ("train.kl_weight", [-1.0, NAN, INF]),
        ("train.initial_scale", [0.0, NAN]),
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
            stg.validate(with_option(option, value))
        assert f"--{option.replace('_', '-')} must be" in str(raised.value)
        assert str(value) in str(raised.value)


def test_every_number_has_a_requirement() -> None:
    """A numeric option added without one would accept NaN or a negative value."""
    required = {option for _, _, options in stg._REQUIREMENTS for option in options}
    numeric = {"seed"}
    for prefix, kind in [("train", stg.TrainConfig), ("eval", stg.EvalConfig)]:
        for name, hint in typing.get_type_hints(kind).items():
            if hint in (int, float, tuple[float, ...]):
                numeric.add(f"{prefix}.{name}")
    assert required == numeric


def test_warmup_and_ramp_fit_into_training() -> None:
    train = dataclasses.replace(cfg.PRESETS["digits"].train, warmup=0.7, ramp=0.7)
    with pytest.raises(ValueError, match=r"warmup and --train.ramp .* got 1.4"):
        stg.validate(dataclasses.replace(cfg.PRESETS["digits"], train=train))


@pytest.mark.parametrize("field", ["dataset", "model", "inference"])
def test_unknown_names_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"unknown .* 'xyzzy'"):
        stg.validate(with_option(field, "xyzzy"))


def test_each_inference_method_is_built_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(stg.INFERENCES) == list(inference.BUILDERS)
    assert set(inference.REFINEMENTS) <= set(inference.BUILDERS)
    with pytest.raises(SystemExit):
        cfg.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"{name} " in text and about in text for name, about in stg.INFERENCES.items())
