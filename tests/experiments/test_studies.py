"""The studies run on tiny settings, and the bounds they compare are bounds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.sets import Box
from experiments.studies import joint_bounds, roundoff, two_moons


def differences(margins):
    p = jax.nn.softmax(margins)
    return p[0] - p


def random_box(rng, scale):
    ends = np.sort(scale * rng.normal(size=(2, 5)) - 0.5, axis=0)
    ends[:, 0] = 0.0  # the margin of the predicted class against itself
    return Box(*jnp.asarray(ends, jnp.float32))


@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_corner_terms_are_below_and_meet_the_exact_minimum(scale):
    rng = np.random.default_rng(0)
    below = jax.jit(lambda m, terms: terms[0] * jnp.exp(m).sum() + terms[1] * jnp.exp(m) + terms[2])
    for _ in range(10):
        box = random_box(rng, scale)
        # Corners too: there the minimum is.
        inside = np.concatenate([rng.uniform(size=(200, 5)), rng.integers(0, 2, (200, 5))])
        points = jnp.float32(box.lower + inside * (box.upper - box.lower))
        exact = jax.vmap(differences)(points)
        for anchor in (0.0, 0.5, 1.0):
            found = jax.vmap(below, (0, None))(points, joint_bounds.corner_terms(box, anchor))
            assert np.all(found <= exact + 1e-5), anchor
        # At u, or where u_j > 0 at u_j and the other l, the last is the minimum itself.
        terms = joint_bounds.corner_terms(box, 1.0)
        least = joint_bounds.corner_minimum(box)
        assert np.all(least <= exact.min(0) + 1e-6)
        for j in range(1, 5):
            others = box.lower if box.upper[j] > 0 else box.upper
            worst = others.at[j].set(box.upper[j]).at[0].set(0.0)
            np.testing.assert_allclose(differences(worst)[j], least[j], atol=1e-5)
            np.testing.assert_allclose(below(worst, terms)[j], least[j], atol=1e-5)


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
