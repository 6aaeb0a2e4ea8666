"""Pixels to numbers: the formulas, for every value and channel, in every type."""

import ml_dtypes
import numpy as np
import pytest

from experiments.data import normalising, splits

PREPROCESSING = splits.Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
VALUES = np.arange(256)[:, None]


def split(shape, **recipe):
    return splits.Split([], shape, 1, PREPROCESSING, True, splits.Recipe(**recipe))


def every_value():
    """One image with each value in each channel."""
    return np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (1, 1, 1, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_of_every_channel(dtype, channels):
    images = np.ascontiguousarray(every_value()[..., :channels])
    out = np.empty(images.shape, dtype)
    normalising.normaliser(split(images.shape[1:]), dtype)(images, out)
    mean, std = (x[:channels] for x in (PREPROCESSING.mean, PREPROCESSING.std))
    expected = ((VALUES / 255 - mean) / std).reshape(out.shape)
    bits = float(ml_dtypes.finfo(dtype).eps) / 2
    error = abs(out.astype(float) - expected)
    assert (error <= bits * abs(expected) + 2e-6).all()


def test_caffe_scales_by_256():
    images = every_value()
    out = np.empty(images.shape, np.float32)
    normalising.normaliser(split((16, 16, 3), normalise="caffe"), np.float32)(
        images, out
    )
    expected = (VALUES - 255 * np.array(PREPROCESSING.mean)) / 256
    np.testing.assert_allclose(out.reshape(256, 3), expected, atol=1e-6)


def test_each_image_by_its_own_deviation_unless_nearly_uniform():
    random = np.random.default_rng(0)
    images = np.full((3, 2, 2, 3), 90, np.uint8)
    images[1, 0, 1, 2] = 91  # a deviation of sqrt(11) / 12, below 1 / sqrt(12)
    images[2] = random.integers(0, 256, (2, 2, 3))
    out = np.empty(images.shape, np.float32)
    normalising.normaliser(split((2, 2, 3), normalise="image"), np.float32)(images, out)
    np.testing.assert_array_equal(out[0], 0)
    expected = np.full((2, 2, 3), -(12**-0.5))
    expected[0, 1, 2] = 11 * 12**-0.5
    np.testing.assert_allclose(out[1], expected, rtol=1e-3)
    pixels = images[2].astype(float)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(out[2], expected, atol=1e-5)


def test_slices_of_other_arrays_will_do():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    normalise = normalising.normaliser(split((16, 16, 3)), np.float32)
    mirrored, whole = np.empty((2, *images.shape), np.float32)
    normalise(images[:, :, ::-1], mirrored)
    normalise(images, whole)
    np.testing.assert_array_equal(mirrored, whole[:, :, ::-1])


def test_the_numbers_do_not_depend_on_who_comes_along():
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    for recipe in ({}, {"normalise": "image"}, {"normalise": "caffe"}):
        normalise = normalising.normaliser(split((16, 16, 3), **recipe), np.float32)
        together, alone = np.empty((2, 4, 16, 16, 3), np.float32)
        normalise(images, together)
        for i in range(4):
            normalise(images[i : i + 1], alone[i : i + 1])
        np.testing.assert_array_equal(alone, together)
