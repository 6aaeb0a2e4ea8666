"""A split of a prepared ``tensorflow_datasets`` data set, opened without TensorFlow.

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
from lbopt import checks

Normalisation = Literal["dataset", "image", "caffe"]
"""Source of the mean and standard deviation that pixels are normalised by."""

Crop = Literal["inception", "plain"]
"""``augment.random_resized_crop`` and ``augment.centre_crop``, or
``augment.random_squashed_crop`` and ``augment.centre_squashed_crop``."""

Record = dict[str, Any]
"""``image``, ``label`` and perhaps other features."""


class Records(Protocol):
    """Random access to the records of a split, as ``tfds.data_source`` gives it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the images of a data set.

    Attributes:
      mean: mean of red, green and blue, in [0, 1]; subtracted.
      std: standard deviation of the same; divided by.
      pad: largest random shift of a training image, in pixels (images of one size).
      flip: whether training images are mirrored at random (images of one size).
      crop_size: height and width, in pixels, of a crop from images of varying size.
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
"""By data set name; sets that are not listed get the defaults of ``Preprocessing``."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run's choices beyond a data set's ``Preprocessing``.

    The defaults crop photographs as Szegedy et al. (2015) do.  ``crop="plain",
    normalise="caffe"`` is Caffe's preprocessing and nearly that of SP-NGD, except that
    both subtract a mean image in place of the mean colour, and that SP-NGD divides by
    255, a factor that the first BatchNorm takes out.

    Attributes:
      normalise: ``"dataset"`` for the data set's constants, one per channel;
        ``"image"`` for the mean and the standard deviation over all pixels and channels
        of the image itself, after augmentation; ``"caffe"`` for (x - mean) / 256.
      border: fill of the edges after a shift (images of one size).
      crop: kind of crop (images of varying size).
      image_size: height and width of an image as the model sees it, in pixels; None for
        the data set's.  Images of varying size are cropped to it; those of one size are
        resized as a whole, after all augmentation.
    """

    normalise: Normalisation = "dataset"
    border: augment.Border = "reflect"
    crop: Crop = "inception"
    image_size: int | None = None

    def __post_init__(self):
        """Raises ValueError for choices that no data set could be read with."""
        choices = {"normalise": Normalisation, "border": augment.Border, "crop": Crop}
        for name, choice in choices.items():
            checks.one_of(name, getattr(self, name), get_args(choice))
        if self.image_size is None:
            return
        checks.whole("image_size", self.image_size, "None keeps the data set's")
        if self.crop == "plain" and self.image_size > augment.SQUASHED_SIZE:
            raise ValueError(
                f"image_size={self.image_size} must be at most "
                f"{augment.SQUASHED_SIZE} with crop='plain'; choose crop='inception'"
            )


DEFAULT_RECIPE = Recipe()

_TEST_SPLITS = {"imagenet2012": "validation"}  # its split `test` has no labels


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set, open for reading.

    Attributes:
      records: the records, by index.
      image_shape: height, width and channels of an image as the model sees it.
      num_classes: number of classes.
      preprocessing: preprocessing of the data set.
      fixed_size: whether all images have the same size on disk.
      recipe: choices of the run.
      origin: record files, for messages.
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

    def read(self, record: int) -> Record:
        """Returns one record, by number; raises ``RecordError`` if it is damaged."""
        return _read(self.records, record, self.origin)


def _read(records: Records, record: int, origin: decoding.Origin) -> Record:
    try:
        return records[record]
    except Exception as error:  # array_record and decoders document no type
        raise origin.read_error(record, error) from error


class InMemory:
    """Records decoded once and held as two arrays.

    Args:
      records: records with images of one size.
      origin: record files, for messages.

    Attributes:
      images: uint8 ``[n, h, w, c]``.
      labels: int32 ``[n]``.
    """

    def __init__(self, records: Records, origin: decoding.Origin):
        image_shape = _read(records, 0, origin)["image"].shape
        self.images = np.empty((len(records), *image_shape), np.uint8)
        self.labels = np.empty(len(records), np.int32)
        for index in range(len(records)):
            row = _read(records, index, origin)
            self.images[index], self.labels[index] = row["image"], row["label"]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """One record, by index."""
        return {"image": self.images[index], "label": self.labels[index]}


class Encoded:
    """Labelled images as encoded files, from records of ``tensorflow_datasets``.

    The parser of ``tensorflow_datasets`` would copy each image twice more and hold the
    interpreter lock meanwhile.

    Args:
      records: serialised messages ``tf.train.Example``.
    """

    def __init__(self, records: Sequence[bytes]):
        self._records = records

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """One record, by index."""
        messages: Any = tf_example_pb2  # its classes are made at run time
        example = messages.Example.FromString(self._records[index])
        features = example.features.feature
        return {
            "image": features["image"].bytes_list.value[0],
            "label": features["label"].int64_list.value[0],
        }


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike,
    *,
    recipe: Recipe = DEFAULT_RECIPE,
    memory_limit: int = 2 << 30,
) -> Split:
    """Opens a split of a prepared data set; ``strokes/...`` is made if it is missing.

    Args:
      name: name in ``tensorflow_datasets``, with the config if there are several:
        ``"strokes/20"``, ``"cifar100"``, ``"imagenet2012"``.
      split: name of a split or part of one: ``"train"``, ``"test"``, ``"train[:10%]"``.
      data_dir: directory that holds data sets, one directory each.
      recipe: choices of the run.
      memory_limit: images of one size that need at most this many bytes are kept
        decoded in memory, at their size on disk.

    Returns:
      The split.

    Raises:
      FileNotFoundError: if the data set is not prepared in ``data_dir``.
      RecordError: if a record file is missing or is not as long as it was written, or
        an image that is kept in memory cannot be decoded.
      ValueError: if there is no such data set or split, the split is empty, or the
        records are not labelled images.
    """
    builder = _open_builder(name, data_dir)
    known = sorted(builder.info.splits)
    if split.split("[")[0] not in known:
        raise ValueError(f"split={split!r} must be one of {known} for {name}")
    if not builder.info.splits[split].num_examples:
        raise ValueError(f"split={split!r} must hold images of {name}; it has none")
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
        # Of a photograph only a crop is used, so decoding is left to the loader.
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
    """Returns the name of the split on which the field reports accuracy."""
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
            "convert_format` (see experiments/README.md), or choose another data_dir"
        )
    return builder


def _advice(name: str, data_dir: str) -> str:
    """Returns the way to a data set that is missing."""
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
