"""A regression of somebody's own: a table of numbers, and what is no such table."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import regression
from experiments.tasks.regression import tables


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def table(rows: int = 40) -> str:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, rows))
    lines = [f"{x:.4f},{y:.4f},{2 * x - y + 5:.4f}" for x, y in zip(a, b, strict=True)]
    return "\n".join(["a,b,price", *lines, ""])


def test_a_table_is_parted_and_standardised_by_its_training_rows(tmp_path):
    found = tables.read(written(tmp_path / "my.csv", table()), "price")
    assert (found.name, found.features, found.target) == ("my", ("a", "b"), "price")
    assert [len(s.y) for s in (found.train, found.validation, found.test)] == [24, 8, 8]
    np.testing.assert_allclose(found.train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.train.y.std(), 1, rtol=1e-4)
    x = found.test.x * found.feature_sd + found.feature_mean
    y = found.test.y * found.target_sd + found.target_mean
    np.testing.assert_allclose(y, 2 * x[:, 0] - x[:, 1] + 5, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "--target price: .* has the columns a, b"),
        ("", "has the columns none"),
        ("price\n1\n", "no column besides price"),
        ("a,a,price\n1,2,3\n", "a come more than once"),
        ("a,price\n1,2\n1\n", "row 3: 1 values"),
        ("a,price\n1,2\nx,3\n", "row 3, column a: 'x' is no finite number"),
        ("a,price\n1,2\n,3\n", "row 3, column a: there is no value"),
        ("a,price\n1,nan\n", "row 2, column price"),
        ("a,price\n1,2\n3,4\n", "2 rows; give 10"),
        ("a,price\n" + "1,2\n1,3\n" * 10, "a has one value in all training rows"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        tables.read(written(tmp_path / "my.csv", text), "price")
    with pytest.raises(FileNotFoundError, match="with a header"):
        tables.read(tmp_path / "none.csv", "price")


def test_a_table_runs_from_its_file_to_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "my.csv", table())
    asked = ["table", "--data", "my.csv", "--target", "price", "--out", "run", "--epochs", "2",
             "--num-samples", "2", "--attack-steps", "1", "--hidden", "4",
             "--curve-points", "1"]  # fmt: skip
    assert regression.main(asked) == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "price" in report and "patients" not in report
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_data"] == 8
    assert regression.main([*asked, "--resume"]) == 0
    written(tmp_path / "my.csv", table(41))
    assert regression.main([*asked, "--resume"]) == 1
    assert "changed since this run began" in capsys.readouterr().err
    for wrong in (["table"], ["sine", "--data", "my.csv"], ["table", "--data", "my.csv"]):
        with pytest.raises(SystemExit):
            regression.main(wrong)
    assert "table --data my.csv --target COLUMN" in capsys.readouterr().err
