"""Opening a split: what is kept in memory, and what is refused."""

import numpy as np
import pytest

from experiments.data import splits


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_small_images_are_decoded_once(data_dir):
    split = splits.open_split("strokes/tiny", "train", data_dir)
    assert isinstance(split.records, splits.InMemory)
    assert (len(split), split.image_shape, split.num_classes) == (256, (16, 16, 3), 5)
    assert split.fixed_size
    row, *_ = split.records.__getitems__([7])
    np.testing.assert_array_equal(row["image"], split.records.images[7])
    assert row["label"] == split.records.labels[7] == 7 % 5


def test_large_sets_stay_on_disk(data_dir):
    kept = splits.open_split("strokes/tiny", "test", data_dir)
    split = splits.open_split("strokes/tiny", "test", data_dir, memory_limit=1000)
    assert not isinstance(split.records, splits.InMemory)
    np.testing.assert_array_equal(split.records[3]["image"], kept.records[3]["image"])


def test_strokes_without_a_config_is_the_demos(data_dir):
    split = splits.open_split("strokes", "test[:5%]", data_dir)
    assert (split.num_classes, split.image_shape) == (20, (32, 32, 3))


def test_statistics_of_strokes_are_those_in_use(data_dir):
    split = splits.open_split("strokes/20", "train", data_dir)
    pixels = split.records.images.reshape(-1, 3) / 255
    preprocessing = splits.PREPROCESSING["strokes"]
    np.testing.assert_allclose(pixels.mean(0), preprocessing.mean, atol=1e-3)
    np.testing.assert_allclose(pixels.std(0), preprocessing.std, atol=1e-3)


def test_the_test_split_is_the_labelled_one():
    assert splits.test_split("imagenet2012") == "validation"
    assert splits.test_split("imagenet2012:5.1.0") == "validation"
    assert splits.test_split("strokes/20") == "test"


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("strokes/7", "train", ValueError, "configs.*not '7'"),
        ("strokes/tiny", "valid", ValueError, r"split.*\['test', 'train'\].*'valid'"),
        ("strokes/tiny", "train[:0]", ValueError, "no images"),
        ("no_such_set", "train", ValueError, "dataset.*'no_such_set'"),
        ("cifar10", "train", FileNotFoundError, "download_and_prepare"),
    ],
)
def test_what_cannot_be_opened_is_refused(data_dir, name, split, error, message):
    with pytest.raises(error, match=message):
        splits.open_split(name, split, data_dir)
