"""Which images of a prepared ImageNet cannot be decoded."""

import pathlib
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from experiments.data import decoding, imagenet_builder


class Undecodable(NamedTuple):
    """An image that training would stop at.

    Attributes:
        index: Index of its record in the split.
        name: Name of its file.
        reason: What is wrong with it.
    """

    index: int
    name: str
    reason: str


def undecodable(
    data_dir: pathlib.Path, split: str, start: int, end: int
) -> list[Undecodable]:
    """Decodes some images, as training does, and returns those that fail.

    Args:
        data_dir: Directory that holds data sets, one directory each.
        split: Name of the split.
        start: Index of the first image.
        end: Index behind the last image.

    Returns:
        The images that cannot be read or decoded, in order.
    """
    builder: Any = imagenet_builder.open_builder(data_dir)
    records = builder.as_data_source(
        f"{split}[{start}:{end}]", decoders={"image": tfds.decode.SkipDecoding()}
    )
    found = []
    for index in range(start, end):
        try:
            record = records[index - start]
        except (OSError, RuntimeError, ValueError) as error:
            found.append(Undecodable(index, "?", f"cannot be read ({error})"))
            continue
        if decoding.decode(record["image"]) is None:
            name = record["file_name"].decode()
            reason = f"{len(record['image']):,} bytes that cannot be decoded"
            found.append(Undecodable(index, name, reason))
    return found
