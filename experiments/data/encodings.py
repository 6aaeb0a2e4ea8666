"""Finds the encoding of an image file from its first bytes, and converts to RGB JPEG.

ImageNet's training set holds 22 CMYK JPEGs and one PNG among its JPEGs.  Since version
3.0.0 ``tensorflow_datasets`` writes them as RGB JPEGs and knows them by their names;
here they are recognised by their contents, which works for any archive.
"""

import io
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

Encoding = Literal["jpeg", "cmyk", "png"]
"""``"jpeg"`` is kept as it is: grey, RGB, or a file without a sound header."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_SCAN = 0xDA  # start of the compressed data
_NOT_A_FRAME = (0xC4, 0xC8, 0xCC)  # tables, within the range of frame headers
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length


def encoding(file: BinaryIO, start: int, size: int) -> Encoding:
    """Returns the encoding of an image inside a file, of which it reads a few bytes.

    The frame header of a JPEG holds the number of its components.  It is found by going
    from marker to marker, over metadata and thumbnails of any size.

    Args:
      file: opened for reading, in binary; its position is changed.
      start: position of the image's first byte.
      size: bytes of the image.
    """
    file.seek(start)
    head = file.read(min(size, len(_PNG)))
    if head == _PNG:
        return "png"
    if not head.startswith(_JPEG):
        return "jpeg"
    return "cmyk" if _components(file, start, size) == 4 else "jpeg"


def to_rgb_jpeg(image: bytes, kind: Encoding) -> bytes:
    """Converts an image to the RGB JPEG that ``tensorflow_datasets`` makes of it.

    As ``tfds.core.utils.png_to_jpeg`` and ``jpeg_cmyk_to_rgb``, which need TensorFlow:
    quality 100, chroma at half the resolution, 300 dots per inch.  The bytes are the
    same for a PNG.  The pixels of a CMYK JPEG are a few levels apart, because
    TensorFlow decodes with a fast, less exact transform; with its exact one they are
    the same.

    Args:
      image: contents of the file.
      kind: encoding of the file.

    Returns:
      The JPEG; ``image`` itself if ``kind`` is ``"jpeg"``.

    Raises:
      ValueError: if the image cannot be decoded.
    """
    if kind == "jpeg":
        return image
    try:
        with Image.open(io.BytesIO(image)) as opened:
            rgb = _cmyk_to_rgb(opened) if kind == "cmyk" else opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's, for a damaged file
        raise ValueError(f"cannot be decoded ({error})") from error
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=100, subsampling="4:2:0", dpi=(300, 300))
    return encoded.getvalue()


def _components(file: BinaryIO, start: int, size: int) -> int | None:
    """Returns the number of colour components of a JPEG; None without frame header."""
    position, end = start + len(_JPEG), start + size
    while position + 4 <= end:
        file.seek(position)
        block = file.read(10)
        if len(block) < 4 or block[0] != 0xFF or block[1] == _SCAN:
            return None
        marker = block[1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _ALONE:
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_A_FRAME:
            return block[9] if len(block) == 10 else None
        else:
            position += 2 + int.from_bytes(block[2:4], "big")
    return None


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Converts as TensorFlow does, rounding down; Pillow's own rounds to nearest."""
    pixels = np.asarray(image.convert("CMYK"), np.uint16)  # [h, w, 4]
    # Pillow inverts all files. Those with Adobe's marker are stored inverted.
    light = 255 - pixels if "adobe" in image.info else pixels
    rgb = light[..., :3] * light[..., 3:] // 255
    return Image.fromarray(rgb.astype(np.uint8))
