"""A split of a data set that `tensorflow_datasets` prepared as TFRecord."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tensorflow_datasets as tfds

from experiments.data import decoding, splits


class Part(NamedTuple):
    """Successive records in one file.

    Attributes:
        path: The file.
        skip: Number of the first record in the file.
        take: How many records.
        first: Number of the first record in the split.
    """

    path: str
    skip: int
    take: int
    first: int


class TfRecords:
    """The records of a split, in TFRecord files.

    A file can only be read from its start: that takes up to as long as reading it,
    for each record that is asked for by its number.

    Args:
        features: The features `image` and `label` of the data set.
        shards: The files.
    """

    def __init__(
        self, features: tfds.features.FeaturesDict, shards: Sequence[decoding.Shard]
    ):
        self._features = features
        # Of a photograph only a part is decoded, by whoever crops.
        image: Any = features["image"]
        skipped = None in image.shape
        self._decoders = {"image": tfds.decode.SkipDecoding()} if skipped else None
        self._parts = []
        for shard in shards:
            self._parts.append(Part(shard.path, shard.skip, shard.take, len(self)))

    def __len__(self) -> int:
        """Number of records."""
        return sum(part.take for part in self._parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record, by index."""
        *_, (_, contents) = read_up_to(self._parts, index)
        example = self.parsed(contents)
        return {key: tensor.numpy() for key, tensor in example.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records, by index."""
        return [self[index] for index in indices]

    def share(self, index: int, count: int) -> list[Part]:
        """One of several equal shares, as `tfds.even_splits` makes them.

        Args:
            index: Which share.
            count: How many there are; their lengths differ by one record at most.

        Returns:
            Where its records are.
        """
        size, longer = divmod(len(self), count)
        start = index * size + min(index, longer)
        stop = start + size + (index < longer)
        parts = []
        for part in self._parts:
            low, high = max(start, part.first), min(stop, part.first + part.take)
            if low < high:
                skip = part.skip + low - part.first
                parts.append(Part(part.path, skip, high - low, low))
        return parts

    def parsed(self, contents: tf.Tensor | bytes) -> dict[str, tf.Tensor]:
        """Image and label of a record; images of varying size are still files."""
        parse: Any = self._features.deserialize_example  # which may give ragged tensors
        return parse(contents, decoders=self._decoders)


def read(path: Any, skip: Any, take: Any, first: Any) -> tf.data.Dataset:
    """The records of a `Part`.

    Returns:
        Numbers in the split and contents, which are empty if a record is damaged or
        behind a damaged one, or the file ends before it.
    """
    # Else whoever ignores errors would try for ever to open a file that is gone.
    opened = tf.data.FixedLengthRecordDataset(path, 1, buffer_size=1).take(1).skip(1)
    found = tf.data.TFRecordDataset(path).skip(skip).ignore_errors()
    missing = tf.data.Dataset.from_tensors("").repeat()
    contents = opened.concatenate(found).concatenate(missing)
    return tf.data.Dataset.zip(tf.data.Dataset.range(first, first + take), contents)


def read_up_to(parts: Sequence[Part], index: int) -> Iterator[tuple[int, bytes]]:
    """The records of a file in order, as `read` gives them, the last being this one.

    Args:
        parts: Where records are.
        index: Number of the record in the split.

    Returns:
        Numbers and contents.

    Raises:
        IndexError: If it is in none of the parts.
    """
    for path, skip, take, first in parts:
        if first <= index < first + take:
            found: Any = read(path, skip, index - first + 1, first)
            return found.as_numpy_iterator()
    raise IndexError(f"there is no record {index}")


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike,
    *,
    recipe: splits.Recipe = splits.DEFAULT_RECIPE,
) -> splits.Split:
    """Opens a split of a data set that was prepared as TFRecord.

    Args:
        name: Name in `tensorflow_datasets`, with the config if there are several.
        split: Name of a split or part of one: `"train"`, `"train[:10%]"`.
        data_dir: Directory that holds data sets, one directory each.
        recipe: What the run wants done differently from the data set's
            `Preprocessing`.

    Returns:
        The split, whose records are `TfRecords`.

    Raises:
        FileNotFoundError: If the data set is not prepared in `data_dir`, or one of its
            files is missing.
        ValueError: If there is no such data set or split, the split is empty, or the
            records are not labelled images in TFRecord files.
    """
    builder = _open_builder(name, data_dir)
    known = sorted(builder.info.splits)
    if split.split("[")[0] not in known:
        raise ValueError(f"split: {name} has {known}, not {split!r}")
    info = builder.info.splits[split]
    if not info.num_examples:
        raise ValueError(f"split: {split!r} of {name} holds no images")
    features: Any = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"{name} has the features {sorted(features)}, not image, label"
        )
    shards = tuple(
        decoding.Shard(os.fspath(f.filename), f.skip, f.take, f.examples_in_shard)
        for f in info.file_instructions
    )
    _require_files(name, shards)
    shape = features["image"].shape
    fixed_size = None not in shape
    preprocessing = splits.PREPROCESSING.get(builder.name, splits.Preprocessing())
    size = recipe.image_size
    if not fixed_size:
        size = size or preprocessing.crop_size
        shape = (size, size, 3)
    elif size:
        shape = (size, size, shape[-1])
    used = {key: features[key] for key in ("image", "label")}
    return splits.Split(
        records=TfRecords(tfds.features.FeaturesDict(used), shards),
        image_shape=shape,
        num_classes=features["label"].num_classes,
        preprocessing=preprocessing,
        fixed_size=fixed_size,
        recipe=recipe,
        origin=decoding.Origin(name, split, shards),
    )


def _open_builder(name: str, data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise ValueError(f"dataset: tensorflow_datasets has no {name!r}") from None
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"dataset: {name!r} is not prepared in {builder.data_path}. Prepare it "
            f"once with tfds.builder({name!r}, data_dir={str(data_dir)!r})"
            ".download_and_prepare(file_format='tfrecord')."
        )
    found = builder.info.file_format
    if found is not tfds.core.FileFormat.TFRECORD:
        raise ValueError(
            f"dataset: {name!r} is prepared in {builder.data_path} as "
            f"{found and found.value}, and reader=tf_data reads tfrecord; choose "
            "reader=array_record, or another data_dir"
        )
    return builder


def _require_files(name: str, shards: Sequence[decoding.Shard]) -> None:
    there: dict[str, set[str]] = {}
    for shard in shards:
        directory, file = os.path.split(shard.path)
        if directory not in there:
            there[directory] = set(tf.io.gfile.listdir(directory))
        if file not in there[directory]:
            raise FileNotFoundError(
                f"dataset: {shard.path}, a file of {name!r}, is missing; prepare the "
                "data set once more"
            )
