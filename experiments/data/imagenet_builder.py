"""Prepares ImageNet as ``tensorflow_datasets`` does, shard by shard.

    archives = {"train": ..., "validation": ...}   paths of the two tars
    directory                                      beside the final directory

    for split, path in archives.items():
        for part in imagenet_archives.parts(path, split):
            ...                                    the index, part by part
        shards = plan(images, split, directory)
        for shard in shards:
            write_shard(shard, path, features)
    finish(builder, shards, directory)

The result is the standard directory of ``imagenet2012``, in ArrayRecord: the records,
their order, the number of shards and the metadata are those of ``tensorflow_datasets``
itself, which needs TensorFlow (to open the archives, and to sort any split larger than
1 GB).  The bytes are the same in every run; there, the order of the three fields within
a record is random.

Records are ordered by a hash of their names.  The index of the archives determines that
order before any image is read, so any process can write any shard straight from the
archive, and nothing is sorted on disk.  A shard takes its name only when it is whole.

Read are the headers of the archives and the beginning of each image for the index, then
each image once.  The images of a shard, 1,251 of 110 kB, lie all over the archive; they
are read in the order of their positions and held in memory, 140 MB.  That suits an SSD
or a parallel file system.  Written are the result, about as large as the archives
(155 GB), and an index of about 120 MB that is removed in the end.
"""

import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import (
    example_serializer,
    file_adapters,
    hashing,
    naming,
    splits,
    writer,
)
from tensorflow_datasets.core.utils import shard_utils

from experiments.data import imagenet_archives
from experiments.data.imagenet_archives import Split

NAME = "imagenet2012"
FORMAT = file_adapters.FileFormat.ARRAY_RECORD
PARTIAL = "partial."
"""Prefix of a file that is being written."""


class Shard(NamedTuple):
    """One file of the result.

    Attributes:
      path: path of the file.
      images: its images in order, ``[n]`` of type ``imagenet_archives.IMAGE``.
    """

    path: pathlib.Path
    images: np.ndarray


class ShardError(RuntimeError):
    """A shard that cannot be written, or is damaged."""


def open_builder(data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of ``tensorflow_datasets``, prepared or not.

    Args:
      data_dir: directory that holds data sets, one directory each.

    Raises:
      FileExistsError: if the data set is prepared there in another format.
    """
    try:
        return tfds.builder(NAME, data_dir=data_dir, file_format=FORMAT.value)
    except ValueError as error:
        raise FileExistsError(
            f"{data_dir / NAME} holds the data set in another format than ArrayRecord "
            f"({str(error).rpartition(': ')[2]}); move it away or choose another "
            "--data-dir"
        ) from error


def plan(images: np.ndarray, split: Split, directory: pathlib.Path) -> list[Shard]:
    """Divides the images among the shards that ``tensorflow_datasets`` would write.

    Args:
      images: all images of the split, ``[n]`` of type ``imagenet_archives.IMAGE``.
      split: name of the split, which salts the hash of the names.
      directory: directory of the shards.

    Returns:
      The shards in order.

    Raises:
      imagenet_archives.ArchiveError: If two images have the same name.
    """
    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(name.decode()) for name in images["name"]]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for first, second in itertools.pairwise(order):
        if keys[first] == keys[second]:
            raise imagenet_archives.ArchiveError(
                f"{images['name'][first].decode()!r} is in the archive of {split} "
                "twice; fetch the archive again and start again"
            )
    template = naming.ShardedFileTemplate(
        data_dir=directory,  # pyright: ignore[reportArgumentType]  (takes any path)
        dataset_name=NAME,
        split=split,
        filetype_suffix=FORMAT.file_suffix,
    )
    count = shard_utils.ShardConfig().get_number_shards(num_bytes(images), len(images))
    ends = shard_utils.get_shard_boundaries(len(images), count)
    return [
        Shard(
            path=pathlib.Path(
                template.sharded_filepath(shard_index=index, num_shards=count)
            ),
            images=images[order[start:end]],
        )
        for index, (start, end) in enumerate(itertools.pairwise([0, *ends]))
    ]


def num_bytes(images: np.ndarray) -> int:
    """Returns the bytes of the images' records, without the file format's overhead."""
    names = np.char.str_len(images["name"])
    sizes = _record_sizes(names, images["label"], images["written_size"])
    return int(np.sum(sizes))


def write_shard(shard: Shard, archive: pathlib.Path, features: Any) -> None:
    """Writes one shard, which takes its name when all of it is on disk.

    Args:
      shard: the shard.
      archive: the archive that holds its images.
      features: ``builder.info.features`` of ``open_builder``.

    Raises:
      imagenet_archives.ArchiveError: If the archive has changed since the index.
      ShardError: if the file cannot be written.
    """
    partial = shard.path.with_name(f"{PARTIAL}{os.getpid()}.{shard.path.name}")
    try:
        records = _records(shard.images, archive, features)
        try:
            writer.ExampleWriter(FORMAT).write(partial, records)
        except RuntimeError as error:  # the C++ code's only type
            raise ShardError(f"{shard.path.name} cannot be written: {error}") from error
        _synchronise(partial)
        partial.replace(shard.path)
    finally:
        partial.unlink(missing_ok=True)


def finish(
    builder: tfds.core.DatasetBuilder,
    shards: Mapping[Split, Sequence[Shard]],
    directory: pathlib.Path,
) -> None:
    """Adds the metadata and gives the directory its final name.

    Args:
      builder: from ``open_builder``; not prepared yet.
      shards: the shards of each split, all written.
      directory: directory of the shards, to be renamed to ``builder.data_path``.

    Raises:
      ShardError: if a shard does not hold as many images as planned.
    """
    infos = []
    for split, planned in shards.items():
        for shard in planned:
            _check_length(shard)
        infos.append(
            splits.SplitInfo(
                name=split,
                shard_lengths=[len(shard.images) for shard in planned],
                num_bytes=sum(num_bytes(shard.images) for shard in planned),
            )
        )
    builder.info.set_splits(splits.SplitDict(infos))
    builder.info.write_to_directory(directory)
    for path in directory.glob("*.*"):
        _synchronise(path)
    directory.rename(builder.data_path)


def _records(
    images: np.ndarray, archive: pathlib.Path, features: Any
) -> Iterator[tuple[str, bytes]]:
    """Yields the names and serialised records of a shard's images, in order."""
    contents = [b""] * len(images)
    with archive.open("rb") as file:
        for row in np.argsort(images["start"]):  # a disk's head moves one way
            contents[row] = imagenet_archives.read_image(file, images[row])
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    total = 0
    for image, content in zip(images, contents, strict=True):
        name = image["name"].decode()
        example = {"image": content, "label": int(image["label"]), "file_name": name}
        message = serializer.get_tf_example(features.encode_example(example))
        # Without `deterministic` the order of the fields differs from run to run.
        record = message.SerializeToString(deterministic=True)
        total += len(record)
        yield name, record
    if total != num_bytes(images):
        raise imagenet_archives.ArchiveError(
            f"{archive} is no longer the archive that was indexed: its images have "
            "other sizes; put the archive back, or begin in another directory"
        )


def _record_sizes(
    names: np.ndarray, labels: np.ndarray, images: np.ndarray
) -> np.ndarray:
    """Returns the bytes of each image's ``tf.train.Example``, from those of its parts.

    The number of shards follows from the sum, which is needed before any is written.
    The nesting is that of ``tensorflow/core/example/feature.proto``.
    """
    values = {
        "file_name": _field(_field(names)),
        "image": _field(_field(images)),
        "label": _field(_field(_varint(labels))),
    }
    entries = [
        _field(_field(len(key)) + _field(value)) for key, value in values.items()
    ]
    return _field(sum(entries))


def _field(length: Any) -> Any:
    """Returns the bytes of a protocol buffer's field with ``length`` bytes in it."""
    return 1 + _varint(length) + length


def _varint(number: Any) -> Any:
    """Returns the bytes of a number of less than 36 bits, at seven bits per byte."""
    return 1 + sum(np.greater_equal(number, 1 << bits) for bits in (7, 14, 21, 28))


def _check_length(shard: Shard) -> None:
    """Raises ShardError unless the shard holds as many records as planned."""
    try:
        found = file_adapters.ADAPTER_FOR_FORMAT[FORMAT].num_examples(shard.path)
    except (OSError, RuntimeError, ValueError) as error:
        found = f"an unknown number ({error})"
    if found != len(shard.images):
        raise ShardError(
            f"{shard.path} holds {found} of its {len(shard.images)} images; remove "
            "this file and start the same command again, which writes it anew"
        )


def _synchronise(path: pathlib.Path) -> None:
    """Waits until a file's contents are on disk, as a safe rename needs."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
