"""The encoding of an image file, from its first bytes; what is not RGB JPEG is made so.

ImageNet's training set holds 22 CMYK JPEGs and one PNG among its JPEGs. Since version
3.0.0 `tensorflow_datasets` writes them as RGB JPEGs and knows them by their names; here
they are known by their contents, so that it works for any archive.
"""

import io
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

Encoding = Literal["jpeg", "cmyk", "png"]
"""`"jpeg"` is kept as it is: grey or RGB, or a file whose header makes no sense."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_SCAN = 0xDA  # where the compressed data begin
_NOT_A_FRAME = (0xC4, 0xC8, 0xCC)  # tables among the numbers of frame headers
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers that no length follows


def encoding(file: BinaryIO, start: int, size: int) -> Encoding:
    """The encoding of an image inside a file, of which a few bytes are read.

    The frame header of a JPEG tells the number of its components. It is found by going
    from marker to marker, over metadata and thumbnails of any size.

    Args:
        file: Opened for reading, in binary; its position is changed.
        start: Position of the image's first byte.
        size: Bytes of the image.

    Returns:
        The encoding.
    """
    file.seek(start)
    head = file.read(min(size, len(_PNG)))
    if head == _PNG:
        return "png"
    if not head.startswith(_JPEG):
        return "jpeg"
    return "cmyk" if _components(file, start, size) == 4 else "jpeg"


def to_rgb_jpeg(image: bytes, kind: Encoding) -> bytes:
    """An image as the RGB JPEG that `tensorflow_datasets` makes of it.

    As `tfds.core.utils.png_to_jpeg` and `jpeg_cmyk_to_rgb`, which need TensorFlow:
    quality 100, chroma at half the resolution, 300 dots an inch. A PNG gives the same
    bytes as there. A CMYK JPEG gives pixels a few levels apart, because TensorFlow
    decodes by a fast, less exact transform; by its exact one the pixels are the same.

    Args:
        image: The file's contents.
        kind: Its encoding.

    Returns:
        The JPEG; `image` itself if it is one already.

    Raises:
        ValueError: If the image cannot be decoded.
    """
    if kind == "jpeg":
        return image
    try:
        with Image.open(io.BytesIO(image)) as opened:
            rgb = _cmyk_to_rgb(opened) if kind == "cmyk" else opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's, of a broken file
        raise ValueError(f"cannot be decoded ({error})") from error
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=100, subsampling="4:2:0", dpi=(300, 300))
    return encoded.getvalue()


def _components(file: BinaryIO, start: int, size: int) -> int | None:
    """Number of colour components of a JPEG, `None` where no frame header is found."""
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
    """TensorFlow's conversion, which rounds down; Pillow's own rounds to nearest."""
    pixels = np.asarray(image.convert("CMYK"), np.uint16)  # [h, w, 4]
    # Pillow inverts whatever it reads. Adobe's files, marked so, are stored inverted.
    light = 255 - pixels if "adobe" in image.info else pixels
    rgb = light[..., :3] * light[..., 3:] // 255
    return Image.fromarray(rgb.astype(np.uint8))
