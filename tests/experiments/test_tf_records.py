"""TFRecords by tf.data: what the other reader would give, in an order of its own."""

import importlib
import importlib.util
import io
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import warnings

import cv2
import grain
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import (
    augment,
    decoding,
    device_feed,
    loading,
    order,
    pipeline,
    splits,
    strokes_builder,
)

TRAIN, TEST = 37, 11  # images of `snapshots`
SHARDS = tfds.download.DownloadConfig(num_shards=5)

needs_tensorflow = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None,
        reason="TensorFlow is not installed: pip install 'lbopt[tf]'",
    ),
]


def with_tensorflow(test):
    for mark in needs_tensorflow:
        test = mark(test)
    return test


# === Without TensorFlow ===============================================================


def test_whoever_lacks_tensorflow_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "experiments.data.tf_records", raising=False)
    message = r"reader=tf_data needs TensorFlow: pip install 'lbopt\[tf\]'"
    with pytest.raises(ValueError, match=message):
        importlib.import_module("experiments.data.tf_records")


WITHOUT = """
import importlib.machinery
import sys

class Refused:  # TensorFlow is there to be found, but whoever imports it fails
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} is imported")

sys.meta_path.insert(0, Refused())
from experiments.data import pipeline

sizes = {"batch_size": 8, "eval_batch_size": 50}
data = pipeline.open_data("strokes/tiny", sys.argv[1], seed=0, **sizes)
print(next(data.train)["label"].shape, sum(b["mask"].sum() for b in data.test))
"""


def test_the_other_reader_does_not_import_tensorflow(tmp_path):
    strokes_builder.prepare("tiny", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True
    )
    assert done.stdout == "(8,) 100.0\n", done.stderr


# === With TensorFlow ==================================================================


class Snapshots(tfds.core.GeneratorBasedBuilder):
    """JPEG files of varying size, and a PNG now and then."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=3),
                "file_name": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(TRAIN),
            "test": self._generate_examples(TEST),
        }

    def _generate_examples(self, count):
        random = np.random.default_rng(count)
        for i in range(count):
            kind = ".png" if i % 5 == 0 else ".jpg"
            encoded = io.BytesIO(snapshot(random, kind))
            yield i, {"image": encoded, "label": i % 3, "file_name": f"{i}{kind}"}


def snapshot(random, kind):
    """A file of a smooth image: where crops begin, JPEG's colours are interpolated."""
    height, width = (int(side) for side in random.integers(60, 130, 2))
    coarse = random.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(kind, pixels)[1].tobytes()


@pytest.fixture(scope="module")
def tf():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own
        return importlib.import_module("tensorflow")


@pytest.fixture(scope="module")
def tf_records(tf):
    return importlib.import_module("experiments.data.tf_records")


def prepared(builder, directory, file_format, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = builder(data_dir=directory, file_format=file_format, **options)
        made.download_and_prepare(file_format=file_format, download_config=SHARDS)
    return directory


@pytest.fixture(scope="module")
def data_dir(tf, tmp_path_factory):
    """`snapshots` and `strokes/tiny` as TFRecord."""
    directory = tmp_path_factory.mktemp("tfrecord")
    prepared(strokes_builder.Strokes, directory, "tfrecord", config="tiny")
    return prepared(Snapshots, directory, "tfrecord")


@pytest.fixture(scope="module")
def array_dir(tf, tmp_path_factory):
    """The same data sets as ArrayRecord."""
    directory = tmp_path_factory.mktemp("array_record")
    prepared(strokes_builder.Strokes, directory, "array_record", config="tiny")
    return prepared(Snapshots, directory, "array_record")


@pytest.fixture(scope="module")
def train(tf_records, data_dir):
    recipe = splits.Recipe(image_size=48)
    return tf_records.open_split("snapshots", "train", data_dir, recipe=recipe)


@pytest.fixture(scope="module")
def stream(tf_records):
    """Training batches that are quick to make: small, of unmoved images."""

    def make(split, batch_size=8, seed=0, **options):
        options = {"num_threads": 2, "with_index": True, **options}
        return tf_records.TfTrainingBatches(
            split, batch_size=batch_size, seed=seed, **options
        )

    return make


def take(batches, count):
    return list(itertools.islice(batches, count))


def indices(batches, count):
    return np.concatenate([batch["index"] for batch in take(batches, count)])


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        assert batch[key].dtype == other[key].dtype
        np.testing.assert_array_equal(batch[key], other[key])


RECIPES = {
    "default": splits.Recipe(image_size=48),
    "plain": splits.Recipe(crop="plain", normalise="caffe", image_size=91),
    "image": splits.Recipe(normalise="image", border="zero", image_size=80),
}
SEEN = {"snapshots": TRAIN, "strokes/tiny": 256}


def pixels(images, split):
    """Values up to 255, or up to the scale of `normalise="image"`."""
    recipe, preprocessing = split.recipe, split.preprocessing
    if recipe.normalise == "image":
        return images * 60.0  # about what they were divided by
    if recipe.normalise == "caffe":
        return images * 256 + 255 * np.asarray(preprocessing.mean, np.float32)
    mean, std = (
        np.asarray(values, np.float32)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return 255 * (images * std + mean)


def assert_close(images, others, split):
    """Equal but for rounding and, at edges of JPEG crops, interpolated colours."""
    error = np.abs(pixels(images, split) - pixels(others, split))
    assert error.mean() < 0.6
    assert np.quantile(error, 0.99) < 2.5
    assert error.max() < 20


def opened(tf_records, dataset, name, directories, recipe):
    """The same split by both readers, shifted and mirrored."""
    preprocessing = splits.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 3, True)
    data_dir, array_dir = directories
    return [
        splits.dataclasses.replace(split, preprocessing=preprocessing)
        for split in (
            tf_records.open_split(dataset, name, data_dir, recipe=recipe),
            splits.open_split(dataset, name, array_dir, recipe=recipe),
        )
    ]


def source(places):
    """The order in which records were read, for the other reader."""
    return grain.MapDataset.source(places.tolist())


recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
datasets = pytest.mark.parametrize("dataset", SEEN)


@with_tensorflow
@datasets
@recipes
def test_training_images_are_those_of_the_other_reader(
    tf_records, stream, data_dir, array_dir, dataset, recipe
):
    ours, theirs = opened(tf_records, dataset, "train", (data_dir, array_dir), recipe)
    size, count = min(SEEN[dataset], 64), 3
    slices = order.Slices(size, 0, 1)
    batches = take(stream(ours, size, seed=5), count)
    places = np.concatenate([batch["index"] for batch in batches])
    form = loading.Form(with_index=True)
    load = loading.training_loader(theirs, 5, True, source(places), form)
    for number, batch in enumerate(batches):
        expected = load(slices.positions(number, size))
        np.testing.assert_array_equal(batch["index"], expected["index"])
        np.testing.assert_array_equal(batch["label"], expected["label"])
        assert batch["image"].dtype == np.float32
        assert_close(batch["image"], expected["image"], ours)


@with_tensorflow
@datasets
@recipes
def test_evaluation_is_that_of_the_other_reader(
    tf_records, data_dir, array_dir, dataset, recipe
):
    ours, theirs = opened(tf_records, dataset, "test", (data_dir, array_dir), recipe)
    size = len(theirs)
    options = {"batch_size": size, "with_index": True, "num_threads": 2}
    (batch,) = tf_records.TfEvaluationBatches(ours, **options)
    (expected,) = pipeline.EvaluationBatches(theirs, **options)
    np.testing.assert_array_equal(np.sort(batch["index"]), np.arange(size))
    np.testing.assert_array_equal(batch["label"], expected["label"][batch["index"]])
    np.testing.assert_array_equal(batch["mask"], np.ones(size, np.float32))
    assert_close(batch["image"], expected["image"][batch["index"]], ours)


@with_tensorflow
def test_images_of_one_size_are_bit_for_bit_those_of_the_other_reader(
    tf_records, stream, data_dir, array_dir
):
    ours, theirs = opened(
        tf_records, "strokes/tiny", "train", (data_dir, array_dir), splits.Recipe()
    )
    batch = next(stream(ours, 64, seed=1))
    places, form = source(batch["index"]), loading.Form(with_index=True)
    load = loading.training_loader(theirs, 1, True, places, form)
    expected = load(np.arange(64))
    np.testing.assert_allclose(batch["image"], expected["image"], atol=1e-6)


@with_tensorflow
def test_images_that_are_not_augmented_look_as_in_evaluation(tf_records, stream, train):
    still = next(stream(train, TRAIN, augmented=False))
    (seen,) = tf_records.TfEvaluationBatches(train, batch_size=TRAIN, with_index=True)
    back = np.argsort(seen["index"])[still["index"]]
    np.testing.assert_array_equal(still["image"], seen["image"][back])


@with_tensorflow
def test_bfloat16_is_rounded_on_the_host(tf_records, stream, train):
    whole = next(stream(train))["image"]
    half = next(stream(train, dtype=jnp.bfloat16))["image"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))
    (batch,) = tf_records.TfEvaluationBatches(
        train, batch_size=TRAIN, dtype=np.dtype(jnp.bfloat16)
    )
    assert batch["image"].dtype == jnp.bfloat16


@with_tensorflow
@pytest.mark.parametrize("shuffle_buffer", [1, 4, 1000])
def test_an_epoch_holds_each_image_once_and_the_next_another_order(
    stream, train, shuffle_buffer
):
    batches = stream(train, 1, augmented=False, shuffle_buffer=shuffle_buffer)
    first, second, third = (indices(batches, TRAIN) for _ in range(3))
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(TRAIN))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    assert not np.array_equal(first, np.arange(TRAIN))


@with_tensorflow
def test_batches_run_on_over_the_end_of_an_epoch(stream, train):
    seen = indices(stream(train, 10, augmented=False), TRAIN)
    # 37 batches of 10 are 10 epochs of 37 exactly: no image is dropped.
    assert np.bincount(seen).tolist() == [10] * TRAIN


@with_tensorflow
def test_seed_decides_the_order_and_threads_do_not(stream, train):
    one = take(stream(train, 16, seed=0), 6)
    same = take(stream(train, 16, seed=0, num_threads=7), 6)
    for batch, other in zip(one, same, strict=True):
        assert_same(batch, other)
    other = take(stream(train, 16, seed=1), 6)
    assert not np.array_equal(one[0]["index"], other[0]["index"])


@with_tensorflow
@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
def test_resumes_bit_for_bit_from_one_integer(stream, train, process):
    options = dict(zip(("process_index", "process_count"), process, strict=True))
    options |= {"shuffle_buffer": 6}
    through = take(stream(train, 6, seed=1, **options), 16)  # 2.6 epochs
    resumed = stream(train, 6, seed=1, **options)
    take(resumed, 2)
    for taken in (14, 0, 1, 4, 9):
        resumed.set_state(taken)
        assert resumed.get_state() == taken
        for batch in through[taken : taken + 4]:
            assert_same(next(resumed), batch)
        assert resumed.get_state() == min(taken + 4, 16)


@with_tensorflow
def test_processes_share_the_split_and_place_crops_as_one_would(stream, train):
    shares = [
        take(stream(train, 12, process_index=p, process_count=3), 39) for p in range(3)
    ]
    seen = [np.concatenate([batch["index"] for batch in share]) for share in shares]
    parts = [set(part.tolist()) for part in seen]
    assert sorted(len(part) for part in parts) == [12, 12, 13]
    assert set.union(*parts) == set(range(TRAIN))
    for share, part in zip(seen, parts, strict=True):
        assert set(share[: len(part)].tolist()) == part  # an epoch of its own
    assert not np.array_equal(seen[1] - seen[1].min(), seen[2] - seen[2].min())
    # The global batch holds process 1's images in rows 4 to 8.
    draws = augment.uniforms(0, np.arange(12), augment.RESIZED_CROP_DRAWS)
    for row, index in enumerate(shares[1][0]["index"]):
        file = train.read(int(index))["image"]
        image = cv2.cvtColor(decoding.decode(file), cv2.COLOR_BGR2RGB)
        image = augment.random_resized_crop(image, draws[4 + row], 48)
        got = pixels(shares[1][0]["image"][row], train)
        assert np.abs(got - image).mean() < 0.6


@with_tensorflow
@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (8, 4), (22, 2), (16, 16)])
def test_evaluation_counts_each_image_once(tf_records, data_dir, batch_size, count):
    split = tf_records.open_split("snapshots", "test", data_dir)  # 11 images
    counted, lengths = [], set()
    for index in range(count):
        batches = tf_records.TfEvaluationBatches(
            split,
            batch_size=batch_size,
            process_index=index,
            process_count=count,
            with_index=True,
        )
        twice = [list(batches), list(batches)]
        lengths |= {len(batches), len(twice[0])}
        for batch, same in zip(*twice, strict=True):
            assert_same(batch, same)
            assert batch["image"].shape == (batch_size // count, 224, 224, 3)
            assert np.isfinite(batch["image"]).all()
            real = batch["mask"] == 1
            assert batch["mask"].dtype == np.float32
            assert (batch["mask"][~real] == 0).all()
            assert (batch["index"][~real] == -1).all()
            counted += batch["index"][real].tolist()
    assert sorted(counted) == list(range(TEST))
    assert lengths == {-(-TEST // batch_size)}


@with_tensorflow
def test_parts_of_splits(tf_records, stream, data_dir):
    part = tf_records.open_split("snapshots", "train[10:25]", data_dir)
    whole = tf_records.open_split("snapshots", "train", data_dir)
    assert len(part) == 15
    for index in range(15):
        assert part.read(index)["image"] == whole.read(10 + index)["image"]
    assert sorted(indices(stream(part, 5), 3)) == list(range(15))


@with_tensorflow
def test_a_feed_takes_from_it(stream, train):
    through = take(stream(train), 6)
    feed = device_feed.DeviceFeed(stream(train), None)
    for batch in through[:3]:
        assert_same(batch, {key: np.asarray(v) for key, v in next(feed).items()})
    assert feed.get_state() == 3
    feed.set_state(5)
    np.testing.assert_array_equal(next(feed)["image"], through[5]["image"])
    feed.close()


# === ImageNet's own builder ===========================================================


@pytest.fixture(scope="module")
def imagenet(tf, tmp_path_factory):
    """A tiny `imagenet2012` by the official builder, from archives like ImageNet's."""
    directory = tmp_path_factory.mktemp("imagenet")
    archives = directory / "downloads" / "manual"
    archives.mkdir(parents=True)
    random = np.random.default_rng(7)

    def add(archive, name, contents):
        member = tarfile.TarInfo(name)
        member.size = len(contents)
        archive.addfile(member, io.BytesIO(contents))

    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in ("n01440764", "n01443537", "n15075141"):  # 0, 1 and 999
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(4):
                    add(tar, f"{synset}_{i}.JPEG", snapshot(random, ".jpg"))
            add(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in range(1, 6):
            name = f"ILSVRC2012_val_{i:08d}.JPEG"
            add(tar, name, snapshot(random, ".jpg"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = tfds.builder("imagenet2012", data_dir=directory)
        builder.download_and_prepare()
    return directory


@with_tensorflow
def test_imagenet_as_the_official_builder_writes_it(tf_records, stream, imagenet):
    train = tf_records.open_split("imagenet2012", "train", imagenet)
    assert (train.num_classes, train.image_shape) == (1000, (224, 224, 3))
    assert train.preprocessing == splits.PREPROCESSING["imagenet2012"]
    batch = next(stream(train, 12))
    assert sorted(batch["label"]) == [0] * 4 + [1] * 4 + [999] * 4
    name = splits.test_split("imagenet2012")
    test = tf_records.open_split("imagenet2012", name, imagenet)
    batches = list(tf_records.TfEvaluationBatches(test, batch_size=4))
    assert [batch["mask"].sum() for batch in batches] == [4, 1]


# === Damage ===========================================================================


@pytest.fixture
def copy(data_dir, tmp_path):
    """The data set, to be damaged."""
    shutil.copytree(data_dir / "snapshots", tmp_path / "snapshots")
    return tmp_path


def shard_of(split, index):
    """A file and the number of its record that stands at an index of the split."""
    for shard in split.origin.shards:
        if index < shard.take:
            return shard.path, index
        index -= shard.take
    raise IndexError(index)


def rewrite(tf, path, number, change):
    """Replaces the image of one record."""
    records = [bytes(record.numpy()) for record in tf.data.TFRecordDataset(path)]
    example = tf.train.Example.FromString(records[number])
    image = example.features.feature["image"].bytes_list.value
    image[0] = change(image[0])
    records[number] = example.SerializeToString()
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)


def broken_off(image):
    return image[: len(image) // 2]


def without_header(image):
    return image[:2] + bytes(300) + image[302:]


def no_image(image):
    return b"no image at all"


def batch_of(stream, split, index):
    """Number of the batch, of 4 images, with the record at an index."""
    order = indices(stream(split, 4, augmented=False), -(-TRAIN // 4))
    return order.tolist().index(index) // 4


def ends(path):
    """Where the records of a file end."""
    data, end, found = path.read_bytes(), 0, []
    while end < len(data):
        end += 16 + int.from_bytes(data[end : end + 8], "little")
        found.append(end)
    return found


def flip_bit(path, number):
    data = bytearray(path.read_bytes())
    data[ends(path)[number] - 100] ^= 4
    path.write_bytes(data)


def cut_inside(path, number):
    path.write_bytes(path.read_bytes()[: ends(path)[number] - 100])


def cut_before(path, number):
    path.write_bytes(path.read_bytes()[: ends(path)[number - 1]])


@with_tensorflow
@pytest.mark.parametrize("damage", [flip_bit, cut_inside, cut_before])
def test_a_damaged_file_stops_where_it_is_needed_and_says_which(
    tf_records, stream, copy, damage
):
    split = tf_records.open_split("snapshots", "train", copy)
    index = 12  # the fifth of the seven or eight in the second file
    path, number = shard_of(split, index)
    shutil.copy(path, copy / "whole")
    places = indices(stream(split, 4, augmented=False), -(-TRAIN // 4)).tolist()
    expected = take(stream(split, 4), 10)
    damage(pathlib.Path(path), number)
    # What follows in the file is lost, too.
    end = index - number + split.origin.shards[1].take
    needed = min(places.index(lost) for lost in range(index, end)) // 4
    batches = stream(split, 4)
    for batch in expected[:needed]:
        assert_same(next(batches), batch)
    with pytest.raises(decoding.RecordError) as caught:
        next(batches)
    message = str(caught.value)
    assert f"record {index} of snapshots, 'train'" in message
    assert f"(number {number} in {path}) cannot be read" in message
    assert "has to be copied or prepared once more" in message
    assert batches.get_state() == needed
    shutil.copy(copy / "whole", path)
    assert_same(next(batches), expected[needed])


@with_tensorflow
@pytest.mark.parametrize("change", [broken_off, without_header, no_image])
def test_a_bad_image_stops_where_it_is_needed_and_says_which(
    tf, tf_records, stream, copy, change
):
    split = tf_records.open_split("snapshots", "train", copy)
    jpegs = [i for i in range(TRAIN) if split.read(i)["image"][:2] == b"\xff\xd8"]
    index = jpegs[len(jpegs) // 2]
    path, number = shard_of(split, index)
    at = batch_of(stream, split, index)
    expected = take(stream(split, 4, augmented=False), at + 2)
    rewrite(tf, path, number, change)
    batches = stream(split, 4, augmented=False)
    for batch in expected[:at]:
        assert_same(next(batches), batch)
    where = rf"record {index} of snapshots, 'train' \(number {number} in .*\): the imag"
    with pytest.raises(decoding.RecordError, match=where):
        next(batches)
    # Skipped images are not decoded.
    batches.set_state(at + 1)
    assert_same(next(batches), expected[at + 1])
    seen = tf_records.TfEvaluationBatches(split, batch_size=4)
    with pytest.raises(decoding.RecordError, match=where):
        list(seen)


@with_tensorflow
def test_missing_files_are_noticed(tf_records, stream, copy):
    split = tf_records.open_split("snapshots", "train", copy)
    path, _ = shard_of(split, 12)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=r"train.tfrecord-00001.*is missing"):
        tf_records.open_split("snapshots", "train", copy)
    with pytest.raises(decoding.RecordError, match=r"train.tfrecord-00001"):
        take(stream(split, 4), 10)


# === At the door ======================================================================


@with_tensorflow
@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("nothing_such", "train", ValueError, "dataset: .* has no 'nothing_such'"),
        ("cifar10", "train", FileNotFoundError, "'cifar10' is not prepared in"),
        ("snapshots", "tests", ValueError, r"\['test', 'train'\], not 'tests'"),
        ("snapshots", "train[:0]", ValueError, "holds no images"),
    ],
)
def test_what_cannot_be_opened(tf_records, data_dir, name, split, error, message):
    with pytest.raises(error, match=message):
        tf_records.open_split(name, split, data_dir)


@with_tensorflow
@pytest.mark.parametrize("dataset", ["snapshots", "strokes/tiny"])
def test_array_record_is_for_the_other_reader(tf_records, array_dir, dataset):
    with pytest.raises(ValueError, match=r"as array_record.*reader=array_record"):
        tf_records.open_split(dataset, "train", array_dir)


@with_tensorflow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size.*got 0"),
        ({"batch_size": 30, "process_count": 4}, "batch_size.*4 process.*got 30"),
        ({"process_index": 1}, "process_index.*got 1"),
        ({"seed": -1}, "seed.*got -1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer.*got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(stream, train, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(train, **arguments)
    with pytest.raises(ValueError, match=r"taken.*-1"):
        stream(train).set_state(-1)
