"""The stream of batches: complete, exact to resume, the same for any process count."""

import io
import itertools

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import pipeline, splits

EPOCH = 256  # training images of strokes/tiny


class Photographs(tfds.core.GeneratorBasedBuilder):
    """PNG files of varying size, as a stand-in for ImageNet's JPEG files."""

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
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        random = np.random.default_rng(0)
        for i in range(11):
            image = np.full((*random.integers(20, 60, 2), 3), 20 * i, np.uint8)
            image[..., 2] = 255  # blue, to tell the order of the channels
            # An array would be encoded with TensorFlow; a file is taken as it is.
            encoded = io.BytesIO(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
            yield i, {"image": encoded, "label": i % 3, "file_name": f"{i}.png"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", params=["in memory", "on disk"])
def train(request, data_dir):
    limit = 1 << 30 if request.param == "in memory" else 0
    return splits.open_split("strokes/tiny", "train", data_dir, memory_limit=limit)


@pytest.fixture(scope="module")
def photographs(data_dir):
    Photographs(data_dir=data_dir, file_format="array_record").download_and_prepare(
        file_format="array_record"
    )
    return splits.open_split("photographs", "train", data_dir)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], other[key])


def originals(split, batch):
    """Record numbers of the images of a batch that was not augmented."""
    images = split.records.__getitems__(list(range(len(split))))
    scale = np.float32(255 * 0.246)
    known = {row["image"].tobytes(): i for i, row in enumerate(images)}
    pixels = np.rint(batch["image"] * scale + 127.5).astype(np.uint8)
    return [known[image.tobytes()] for image in pixels]


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_batches_have_the_declared_shapes_and_types(train):
    batch = next(pipeline.TrainingBatches(train, batch_size=32, seed=0))
    shapes = pipeline.batch_shapes(32, train.image_shape)
    assert batch.keys() == shapes.keys()
    for key, expected in shapes.items():
        assert (batch[key].shape, batch[key].dtype) == (expected.shape, expected.dtype)
    assert abs(batch["image"].mean()) < 0.5
    assert 0.5 < batch["image"].std() < 1.5


def test_an_epoch_holds_each_image_once_and_the_next_another_order(train):
    batches = pipeline.TrainingBatches(train, batch_size=32, seed=0, augmented=False)
    first, second = (
        [i for batch in take(batches, EPOCH // 32) for i in originals(train, batch)]
        for _ in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(EPOCH))
    assert first != second
    assert first != sorted(first)


def test_batches_run_on_over_the_end_of_an_epoch(train):
    batches = pipeline.TrainingBatches(train, batch_size=96, seed=0, augmented=False)
    seen = [i for batch in take(batches, 8) for i in originals(train, batch)]
    # 8 batches of 96 are 3 epochs of 256 exactly: no image is dropped.
    assert np.bincount(seen).tolist() == [3] * EPOCH


def test_labels_belong_to_their_images(train):
    batches = pipeline.TrainingBatches(train, batch_size=64, seed=3, augmented=False)
    batch = next(batches)
    rows = train.records.__getitems__(originals(train, batch))
    np.testing.assert_array_equal(batch["label"], [row["label"] for row in rows])


@pytest.mark.parametrize("taken", [0, 1, 5, 9])
def test_resumes_bit_for_bit_from_one_integer(train, taken):
    batches = pipeline.TrainingBatches(train, batch_size=48, seed=1)
    through = take(batches, 10)
    resumed = pipeline.TrainingBatches(train, batch_size=48, seed=1)
    take(resumed, 2)
    resumed.set_state(taken)
    assert resumed.get_state() == taken
    for batch in through[taken:]:
        assert_same(next(resumed), batch)
    assert resumed.get_state() == batches.get_state() == 10


def test_seed_decides_the_order(train):
    one, same, other = (
        next(pipeline.TrainingBatches(train, batch_size=32, seed=seed))
        for seed in (0, 0, 1)
    )
    assert_same(one, same)
    assert not np.array_equal(one["image"], other["image"])


def test_processes_together_read_what_one_process_reads(train):
    whole = take(pipeline.TrainingBatches(train, batch_size=64, seed=2), 6)
    shares = [
        take(
            pipeline.TrainingBatches(
                train, batch_size=64, seed=2, process_index=index, process_count=4
            ),
            6,
        )
        for index in range(4)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            parts = np.stack([share[step][key] for share in shares], axis=1)
            assert parts.shape[:2] == (16, 4)
            np.testing.assert_array_equal(parts.reshape(batch[key].shape), batch[key])


def test_memory_and_disk_give_the_same_batches(data_dir):
    one, other = (
        splits.open_split("strokes/tiny", "train", data_dir, memory_limit=limit)
        for limit in (0, 1 << 30)
    )
    for batch, same in zip(
        take(pipeline.TrainingBatches(one, batch_size=40, seed=0), 4),
        take(pipeline.TrainingBatches(other, batch_size=40, seed=0), 4),
        strict=True,
    ):
        assert_same(batch, same)


def test_augmentation_follows_the_preprocessing(data_dir):
    split = splits.open_split("strokes/tiny", "train", data_dir)
    moved = splits.dataclasses.replace(
        split, preprocessing=splits.Preprocessing(pad=2, flip=True)
    )
    plain = splits.dataclasses.replace(split, preprocessing=splits.Preprocessing())
    augmented, still = (
        next(pipeline.TrainingBatches(s, batch_size=64, seed=0)) for s in (moved, plain)
    )
    np.testing.assert_array_equal(augmented["label"], still["label"])
    differs = (augmented["image"] != still["image"]).any((1, 2, 3))
    assert 0.9 < differs.mean() <= 1  # 1 in 50 stays where it is
    without = pipeline.TrainingBatches(moved, batch_size=64, seed=0, augmented=False)
    assert_same(next(without), still)


@pytest.mark.parametrize(("batch_size", "process_count"), [(32, 1), (48, 4), (256, 2)])
def test_evaluation_counts_each_image_once(data_dir, batch_size, process_count):
    split = splits.open_split("strokes/tiny", "test", data_dir)  # 100 images
    counted, lengths = [], set()
    for index in range(process_count):
        batches = pipeline.EvaluationBatches(
            split,
            batch_size=batch_size,
            process_index=index,
            process_count=process_count,
        )
        twice = [list(batches), list(batches)]
        lengths |= {len(batches), len(twice[0])}
        for batch, same in zip(*twice, strict=True):
            assert_same(batch, same)
            assert len(batch["label"]) == batch_size // process_count
            assert np.isfinite(batch["image"]).all()
            real = batch["mask"] == 1
            assert (batch["mask"][~real] == 0).all()
            rows = {key: value[real] for key, value in batch.items()}
            found = originals(split, rows)
            np.testing.assert_array_equal(rows["label"], split.records.labels[found])
            counted += found
    assert sorted(counted) == list(range(100))
    assert len(lengths) == 1


def test_photographs_are_cropped_to_one_size(photographs):
    assert not photographs.fixed_size
    batches = pipeline.TrainingBatches(photographs, batch_size=8, seed=0, num_threads=2)
    through = take(batches, 3)
    for batch in through:
        assert batch["image"].shape == (8, 224, 224, 3)
    batches.set_state(1)
    assert_same(next(batches), through[1])


def test_photographs_keep_their_colours_and_labels(photographs):
    evaluation = pipeline.EvaluationBatches(photographs, batch_size=4, num_threads=2)
    seen = {}
    for batch in evaluation:
        for image, label, mask in zip(*batch.values(), strict=True):
            if mask:
                red, green, blue = np.rint(255 * (image[9, 9] * 0.25 + 0.5))
                assert (red, blue) == (green, 255)
                seen[int(red) // 20] = int(label)
    assert seen == {i: i % 3 for i in range(11)}


def test_open_data_counts_steps(data_dir):
    data = pipeline.open_data(
        "strokes/tiny", data_dir, batch_size=96, eval_batch_size=50, seed=0
    )
    assert data.steps_per_epoch == pytest.approx(256 / 96)
    assert [data.steps(epochs) for epochs in (0.01, 1, 3)] == [1, 3, 8]
    assert (data.num_classes, data.image_shape, len(data.test)) == (5, (16, 16, 3), 2)
    with pytest.raises(ValueError, match=r"batch_size must be at most 256.*got 257"):
        pipeline.open_data(
            "strokes/tiny", data_dir, batch_size=257, eval_batch_size=50, seed=0
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size.*got 0"),
        ({"batch_size": 30, "process_count": 4}, "batch_size.*4 process.*got 30"),
        ({"batch_size": 32, "process_index": 1}, "process_index.*got 1"),
        ({"batch_size": 32, "seed": -1}, "seed.*got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.TrainingBatches(train, **{"seed": 0, **arguments})


def test_negative_states_are_refused(train):
    batches = pipeline.TrainingBatches(train, batch_size=32, seed=0)
    with pytest.raises(ValueError, match=r"taken.*-1"):
        batches.set_state(-1)
