"""The stream of batches: complete, exact to resume, the same for any process count."""

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

# So that little is read ahead, which most tests would not take.
stream = functools.partial(pipeline.TrainingBatches, num_threads=2)


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
    batch = next(stream(train, batch_size=32, seed=0))
    shapes = pipeline.batch_shapes(32, train.image_shape)
    assert batch.keys() == shapes.keys()
    for key, expected in shapes.items():
        assert (batch[key].shape, batch[key].dtype) == (expected.shape, expected.dtype)
    assert abs(batch["image"].mean()) < 0.5
    assert 0.5 < batch["image"].std() < 1.5


def test_an_epoch_holds_each_image_once_and_the_next_another_order(train):
    batches = stream(train, batch_size=32, seed=0, augmented=False)
    first, second = (
        [i for batch in take(batches, EPOCH // 32) for i in originals(train, batch)]
        for _ in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(EPOCH))
    assert first != second
    assert first != sorted(first)


def test_batches_run_on_over_the_end_of_an_epoch(train):
    batches = stream(train, batch_size=96, seed=0, augmented=False)
    seen = [i for batch in take(batches, 8) for i in originals(train, batch)]
    # 8 batches of 96 are 3 epochs of 256 exactly: no image is dropped.
    assert np.bincount(seen).tolist() == [3] * EPOCH


def test_labels_belong_to_their_images(train):
    batches = stream(train, batch_size=64, seed=3, augmented=False)
    batch = next(batches)
    rows = train.records.__getitems__(originals(train, batch))
    np.testing.assert_array_equal(batch["label"], [row["label"] for row in rows])


@pytest.mark.parametrize("taken", [0, 1, 5, 9])
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


def test_any_batch_size_will_do(train):
    batches = stream(train, batch_size=1, seed=0, augmented=False)
    one_by_one = [i for batch in take(batches, 21) for i in originals(train, batch)]
    batches = stream(train, batch_size=7, seed=0, augmented=False)
    by_seven = [i for batch in take(batches, 3) for i in originals(train, batch)]
    assert one_by_one == by_seven


def test_seed_decides_the_order(train):
    one, same, other = (
        next(stream(train, batch_size=32, seed=seed)) for seed in (0, 0, 1)
    )
    assert_same(one, same)
    assert not np.array_equal(one["image"], other["image"])


def test_processes_together_read_what_one_process_reads(train):
    whole = take(stream(train, batch_size=64, seed=2), 6)
    shares = [
        take(
            stream(train, batch_size=64, seed=2, process_index=index, process_count=4),
            6,
        )
        for index in range(4)
    ]
    for step, batch in enumerate(whole):
        for key in batch:
            parts = [share[step][key] for share in shares]
            assert [len(part) for part in parts] == [16] * 4
            np.testing.assert_array_equal(np.concatenate(parts), batch[key])


def test_memory_and_disk_give_the_same_batches(data_dir):
    one, other = (
        splits.open_split("strokes/tiny", "train", data_dir, memory_limit=limit)
        for limit in (0, 1 << 30)
    )
    for batch, same in zip(
        take(stream(one, batch_size=40, seed=0), 4),
        take(stream(other, batch_size=40, seed=0), 4),
        strict=True,
    ):
        assert_same(batch, same)


def test_augmentation_follows_the_preprocessing(data_dir):
    split = splits.open_split("strokes/tiny", "train", data_dir)
    moved = splits.dataclasses.replace(
        split, preprocessing=splits.Preprocessing(pad=2, flip=True)
    )
    plain = splits.dataclasses.replace(split, preprocessing=splits.Preprocessing())
    augmented, still = (next(stream(s, batch_size=64, seed=0)) for s in (moved, plain))
    np.testing.assert_array_equal(augmented["label"], still["label"])
    differs = (augmented["image"] != still["image"]).any((1, 2, 3))
    assert 0.9 < differs.mean() <= 1  # 1 in 50 stays where it is
    without = stream(moved, batch_size=64, seed=0, augmented=False)
    assert_same(next(without), still)


@pytest.mark.parametrize("batch_size", [64, 96])
def test_slices_of_an_epoch_are_disjoint_and_complete(data_dir, batch_size):
    train = splits.open_split("strokes/tiny", "train", data_dir)
    seen = []
    for index in range(4):
        batches = stream(
            train,
            batch_size=batch_size,
            seed=5,
            process_index=index,
            process_count=4,
            with_index=True,
        )
        taken = take(batches, 3 * EPOCH // batch_size)
        assert all(batch["index"].dtype == np.int32 for batch in taken)
        seen.append(np.stack([batch["index"] for batch in taken]))
    records = np.concatenate(seen, axis=1).ravel()  # as the stream has them
    for epoch in np.split(records, 3):
        assert sorted(epoch) == list(range(EPOCH))
    assert records.tolist() == [i % EPOCH for i in places(EPOCH, 5, 3 * EPOCH)]


def test_an_index_is_of_the_image_it_comes_with(train):
    batches = stream(train, batch_size=64, seed=1, augmented=False, with_index=True)
    for batch in take(batches, 5):
        assert batch["index"].tolist() == originals(train, batch)


def test_evaluation_gives_padding_no_index(data_dir):
    split = splits.open_split("strokes/tiny", "test", data_dir)  # 100 images
    batches = [
        list(
            pipeline.EvaluationBatches(
                split,
                batch_size=32,
                process_index=index,
                process_count=2,
                with_index=True,
            )
        )
        for index in range(2)
    ]
    pairs = zip(*batches, strict=True)
    whole = [np.concatenate([b["index"] for b in pair]) for pair in pairs]
    assert np.concatenate(whole).tolist() == [*range(100), *[-1] * 28]


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
    batches = stream(photographs, batch_size=8, seed=0)
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


class Damaged(tfds.core.GeneratorBasedBuilder):
    """Twelve JPEG files, of which the third is none and the eighth is broken off."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=12),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            image = np.full((40, 50, 3), 20 * i, np.uint8)
            file = cv2.imencode(".jpg", image)[1].tobytes()
            file = {2: b"no image at all", 7: file[:-300]}.get(i, file)
            yield i, {"image": io.BytesIO(file), "label": i}


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
    for part in (
        f"record {record} of damaged, 'train' (number {record} in {shard.path})",
        "prepare_imagenet.py --verify",
        "--bad-images blank",
    ):
        assert part in str(error.value)
    with pytest.raises(decoding.RecordError):
        list(pipeline.EvaluationBatches(split, batch_size=6))


@pytest.mark.parametrize("normalise", ["dataset", "image", "caffe"])
def test_blank_images_are_of_the_mean_colour_and_told_of_once(damaged, normalise):
    split, bad = damaged
    recipe = splits.Recipe(image_size=16, normalise=normalise)
    split = splits.dataclasses.replace(split, recipe=recipe)
    batches = stream(split, batch_size=4, seed=0, bad_images="blank", with_index=True)
    with pytest.warns(UserWarning, match="of damaged, 'train'.*mean colour") as warned:
        epochs = take(batches, 6)
    assert len(warned) == batches.bad_images == 2
    for batch in epochs:
        assert batch.keys() == {"image", "label", "index"}
        blank = np.isin(batch["index"], bad)
        np.testing.assert_array_equal(np.isin(batch["label"], (2, 7)), blank)
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


class Encoded(list):
    """Records of PNG files, held in a list."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.fixture(scope="module")
def textured():
    """Photographs of noise, of which each crop is different."""
    random = np.random.default_rng(1)
    images = [
        random.integers(0, 256, (*random.integers(20, 60, 2), 3)).astype(np.uint8)
        for _ in range(11)
    ]
    records = Encoded(
        {"image": cv2.imencode(".png", image[..., ::-1])[1].tobytes(), "label": i}
        for i, image in enumerate(images)
    )

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
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def with_recipe(split, recipe):
    """The same records, shifted, mirrored, and read by another recipe."""
    size = recipe.image_size or split.image_shape[0]
    preprocessing = splits.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 3, True)
    return splits.dataclasses.replace(
        split,
        recipe=recipe,
        preprocessing=preprocessing,
        image_shape=(size, size, split.image_shape[2]),
    )


@recipes
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
    batches = stream(split, batch_size=13, seed=2)
    training = next(batches)
    draws = augment.uniforms(2, np.arange(13), 3)
    tries = augment.uniforms(2, np.arange(13), 41)
    for position, record in enumerate(places(11, 2, 13)):
        image = images[record]
        if crop == "plain":
            image = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
            y, x = (int(draw * (257 - size)) for draw in draws[position, :2])
            image = image[y : y + size, x : x + size]
            image = image[:, ::-1] if draws[position, 2] < 0.5 else image
        else:
            image = augment.random_resized_crop(image, tries[position], size)
        image = normalised(image, recipe, split.preprocessing)
        np.testing.assert_allclose(training["image"][position], image, atol=2e-5)
        assert training["label"][position] == record

    batches = pipeline.EvaluationBatches(split, batch_size=11, num_threads=2)
    still = stream(split, batch_size=11, seed=2, augmented=False, num_threads=2)
    everything = next(iter(batches))["image"]
    np.testing.assert_array_equal(next(still)["image"], everything[places(11, 2, 11)])
    for image, got in zip(images, everything, strict=True):
        if crop == "plain":
            image = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
            start = (256 - size) // 2
            image = image[start : start + size, start : start + size]
        else:
            image = augment.centre_crop(image, size)
        image = normalised(image, recipe, split.preprocessing)
        np.testing.assert_allclose(got, image, atol=2e-5)


@recipes
def test_recipes_keep_the_order_for_any_processes_and_resume(train, recipe):
    split = with_recipe(train, recipe)
    through = take(stream(split, batch_size=48, seed=1), 7)
    resumed = stream(split, batch_size=48, seed=1)
    resumed.set_state(5)
    assert_same(next(resumed), through[5])
    for index in range(3):
        share = stream(
            split, batch_size=48, seed=1, process_index=index, process_count=3
        )
        share.set_state(6)
        own = slice(16 * index, 16 * (index + 1))
        assert_same(next(share), {key: v[own] for key, v in through[6].items()})


def test_plain_crops_keep_the_order_for_any_processes_and_resume(textured):
    split = textured[1](splits.Recipe(crop="plain", image_size=64))

    def batches(**process):
        return stream(split, batch_size=6, seed=1, **process)

    through, resumed = take(batches(), 4), batches()
    resumed.set_state(2)
    assert_same(next(resumed), through[2])
    for index in range(2):
        share = take(batches(process_index=index, process_count=2), 4)[3]
        own = slice(3 * index, 3 * (index + 1))
        assert_same(share, {key: v[own] for key, v in through[3].items()})


def test_a_nearly_uniform_image_is_not_blown_up():
    images = np.full((2, 2, 2, 3), 90, np.uint8)
    images[1, 0, 1, 2] = 91  # a deviation of sqrt(11) / 12, below 1 / sqrt(12)
    records = Encoded({"image": image, "label": 0} for image in images)
    split = splits.Split(
        records, (2, 2, 3), 1, splits.Preprocessing(), True, splits.Recipe("image")
    )
    uniform, nearly = next(iter(pipeline.EvaluationBatches(split, batch_size=2)))[
        "image"
    ]
    np.testing.assert_array_equal(uniform, 0)
    expected = np.full((2, 2, 3), -(12**-0.5))
    expected[0, 1, 2] = 11 * 12**-0.5
    np.testing.assert_allclose(nearly, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("dataset", "recipe", "shape"),
    [
        ("strokes/tiny", splits.Recipe(image_size=67), (67, 67, 3)),
        ("photographs", splits.Recipe(), (224, 224, 3)),
        ("photographs", splits.Recipe(image_size=67), (67, 67, 3)),
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
    data = pipeline.open_data(
        "strokes/tiny", data_dir, batch_size=96, eval_batch_size=50, seed=0
    )
    assert data.steps_per_epoch == pytest.approx(256 / 96)
    assert [data.steps(epochs) for epochs in (0.01, 1, 3)] == [1, 3, 8]
    assert (data.num_classes, data.image_shape, len(data.test)) == (5, (16, 16, 3), 2)
    assert (data.train_images, data.test_images) == (256, 100)
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
        stream(train, **{"seed": 0, **arguments})


def test_negative_states_are_refused(train):
    batches = stream(train, batch_size=32, seed=0)
    with pytest.raises(ValueError, match=r"taken.*-1"):
        batches.set_state(-1)


def test_a_closed_stream_goes_on(train):
    batches = stream(train, batch_size=32, seed=0)
    first, second = take(batches, 2)
    batches.close()
    batches.set_state(1)
    batches.close()
    assert batches.get_state() == 1
    assert_same(next(batches), second)
    batches.set_state(0)
    assert_same(next(batches), first)
    batches.close()
