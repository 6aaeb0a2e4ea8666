"""Flat grey images, for autoencoders."""

from typing import Any, NamedTuple

import numpy as np

from experiments.data import splits


class Images(NamedTuple):
    """Flat grey images, float32 ``[n, pixels]`` in [0, 1]."""

    train: np.ndarray
    test: np.ndarray


def strokes() -> Images:
    """Returns the luminance of the inner 28×28 pixels of ``strokes/20``."""

    def prepared(name: str) -> np.ndarray:
        records: Any = splits.open_split("strokes/20", name, "data").records
        return luminance(records.images)

    return Images(prepared("train"), prepared("test"))


def luminance(images: np.ndarray) -> np.ndarray:
    """Returns the luminance (ITU-R BT.601) of images without a rim of two pixels."""
    weights = np.array([0.299, 0.587, 0.114], np.float32) / 255
    inner = images[:, 2:-2, 2:-2].astype(np.float32) @ weights
    return inner.reshape(len(images), -1)


def digits() -> Images:
    """Returns handwritten digits of 8×8 pixels: 1,500 for training, 297 for testing."""
    from sklearn import datasets  # of an extra that only this function needs

    images = datasets.load_digits(return_X_y=True)[0].astype(np.float32) / 16
    return Images(images[:1500], images[1500:])
