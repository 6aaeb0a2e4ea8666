"""Loads batches by position: reads, crops, augments and normalises images."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import cv2
import grain
import numpy as np

from experiments.data import augment, decoding, normalising, splits

Batch = dict[str, np.ndarray]
"""``image`` ``[b, h, w, c]``, ``label`` int32 ``[b]``; in evaluation, ``mask`` float32
``[b]``."""

BadImages = Literal["stop", "blank"]
"""For an image that cannot be decoded: raise ``decoding.RecordError``, or substitute an
image of the data set's mean."""

BLANK = "blank"
"""Key of the numbers of records whose images are blank; the pipeline removes it."""

Load = Callable[[np.ndarray], Batch]
"""A batch from positions in the stream."""


class Form(NamedTuple):
    """Form of the batches.

    Attributes:
      dtype: dtype of the images.
      bad_images: treatment of images that cannot be decoded.
    """

    dtype: np.typing.DTypeLike = np.float32
    bad_images: BadImages = "stop"


_Crop = Callable[[np.ndarray], np.ndarray]
_Crops = Callable[[np.ndarray], list[_Crop]]  # of the images at some positions
_Shift = Callable[[np.ndarray, np.ndarray], np.ndarray]


def training_loader(
    split: splits.Split,
    seed: int,
    augmented: bool,
    order: grain.MapDataset[int],
    form: Form,
) -> Load:
    """Returns a loader of positions in the endless stream.

    Args:
      split: the records.
      seed: seed of the augmentation.
      augmented: whether images are cropped and mirrored at random.
      order: the record at each position.
      form: form of the batches.
    """
    crops = _random_crops(split, seed) if augmented else _centre_crops(split)
    moved = augmented and split.fixed_size
    shift = _shift(split, seed) if moved else _unmoved
    images_of = _loader(split, crops, shift, form)

    def load(positions: np.ndarray) -> Batch:
        records = [order[position] for position in positions.tolist()]
        return images_of(np.array(records), positions)

    return load


def evaluation_loader(split: splits.Split, form: Form) -> Load:
    """Returns a loader of record numbers; numbers past the end are padding."""
    images_of = _loader(split, _centre_crops(split), _unmoved, form)

    def load(positions: np.ndarray) -> Batch:
        real = positions < len(split)
        # The padding repeats record 0: any image will do that cannot become NaN.
        batch = images_of(np.where(real, positions, 0), positions)
        return batch | {"mask": real.astype(np.float32)}

    return load


class _Fetched(NamedTuple):
    """Images of one size, uint8 ``[b, h, w, c]``, labels, and indices of bad images."""

    images: np.ndarray
    labels: np.ndarray
    bad: list[int]


_Fetch = Callable[[np.ndarray, np.ndarray], _Fetched]
"""From numbers of records and their positions in the stream."""


def _loader(
    split: splits.Split, crops: _Crops, shift: _Shift, form: Form
) -> Callable[[np.ndarray, np.ndarray], Batch]:
    """Returns a loader of records that stand at positions of the stream."""
    normalise = normalising.normaliser(split, form.dtype)
    fetch = _fetcher(split, crops, form.bad_images)

    def load(records: np.ndarray, positions: np.ndarray) -> Batch:
        images, labels, bad = fetch(records, positions)
        out = np.empty((len(records), *split.image_shape), form.dtype)
        normalise(shift(images, positions), out)
        out[bad] = 0  # the mean
        return {"image": out, "label": labels, BLANK: records[bad]}

    return load


def _fetcher(split: splits.Split, crops: _Crops, bad_images: BadImages) -> _Fetch:
    """Returns a reader; it crops images of varying size, and only those."""
    records = split.records
    if isinstance(records, splits.InMemory):
        return lambda chosen, _: _Fetched(
            records.images[chosen], records.labels[chosen], []
        )
    if split.fixed_size:
        return lambda chosen, _: _whole([split.read(i) for i in chosen.tolist()])

    def fetch(chosen: np.ndarray, positions: np.ndarray) -> _Fetched:
        images = np.zeros((len(chosen), *split.image_shape), np.uint8)
        labels = np.empty(len(chosen), np.int32)
        bad = []
        pairs = zip(chosen.tolist(), crops(positions), strict=True)
        for i, (record, crop) in enumerate(pairs):
            # One by one: ``__getitems__`` would start a thread for each file touched.
            row = split.read(record)
            labels[i] = row["label"]
            pixels = decoding.decode(row["image"])
            if pixels is not None:
                # Swapping the channels is cheaper after the crop than before.
                cv2.cvtColor(crop(pixels), cv2.COLOR_BGR2RGB, images[i])
            elif bad_images == "stop":
                raise split.origin.image_error(record)
            else:
                bad.append(i)
        return _Fetched(images, labels, bad)

    return fetch


def _whole(rows: list[splits.Record]) -> _Fetched:
    labels = np.array([row["label"] for row in rows], np.int32)
    return _Fetched(np.stack([row["image"] for row in rows]), labels, [])


def _shift(split: splits.Split, seed: int) -> _Shift:
    """Returns the random shift and flip of training images of one size."""
    preprocessing, border = split.preprocessing, split.recipe.border
    return lambda images, positions: augment.pad_crop_flip(
        images,
        positions,
        seed,
        pad=preprocessing.pad,
        flip=preprocessing.flip,
        border=border,
    )


def _unmoved(images: np.ndarray, positions: np.ndarray) -> np.ndarray:
    del positions
    return images


def _random_crops(split: splits.Split, seed: int) -> _Crops:
    """Returns the random crops of training images, by position."""
    size = split.image_shape[0]
    if split.recipe.crop == "plain":
        crop, draws = augment.random_squashed_crop, augment.SQUASHED_CROP_DRAWS
    else:
        crop, draws = augment.random_resized_crop, augment.RESIZED_CROP_DRAWS

    def crops(positions: np.ndarray) -> list[_Crop]:
        # Drawn for all at once: alone, each would wait for the interpreter lock.
        numbers = augment.uniforms(seed, positions, draws)
        return [functools.partial(crop, draws=row, size=size) for row in numbers]

    return crops


def _centre_crops(split: splits.Split) -> _Crops:
    """Returns the centre crops of evaluation, whatever the positions."""
    plain = split.recipe.crop == "plain"
    crop = augment.centre_squashed_crop if plain else augment.centre_crop
    centre = functools.partial(crop, size=split.image_shape[0])
    return lambda positions: [centre] * len(positions)
