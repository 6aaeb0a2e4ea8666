"""Finds the images of a prepared ImageNet that cannot be decoded."""

import pathlib
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from experiments.data import decoding, imagenet_builder


class Undecodable(NamedTuple):
    """An image at which training would stop.

    Attributes:
      index: index of the record in the split.
      name: name of the file.
      reason: why it cannot be decoded.
    """

    index: int
    name: str
    reason: str


def undecodable(
    data_dir: pathlib.Path, split: str, start: int, end: int
) -> list[Undecodable]:
    """Decodes the images ``[start, end)`` as training does; returns those that fail."""
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
