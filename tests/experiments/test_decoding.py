"""Image files to pixels, and what is said of records that cannot be had."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.data import decoding


@pytest.fixture
def photograph():
    """A smooth image, which JPEG keeps nearly as it is."""
    y, x = np.mgrid[0:60, 0:90]
    return np.stack([2 * x, 3 * y, 255 - x - y], -1).astype(np.uint8)


def encoded(image, form="JPEG", **settings):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, quality=98, subsampling=0, **settings)
    return file.getvalue()


def test_blue_comes_first(photograph):
    pixels = decoding.decode(encoded(photograph, "PNG"))
    np.testing.assert_array_equal(pixels, photograph[..., ::-1])
    pixels = decoding.decode(encoded(photograph)).astype(int)
    assert abs(pixels - photograph[..., ::-1]).max() < 8


def test_grey_images_get_three_channels(photograph):
    pixels = decoding.decode(encoded(photograph[..., 0], "PNG"))
    np.testing.assert_array_equal(pixels, np.stack([photograph[..., 0]] * 3, -1))


def test_cmyk_images_are_converted(photograph):
    file = io.BytesIO()
    Image.fromarray(photograph).convert("CMYK").save(file, "JPEG", quality=98)
    pixels = decoding.decode(file.getvalue())
    assert pixels.shape == (60, 90, 3)
    assert abs(pixels.astype(int) - photograph[..., ::-1]).mean() < 8


def test_a_camera_s_orientation_is_ignored(photograph):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decoding.decode(encoded(photograph, exif=exif)).shape == (60, 90, 3)


def test_what_is_no_image_or_broken_off_is_none(photograph):
    file = encoded(photograph)
    assert decoding.decode(file) is not None
    assert decoding.decode(file + b"\0\0 appended") is not None
    for bad in (b"", b"not an image", file[:-2], file[: len(file) // 2], file[:20]):
        assert decoding.decode(bad) is None


@pytest.fixture
def origin():
    shards = (decoding.Shard("a", 3, 4, 7), decoding.Shard("b", 0, 5, 9))
    return decoding.Origin("pets", "train[30%:]", shards)


@pytest.mark.parametrize(
    ("record", "place"), [(0, "3 in a"), (3, "6 in a"), (4, "0 in b"), (8, "4 in b")]
)
def test_a_record_is_named_with_its_file(origin, record, place):
    expected = f"record {record} of pets, 'train[30%:]' (number {place})"
    assert origin.describe(record) == expected


def test_records_without_files_are_named_too():
    assert decoding.UNKNOWN.describe(5) == "record 5 of a data set, 'a split'"


def test_errors_name_the_way_out(origin):
    text = str(origin.image_error(4))
    assert "record 4 of pets, 'train[30%:]' (number 0 in b): the image is" in text
    assert "prepare_imagenet.py --verify" in text
    assert "--bad-images blank" in text
    text = str(origin.read_error(4, "the disk is gone"))
    assert "(number 0 in b) cannot be read: the disk is gone" in text
    assert "--verify" in text
