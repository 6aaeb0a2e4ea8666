"""A split of a prepared `tensorflow_datasets` data set, opened without TensorFlow.

Images of one size that fit in memory are decoded once, when the split is opened; others
(ImageNet) stay on disk, encoded, until a batch asks for them.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data import augment, decoding, strokes_builder

Normalisation = Literal["dataset", "image", "caffe"]
"""Whose mean and standard deviation the pixels are normalised by."""

Crop = Literal["inception", "plain"]
"""How a part of an image is chosen: by `augment.random_resized_crop` and
`augment.centre_crop`, or by `augment.random_squashed_crop` and
`augment.centre_squashed_crop`."""


class Records(Protocol):
    """Random access to the records of a split, as `tfds.data_source` gives it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to the images of a data set.

    Attributes:
        mean: Mean of red, green and blue, of 1; subtracted.
        std: Standard deviation of the same; divided by.
        pad: Largest random shift of a training image, in pixels (images of one size).
        flip: Whether training images are mirrored at random (images of one size).
        crop_size: Height and width, in pixels, of a crop from images of varying size.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    pad: int = 0
    flip: bool = False
    crop_size: int = 224


PREPROCESSING = {
    # Never mirrored: a class is a drawing, and its mirror image is none of the classes.
    # Nor shifted: each drawing has been moved at random already.
    "strokes": Preprocessing(std=(0.246, 0.246, 0.246)),
    "cifar10": Preprocessing((0.491, 0.482, 0.447), (0.247, 0.243, 0.262), 4, True),
    "cifar100": Preprocessing((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 4, True),
    "imagenet2012": Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""By data set name; sets that are not listed get the defaults of `Preprocessing`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run wants done differently from a data set's `Preprocessing`.

    The defaults crop photographs as Szegedy et al. (2015) do. `crop="plain",
    normalise="caffe"` is Caffe's preprocessing and nearly that of SP-NGD; both subtract
    a mean image, here it is the mean colour, and SP-NGD has a 255th of the values, a
    factor that the first BatchNorm takes out.

    Attributes:
        normalise: `"dataset"` for the constants of the data set, one a channel;
            `"image"` for the mean and the standard deviation of all pixels and
            channels of the image itself, as it is given to the model; `"caffe"` for
            the data set's mean alone and a 256th of the pixels' values.
        border: What a shift brings in at the edges (images of one size).
        crop: How a part of an image is chosen (images of varying size).
        image_size: Height and width of an image as the model sees it, in pixels;
            `None` for the data set's. Images of varying size are cropped to it; those
            of one size are resized as a whole, after all augmentation.
    """

    normalise: Normalisation = "dataset"
    border: augment.Border = "reflect"
    crop: Crop = "inception"
    image_size: int | None = None

    def __post_init__(self):
        """Refuses what no data set could be read with, naming the argument."""
        choices = {"normalise": Normalisation, "border": augment.Border, "crop": Crop}
        for name, choice in choices.items():
            if getattr(self, name) not in (known := get_args(choice)):
                raise ValueError(
                    f"{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        if self.image_size is None:
            return
        if self.image_size < 1:
            raise ValueError(
                f"image_size must be positive, or None for the data set's, got "
                f"{self.image_size}"
            )
        if self.crop == "plain" and self.image_size > augment.SQUASHED_SIZE:
            raise ValueError(
                f"image_size must be at most {augment.SQUASHED_SIZE}, from which "
                f"crop='plain' crops, got {self.image_size}; choose crop='inception'"
            )


DEFAULT_RECIPE = Recipe()
"""Nothing different."""

_TEST_SPLITS = {"imagenet2012": "validation"}  # whose split `test` has no labels


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, open for reading.

    Attributes:
        records: The records, by index.
        image_shape: Height, width and channels of an image as the model sees it.
        num_classes: Number of classes.
        preprocessing: What happens to the images.
        fixed_size: Whether all images have the same size on disk.
        recipe: What the run wants done differently.
        origin: Where the records come from.
    """

    records: Records
    image_shape: tuple[int, int, int]
    num_classes: int
    preprocessing: Preprocessing
    fixed_size: bool
    recipe: Recipe = DEFAULT_RECIPE
    origin: decoding.Origin = decoding.UNKNOWN

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    def read(self, record: int) -> dict[str, Any]:
        """One record, by number; a `RecordError` if it cannot be read."""
        return read(self.records, record, self.origin)


def read(records: Records, record: int, origin: decoding.Origin) -> dict[str, Any]:
    """One record, by number.

    Args:
        records: Of which.
        record: Number of the record.
        origin: Where the records come from.

    Returns:
        The record's features.

    Raises:
        RecordError: If it cannot be read, or decoded where the records are.
    """
    try:
        return records[record]
    except Exception as error:  # array_record's or the decoder's, by no contract
        raise origin.read_error(record, error) from error


class InMemory:
    """Records decoded once and held as two arrays.

    Args:
        records: What to decode; images of one size.
        origin: Where they come from.

    Attributes:
        images: uint8 `[n, h, w, c]`.
        labels: int32 `[n]`.
    """

    def __init__(self, records: Records, origin: decoding.Origin):
        image_shape = read(records, 0, origin)["image"].shape
        self.images = np.empty((len(records), *image_shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        for index in range(len(records)):
            row = read(records, index, origin)
            self.images[index], self.labels[index] = row["image"], row["label"]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record, by index."""
        return {"image": self.images[index], "label": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records, by index."""
        return [self[index] for index in indices]


class Encoded:
    """Labelled images as the bytes of files, from records of `tensorflow_datasets`.

    Its own parser copies each image twice more and holds the interpreter lock for it;
    and worker processes need nothing of it but the names of the files.

    Args:
        records: The serialised `tf.train.Example`s.
    """

    def __init__(self, records: Sequence[bytes]):
        self._records = records

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record, by index."""
        messages: Any = tf_example_pb2  # whose classes are made as it is imported
        example = messages.Example.FromString(self._records[index])
        features = example.features.feature
        return {
            "image": features["image"].bytes_list.value[0],
            "label": features["label"].int64_list.value[0],
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records, by index."""
        return [self[index] for index in indices]


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike,
    *,
    recipe: Recipe = DEFAULT_RECIPE,
    memory_limit: int = 2 << 30,
) -> Split:
    """Opens a split of a prepared data set; `strokes/...` is made if it is missing.

    Args:
        name: Name in `tensorflow_datasets`, with the config if there are several:
            `"strokes/20"`, `"cifar100"`, `"imagenet2012"`.
        split: Name of a split or part of one: `"train"`, `"test"`, `"train[:10%]"`.
        data_dir: Directory that holds data sets, one directory each.
        recipe: What the run wants done differently from the data set's
            `Preprocessing`.
        memory_limit: Images of one size that need at most this many bytes are kept
            decoded in memory, as large as they are on disk.

    Returns:
        The split.

    Raises:
        FileNotFoundError: If the data set is not prepared in `data_dir`.
        RecordError: If a record file is missing or is not as long as it was written,
            or an image that is kept in memory cannot be decoded.
        ValueError: If there is no such data set or split, the split is empty, or the
            records are not labelled images.
    """
    builder = _open_builder(name, data_dir)
    known = sorted(builder.info.splits)
    if split.split("[")[0] not in known:
        raise ValueError(f"split: {name} has {known}, not {split!r}")
    if not builder.info.splits[split].num_examples:
        raise ValueError(f"split: {split!r} of {name} holds no images")
    features: Any = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"{name} has the features {sorted(features)}, not image, label"
        )

    shards = tuple(
        decoding.Shard(os.fspath(f.filename), f.skip, f.take, f.examples_in_shard)
        for f in builder.info.splits[split].file_instructions
    )
    origin = decoding.Origin(name, split, shards)
    origin.check()
    shape = features["image"].shape
    fixed_size = None not in shape
    preprocessing = PREPROCESSING.get(builder.name, Preprocessing())
    open_records: Any = builder.as_data_source  # whose decorator hides its parameters
    records: Any = open_records(split)
    if not fixed_size:
        # Of a photograph only a crop is used, so decoding is left to whoever crops.
        records = Encoded(records.data_source)
    if fixed_size and len(records) * int(np.prod(shape)) <= memory_limit:
        records = InMemory(records, origin)
    size = recipe.image_size
    if not fixed_size:
        size = size or preprocessing.crop_size
        shape = (size, size, 3)
    elif size:
        shape = (size, size, shape[-1])
    return Split(
        records=records,
        image_shape=shape,
        num_classes=features["label"].num_classes,
        preprocessing=preprocessing,
        fixed_size=fixed_size,
        recipe=recipe,
        origin=origin,
    )


def test_split(name: str) -> str:
    """The split on which the field reports accuracy.

    Args:
        name: Name in `tensorflow_datasets`, as in `open_split`.

    Returns:
        Name of the split.
    """
    return _TEST_SPLITS.get(name.partition("/")[0].partition(":")[0], "test")


def _open_builder(name: str, data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(data_dir)
    family, _, config = name.partition("/")
    if family == "strokes":
        return strokes_builder.prepare(config or "20", data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise ValueError(f"dataset: tensorflow_datasets has no {name!r}") from None
    if not builder.is_prepared():
        where = "is not prepared in" if os.path.isdir(data_dir) else "cannot be in"
        raise FileNotFoundError(
            f"dataset: {name!r} {where} {builder.data_path}. {_advice(name, data_dir)}"
        )
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"dataset: {name!r} is prepared in {builder.data_path} as "
            f"{found and found.value}, not array_record; convert it once with `tfds "
            "convert_format --out_file_format=array_record`, or choose another data_dir"
        )
    return builder


def _advice(name: str, data_dir: str) -> str:
    """How a data set that is missing gets there."""
    if not os.path.isdir(data_dir):
        return f"There is no directory {data_dir}; give another as data_dir"
    if name.startswith("imagenet2012"):
        return (
            "Prepare it once with `python experiments/prepare_imagenet.py --archives "
            f"DIRECTORY --data-dir {data_dir}`"
        )
    return (
        f"Prepare it once with tfds.builder({name!r}, data_dir={data_dir!r})"
        ".download_and_prepare(file_format='array_record')."
    )
