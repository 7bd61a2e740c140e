"""Weights by name, properties for other verifiers, certificates as files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnncert as bc
from bnncert import interop
from bnncert.certify import Constraints, class_stays, outputs_within

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x))
        return nn.Dense(3)(x.transpose(2, 0, 1).reshape(-1))  # as PyTorch flattens


STATE = {
    "features.0.weight": RNG.normal(size=(4, 2, 3, 3)).astype(np.float32),
    "features.0.bias": RNG.normal(size=4).astype(np.float32),
    "head.weight": RNG.normal(size=(3, 16)).astype(np.float32),
    "head.bias": RNG.normal(size=3).astype(np.float32),
}
LAYERS = {"params/Conv_0": "features.0", "params/Dense_0": "head"}


class Tensor:
    """As a tensor of PyTorch is read, without PyTorch."""

    def __init__(self, array):
        self.array, self.steps = array, []

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.array


def test_a_state_dict_becomes_the_same_network():
    """Against the sums themselves, in PyTorch's layouts."""
    x = RNG.normal(size=(2, 4, 4)).astype(np.float32)  # channels first
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    hidden = np.einsum("ihwab,oiab->ohw", windows, STATE["features.0.weight"])
    hidden = np.maximum(hidden + STATE["features.0.bias"][:, None, None], 0)
    expected = STATE["head.weight"] @ hidden.reshape(-1) + STATE["head.bias"]
    like = jax.eval_shape(Net().init, KEY, jnp.zeros((4, 4, 2)))
    for state in (STATE, {name: Tensor(value) for name, value in STATE.items()}):
        params = interop.from_torch(state, like, LAYERS)
        found = Net().apply(params, jnp.asarray(x.transpose(1, 2, 0)))
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_names_that_do_not_fit_are_listed():
    like = jax.eval_shape(Net().init, KEY, jnp.zeros((4, 4, 2)))
    with pytest.raises(ValueError, match=r"params/Dense_0/bias.*left over are head\.bias"):
        interop.from_torch(STATE, like, {"params/Conv_0": "features.0"})
    with pytest.raises(ValueError, match="left over are extra"):
        interop.from_torch({**STATE, "extra": np.ones(1)}, like, LAYERS)
    with pytest.raises(ValueError, match=r"head\.weight has the shape \(7, 3\)"):
        interop.from_torch({**STATE, "head.weight": np.ones((3, 7))}, like, LAYERS)


def read(text):
    """Ends of inputs, and what is asserted of outputs: a small reader of VNN-LIB."""
    ends = {}
    for relation, name, value in re.findall(r"\(assert \((<=|>=) X_(\d+) (\S+?)\)\)", text):
        ends.setdefault(int(name), {})[relation] = float(value)
    claims = re.findall(r"\(and \((<=|>=) Y_(\d+) (\S+?)\)\)", text)
    return ends, claims


def broken(claims, y):
    def value(word):
        return y[int(word[2:])] if word.startswith("Y_") else float(word)

    return any(
        y[int(left)] <= value(right) if relation == "<=" else y[int(left)] >= value(right)
        for relation, left, right in claims
    )


@pytest.mark.parametrize("kind", ["class", "band"])
def test_a_property_says_what_the_constraints_say(kind):
    center = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    region = bc.Box(center - 0.1, center + 0.1)
    constraints = class_stays(1, 3) if kind == "class" else outputs_within(-0.5, 0.7)
    outputs = np.asarray(constraints.matrix).shape[1]
    text = interop.vnnlib(region, constraints, about="two\nlines")
    assert text.startswith("; two\n; lines\n")
    assert text.count("(") == text.count(")")
    ends, claims = read(text)
    np.testing.assert_array_equal([ends[i][">="] for i in range(6)], np.ravel(region.lower))
    np.testing.assert_array_equal([ends[i]["<="] for i in range(6)], np.ravel(region.upper))
    for y in RNG.normal(size=(200, outputs)):
        safe = (np.asarray(constraints.matrix) @ y + np.asarray(constraints.offset) > 0).all()
        assert broken(claims, y) == (not safe)


def test_numbers_are_written_out_exactly():
    lower, upper = np.float32(1e-38), np.float32(0.1)
    region = bc.Box(jnp.array([lower]), jnp.array([upper]))
    ends, _ = read(interop.vnnlib(region, class_stays(0, 2)))
    assert ends[0] == {">=": float(lower), "<=": float(upper)}


def test_what_cannot_be_written_is_refused():
    box = bc.Box(jnp.zeros(1), jnp.ones(1))
    with pytest.raises(TypeError, match="has boxes of inputs"):
        interop.vnnlib(bc.LpBall(jnp.zeros(1), jnp.ones(()), 2), class_stays(0, 2))
    with pytest.raises(ValueError, match="finite ends"):
        interop.vnnlib(bc.Box(jnp.ones(1), jnp.zeros(1)), class_stays(0, 2))
    with pytest.raises(ValueError, match=r"row 0 .* \[1\.0, 2\.0\]"):
        interop.vnnlib(box, Constraints(np.array([[1.0, 2.0]]), np.zeros(1)))


def apply(w, x):
    return w @ x


def test_a_certificate_survives_its_file(tmp_path):
    samples = jax.random.normal(KEY, (3, 2, 2))
    x = jnp.array([1.0, 0.5])
    region = bc.Box(x - 0.1, x + 0.1)
    found = bc.certify.decision(apply, samples, region)
    made = interop.certificate("the class stays", found, samples, region, x=x, method="crown-ibp")
    assert made.arithmetic == "float32" == found.arithmetic
    path = interop.save(tmp_path / "proof", made)
    again = interop.load(path)
    assert path.name == "proof.npz" and again._replace(arrays={}) == made._replace(arrays={})
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    np.testing.assert_array_equal(again.arrays["found.margins"], found.margins)
    np.testing.assert_array_equal(again.arrays["set.lower"], region.lower)
    assert again.is_of(samples) and not again.is_of(samples.at[0, 0, 0].add(1e-6))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        interop.save(path, made)
    interop.save(path, made._replace(claim="another"), overwrite=True)
    assert interop.load(path).claim == "another"
    assert [p.name for p in tmp_path.iterdir()] == ["proof.npz"]


def test_other_files_are_no_certificates(tmp_path):
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no certificate")
    with pytest.raises(ValueError, match="no certificate that bnncert saved"):
        interop.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.ones(1))
    with pytest.raises(ValueError, match="no certificate that bnncert saved"):
        interop.load(tmp_path / "other.npz")
    header = np.array('{"format": 99, "versions": {"bnncert": "9.0"}}')
    np.savez(tmp_path / "later.npz", header=header)
    with pytest.raises(ValueError, match=r"format 99.*later one \(it was made by 9\.0\)"):
        interop.load(tmp_path / "later.npz")


def test_an_interrupted_file_leaves_nothing(tmp_path, monkeypatch):
    made = interop.certificate("y", {"upper": np.ones(1)}, {"w": np.ones(1)}, bc.Box(0.0, 1.0))

    def full(*args, **arrays):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        interop.save(tmp_path / "proof.npz", made)
    assert not list(tmp_path.iterdir())
