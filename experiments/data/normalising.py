"""Resizes and normalises batches of pixels, and converts them to the model's dtype."""

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from experiments.data import augment, splits

_CAFFE_STD = (256 / 255, 256 / 255, 256 / 255)  # values / 256, not / 255

Normalise = Callable[[np.ndarray, np.ndarray], None]
"""Writes uint8 images ``[n, h, w, c]``, normalised, into the second argument."""


def normaliser(split: splits.Split, dtype: np.typing.DTypeLike) -> Normalise:
    """Returns a function that resizes and normalises a batch.

    Args:
      split: supplies recipe and preprocessing.
      dtype: dtype of the result; numbers are computed in float32 and then rounded.
    """
    preprocessing = split.preprocessing
    if split.recipe.normalise == "image":
        write = _write_standardised
    else:
        caffe = split.recipe.normalise == "caffe"
        std = _CAFFE_STD if caffe else preprocessing.std
        channels = split.image_shape[-1]
        table = _value_table(preprocessing.mean[:channels], std[:channels], dtype)
        write = functools.partial(_write_looked_up, table)

    def normalise(images: np.ndarray, out: np.ndarray) -> None:
        if images.shape[1:] != split.image_shape:
            # Here rather than once for all records, so that those in memory stay small.
            images = augment.resize(images, split.image_shape[0])
        write(images, out)

    return normalise


def _value_table(
    mean: Sequence[float], std: Sequence[float], dtype: np.typing.DTypeLike
) -> np.ndarray:
    """Returns ``(value / 255 - mean) / std`` for all values, ``[256, channels]``."""
    deviation = np.asarray(std, np.float32)
    scale = np.float32(1 / 255) / deviation
    shift = np.asarray(mean, np.float32) / deviation
    values = np.arange(256, dtype=np.float32)[:, None]
    return (values * scale - shift).astype(dtype)


def _write_looked_up(table: np.ndarray, images: np.ndarray, out: np.ndarray) -> None:
    """Writes ``table[value, channel]``, which is ten times faster than arithmetic."""
    shape = (-1, *images.shape[2:])
    # OpenCV has no bfloat16, but may copy the entries as integers of the same size.
    kind = np.uint16 if table.itemsize == 2 else table.dtype
    pixels = np.ascontiguousarray(images).reshape(shape)
    cv2.LUT(pixels, table.view(kind)[None], out.view(kind).reshape(shape))


def _write_standardised(images: np.ndarray, out: np.ndarray) -> None:
    """Writes each image normalised by its own mean and standard deviation.

    As ``tf.image.per_image_standardization`` of float images with values up to 255: the
    deviation of an image of ``n`` numbers counts as ``1 / sqrt(n)`` at least.
    """
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    least = np.float32(rows.shape[1] ** -0.5)
    rows /= np.maximum(rows.std(1, keepdims=True), least)
    out[:] = rows.reshape(images.shape)
