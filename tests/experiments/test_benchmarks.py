"""The benchmarks run on tiny settings, and count what they say they count."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnncert.bounds.methods import METHODS
from experiments.benchmarks import affine_runs, bounds, inference_step, training_step


def test_layers_and_floors_of_the_small_cnn():
    net = bounds.network("cnn", width=4)
    found = bounds.layers(net, jnp.zeros((28, 28, 1)))
    convolutions = [(14 * 14 * 16, 14 * 14 * 16 * 16), (7 * 7 * 32, 7 * 7 * 32 * 256)]
    assert [tuple(layer) for layer in found] == [*convolutions, (100, 156_800), (10, 1000)]
    floor = bounds.floors(found, inputs=784, margins=9, steps=2)
    assert set(METHODS) <= set(floor)
    total = sum(layer.products for layer in found)
    assert floor["crown-ibp"] == pytest.approx(2 + 9 * (2 * total - 1000) / total)
    lower = bounds.floors(found, inputs=784, margins=9, steps=2, ends=1)
    assert lower["crown-ibp"] == pytest.approx(2 + 9)
    # One hidden layer alone has no bounds of its own to sweep for.
    alone = bounds.floors(found[2:], inputs=1568, margins=9, steps=1)
    assert alone["crown"] == alone["crown-ibp"]


def test_margins_leave_the_label_out():
    logits = jnp.arange(10.0) ** 2
    margins = bounds.margins_of(lambda params, x: x)
    for c in range(10):
        expected = np.delete(np.asarray(logits - logits[c]), c)
        np.testing.assert_allclose(margins(None, logits, jnp.int32(c)), expected)


def test_a_table_of_two_methods(tmp_path, capsys):
    out = tmp_path / "bounds.json"
    arguments = (
        "--models cnn --methods ibp crown-ibp --batch-size 2 --repeats 1 --samples 2".split()
    )
    # IBP's floor of 2 passes, for 2 samples, is within 4; that of CROWN-IBP is not.
    bounds.main([*arguments, "--most", "4", "--out", str(out)])
    found = json.loads(out.read_text())["timings"]
    names = [(row["method"], row["sweep"]) for row in found]
    sweeps = ("one", "by vmap", "by map")
    assert names == [("plain", "one"), *((m, s) for m in ("ibp", "crown-ibp") for s in sweeps)]
    for row in found:
        timed = row["method"] != "crown-ibp"
        assert (row["seconds"] is not None) == timed
        assert not timed or (row["passes"] > 0 and row["compile_seconds"] > 0)
    printed = capsys.readouterr().out
    assert printed.count("too large") == 3
    with pytest.raises(SystemExit):
        bounds.main([*arguments, "--out", str(out)])
    assert "exists" in capsys.readouterr().err


def test_networks_give_ten_logits():
    for name in bounds.BATCH_SIZES:
        net = bounds.network(name, width=2)
        logits = jax.eval_shape(net.apply, net.params, jnp.zeros((28, 28, 1)))
        assert logits.shape == (bounds.CLASSES,)
    assert len(bounds.layers(bounds.network("cnn7", width=2), jnp.zeros((28, 28, 1)))) == 7


def test_steps_are_timed_in_steps_of_the_first(capsys):
    tiny = "--models mlp --batch-size 2 --repeats 1".split()
    inference_step.main([*tiny, "--methods", "ivon"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["mlp", "bbb"], ["mlp", "ivon"]]
    assert rows[0][3] == "1.00" and float(rows[1][3]) > 0
    training_step.main(tiny)
    _, plain, robust, ratio, _ = capsys.readouterr().out.splitlines()[2].split()
    assert float(ratio) == pytest.approx(float(robust) / float(plain), rel=0.1)


def test_affine_runs_are_counted_and_timed(capsys):
    affine_runs.main("--networks centered --batch-size 2 --repeats 1 --step".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:-3] for row in rows] == [
        ["centered", "1"],
        ["centered", "2"],
        ["centered", "step", "2"],
    ]
    assert all(float(number) > 0 for row in rows for number in row[-3:])
