"""Certificates and attacks added to a finished run: in order, and kept when stopped."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import attack, certify, run
from experiments.benchmarks import certificates as timed
from experiments.pipeline import finished
from experiments.pipeline.evaluation import SoundnessError
from experiments.setup.data import load
from experiments.studies import certificates

TINY = (
    "digits --train.epochs 3 --eval.num-samples 2 --eval.attack-steps 2 --eval.attack-restarts 1 "
    "--eval.certify-method ibp --eval.curve-points 2 --eval.curve-images 50"
).split()
CERTIFY = ["--method", "ibp", "crown-ibp", "--images", "60", "--batch-size", "32"]
ATTACK = "--attacks pgd transfer --steps 3 --images 60 --batch-size 32".split()
CERTIFIED, ATTACKED = "certify-ibp+crown-ibp-0.05", "attack-0.05-3x1"


def call(program: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and the errors."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            status = program.main(list(arguments))
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with nothing added."""
    folder = tmp_path_factory.mktemp("runs") / "original"
    status, _, errors = call(run, *TINY, "--out", str(folder))
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def added(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with a cascade of certificates and two attacks."""
    folder = tmp_path_factory.mktemp("runs") / "added"
    shutil.copytree(original, folder)
    for program, options in ((certify, CERTIFY), (attack, ATTACK)):
        status, printed, errors = call(program, str(folder), *options)
        assert status == 0, errors
        assert "of 60 images" in printed and "report.html" in printed
    return folder


def rows(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_what_the_run_wrote_stays_as_it_was(original: Path, added: Path) -> None:
    for path in original.iterdir():
        if path.is_file() and path.name != "report.html":
            assert path.read_bytes() == (added / path.name).read_bytes()
    new = {path.name for path in added.iterdir()} - {path.name for path in original.iterdir()}
    assert new == {
        f"{name}.{suffix}" for name in (CERTIFIED, ATTACKED) for suffix in ("npz", "json")
    }


def test_a_cascade_proves_what_its_first_method_does_and_more(original: Path, added: Path) -> None:
    found, its = rows(added, CERTIFIED), record(added, CERTIFIED)
    own = rows(original, "certificates")  # of IBP, at the same radius
    np.testing.assert_array_equal(found["label"], load("digits").test.y[:60])
    assert (found["certified"] >= own["certified"][:60]).all()
    assert found["certified"].sum() > own["certified"][:60].sum()
    first = found["stage"] == 0
    np.testing.assert_array_equal(found["certified"][first], own["certified"][:60][first])
    np.testing.assert_allclose(found["margin"][first], own["margin"][:60][first], atol=1e-5)
    assert (found["margin"] >= own["margin"][:60] - 1e-5).all()
    np.testing.assert_array_equal(found["robust"], found["margin"] > 0)
    assert its["certified_accuracy"] == found["certified"].mean()
    assert its["clean_accuracy"] == own["clean_correct"][:60].mean()
    assert sum(its["certified_by"].values()) == found["certified"].sum()
    assert its["eps"] == 0.05 and its["num_samples"] == 2 and its["tier"] == "exact"


def test_attacks_come_one_after_the_other_and_break_no_proof(original: Path, added: Path) -> None:
    found, its = rows(added, ATTACKED), record(added, ATTACKED)
    own = rows(original, "certificates")
    assert not (found["broken"] & rows(added, CERTIFIED)["certified"]).any()
    np.testing.assert_array_equal(found["broken"], found["margin"] <= 0)
    np.testing.assert_array_equal(found["broken"], found["predicted"] != found["label"])
    clean = own["clean_correct"][:60]
    np.testing.assert_array_equal(found["broken"] & (found["stage"] == 0), ~clean)
    assert (~found["broken"] <= clean).all() and found["broken"].sum() > (~clean).sum()
    assert its["attacked_accuracy"] == 1 - found["broken"].mean()
    assert its["clean_accuracy"] == pytest.approx(clean.mean())
    assert set(its["broken_by"]) == {"pgd", "transfer"}
    assert sum(its["broken_by"].values()) == found["broken"].sum() - (~clean).sum()
    # the third step is one more than the run's own attack took, from the same start
    assert found["broken"].sum() >= (own["attacked_margin"][:60] <= 0).sum() - 2


def test_the_report_shows_them(original: Path, added: Path) -> None:
    page = (added / "report.html").read_text()
    assert "More certificates and attacks" in page and "pgd&nbsp;" in page
    assert f"{100 * record(added, CERTIFIED)['certified_accuracy']:.1f}" in page
    assert "More certificates" not in (original / "report.html").read_text()


@pytest.mark.parametrize(
    ("program", "options", "name"), [(certify, CERTIFY, CERTIFIED), (attack, ATTACK, ATTACKED)]
)
def test_stopped_it_goes_on_where_it_was(
    original: Path,
    added: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    options: list[str],
    name: str,
) -> None:
    """Killed in the middle of a line of the second stage: the same numbers to the bit."""
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    append, lines = finished._append, []

    def stop(file: Any, line: Any) -> None:
        append(file, line)
        lines.append(line)
        if len(lines) == 4:  # the settings, two batches of the first stage, one of the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finished, "_append", stop)
        status, _, errors = call(program, str(folder), *options)
    assert status == 130 and "goes on from here" in errors
    assert not (folder / f"{name}.json").exists()
    partial = folder / f"{name}.jsonl"
    assert len(partial.read_text().splitlines()) == 4
    partial.write_text(partial.read_text() + '{"stage": "pgd", "ind')

    status, _, errors = call(program, str(folder), *options, "--images", "50")
    assert status == 1 and "num_images: 60 -> 50" in errors and "remove it" in errors
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(finished, "_append", lambda f, line: (append(f, line), again.append(line)))
        status, _, errors = call(program, str(folder), *options)
    assert status == 0, errors
    assert {line["stage"] for line in again}.isdisjoint({lines[1]["stage"]})
    assert not partial.exists()
    expected, found = rows(added, name), rows(folder, name)
    assert expected.keys() == found.keys()
    for column, values in expected.items():
        np.testing.assert_array_equal(found[column], values, err_msg=column)


def test_a_finished_result_is_kept_and_other_settings_do_not_overwrite_it(added: Path) -> None:
    before = (added / f"{CERTIFIED}.npz").read_bytes()
    status, printed, _ = call(certify, str(added), *CERTIFY)
    assert status == 0 and "of 60 images certified" in printed
    status, _, errors = call(certify, str(added), *CERTIFY, "--images", "40")
    assert status == 1 and "num_images: 60 -> 40" in errors
    assert (added / f"{CERTIFIED}.npz").read_bytes() == before


def test_an_attack_on_a_certified_image_stops_it(added: Path, tmp_path: Path) -> None:
    """A forged certificate, of l_inf and of a larger radius: it covers this attack as well."""
    folder = tmp_path / "run"
    shutil.copytree(added, folder)
    forged: dict[str, Any] = rows(folder, CERTIFIED)
    forged["certified"] = np.ones(60, bool)
    np.savez(folder / "certify-forged.npz", **forged)
    its = record(folder, CERTIFIED)
    (folder / "certify-forged.json").write_text(json.dumps({**its, "eps": 0.5}))
    pair = record(added, ATTACKED), rows(added, ATTACKED)
    for suffix in ("json", "npz"):
        (folder / f"{ATTACKED}.{suffix}").unlink()
    message = "is certified in certify-forged, but attack-0.05-3x1 changed its class"
    with pytest.raises(SoundnessError, match=message):
        finished.finish(folder, ATTACKED, *pair)
    assert not (folder / f"{ATTACKED}.json").exists()
    # of a smaller radius it says nothing about this attack
    (folder / "certify-forged.json").write_text(json.dumps({**its, "eps": 0.01}))
    finished.finish(folder, ATTACKED, *pair)
    assert record(folder, ATTACKED) == record(added, ATTACKED)


@pytest.mark.parametrize(
    ("program", "options", "status", "message"),
    [
        (certify, ["--radius", "8"], 2, r"--radius 8: a radius must be finite"),
        (certify, ["--eps", "8"], 2, r"--radius 8: a radius must be finite"),
        (attack, ["--radius", "8"], 2, r"--eps 8: a radius must be finite"),
        (certify, ["--method", "ibp", "ibp"], 2, "name each once"),
        (certify, ["--method", "corwn"], 2, "invalid choice: 'corwn'"),
        (
            certify,
            ["--method", "crown(slope=one)"],
            2,
            "the options: lower_slope=, unstable_only=",
        ),
        (certify, ["--method", "alpha-crown(steps=0)"], 2, "steps = 0"),
        (certify, ["--method", "ibp(steps=3)"], 2, "ibp has the options: none"),
        (certify, ["--unit-roundoff", "2"], 2, "give a number in (0, 0.5)"),
        (certify, ["--images", "400"], 1, "--images 400: the test set has 360"),
        (certify, ["--batch-size", "0"], 2, "--batch-size must be at least 1, got 0"),
        (attack, ["--eps", "-0.1"], 2, "--eps -0.1: a radius must be finite"),
        (attack, ["--steps", "0"], 2, "--steps must be at least 1, got 0"),
        (
            attack,
            ["--norm", "2", "--attacks", "square"],
            2,
            "--attacks square: it is for --norm inf",
        ),
    ],
)
def test_mistakes_are_named(
    original: Path, program: Any, options: list[str], status: int, message: str
) -> None:
    found, _, errors = call(program, str(original), *options)
    assert found == status and message in errors


def test_folders_that_hold_no_finished_run_are_named(tmp_path: Path) -> None:
    status, _, errors = call(certify, str(tmp_path / "no"))
    assert status == 1 and "there is no folder" in errors
    status, _, errors = call(attack, str(tmp_path))
    assert status == 1 and "it has no config.json" in errors


def test_joint_bounds_speak_of_float32_and_prove_no_less(added: Path):
    options = ["--method", "ibp", "joint", "--images", "20", "--batch-size", "10"]
    status, printed, errors = call(certify, str(added), *options)
    assert status == 0, errors
    record = json.loads((added / "certify-ibp+joint-0.05.json").read_text())
    assert record["arithmetic"] == "float32" and "ibp, joint" in printed
    joint, other = rows(added, "certify-ibp+joint-0.05"), rows(added, CERTIFIED)
    assert (joint["certified"] >= other["certified"][:20]).all()


def test_every_tier_of_a_run_in_parts(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "tiers.json"
    options = [str(original), "--images", "12", "--draws", "120", "--few", "1", "--batch-size", "8"]
    options += ["--out", str(out), "--parts"]
    parts = ["expectation", "radii", "statistical", "safety", "ood"]
    assert certificates.main([*options, "expectation"]) == 0
    assert certificates.main([*options, *parts]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == parts
    found = json.loads(out.read_text())["parts"]
    assert found["radii"]["mean_certified_radius"] <= found["radii"]["mean_attacked_radius"]
    each = found["statistical"]
    assert each["certified_accuracy_all_at_once"] <= each["certified_accuracy_each"]
    assert each["mean_margin_all_at_once"] < each["mean_margin_each"]
    accuracies = [row["certified_accuracy"] for row in found["expectation"]["rows"]]
    assert accuracies == sorted(accuracies, reverse=True)
    row = found["safety"]["rows"][0]
    assert row["sampled_lower"] <= row["sampled_upper"] and row["boxes_lower"] <= row["boxes_upper"]
    assert row["boxes_lower"] <= row["sampled_upper"]
    assert "no other data set" in found["ood"]["skipped"]
    with pytest.raises(SystemExit):
        certificates.main([*options, "radii", "--delta", "0.1"])
    assert "is of other settings" in capsys.readouterr().err


def test_certificates_are_timed(original: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--images", "10", "--samples", "3", "--batch-size", "4", "--methods", "ibp"]
    assert timed.main([str(original), *options]) == 0
    printed = capsys.readouterr().out
    assert "ibp: 10 images x 3 samples at radius 0.05" in printed and "GiB" in printed
    assert timed.main([str(original / "none"), *options]) == 1
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        timed.main([str(original), "--samples", "0"])
    assert "--samples 0: at least 1" in capsys.readouterr().err


def test_a_method_may_be_written_with_its_options(original: Path, tmp_path: Path) -> None:
    """Coarser arithmetic proves less, and alpha-CROWN no less than what it starts from."""
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    few = ["--images", "12", "--batch-size", "12"]
    for options in (
        ["--method", "crown-ibp"],
        ["--method", "crown-ibp", "--unit-roundoff", "0.00002"],
        ["--method", "alpha-crown(steps=2)"],
    ):
        status, _, errors = call(certify, str(folder), *options, *few)
        assert status == 0, errors
    names = ("crown-ibp", "crown-ibp-u2e-05", "alpha-crown-steps=2")
    fine, coarse, alpha = (rows(folder, f"certify-{name}-0.05") for name in names)
    assert (coarse["margin"] < fine["margin"]).all()
    assert (alpha["margin"] >= fine["margin"] - 1e-6).all()
    its = record(folder, "certify-crown-ibp-u2e-05-0.05")
    assert its["unit_roundoff"] == its_unit(its) == 2e-05


def its_unit(its: dict[str, Any]) -> float:
    return float(its["arithmetic"].removeprefix("unit roundoff "))
