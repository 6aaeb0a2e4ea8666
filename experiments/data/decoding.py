"""Decodes image files, and names the records that cannot be read or decoded."""

import concurrent.futures
import os
from typing import NamedTuple

import cv2
import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue] compiled
)

# The camera's orientation is ignored, as TensorFlow and Pillow do. Decoding to half the
# size takes 0.7 of the time, but changes the pixels and suits only crops of 448 pixels
# or more, which few of ImageNet's photographs have room for.
_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"

_VERIFY = "`python experiments/prepare_imagenet.py --verify` lists such records"


class RecordError(ValueError):
    """A record that cannot be read or decoded."""


class Shard(NamedTuple):
    """The part of a record file that belongs to a split.

    Attributes:
      path: path of the file.
      skip: number in the file of the split's first record.
      take: number of records of the split.
      size: number of records in the whole file.
    """

    path: str
    skip: int
    take: int
    size: int


class Origin(NamedTuple):
    """The data set, split and files of some records, for messages.

    Attributes:
      dataset: name of the data set.
      split: name of the split.
      shards: its record files, in order.
    """

    dataset: str
    split: str
    shards: tuple[Shard, ...] = ()

    def describe(self, record: int) -> str:
        """Returns the record's name, with its file."""
        text = f"record {record} of {self.dataset}, {self.split!r}"
        first = 0
        for shard in self.shards:
            if record < first + shard.take:
                return f"{text} (number {record - first + shard.skip} in {shard.path})"
            first += shard.take
        return text

    def read_error(self, record: int, reason: object) -> RecordError:
        """Returns the error for a record that cannot be read."""
        return RecordError(
            f"{self.describe(record)} cannot be read: {reason}. {_VERIFY}; copy or "
            "prepare its file once more"
        )

    def image_error(self, record: int) -> RecordError:
        """Returns the error for an image that cannot be decoded."""
        return RecordError(
            f"{self.describe(record)}: the image is neither a JPEG nor a PNG that can "
            f"be decoded. {_VERIFY}; --bad-images blank goes on without them"
        )

    def check(self) -> None:
        """Raises ``RecordError`` if a record file is missing, cut off or exchanged."""
        # In threads, because opening files on a shared disk is mostly waiting.
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            for fault in pool.map(_fault, self.shards):
                if fault is not None:
                    raise RecordError(
                        f"{self.split!r} of {self.dataset}: {fault}; copy or prepare "
                        "the file once more"
                    )


def _fault(shard: Shard) -> str | None:
    if not os.path.exists(shard.path):
        return f"{shard.path} is missing"
    try:
        reader = array_record_module.ArrayRecordReader(shard.path)
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:  # a file that is cut off has no index at its end
        return f"{shard.path} is damaged, perhaps cut off: {error}"
    if records != shard.size:
        return f"{shard.path} holds {records} records instead of {shard.size}"
    return None


UNKNOWN = Origin("a data set", "a split")
"""The origin of records that lie in no files."""


def decode(encoded: bytes) -> np.ndarray | None:
    """Decodes a JPEG or PNG file; grey and CMYK are converted.

    Returns:
      uint8 ``[h, w, 3]``, **blue first**, as OpenCV has it; None if the file is
      neither, or cut off, of which OpenCV 4 would fill the rest with grey.
    """
    if encoded.startswith(_JPEG) and encoded.rfind(_END_OF_JPEG) < 0:
        return None
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), _COLOUR)
    except cv2.error:  # an empty file, or an impossible size
        return None
