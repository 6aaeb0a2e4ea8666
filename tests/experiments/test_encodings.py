"""Encodings of image files against Pillow, and their conversion against arithmetic."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.data import encodings

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
SMOOTH = Image.fromarray(PIXELS).resize((96, 72), Image.Resampling.BICUBIC)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def with_black(image):
    """CMYK with a full black plate, which Pillow's own conversion leaves empty."""
    light = np.asarray(image, float)
    brightest = np.maximum(light.max(-1, keepdims=True), 1)
    plates = np.concatenate([light / brightest * 255, brightest], axis=-1)
    return Image.fromarray(np.round(255 - plates).astype(np.uint8), "CMYK")


def without_adobe(jpeg):
    """The same file without the mark that says its colours are inverted."""
    start = jpeg.index(b"\xff\xee")
    length = int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return jpeg[:start] + jpeg[start + 2 + length :]


CMYK = encoded(with_black(SMOOTH), format="JPEG", quality=95)
FILES = {
    "rgb": ("jpeg", encoded(SMOOTH, format="JPEG")),
    "grey": ("jpeg", encoded(SMOOTH.convert("L"), format="JPEG")),
    "progressive": ("jpeg", encoded(SMOOTH, format="JPEG", progressive=True)),
    "cmyk": ("cmyk", CMYK),
    "cmyk without mark": ("cmyk", without_adobe(CMYK)),
    "cmyk behind metadata": (
        "cmyk",
        encoded(with_black(SMOOTH), format="JPEG", comment=bytes(60_000)),
    ),
    "fill bytes": ("cmyk", CMYK[:2] + b"\xff\xff\xff" + CMYK[2:]),
    "a marker alone": ("cmyk", CMYK[:2] + b"\xff\x01" + CMYK[2:]),
    "png": ("png", encoded(SMOOTH, format="PNG")),
    "empty": ("jpeg", b""),
    "text": ("jpeg", b"not found"),
    "no frame": ("jpeg", CMYK[:20]),
    "cut in the frame": ("jpeg", CMYK[: CMYK.index(b"\xff\xc0") + 8]),
}


@pytest.mark.parametrize(("expected", "data"), FILES.values(), ids=FILES)
def test_encoding_is_found_inside_a_larger_file(expected, data):
    # What follows would be taken for a frame of 4 components, were it looked at.
    file = io.BytesIO(b"before" + data + b"\xff\xc0\x00\x14\x08\0\0\0\0\4" * 3)
    assert encodings.encoding(file, len(b"before"), len(data)) == expected


def test_a_jpeg_is_left_as_it_is():
    _, data = FILES["grey"]
    assert encodings.to_rgb_jpeg(data, "jpeg") is data


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_becomes_rgb(adobe):
    data = CMYK if adobe else without_adobe(CMYK)
    made = Image.open(io.BytesIO(encodings.to_rgb_jpeg(data, "cmyk")))
    assert (made.mode, made.size, made.info["dpi"]) == ("RGB", (96, 72), (300, 300))
    # The inks of Pillow's reading; unmarked files are stored the other way round.
    inks = np.asarray(Image.open(io.BytesIO(data)), float) / 255
    inks = inks if adobe else 1 - inks
    expected = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
    # Chroma is stored at half the resolution, so single pixels differ.
    assert np.abs(np.asarray(made, float) - expected).mean() < 3
    if adobe:
        assert np.abs(np.asarray(made, float) - np.asarray(SMOOTH)).mean() < 5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_png_becomes_rgb(mode):
    image = SMOOTH.convert(mode)
    data = encoded(image, format="PNG")
    made = Image.open(io.BytesIO(encodings.to_rgb_jpeg(data, "png")))
    assert (made.format, made.mode) == ("JPEG", "RGB")
    difference = np.asarray(made, float) - np.asarray(image.convert("RGB"))
    # The dither of a palette does not survive the chroma's half resolution.
    assert np.abs(difference).mean() < (20 if mode == "P" else 3)


@pytest.mark.parametrize("kind", ["cmyk", "png"])
def test_what_cannot_be_decoded_is_refused(kind):
    data = next(data for found, data in FILES.values() if found == kind)
    with pytest.raises(ValueError, match="cannot be decoded"):
        encodings.to_rgb_jpeg(data[: len(data) // 2], kind)


@pytest.mark.slow  # TensorFlow is no part of the ordinary installation
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_png_as_tensorflow_makes_it(mode):
    pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    data = encoded(SMOOTH.convert(mode), format="PNG")
    expected = tfds.core.utils.png_to_jpeg(data)
    assert encodings.to_rgb_jpeg(data, "png") == expected


@pytest.mark.slow
@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_as_tensorflow_makes_it(adobe):
    tf = pytest.importorskip("tensorflow")
    data = CMYK if adobe else without_adobe(CMYK)
    exact = tf.image.decode_jpeg(data, dct_method="INTEGER_ACCURATE")
    expected = tf.image.encode_jpeg(exact, format="rgb", quality=100).numpy()
    assert encodings.to_rgb_jpeg(data, "cmyk") == expected
