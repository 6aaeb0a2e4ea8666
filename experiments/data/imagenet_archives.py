"""Indexes the archives of ILSVRC2012 as image-net.org distributes them.

    ILSVRC2012_img_train.tar    n01440764.tar, ..., one tar per class, each of
                                n01440764_18.JPEG, ...
    ILSVRC2012_img_val.tar      ILSVRC2012_val_00000001.JPEG, ...

The index holds the name, label, position, size and encoding of each image, so that the
tar can be read in any order.  Making it reads the headers of the archive's members and
the first bytes of each image, not the images.
"""

import pathlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import encodings

Split = Literal["train", "validation"]

TARS: dict[Split, str] = {
    "train": "ILSVRC2012_img_train.tar",
    "validation": "ILSVRC2012_img_val.tar",
}
"""File names of the archives, by split."""

MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "validation": "29b22e2961454d5413ddabcf34fc5622",
}
"""MD5 sums of the official archives, as published by image-net.org, by split."""

NUM_IMAGES: dict[Split, int] = {"train": 1_281_167, "validation": 50_000}
"""Images in the official archives, by split."""

IMAGE = np.dtype(
    [
        ("name", "S40"),
        ("label", "<i8"),
        ("start", "<i8"),
        ("size", "<i8"),
        ("encoding", "u1"),
        ("written_size", "<i8"),
    ]
)
"""An entry of the index.

``start`` and ``size`` are bytes in the archive, ``encoding`` is an index into
``ENCODINGS``, and ``written_size`` is the size as RGB JPEG.
"""

ENCODINGS = get_args(encodings.Encoding)

_TRAIN_NAME = re.compile(r"(n\d{8})_\d{1,9}\.JPEG")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_MIB = 1 << 20
_END = bytes(tarfile.BLOCKSIZE)


class ArchiveError(ValueError):
    """An archive that is missing, damaged, or of another data set."""


class Part(NamedTuple):
    """A tar that is indexed in one go: a file, or a member of one.

    Attributes:
      name: name of the tar.
      start: position of its first byte in the file.
      end: position after its last byte.
    """

    name: str
    start: int
    end: int


def synsets() -> list[str]:
    """Returns the 1,000 synsets, such as ``"n01440764"``, by label."""
    return _lines("labels.txt")


def validation_synsets() -> list[str]:
    """Returns the synsets of the 50,000 validation images, by number."""
    return _lines("validation_labels.txt")


def fingerprint(path: pathlib.Path) -> list[int]:
    """Returns the size of an archive, and the CRC-32 of its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        crc = zlib.crc32(file.read(_MIB))
        file.seek(max(0, size - _MIB))
        return [size, zlib.crc32(file.read(_MIB), crc)]


def parts(path: pathlib.Path, split: Split) -> list[Part]:
    """Returns the tars of the classes for ``"train"``, else the archive itself.

    Raises:
      ArchiveError: if the archive is not a whole tar, or holds something else.
    """
    whole = Part(path.name, 0, path.stat().st_size)
    if split == "validation":
        return [whole]
    known = {f"{synset}.tar" for synset in synsets()}
    found = []
    for member in _members(path, whole):
        if member.name not in known:
            raise ArchiveError(
                f"{path} holds {member.name!r}, which is not the tar of a class of "
                f"ILSVRC2012 (the first is {min(known)!r}). {_advice(split)}"
            )
        found.append(member)
    return found


def index(path: pathlib.Path, part: Part, split: Split) -> np.ndarray:
    """Returns the index of one part of an archive.

    Args:
      path: the archive.
      part: one of its ``parts``.
      split: split of the archive.

    Returns:
      Entries in the order of the archive, ``[n]`` of type ``IMAGE``.

    Raises:
      ArchiveError: if the part is not a whole tar, holds something else than images
        of the split, or an image that must be encoded again cannot be decoded.
    """
    label_of = _label_function(split)
    entries = []
    with path.open("rb") as file:
        for member in _members(path, part):
            size = member.end - member.start
            label = label_of(member.name, part)
            if label is None:
                raise ArchiveError(
                    f"{part.name} in {path} holds {member.name!r}, which is not an "
                    f"image of its place in ILSVRC2012. {_advice(split)}"
                )
            kind = encodings.encoding(file, member.start, size)
            entry = (member.name, label, member.start, size, ENCODINGS.index(kind))
            written_size = size
            if kind != "jpeg":
                written_size = len(_encoded(file, member, kind, path))
            entries.append((*entry, written_size))
    return np.array(entries, IMAGE)


def read_image(file: BinaryIO, image: Any) -> bytes:
    """Reads an image of the index as RGB JPEG (or grey JPEG, if it was one).

    Args:
      file: the archive, opened for reading in binary.
      image: entry of the index, a scalar of type ``IMAGE``.

    Returns:
      The bytes of the JPEG.

    Raises:
      ArchiveError: if the archive has become shorter than the index says.
    """
    start, size = int(image["start"]), int(image["size"])
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise ArchiveError(
            f"{file.name} ends before image {image['name'].decode()!r} does, and was "
            "longer when it was indexed; put the whole archive back and start again"
        )
    return encodings.to_rgb_jpeg(data, ENCODINGS[image["encoding"]])


def _members(path: pathlib.Path, tar: Part) -> Iterator[Part]:
    """Yields the files of an uncompressed tar, found from their headers alone."""
    where = str(path) if tar.name == path.name else f"{tar.name} in {path}"
    with path.open("rb") as file:
        file.seek(tar.start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for member in opened:
                    end = member.offset_data + member.size
                    if end > tar.end:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    if member.isfile():
                        yield Part(member.name, member.offset_data, end)
                # A damaged header ends the loop as the end mark does, but only the mark
                # is a block of zeros.
                last = opened.offset
            file.seek(last)
            if last >= tar.end or file.read(len(_END)) != _END:
                raise tarfile.ReadError(f"no header and no end at byte {last:,}")
        except tarfile.TarError as error:
            raise ArchiveError(
                f"{where} is not a whole, uncompressed tar ({error}); fetch the "
                "archive again, or wait until it has arrived, and start the same "
                "command again"
            ) from error


def _label_function(split: Split) -> Callable[[str, Part], int | None]:
    """Returns a function from an image's name, and the tar it is in, to its label."""
    labels = {synset: label for label, synset in enumerate(synsets())}
    # Official names count from 1 in the order of the list. tensorflow_datasets pairs
    # the sorted names with the list, which fails for a part of the archive.
    numbered = validation_synsets()

    def train_label(name: str, part: Part) -> int | None:
        match = _TRAIN_NAME.fullmatch(name)
        if match is None or f"{match[1]}.tar" != part.name:
            return None
        return labels[match[1]]

    def validation_label(name: str, part: Part) -> int | None:
        del part
        match = _VALIDATION_NAME.fullmatch(name)
        if match is None or not 1 <= int(match[1]) <= len(numbered):
            return None
        return labels[numbered[int(match[1]) - 1]]

    return train_label if split == "train" else validation_label


def _encoded(
    file: BinaryIO, member: Part, kind: encodings.Encoding, path: pathlib.Path
) -> bytes:
    file.seek(member.start)
    try:
        return encodings.to_rgb_jpeg(file.read(member.end - member.start), kind)
    except ValueError as error:
        raise ArchiveError(
            f"{member.name} in {path} {error}; fetch the archive again and start again"
        ) from error


def _advice(split: Split) -> str:
    return f"Is it {TARS[split]} of ILSVRC2012? Its MD5 sum is {MD5[split]}."


def _lines(name: str) -> list[str]:
    file = tfds.core.tfds_path("datasets") / "imagenet2012" / name
    return file.read_text().split()
