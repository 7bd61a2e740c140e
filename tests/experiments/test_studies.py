"""The studies run on tiny settings, and the bounds they compare are bounds."""

import json

import numpy as np
import pytest

from experiments.studies import joint_bounds, roundoff, two_moons


def test_joint_bounds_on_digits(tmp_path, capsys):
    out = tmp_path / "joint.json"
    arguments = ["--dataset", "digits", "--members", "2", "--epochs", "2", "--images", "12"]
    arguments += ["--batch-size", "8", "--methods", "crown", "--out", str(out)]
    arguments += ["--forms", "corner-0"]
    joint_bounds.main(arguments)
    record = json.loads(out.read_text())
    rows = {(row["how"], row["form"]): row for row in record["rows"]}
    proved = {name: row["gap"] for name, row in rows.items() if row["method"] != "attack"}
    assert len(proved) == 2
    assert max(proved.values()) <= rows["joint", "pgd"]["gap"]
    assert proved["joint", "corner-0"] >= proved["separate", "corner-0"] - 1e-5
    for (how, form), row in rows.items():
        assert row["certified"] <= min(row["robust"], record["clean_accuracy"]), (how, form)
    with pytest.raises(SystemExit):
        joint_bounds.main(arguments)
    assert "exists" in capsys.readouterr().err


def test_sweep_of_rounding_errors(tmp_path, capsys):
    out = tmp_path / "roundoff.json"
    arguments = ["--functions", "exp", "tanh'", "--stride", "40009", "--out", str(out)]
    roundoff.main(arguments)
    record = json.loads(out.read_text())
    assert [row["function"] for row in record["rows"]] == ["exp", "tanh'"]
    assert all(0 < row["share"] <= 1 for row in record["rows"])
    with pytest.raises(SystemExit):
        roundoff.main(arguments)
    assert "exists: name a new file" in capsys.readouterr().err


def test_a_sweep_that_finds_too_large_an_error_fails(monkeypatch, capsys):
    exp = roundoff.cases()["exp"]
    monkeypatch.setattr(roundoff, "cases", lambda: {"exp": exp._replace(relative=0.5)})
    with pytest.raises(SystemExit, match=r"these need more .*: exp"):
        roundoff.main(["--stride", "40009"])


def test_two_moons(tmp_path, capsys):
    out = tmp_path / "moons.json"
    arguments = ["--data", "20", "--grid", "12", "--chains", "2", "--warmup", "20", "--depth", "4"]
    arguments += ["--draws", "20", "--steps", "400", "--members", "30", "--out", str(out)]
    arguments += ["--methods", "nuts", "svi", "cyclical"]
    two_moons.main(arguments)
    record = json.loads(out.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["nuts, another seed", "svi", "cyclical"]
    for row in rows.values():
        assert 0 < row["tv"] <= row["worst"] <= 1
        assert 0 < row["entropy"] <= np.log(2)
        assert row["accuracy"] > 0.6
    assert out.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        two_moons.main(arguments)
    assert "exists: name a new file" in capsys.readouterr().err
