"""From the bytes of an image file to pixels; and what to say where that fails."""

import concurrent.futures
import os
from typing import NamedTuple

import cv2
import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue] compiled
)

# Orientation that a camera noted is ignored, as TensorFlow and Pillow do. Decoding to
# half the size takes 0.7 of the time, but gives other pixels, and is enough only for
# crops of 448 pixels or more, which few of ImageNet's photographs have room for.
_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"


_VERIFY = "`python experiments/prepare_imagenet.py --verify` lists such records"


class RecordError(ValueError):
    """A record that cannot be read or decoded: which one, and the way out."""


class Shard(NamedTuple):
    """The part of a record file that belongs to a split.

    Attributes:
        path: The file.
        skip: Number of the first record in the file that belongs.
        take: How many belong.
        size: Records in the whole file.
    """

    path: str
    skip: int
    take: int
    size: int


class Origin(NamedTuple):
    """Where the records of a split come from.

    Attributes:
        dataset: Name of the data set.
        split: Name of the split.
        shards: Its record files, in order; empty if it has none.
    """

    dataset: str
    split: str
    shards: tuple[Shard, ...] = ()

    def describe(self, record: int) -> str:
        """Which record this is, and in which file it lies."""
        text = f"record {record} of {self.dataset}, {self.split!r}"
        first = 0
        for shard in self.shards:
            if record < first + shard.take:
                return f"{text} (number {record - first + shard.skip} in {shard.path})"
            first += shard.take
        return text

    def read_error(self, record: int, reason: object) -> RecordError:
        """What to raise for a record that cannot be read."""
        return RecordError(
            f"{self.describe(record)} cannot be read: {reason}. {_VERIFY}; its file "
            "has to be copied or prepared once more"
        )

    def image_error(self, record: int) -> RecordError:
        """What to raise for an image that is none."""
        return RecordError(
            f"{self.describe(record)}: the image is neither a JPEG nor a PNG that can "
            f"be decoded. {_VERIFY}; --bad-images blank goes on without them"
        )

    def check(self) -> None:
        """Makes sure that the record files are as long as they were written.

        Raises:
            RecordError: If one is missing, cut off or another one.
        """
        # Each is opened, which on a shared disk is all waiting.
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            for fault in pool.map(_fault, self.shards):
                if fault is not None:
                    raise RecordError(
                        f"{self.split!r} of {self.dataset}: {fault}. The file has to "
                        "be copied or prepared once more"
                    )


def _fault(shard: Shard) -> str | None:
    if not os.path.exists(shard.path):
        return f"{shard.path} is missing"
    try:
        reader = array_record_module.ArrayRecordReader(shard.path)
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:  # what is cut off has no index at its end
        return f"{shard.path} is damaged, perhaps cut off: {error}"
    if records != shard.size:
        return f"{shard.path} holds {records} records instead of {shard.size}"
    return None


UNKNOWN = Origin("a data set", "a split")
"""Of records that lie in no files."""


def decode(encoded: bytes) -> np.ndarray | None:
    """Pixels of a JPEG or PNG file; grey and CMYK are converted.

    Args:
        encoded: The file.

    Returns:
        uint8 `[h, w, 3]`, **blue first**, as OpenCV has it; `None` if the file is
        neither, or broken off: OpenCV 4 would make up the rest of a JPEG in grey.
    """
    if encoded.startswith(_JPEG) and encoded.rfind(_END_OF_JPEG) < 0:
        return None
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), _COLOUR)
    except cv2.error:  # of an empty file, or a size that no image has
        return None
