"""Opening a split: what is kept in memory, and what is refused."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from experiments.data import decoding, splits


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_small_images_are_decoded_once(data_dir):
    split = splits.open_split("strokes/tiny", "train", data_dir)
    assert isinstance(split.records, splits.InMemory)
    assert (len(split), split.image_shape, split.num_classes) == (256, (16, 16, 3), 5)
    assert split.fixed_size
    row = split.records[7]
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
        (
            "strokes/tiny",
            "valid",
            ValueError,
            r"split='valid' must be one of \['test', 'train'\]",
        ),
        (
            "strokes/tiny",
            "train[:0]",
            ValueError,
            r"split='train\[:0\]' must hold images",
        ),
        ("no_such_set", "train", ValueError, "dataset.*'no_such_set'"),
        ("cifar10", "train", FileNotFoundError, "download_and_prepare"),
        (
            "imagenet2012",
            "train",
            FileNotFoundError,
            "not prepared in .*python experiments/prepare_imagenet.py --archives",
        ),
    ],
)
def test_what_cannot_be_opened_is_refused(data_dir, name, split, error, message):
    with pytest.raises(error, match=message):
        splits.open_split(name, split, data_dir)


def test_resized_images_are_kept_as_small_as_they_are(data_dir):
    recipe = splits.Recipe(image_size=40)
    split = splits.open_split("strokes/tiny", "train", data_dir, recipe=recipe)
    assert (split.image_shape, split.recipe) == ((40, 40, 3), recipe)
    assert isinstance(split.records, splits.InMemory)
    assert split.records.images.shape == (256, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalise": "batch"}, "normalise='batch' must be .*'image' or 'caffe'"),
        ({"border": "wrap"}, "border='wrap' must be 'reflect' or 'zero'"),
        ({"crop": "ten"}, "crop='ten' must be 'inception' or 'plain'"),
        ({"image_size": 0}, "image_size=0 must be a whole number, ≥ 1"),
        ({"image_size": 257, "crop": "plain"}, "image_size=257 .*256.*'inception'"),
    ],
)
def test_recipes_that_cannot_be_are_refused_by_name(arguments, message):
    splits.Recipe(image_size=256, crop="plain")
    splits.Recipe(image_size=1)
    with pytest.raises(ValueError, match=message):
        splits.Recipe(**arguments)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere; give"):
        splits.open_split("cifar10", "train", tmp_path / "nowhere")


def test_a_copy_in_another_format_names_the_converter(tmp_path):
    builder = tfds.builder("cifar10", data_dir=tmp_path, file_format="tfrecord")
    directory = builder.data_path
    directory.mkdir(parents=True)
    builder.info.write_to_directory(directory)
    with pytest.raises(ValueError, match=r"^dataset: .* as tfrecord, .*convert_format"):
        splits.open_split("cifar10", "train", tmp_path)


@pytest.fixture
def copied(data_dir, tmp_path):
    """A copy of a data set, and its only file of training records."""
    splits.open_split("strokes/tiny", "train", data_dir)  # made if it is missing
    shutil.copytree(data_dir / "strokes" / "tiny", tmp_path / "strokes" / "tiny")
    (path,) = tmp_path.glob("strokes/tiny/*/*train.array_record*")
    return tmp_path, path


def _with_fewer_records(path):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(255):
        writer.write(b"record")
    writer.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda p: os.truncate(p, p.stat().st_size * 2 // 3), "perhaps cut off"),
        (lambda p: os.truncate(p, 0), "damaged, perhaps cut off"),
        (_with_fewer_records, "holds 255 records instead of 256"),
        (os.remove, "is missing"),
    ],
)
def test_faults_of_record_files_are_found_at_the_door(copied, fault, message):
    directory, path = copied
    assert len(splits.open_split("strokes/tiny", "train", directory)) == 256
    fault(path)
    with pytest.raises(decoding.RecordError) as error:
        splits.open_split("strokes/tiny", "train", directory)
    for part in (message, str(path), "'train' of strokes/tiny", "file once more"):
        assert part in str(error.value)
    assert len(splits.open_split("strokes/tiny", "test", directory)) == 100


@pytest.mark.parametrize("memory_limit", [0, 1 << 30])
def test_a_damaged_record_is_named(copied, memory_limit):
    directory, path = copied
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 3)
        file.write(bytes(2000))

    def read_all():
        split = splits.open_split(
            "strokes/tiny", "train", directory, memory_limit=memory_limit
        )
        for record in range(256):
            split.read(record)

    with pytest.raises(decoding.RecordError, match=r"cannot be read: .*--verify") as e:
        read_all()
    assert f"in {path})" in str(e.value)


def test_parts_of_a_split_know_their_place_in_the_file(data_dir):
    split = splits.open_split("strokes/tiny", "train[50:60]", data_dir)
    text = split.origin.describe(3)
    assert text.startswith("record 3 of strokes/tiny, 'train[50:60]' (number 53 in ")
