"""Crops, shifts, flips and normalisation as operations of TensorFlow.

They are those of `augment` and `normalising`, by the same random numbers, for one image
at a time: the results differ by the rounding of pixels alone. Of a photograph only the
rectangle that is used is decoded.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from experiments.data import augment, order, splits

Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""From an image and its random numbers to what a model sees of it, with values up to
255. An image of varying size is given as a file, and comes back at the model's size."""

_Window = Callable[[tf.Tensor], tf.Tensor]
"""From height and width of an image to top, left, height and width of a part."""

_CAFFE_STD = (256 / 255, 256 / 255, 256 / 255)  # as in `normalising`
_DCT = "INTEGER_ACCURATE"  # of OpenCV and Pillow, too; TensorFlow's own is rougher


def uniforms(
    seed: int, slices: order.Slices, draws: int, taken: int
) -> tf.data.Dataset:
    """The random numbers of each image that a process reads, one after the other.

    Args:
        seed: Not negative.
        slices: The process's slice of each batch.
        draws: How many numbers an image needs.
        taken: Batches read before.

    Returns:
        float64 `[draws]` an element.
    """
    if not draws:  # TensorFlow crashes over rows of no numbers
        return tf.data.Dataset.from_tensors(tf.zeros([0], tf.float64)).repeat()

    def of_batch(number: np.ndarray) -> np.ndarray:
        positions = slices.positions(int(number), slices.local_size)
        return augment.uniforms(seed, positions, draws)

    def rows(number: tf.Tensor) -> tf.Tensor:
        drawn = tf.numpy_function(of_batch, [number], tf.float64, stateful=False)
        return tf.ensure_shape(drawn, [slices.local_size, draws])

    return tf.data.Dataset.range(taken, np.iinfo(np.int64).max).map(rows).unbatch()


def augmentation(
    preprocessing: splits.Preprocessing,
    recipe: splits.Recipe,
    *,
    size: int | None,
    augmented: bool,
) -> tuple[int, Augment]:
    """What is seen of an image.

    Args:
        preprocessing: What happens to the images of the data set.
        recipe: What the run wants done differently.
        size: Height and width of the result, for images of varying size; `None` for
            images of one size, which keep it.
        augmented: Whether images are cropped, shifted and mirrored at random.

    Returns:
        How many random numbers an image needs, and the function.
    """
    if size is None:
        shifted = functools.partial(_shifted, preprocessing, recipe.border)
        return (3, shifted) if augmented else (0, lambda image, draws: image)
    if recipe.crop == "plain":
        crop = _random_squashed_crop if augmented else _centre_squashed_crop
        draws = augment.SQUASHED_CROP_DRAWS
        return draws if augmented else 0, functools.partial(crop, size)
    crop = _random_resized_crop if augmented else _centre_crop
    draws = augment.RESIZED_CROP_DRAWS
    return draws if augmented else 0, functools.partial(crop, size)


def normaliser(
    preprocessing: splits.Preprocessing,
    recipe: splits.Recipe,
    shape: tuple[int, int, int],
) -> Callable[[tf.Tensor], tf.Tensor]:
    """How pixels become the numbers that a model sees.

    Args:
        preprocessing: Mean and deviation of the data set.
        recipe: Which of them, or the image's own, to use.
        shape: Of an image.

    Returns:
        A function of a float32 image with values up to 255.
    """
    if recipe.normalise == "image":
        return tf.image.per_image_standardization
    std = _CAFFE_STD if recipe.normalise == "caffe" else preprocessing.std
    scale = np.float32(1 / 255) / np.asarray(std, np.float32)
    shift = np.asarray(preprocessing.mean, np.float32) / np.asarray(std, np.float32)
    # Whole images: TensorFlow takes ten times longer over three numbers.
    scale, shift = (np.tile(row[: shape[2]], (*shape[:2], 1)) for row in (scale, shift))
    return lambda image: image * scale - shift


def _shifted(
    preprocessing: splits.Preprocessing,
    border: augment.Border,
    image: tf.Tensor,
    draws: tf.Tensor,
) -> tf.Tensor:
    """`augment.pad_crop_flip`."""
    shifted = image
    if pad := preprocessing.pad:
        x, y = tf.unstack(tf.cast(draws[:2] * (2 * pad + 1), tf.int32))
        mode = "REFLECT" if border == "reflect" else "CONSTANT"
        padded = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode)
        shifted = tf.slice(padded, tf.stack([y, x, 0]), image.shape)
    return _mirrored(shifted, draws[2]) if preprocessing.flip else shifted


def _random_resized_crop(size: int, file: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """`augment.random_resized_crop`."""
    part = _decoded(file, functools.partial(_random_window, draws[:-1]))
    return _mirrored(tf.image.resize(part, (size, size)), draws[-1])


def _centre_crop(size: int, file: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """`augment.centre_crop`."""
    del draws

    def window(shape: tf.Tensor) -> tf.Tensor:
        share = 0.875 * tf.cast(tf.reduce_min(shape), tf.float64)
        side = tf.fill([2], tf.maximum(1, tf.cast(tf.round(share), tf.int32)))
        return tf.concat([(shape - side + 1) // 2, side], 0)

    return tf.image.resize(_decoded(file, window), (size, size), method="area")


def _random_squashed_crop(size: int, file: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """`augment.random_squashed_crop`."""
    room = augment.SQUASHED_SIZE - size + 1
    y, x = tf.unstack(tf.cast(draws[:2] * room, tf.int32))
    return _mirrored(_squashed(file)[y : y + size, x : x + size], draws[2])


def _centre_squashed_crop(size: int, file: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """`augment.centre_squashed_crop`."""
    del draws
    start = (augment.SQUASHED_SIZE - size) // 2
    return _squashed(file)[start : start + size, start : start + size]


def _random_window(draws: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """The first of ten rectangles that fits, else the largest centred square."""
    shape = tf.cast(shape, tf.float64)
    area, ratio, top, left = tf.unstack(tf.reshape(draws, [-1, 4]), axis=1)
    area = tf.reduce_prod(shape) * (0.08 + 0.92 * area)
    ratio = (3 / 4) * (16 / 9) ** ratio
    tries = tf.stack(
        [tf.round((area / ratio) ** 0.5), tf.round((area * ratio) ** 0.5)], 1
    )
    square = tf.fill([1, 2], tf.reduce_min(shape))
    sides = tf.concat([tries, square], 0)
    places = tf.concat([tf.stack([top, left], 1), [[0.5, 0.5]]], 0)
    fits = tf.reduce_all((sides > 0) & (sides <= shape), axis=1)
    first = tf.argmax(tf.cast(fits, tf.int32))
    side, place = sides[first], places[first]
    return tf.cast(tf.concat([place * (shape - side + 1), side], 0), tf.int32)


def _decoded(file: tf.Tensor, window: _Window) -> tf.Tensor:
    """A part of a JPEG or PNG file, uint8 `[h, w, 3]`."""

    def jpeg() -> tf.Tensor:
        part = window(tf.io.extract_jpeg_shape(file)[:2])
        return tf.io.decode_and_crop_jpeg(file, part, 3, dct_method=_DCT)

    def other() -> tf.Tensor:
        image = tf.io.decode_png(file, 3)
        y, x, height, width = tf.unstack(window(tf.shape(image)[:2]))
        return image[y : y + height, x : x + width]

    return tf.cond(tf.io.is_jpeg(file), jpeg, other)


def _squashed(file: tf.Tensor) -> tf.Tensor:
    # It decodes PNG files, too.
    image = tf.io.decode_jpeg(file, 3, dct_method=_DCT)
    return tf.image.resize(image, (augment.SQUASHED_SIZE, augment.SQUASHED_SIZE))


def _mirrored(image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    return tf.cond(draw < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
