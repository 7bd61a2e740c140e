"""A run on data and a network of one's own: what is read, what is refused, and a whole run."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import attack, certify, run
from experiments.setup import own_data, own_models, subject
from experiments.setup.data import dataset_of
from experiments.setup.presets import parse
from experiments.setup.requirements import number

RNG = np.random.default_rng(0)
NUM = 40


def stripes(num=NUM, size=8):
    """Stripes that lie or stand, as whole numbers."""
    y = np.arange(num) % 2
    lines = np.zeros((num, size, size), np.uint8)
    lines[y == 0, ::2], lines[y == 1, :, ::2] = 200, 200
    return lines + RNG.integers(0, 40, lines.shape).astype(np.uint8), y


X, Y = stripes()
NAMES = np.array(["lying", "standing"])[Y]


def saved(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_arrays_are_read_scaled_and_parted(tmp_path):
    found = own_data.read(saved(tmp_path / "my.npz", x=X, y=NAMES))
    assert found.name == "my" and found.class_names == ("lying", "standing")
    assert found.image_shape == (8, 8, 1) and len(found.train.y) + len(found.test.y) == NUM
    assert found.train.x.max() <= 1 and found.train.x.dtype == np.float32
    assert np.bincount(found.test.y).tolist() == [4, 4]  # a fifth of each
    again = own_data.read(saved(tmp_path / "copy.npz", x=X, y=NAMES))
    assert own_data.digest(found) == own_data.digest(again)
    x = X.astype(np.float32) / 255
    vectors = own_data.read(saved(tmp_path / "v.npz", x=x.reshape(NUM, -1), y=Y))
    assert vectors.image_shape == (1, 64, 1) and own_data.digest(vectors) != own_data.digest(found)
    split = np.where(np.arange(NUM) < 30, "train", "test")
    told = own_data.read(saved(tmp_path / "s.npz", x=X, y=Y, split=split))
    apart = own_data.read(
        saved(tmp_path / "t.npz", x=X[:30], y=Y[:30], x_test=X[30:], y_test=Y[30:])
    )
    assert own_data.digest(told) == own_data.digest(apart) and len(told.test.y) == 10


@pytest.mark.parametrize(
    ("arrays", "error", "match"),
    [
        ({"x": X}, ValueError, "needs x and y"),
        ({"x": X, "y": Y, "z": Y}, ValueError, "holds z besides"),
        ({"x": X, "y": np.eye(2)[Y]}, ValueError, r"y\.argmax"),
        ({"x": X, "y": Y.astype(float)}, TypeError, r"y\.astype"),
        ({"x": X, "y": Y[:5]}, ValueError, "as many labels"),
        ({"x": X.astype(int) + 200, "y": Y}, ValueError, r"0 \.\. 255"),
        ({"x": X / 100, "y": Y}, ValueError, r"\[0, 2\.39\]; radii"),
        ({"x": X / np.nan, "y": Y}, ValueError, "nan"),
        ({"x": np.repeat(X[:, None], 3, 1), "y": Y}, ValueError, "channels first"),
        ({"x": np.repeat(X[..., None], 4, 3), "y": Y}, ValueError, "1 or 3 channels"),
        ({"x": X, "y": 0 * Y}, ValueError, "two classes"),
        ({"x": X, "y": Y, "split": np.array(["train"] * NUM)}, ValueError, "for test"),
        ({"x": X, "y": Y, "split": np.array(["dev"] * NUM)}, ValueError, "values dev"),
        ({"x": X, "y": NAMES, "split": np.where(Y, "train", "test")}, ValueError, "lying"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(tmp_path, arrays, error, match):
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(error, match=match):
        own_data.read(saved(tmp_path / "my.npz", **arrays))


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfds:NAME or hf:NAME"):
        own_data.read(str(tmp_path / "none.npz"))
    (tmp_path / "my.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"np\.savez"):
        own_data.read(str(tmp_path / "my.csv"))
    (tmp_path / "text.npz").write_text("1,2")
    with pytest.raises(ValueError, match=r"no \.npz file"):
        own_data.read(str(tmp_path / "text.npz"))


def test_folders_of_images_are_read(tmp_path):
    for i, (image, name) in enumerate(zip(X, NAMES, strict=True)):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "all" / name / f"{i:03}.png")
    found = own_data.read(str(tmp_path / "all"))
    assert found.class_names == ("lying", "standing") and found.image_shape == (8, 8, 1)
    assert len(found.train.y) == 32
    for part in ("train", "test"):
        (tmp_path / "parted").mkdir(exist_ok=True)
        (tmp_path / "parted" / part).symlink_to(tmp_path / "all")
    assert len(own_data.read(str(tmp_path / "parted")).test.y) == NUM
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "all" / "lying" / "odd.jpg")
    with pytest.raises(ValueError, match=r"8x8.*odd\.jpg is 6x5"):
        own_data.read(str(tmp_path / "all"))
    (tmp_path / "all" / "lying" / "odd.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"odd\.jpg is no image"):
        own_data.read(str(tmp_path / "all"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no folders with images"):
        own_data.read(str(tmp_path / "empty"))


def test_hugging_face_s_data_sets_are_read_where_its_library_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        own_data.read("hf:stripes")

    class Rows(dict):
        column_names = ("image", "label")
        features = types.MappingProxyType(
            {"label": types.SimpleNamespace(names=["lying", "standing"])}
        )

    rows = Rows(image=[Image.fromarray(x) for x in X], label=Y.tolist())
    fake = types.SimpleNamespace(load_dataset=lambda name: {"train": rows, "test": rows})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = own_data.read("hf:stripes")
    assert found.class_names == ("lying", "standing") and len(found.test.y) == NUM


MODELS = """
import equinox as eqx
import jax
from flax import linen as nn
from flax import nnx


class Linen(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x.reshape((x.shape[0], -1)))


class Single(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(5)(x.reshape(-1))))


class Nnx(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 8, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = self.drop(nnx.relu(self.layers[0](x.reshape((x.shape[0], -1)))))
        return self.out(x)


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, num_classes, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 4, 3, 2, key=first)
        self.out = eqx.nn.Linear(36, num_classes, key=second)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.conv(x)).reshape(-1))


def made(num_classes):
    return Linen(num_classes)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(x.reshape((x.shape[0], -1)))


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.out = nnx.BatchNorm(1, rngs=rngs), nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x).reshape((x.shape[0], -1)))


class Wrong(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7)(x.reshape((x.shape[0], -1)))


class Asks(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        return x


def number():
    return 3
"""


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(MODELS)
    return path


def split(num):
    x = (X[:num, ..., None] / 255).astype(np.float32)
    return own_data.Split(x, Y[:num].astype(np.int32))


DATA = dataset_of("stripes", split(NUM), split(4), ("lying", "standing"))


@pytest.mark.parametrize("name", ["Linen", "Single", "Nnx", "Equinox", "made"])
def test_modules_of_all_libraries_are_functions_of_one_image(models, name):
    model = own_models.build(f"{models}:{name}", DATA)
    params, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    assert model.apply(params, DATA.train.x[0]).shape == (2,)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and (a.ndim < 2 or (a != b).any())
    assert isinstance(params, dict)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    assert (model.apply(params, DATA.train.x[0]) != model.apply(changed, DATA.train.x[0])).any()
    many = jax.vmap(model.apply, (None, 0))(params, jnp.asarray(DATA.train.x[:3]))
    np.testing.assert_allclose(many[1], model.apply(params, DATA.train.x[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Normed", r"batch_stats.*cnn-bn"),
        ("NnxNormed", r"BatchStat.*cnn-bn"),
        ("Wrong", r"no logits of 2 classes.*\(2, 7\)"),
        ("Asks", "asks for depth.*give others defaults"),
        ("Missing", "defines no Missing"),
        ("number", "no module of Flax"),
    ],
)
def test_networks_that_cannot_be_followed_are_refused(models, name, match):
    with pytest.raises((ValueError, TypeError), match=match):
        own_models.build(f"{models}:{name}", DATA)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        own_models.build("nowhere.py:Net", DATA)


SMALL = ["--train.epochs", "2", "--train.batch-size", "16", "--eval.num-samples", "2",
         "--eval.attack-steps", "2", "--eval.curve-points", "2", "--eval.eps", "4/255"]  # fmt: skip


def test_a_run_is_certified_and_attacked_again_on_the_same_data_alone(
    tmp_path, models, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "my.npz", x=X, y=NAMES)
    asked = ["my", "--data", "my.npz", "--model", "my_models.py:Single", "--out", "run", *SMALL]
    assert run.main(asked) == 0
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["dataset"] == "my" and results["class_names"] == ["lying", "standing"]
    assert results["eps"] == 4 / 255 and results["model"] == "my_models.py:Single"
    assert "lying" in (folder / "report.html").read_text()
    assert set(json.loads((folder / "own.json").read_text())) == {"data", "model"}
    assert run.main([*asked, "--resume"]) == 0
    assert certify.main(["run", "--radius", "2/255", "--method", "ibp"]) == 0
    assert attack.main(["run", "--eps", "2/255", "--steps", "2"]) == 0
    # Moved, it is named again; changed, it is another's.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my.npz").rename(tmp_path / "elsewhere" / "my.npz")
    assert certify.main(["run", "--radius", "1/255", "--method", "ibp"]) == 1
    moved = ["run", "--radius", "1/255", "--method", "ibp", "--data-dir", "elsewhere"]
    assert certify.main(moved) == 0
    saved(tmp_path / "elsewhere" / "my.npz", x=X, y=Y)
    capsys.readouterr()
    again = ["run", "--radius", "3/255", "--method", "ibp", "--data-dir", "elsewhere"]
    assert certify.main(again) == 1
    assert "changed since" in capsys.readouterr().err
    models.write_text(MODELS + "\n# changed\n")
    saved(tmp_path / "elsewhere" / "my.npz", x=X, y=NAMES)
    assert certify.main(again) == 1
    assert "put the file back" in capsys.readouterr().err


def test_options_that_do_not_fit_name_the_way_out(capsys):
    for asked, said in (
        (["my"], "run my --data my.npz"),
        (["digits", "--data", "my.npz"], "goes with the preset my"),
        (["my", "--data", "a.npz", "--model", "vgg"], "FILE.py:NAME"),
        (["my", "--data", "a.npz", "--model", "a.py:N", "--train.random-layers", "last"], "not"),
        (["my", "--data", "a.npz", "--eval.eps", "8/0"], "8/255"),
    ):
        with pytest.raises(SystemExit) as status:
            parse(asked)
        assert status.value.code == 2
        printed = capsys.readouterr()
        assert said in printed.err + printed.out


def test_fractions_are_numbers():
    assert parse(["digits", "--eval.eps", "8/255"]).eval.eps == 8 / 255 == number("8/255")


def test_a_network_is_chosen_by_the_size_of_images():
    config = parse(["my", "--data", "my.npz"])
    assert subject.settled(config, DATA).model == "mlp"
    large = DATA._replace(train=own_data.Split(np.zeros((1, 28, 28, 1), np.float32), Y[:1]))
    assert subject.settled(config, large).model == "cnn"
