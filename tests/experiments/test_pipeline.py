"""The stream of batches: complete, exact to resume, the same for any process count."""

import dataclasses
import functools
import io
import itertools

import cv2
import grain
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import augment, decoding, pipeline, splits

EPOCH = 256  # training images of strokes/tiny

# Two threads read little ahead, which most tests would not take.
stream = functools.partial(pipeline.TrainingBatches, num_threads=2)


class ImageFiles(tfds.core.GeneratorBasedBuilder):
    """Encoded images of varying size, as a stand-in for ImageNet."""

    VERSION = tfds.core.Version("1.0.0")
    FILES = ()

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=len(self.FILES)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i, file in enumerate(self.FILES):
            # An array would be encoded with TensorFlow; a file is taken as it is.
            yield i, {"image": io.BytesIO(file), "label": i, "file_name": f"{i}.png"}


def photograph(i, size):
    image = np.full((*size, 3), 20 * i, np.uint8)
    image[..., 2] = 255  # blue, to tell the order of the channels
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


class Photographs(ImageFiles):
    FILES = tuple(
        photograph(i, np.random.default_rng(i).integers(20, 60, 2)) for i in range(11)
    )


class Damaged(ImageFiles):
    """Twelve JPEG files, of which the third is none and the eighth is cut off."""

    FILES = tuple(
        cv2.imencode(".jpg", np.full((40, 50, 3), 20 * i, np.uint8))[1].tobytes()
        for i in range(12)
    )
    FILES = (*FILES[:2], b"no image at all", *FILES[3:7], FILES[7][:-300], *FILES[8:])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", params=["in memory", "on disk"])
def train(request, data_dir):
    limit = 1 << 30 if request.param == "in memory" else 0
    return splits.open_split("strokes/tiny", "train", data_dir, memory_limit=limit)


@pytest.fixture(scope="module")
def held_out(data_dir):
    return splits.open_split("strokes/tiny", "test", data_dir)  # 100 images


@pytest.fixture(scope="module")
def photographs(data_dir):
    builder = Photographs(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return splits.open_split("photographs", "train", data_dir)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], other[key])


def part(batch, index, count):
    """The slice of a batch that one of several processes reads."""
    size = len(batch["label"]) // count
    return {key: v[index * size : (index + 1) * size] for key, v in batch.items()}


def originals(split, batch):
    """Record numbers of the images of a batch that was not augmented."""
    scale = np.float32(255 * 0.246)
    images = (split.records[i]["image"] for i in range(len(split)))
    known = {image.tobytes(): i for i, image in enumerate(images)}
    pixels = np.rint(batch["image"] * scale + 127.5).astype(np.uint8)
    return [known[image.tobytes()] for image in pixels]


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_batches_have_the_declared_shapes_and_types(train):
    batch = next(stream(train, batch_size=32, seed=0))
    shapes = pipeline.batch_shapes(32, train.image_shape)
    assert batch.keys() == shapes.keys()
    for key, expected in shapes.items():
        assert (batch[key].shape, batch[key].dtype) == (expected.shape, expected.dtype)
    assert abs(batch["image"].mean()) < 0.5
    assert 0.5 < batch["image"].std() < 1.5


@pytest.mark.parametrize(("batch_size", "count"), [(96, 8), (7, 3), (1, 21)])
def test_batches_run_on_over_the_end_of_an_epoch(train, batch_size, count):
    batches = stream(train, batch_size=batch_size, seed=0, augmented=False)
    seen = [i for batch in take(batches, count) for i in originals(train, batch)]
    assert seen == places(EPOCH, 0, batch_size * count)
    if batch_size == 96:  # three epochs of 256 exactly: no image is dropped
        epochs = seen[:EPOCH], seen[EPOCH : 2 * EPOCH], seen[2 * EPOCH :]
        assert all(sorted(epoch) == list(range(EPOCH)) for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_resumes_bit_for_bit_from_one_integer(train, taken):
    batches = stream(train, batch_size=48, seed=1)
    through = take(batches, 10)
    resumed = stream(train, batch_size=48, seed=1)
    take(resumed, 2)
    resumed.set_state(taken)
    assert resumed.get_state() == taken
    for batch in through[taken:]:
        assert_same(next(resumed), batch)
    assert resumed.get_state() == batches.get_state() == 10


def test_processes_together_read_what_one_process_reads(train):
    read = functools.partial(stream, train, batch_size=64, seed=2)
    whole = take(read(), 6)
    for index in range(4):
        share = take(read(process_index=index, process_count=4), 6)
        for batch, own in zip(whole, share, strict=True):
            assert_same(own, part(batch, index, 4))


@pytest.mark.parametrize("normalise", ["dataset", "image", "caffe"])
def test_bfloat16_images_are_the_float32_ones_rounded(train, textured, normalise):
    recipe = splits.Recipe(normalise=normalise)
    for split in (with_recipe(train, recipe), textured[1](recipe)):
        exact, rounded = (
            next(stream(split, batch_size=6, seed=0, dtype=dtype))
            for dtype in (np.float32, ml_dtypes.bfloat16)
        )
        shapes = pipeline.batch_shapes(6, split.image_shape, ml_dtypes.bfloat16)
        assert rounded["image"].dtype == shapes["image"].dtype == ml_dtypes.bfloat16
        assert exact["image"].dtype == np.float32
        # Eight bits are kept; rounded to nearest, they are off by half of the last.
        image = rounded["image"].astype(np.float32)
        np.testing.assert_allclose(image, exact["image"], rtol=2**-8, atol=1e-30)
        assert not np.array_equal(image, exact["image"])
        np.testing.assert_array_equal(rounded["label"], exact["label"])


@pytest.mark.parametrize(("batch_size", "process_count"), [(32, 1), (48, 4), (256, 2)])
def test_evaluation_counts_each_image_once(held_out, batch_size, process_count):
    counted, lengths = [], set()
    for index in range(process_count):
        batches = pipeline.EvaluationBatches(
            held_out,
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
            found = originals(held_out, rows)
            np.testing.assert_array_equal(rows["label"], held_out.records.labels[found])
            counted += found
    assert sorted(counted) == list(range(100))
    assert len(lengths) == 1


def test_photographs_keep_their_colours_and_labels(photographs):
    assert not photographs.fixed_size
    evaluation = pipeline.EvaluationBatches(photographs, batch_size=4, num_threads=2)
    seen = {}
    for batch in evaluation:
        assert batch["image"].shape == (4, 224, 224, 3)
        for image, label, mask in zip(*batch.values(), strict=True):
            if mask:
                red, green, blue = np.rint(255 * (image[9, 9] * 0.25 + 0.5))
                assert (red, blue) == (green, 255)
                seen[int(red) // 20] = int(label)
    assert seen == {i: i for i in range(11)}


@pytest.fixture(scope="module")
def damaged(data_dir):
    builder = Damaged(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    recipe = splits.Recipe(image_size=16)
    split = splits.open_split("damaged", "train", data_dir, recipe=recipe)
    # Records come in the order of their hashed keys; their labels tell which they were.
    bad = [i for i in range(12) if split.read(i)["label"] in (2, 7)]
    return split, bad


def test_a_bad_image_stops_the_stream_in_its_place_with_the_way_out(damaged):
    split, bad = damaged
    first = min(places(12, 0, 12).index(record) for record in bad)
    batches = stream(split, batch_size=1, seed=0, num_threads=3)
    assert len(take(batches, first)) == first
    for _ in range(2):  # asked once more, it is read once more
        with pytest.raises(decoding.RecordError) as error:
            next(batches)
        assert batches.get_state() == first
    record = places(12, 0, 12)[first]
    (shard,) = split.origin.shards
    for words in (
        f"record {record} of damaged, 'train' (number {record} in {shard.path})",
        "prepare_imagenet.py --verify",
        "--bad-images blank",
    ):
        assert words in str(error.value)
    with pytest.raises(decoding.RecordError):
        list(pipeline.EvaluationBatches(split, batch_size=6))


@pytest.mark.parametrize("normalise", ["dataset", "image", "caffe"])
def test_blank_images_are_of_the_mean_colour_and_told_of_once(damaged, normalise):
    split, bad = damaged
    recipe = splits.Recipe(image_size=16, normalise=normalise)
    split = dataclasses.replace(split, recipe=recipe)
    batches = stream(split, batch_size=4, seed=0, bad_images="blank")
    with pytest.warns(UserWarning, match="of damaged, 'train'.*mean colour") as warned:
        epochs = take(batches, 6)
    assert len(warned) == batches.bad_images == 2
    for batch in epochs:
        assert batch.keys() == {"image", "label"}
        blank = np.isin(batch["label"], (2, 7))
        assert (batch["image"][blank] == 0).all()
        if normalise != "image":  # by which one colour alone is 0, whichever it is
            assert (batch["image"][~blank] != 0).any((1, 2, 3)).all()
    batches.set_state(0)
    for batch, same in zip(take(batches, 3), epochs[:3], strict=True):
        assert_same(batch, same)
    evaluation = pipeline.EvaluationBatches(split, batch_size=12, bad_images="blank")
    with pytest.warns(UserWarning, match="mean colour"):
        (whole,) = evaluation
    assert (whole["image"][bad] == 0).all()
    assert evaluation.bad_images == 2


@pytest.fixture(scope="module")
def textured():
    """Photographs of noise, of which each crop is different."""
    random = np.random.default_rng(1)
    images = [
        random.integers(0, 256, (*random.integers(20, 60, 2), 3)).astype(np.uint8)
        for _ in range(11)
    ]
    records = [
        {"image": cv2.imencode(".png", image[..., ::-1])[1].tobytes(), "label": i}
        for i, image in enumerate(images)
    ]

    def split(recipe):
        size = recipe.image_size or 224
        preprocessing = splits.PREPROCESSING["imagenet2012"]
        return splits.Split(records, (size, size, 3), 11, preprocessing, False, recipe)

    return images, split


def places(length, seed, count):
    """Record numbers at the first positions of the stream."""
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
    return [order[position] for position in range(count)]


def normalised(image, recipe, preprocessing):
    """The formulas of the normalisations for one image, in float64."""
    pixels = image.astype(float)
    if recipe.normalise == "dataset":
        return (pixels / 255 - preprocessing.mean) / preprocessing.std
    if recipe.normalise == "caffe":  # (x - mean pixel) / 256
        return (pixels - 255 * np.asarray(preprocessing.mean)) / 256
    return (pixels - pixels.mean()) / max(pixels.std(), pixels.size**-0.5)


RECIPES = {
    "default": splits.Recipe(),
    "nlcg": splits.Recipe(normalise="image", border="zero"),
    "enlarged": splits.Recipe(image_size=37),
    "all": splits.Recipe("image", "zero", "plain", 11),
}


def with_recipe(split, recipe):
    """The same records, shifted, mirrored, and read by another recipe."""
    size = recipe.image_size or split.image_shape[0]
    preprocessing = splits.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 3, True)
    return dataclasses.replace(
        split,
        recipe=recipe,
        preprocessing=preprocessing,
        image_shape=(size, size, split.image_shape[2]),
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_for_images_of_one_size(train, recipe):
    split = with_recipe(train, recipe)
    size = split.image_shape[0]
    mode = "constant" if recipe.border == "zero" else "reflect"

    def expected(image):
        resized = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        return normalised(resized, recipe, split.preprocessing)

    order = places(EPOCH, 4, 2 * 160)  # on into the second epoch
    draws = augment.uniforms(4, np.arange(2 * 160), 3)
    training = take(stream(split, batch_size=160, seed=4), 2)
    images = np.concatenate([batch["image"] for batch in training])
    labels = np.concatenate([batch["label"] for batch in training])
    for position, record in enumerate(order):
        row = split.records[record]
        padded = np.pad(row["image"], ((3, 3), (3, 3), (0, 0)), mode=mode)
        x, y = (int(7 * draw) for draw in draws[position, :2])
        moved = padded[y : y + 16, x : x + 16]
        moved = moved[:, ::-1] if draws[position, 2] < 0.5 else moved
        np.testing.assert_allclose(images[position], expected(moved), atol=2e-5)
        assert labels[position] == row["label"]

    still = stream(split, batch_size=160, seed=4, augmented=False)
    evaluation = pipeline.EvaluationBatches(split, batch_size=EPOCH)
    first, everything = next(still)["image"], next(iter(evaluation))["image"]
    np.testing.assert_array_equal(first, everything[order[:160]])
    for record in range(EPOCH):
        image = expected(split.records[record]["image"])
        np.testing.assert_allclose(everything[record], image, atol=2e-5)
    assert images.dtype == everything.dtype == np.float32


@pytest.mark.parametrize("normalise", ["dataset", "image", "caffe"])
@pytest.mark.parametrize("image_size", [None, 227])
@pytest.mark.parametrize("crop", ["inception", "plain"])
def test_recipes_for_photographs(textured, crop, image_size, normalise):
    recipe = splits.Recipe(crop=crop, image_size=image_size, normalise=normalise)
    images, opened = textured
    split, size = opened(recipe), image_size or 224
    training = next(stream(split, batch_size=13, seed=2))
    draws = augment.uniforms(2, np.arange(13), 3)
    tries = augment.uniforms(2, np.arange(13), 41)

    def squashed(image, y, x):
        image = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
        return image[y : y + size, x : x + size]

    for position, record in enumerate(places(11, 2, 13)):
        image = images[record]
        if crop == "plain":
            image = squashed(
                image, *(int(x * (257 - size)) for x in draws[position, :2])
            )
            image = image[:, ::-1] if draws[position, 2] < 0.5 else image
        else:
            image = augment.random_resized_crop(image, tries[position], size)
        image = normalised(image, recipe, split.preprocessing)
        np.testing.assert_allclose(training["image"][position], image, atol=2e-5)
        assert training["label"][position] == record

    batches = pipeline.EvaluationBatches(split, batch_size=11, num_threads=2)
    still = stream(split, batch_size=11, seed=2, augmented=False)
    everything = next(iter(batches))["image"]
    np.testing.assert_array_equal(next(still)["image"], everything[places(11, 2, 11)])
    start = (256 - size) // 2
    for image, got in zip(images, everything, strict=True):
        if crop == "plain":
            image = squashed(image, start, start)
        else:
            image = augment.centre_crop(image, size)
        image = normalised(image, recipe, split.preprocessing)
        np.testing.assert_allclose(got, image, atol=2e-5)


@pytest.mark.parametrize("crop", ["inception", "plain"])
def test_crops_keep_the_order_for_any_processes_and_resume(textured, crop):
    split = textured[1](splits.Recipe(crop=crop, image_size=64))
    read = functools.partial(stream, split, batch_size=6, seed=1)
    through, resumed = take(read(), 4), read()
    resumed.set_state(2)
    assert_same(next(resumed), through[2])
    for index in range(2):
        share = take(read(process_index=index, process_count=2), 4)[3]
        assert_same(share, part(through[3], index, 2))


@pytest.mark.parametrize(
    ("dataset", "recipe", "shape"),
    [
        ("strokes/tiny", splits.Recipe(image_size=67), (67, 67, 3)),
        ("photographs", splits.Recipe(), (224, 224, 3)),
        ("photographs", splits.Recipe(crop="plain"), (224, 224, 3)),
    ],
)
def test_open_data_follows_the_recipe(photographs, data_dir, dataset, recipe, shape):
    del photographs  # only prepared
    data = pipeline.open_data(
        dataset, data_dir, batch_size=4, eval_batch_size=4, seed=0, recipe=recipe
    )
    assert data.image_shape == shape
    training, test = next(data.train), next(iter(data.test))
    assert training["image"].shape == test["image"].shape == (4, *shape)
    opened = splits.open_split(dataset, "train", data_dir, recipe=recipe)
    assert_same(next(stream(opened, batch_size=4, seed=0)), training)


def test_open_data_counts_steps(data_dir):
    opened = functools.partial(
        pipeline.open_data, "strokes/tiny", data_dir, eval_batch_size=50, seed=0
    )
    data = opened(batch_size=96)
    assert data.steps_per_epoch == pytest.approx(256 / 96)
    assert [data.steps(epochs) for epochs in (0.01, 1, 3)] == [1, 3, 8]
    assert (data.num_classes, data.image_shape, len(data.test)) == (5, (16, 16, 3), 2)
    assert (data.train_images, data.test_images) == (256, 100)
    with pytest.raises(ValueError, match="batch_size=257 must be at most 256"):
        opened(batch_size=257)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"batch_size": 32, "seed": -1}, "seed=-1 must"),
        ({"batch_size": 32, "seed": 2**32}, "seed=4294967296 must"),
    ],
)
def test_bad_arguments_are_refused_by_name(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(train, **{"seed": 0, **arguments})


def test_a_closed_stream_goes_on(train):
    batches = stream(train, batch_size=32, seed=0)
    with pytest.raises(ValueError, match=r"taken=-1 must"):
        batches.set_state(-1)
    first, second = take(batches, 2)
    batches.close()
    batches.set_state(1)
    batches.close()
    assert batches.get_state() == 1
    assert_same(next(batches), second)
    batches.set_state(0)
    assert_same(next(batches), first)
    batches.close()
