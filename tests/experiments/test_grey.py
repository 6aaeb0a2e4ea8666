"""Flat grey images: which pixels, how light, and how many."""

import numpy as np
import pytest

from experiments.data import grey


def test_grey_is_the_luminance_of_the_inner_pixels():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[0, 2, 2] = (255, 0, 0)
    images[0, 2, 3] = (0, 255, 0)
    images[0, 29, 29] = 255
    images[1, :2] = images[1, -2:] = 255  # cut off
    flat = grey.luminance(images)
    assert (flat.shape, flat.dtype) == ((2, 784), np.float32)
    np.testing.assert_allclose(flat[0, [0, 1, 783]], [0.299, 0.587, 1.0], rtol=1e-6)
    assert flat[0].sum() == pytest.approx(1.886)
    assert not flat[1].any()


def test_the_digits_are_split_once():
    images = grey.digits()
    assert (images.train.shape, images.test.shape) == ((1500, 64), (297, 64))
    assert (images.train.min(), images.train.max()) == (0, 1)
