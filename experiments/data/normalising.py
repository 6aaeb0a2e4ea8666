"""From pixels to the numbers that a model sees: size, mean, deviation and type."""

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from experiments.data import augment, splits

_CAFFE_STD = (256 / 255, 256 / 255, 256 / 255)  # values / 256, not / 255

Normalise = Callable[[np.ndarray, np.ndarray], None]
"""Writes uint8 images `[n, h, w, c]`, normalised, into the second argument."""


def normaliser(split: splits.Split, dtype: np.typing.DTypeLike) -> Normalise:
    """How the images of a split, cropped and augmented, are finished for the model.

    Args:
        split: Says how.
        dtype: Of the result; numbers are computed in float32 and then rounded.

    Returns:
        A function that resizes and normalises a batch. Nothing but the number of
        bytes depends on how many images it is given at a time.
    """
    preprocessing = split.preprocessing
    if split.recipe.normalise == "image":
        write = _write_standardised
    else:
        caffe = split.recipe.normalise == "caffe"
        std = _CAFFE_STD if caffe else preprocessing.std
        channels = split.image_shape[-1]
        table = value_table(preprocessing.mean[:channels], std[:channels], dtype)
        write = functools.partial(_write_looked_up, table)

    def normalise(images: np.ndarray, out: np.ndarray) -> None:
        if images.shape[1:] != split.image_shape:
            # A batch at a time: the records in memory stay small.
            images = augment.resize(images, split.image_shape[0])
        write(images, out)

    return normalise


def value_table(
    mean: Sequence[float], std: Sequence[float], dtype: np.typing.DTypeLike
) -> np.ndarray:
    """What each of the 256 values of a pixel becomes, `[256, channels]`.

    Args:
        mean: Of each channel, of 1; subtracted.
        std: Deviation of each channel, of 1; divided by.
        dtype: Of the result; computed in float32.

    Returns:
        `(value / 255 - mean) / std`.
    """
    deviation = np.asarray(std, np.float32)
    scale = np.float32(1 / 255) / deviation
    shift = np.asarray(mean, np.float32) / deviation
    values = np.arange(256, dtype=np.float32)[:, None]
    return (values * scale - shift).astype(dtype)


def _write_looked_up(table: np.ndarray, images: np.ndarray, out: np.ndarray) -> None:
    """`table[value, channel]` of each pixel; ten times faster than arithmetic is."""
    shape = (-1, *images.shape[2:])
    # OpenCV has no bfloat16, but a table does not care what its entries mean.
    kind = np.uint16 if table.itemsize == 2 else table.dtype
    pixels = np.ascontiguousarray(images).reshape(shape)
    cv2.LUT(pixels, table.view(kind)[None], out.view(kind).reshape(shape))


def _write_standardised(images: np.ndarray, out: np.ndarray) -> None:
    """Images of mean 0 and variance 1, each by its own mean and deviation.

    As `tf.image.per_image_standardization` of float images with values up to 255: the
    deviation of a nearly uniform image of `n` numbers is taken as `1 / sqrt(n)`.
    """
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    least = np.float32(rows.shape[1] ** -0.5)
    rows /= np.maximum(rows.std(1, keepdims=True), least)
    out[:] = rows.reshape(images.shape)
