"""ImageNet as `tensorflow_datasets` prepares it, without TensorFlow and shard by shard.

    archives = {"train": ..., "validation": ...}   paths of the two tars
    directory                                      where the work is done

    for split, path in archives.items():
        for part in imagenet_archives.parts(path, split):
            ...                                    the index, part by part
        shards = plan(images, split, directory)
        for shard in shards:
            write_shard(shard, path, features)
    finish(builder, shards, directory)

The result is the standard directory of `imagenet2012`, in ArrayRecord: the records,
their order, the number of shards and the metadata are those of `tensorflow_datasets`'
own preparation, which needs TensorFlow (to open the archives, and to sort any split
larger than 1 GB). The bytes are the same in every run; there, the order of the three
fields within a record is left to chance.

The order of the records is that of a hash of the names. With an index of the archives
it is known before any image is read, so each shard can be written by itself, by any
process, straight from the archive; nothing is sorted on disk. A shard takes its name
only when it is whole.

What is read: the headers of the archives and the beginning of each image for the index,
then each image once. The images of a shard, 1,251 of 110 kB, lie all over the archive;
they are read in the order of their positions and held in memory, 140 MB. That suits an
SSD or a parallel file system. What is written: the result, about as large as the
archives (155 GB), and an index of about 120 MB that is removed in the end.
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
"""What the name of a file begins with that is being written."""


class Shard(NamedTuple):
    """One file of the result.

    Attributes:
        path: Where it is written.
        images: Its images in order, `[n]` of type `imagenet_archives.IMAGE`.
    """

    path: pathlib.Path
    images: np.ndarray


class ShardError(RuntimeError):
    """A shard could not be written."""


def open_builder(data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of `tensorflow_datasets`, which knows the features and the names.

    Args:
        data_dir: Directory that holds data sets, one directory each.

    Returns:
        The builder, prepared or not.

    Raises:
        FileExistsError: If the data set is prepared there in another format.
    """
    try:
        return tfds.builder(NAME, data_dir=data_dir, file_format=FORMAT.value)
    except ValueError as error:
        raise FileExistsError(
            f"{data_dir / NAME} holds the data set in another format than ArrayRecord "
            f"({str(error).rpartition(': ')[2]}). Move it away or name another "
            "--data-dir"
        ) from error


def plan(images: np.ndarray, split: Split, directory: pathlib.Path) -> list[Shard]:
    """Which image goes where: the shards that `tensorflow_datasets` would write.

    Args:
        images: All images of the split, `[n]` of type `imagenet_archives.IMAGE`.
        split: Name of the split, which salts the hash of the names.
        directory: Where the shards are written.

    Returns:
        The shards.

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
                "twice. Fetch the archive again and start again."
            )
    template = naming.ShardedFileTemplate(
        data_dir=directory,  # pyright: ignore[reportArgumentType]  (any path will do)
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
    """Bytes of the records of some images, without the file format's own.

    Args:
        images: `[n]` of type `imagenet_archives.IMAGE`.

    Returns:
        The sum.
    """
    names = np.char.str_len(images["name"])
    sizes = _record_sizes(names, images["label"], images["written_size"])
    return int(np.sum(sizes))


def write_shard(shard: Shard, archive: pathlib.Path, features: Any) -> None:
    """Writes one shard; its name appears when all of it is on disk.

    Args:
        shard: What to write.
        archive: The archive that its images are in.
        features: `builder.info.features` of `open_builder`.

    Raises:
        imagenet_archives.ArchiveError: If the archive has changed since the index.
        ShardError: If the file cannot be written.
    """
    partial = shard.path.with_name(f"{PARTIAL}{os.getpid()}.{shard.path.name}")
    try:
        records = _records(shard.images, archive, features)
        try:
            writer.ExampleWriter(FORMAT).write(partial, records)
        except RuntimeError as error:  # of the C++ code, whatever it meets with
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
        builder: From `open_builder`; not prepared yet.
        shards: The shards of each split, all written.
        directory: Where the shards are; it is renamed to `builder.data_path`.

    Raises:
        ShardError: If a shard does not hold what it should.
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
    """Names and serialised records of a shard's images, in order."""
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
            "other sizes. Put the archive back, or begin in another directory."
        )


def _record_sizes(
    names: np.ndarray, labels: np.ndarray, images: np.ndarray
) -> np.ndarray:
    """Bytes of each image's `tf.train.Example`, from the lengths of its parts.

    The number of shards follows from the sum, so it must be known before any is
    written. The nesting is that of `tensorflow/core/example/feature.proto`.
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
    """Bytes of a protocol buffer's field that holds `length` bytes."""
    return 1 + _varint(length) + length


def _varint(number: Any) -> Any:
    """Bytes of a number of less than 36 bits: seven bits a byte."""
    return 1 + sum(np.greater_equal(number, 1 << bits) for bits in (7, 14, 21, 28))


def _check_length(shard: Shard) -> None:
    """Refuses a shard that holds another number of records than it should."""
    try:
        found = file_adapters.ADAPTER_FOR_FORMAT[FORMAT].num_examples(shard.path)
    except (OSError, RuntimeError, ValueError) as error:
        found = f"an unknown number ({error})"
    if found != len(shard.images):
        raise ShardError(
            f"{shard.path} holds {found} of its {len(shard.images)} images. Remove "
            "this file and start the same command again, which writes it anew."
        )


def _synchronise(path: pathlib.Path) -> None:
    """Waits until a file's contents are on disk, so that a rename means something."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
