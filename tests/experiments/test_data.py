import re
from pathlib import Path

import numpy as np
import pytest

from experiments.setup import data


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def rows(split: data.Split) -> set[bytes]:
    return {x.tobytes() + y.tobytes() for x, y in zip(split.x, split.y, strict=True)}


def test_digits_are_the_published_set_and_split_by_class(digits: data.Dataset) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    ours = np.concatenate([digits.train.x, digits.test.x])
    assert ours.shape == (1797, 8, 8, 1)
    assert digits.image_shape == (8, 8, 1)
    assert len(digits.test.y) == 360
    # The same multiset of pictures, whatever their order, in units of [0, 1].
    theirs = np.sort((x / 16).astype(np.float32).reshape(1797, -1).view("V256").ravel())
    np.testing.assert_array_equal(np.sort(ours.reshape(1797, -1).view("V256").ravel()), theirs)
    share = np.bincount(y) * 360 / 1797
    assert np.all(np.abs(np.bincount(digits.test.y) - share) <= 1)


def test_loading_twice_gives_the_same(digits: data.Dataset) -> None:
    again = data.load("digits")
    np.testing.assert_array_equal(digits.train.x, again.train.x)
    np.testing.assert_array_equal(digits.test.y, again.test.y)


def test_normalisation_is_the_mean_and_deviation_of_the_train_split(digits: data.Dataset) -> None:
    x = (digits.train.x - np.array(digits.mean)) / np.array(digits.std)
    assert abs(x.mean()) < 2e-4
    assert abs(x.std() - 1) < 2e-4


@pytest.mark.parametrize(
    ("name", "raw_mean", "train", "std"),
    [
        ("mnist", 33.79, 60_000, (0.3081,)),
        ("fashion_mnist", 73.15, 60_000, (0.3530,)),
        ("cifar10", 121.53, 50_000, (0.2470, 0.2435, 0.2616)),
    ],
)
def test_each_prepared_set_is_the_one_it_says(
    shared_data: Path, name: str, raw_mean: float, train: int, std: tuple[float, ...]
) -> None:
    """MNIST and FashionMNIST share file names: one has been served as the other before."""
    dataset = data.load(name, shared_data)
    assert len(dataset.train.y) == train
    assert len(dataset.test.y) == 10_000
    assert dataset.train.x.dtype == np.float32
    assert dataset.train.y.dtype == np.int32
    assert abs(dataset.test.x.mean(dtype=np.float64) * 255 - raw_mean) < 0.006
    assert dataset.std == pytest.approx(std, abs=1e-4)  # as the literature quotes them
    assert dataset.test.x.max() == 1.0
    if name != "mnist":
        assert set(np.bincount(dataset.test.y)) == {1000}


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'fashion-mnist': did you mean 'fashion_mnist'\?"):
        data.load("fashion-mnist")
    with pytest.raises(ValueError, match=r"Known: digits, mnist"):
        data.load("???")


@pytest.mark.parametrize("made", [True, False])
def test_absent_set_says_how_to_prepare_it(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "my data"
    if made:
        folder.mkdir()
    with pytest.raises(FileNotFoundError) as raised:
        data.load("cifar10", folder)
    command = f"t.builder('cifar10', data_dir='{folder}', file_format='array_record')"
    assert command in str(raised.value)
    assert "[prepare]" in str(raised.value)
    assert "--data-dir" in str(raised.value)


def test_damaged_set_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="unreadable"):
        data.load("mnist", tmp_path)


def good() -> tuple[np.ndarray, np.ndarray]:
    return np.full((2, 4, 4, 1), 0.5, np.float32), np.array([0, 2], np.int32)


def test_check_images_accepts_the_closed_range() -> None:
    x, y = good()
    x[0, 0, 0, 0], x[1, 1, 1, 0] = 0.0, 1.0
    data.check_images(x, y, 3)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda x, y: ((x * 255).astype(np.uint8), y), TypeError, "uint8.*/ 255"),
        (lambda x, y: (x, y.astype(np.float32)), TypeError, "labels have dtype float32"),
        (lambda x, y: (x * 255, y), ValueError, r"pixels lie in \[127.5, 127.5\]"),
        (lambda x, y: (x - 1, y), ValueError, r"pixels lie in \[-0.5"),
        (lambda x, y: (x * np.nan, y), ValueError, "pixels lie in .*nan"),
        (lambda x, y: (x, y + 1), ValueError, r"labels lie in 1 \.\. 3; 3 classes need 0 \.\. 2"),
        (lambda x, y: (x, y - 1), ValueError, r"labels lie in -1 \.\. 1"),
        (lambda x, y: (x, y[:1]), ValueError, r"\(2, 4, 4, 1\) and labels \(1,\)"),
        (lambda x, y: (x[..., 0], y), ValueError, "height, width, channels"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "no images"),
    ],
)
def test_check_images_refuses(change, error, says) -> None:
    with pytest.raises(error, match=says):
        data.check_images(*change(*good()), num_classes=3)


def test_validation_split_parts_the_set(digits: data.Dataset) -> None:
    train, held = data.validation_split(digits.train, 137, seed=0)
    assert (len(train.y), len(held.y)) == (1300, 137)
    assert rows(train) | rows(held) == rows(digits.train)
    # No picture in both, but for the published set's own duplicates.
    assert len(rows(train)) + len(rows(held)) - len(rows(digits.train)) <= 0
    again = data.validation_split(digits.train, 137, seed=0)[1]
    other = data.validation_split(digits.train, 137, seed=1)[1]
    np.testing.assert_array_equal(held.x, again.x)
    assert rows(held) != rows(other)


def test_validation_split_of_none_keeps_all(digits: data.Dataset) -> None:
    train, held = data.validation_split(digits.train, 0, seed=0)
    np.testing.assert_array_equal(train.x, digits.train.x)
    assert held.x.shape == (0, 8, 8, 1)


@pytest.mark.parametrize("n", [-1, 1437])
def test_validation_split_refuses(digits: data.Dataset, n: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"hold out {n} of 1437")):
        data.validation_split(digits.train, n, seed=0)


@pytest.mark.parametrize(("num", "batch_size"), [(10, 5), (10, 4), (3, 8), (1, 1)])
def test_an_epoch_visits_each_example_once(num: int, batch_size: int) -> None:
    indices, mask = data.epoch_batches((7, 0), num, batch_size)
    assert indices.shape == mask.shape == (-(-num // batch_size), batch_size)
    assert sorted(indices[mask > 0]) == list(range(num))
    assert indices.min() >= 0
    assert indices.max() < num  # padding points at real examples
    assert set(mask.ravel()) <= {0.0, 1.0}
    assert mask[:-1].all()


def test_the_order_is_a_function_of_the_seed() -> None:
    first, again, other = (data.epoch_batches((7, e), 50, 8).indices for e in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_epoch_batches_refuses_nothing_to_visit() -> None:
    with pytest.raises(ValueError, match="got 0 and 8"):
        data.epoch_batches(0, 0, 8)
