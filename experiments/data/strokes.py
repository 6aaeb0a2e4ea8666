"""The procedural image set ``strokes``: drawings made by NumPy alone.

A *class* is three Bezier strokes.  Classes come in *families* of five which share two
of the three, so that the members of a family differ in one stroke only and are easily
confused.  An *image* of a class is its strokes under random changes:

    control points   jittered, then rotated, scaled, sheared and shifted together
    pen              one radius and one colour per image, lighter or darker than
                     the ground
    ground           a colour plus a 1/f texture (equal variance in every octave)
    clutter          a short stroke that belongs to no class, below the others
    pixels           additive noise, rounded to uint8

Every bit of an image follows from ``(VERSION, seed, split, index)``, on any machine:
numbers come from the integers of PCG64, whose stream NumPy promises to keep (which it
does not for the floats of ``numpy.random.Generator``), and pixels from operations that
IEEE 754 rounds exactly (+, -, *, /, sqrt, min, max, element by element).  No
transcendental function, no floating-point sum over an axis and no FFT is used, since
their last bit differs between processors.
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from lbopt import checks

VERSION = 1
"""Raised whenever any image or label changes; part of every seed."""

FAMILY_SIZE = 5
"""Classes in a family: two strokes in common, one of their own."""

BLOCK = 128
"""Images that share a random stream and are drawn together, to fit a core's cache."""

SPLITS = {"train": 0, "test": 1}

_CLASS_STREAM = 2  # after the splits' numbers, so that no stream is used twice
_CONTRAST = 0.18  # least difference in lightness between pen and ground, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Parameters of the drawings.

    Attributes:
      num_classes: number of classes; families are filled one after the other.
      image_size: height and width, in pixels.
      label_noise: fraction of the *training* labels replaced by a class drawn
        uniformly, which may be the true one.  Test labels are always true.
      seed: seed of the classes and the images.
    """

    num_classes: int = 20
    image_size: int = 32
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        checks.whole("num_classes", self.num_classes, "20 is the default", least=2)
        checks.whole("image_size", self.image_size, "32 is the default", least=8)
        checks.whole("seed", self.seed, "0 is the default", least=0)
        if not 0.0 <= self.label_noise <= 1.0:
            raise ValueError(
                f"label_noise={self.label_noise} must lie in [0, 1]; 0 for true labels"
            )


def draw(config: Strokes, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the first ``count`` images of a split.

    Args:
      config: parameters of the drawings.
      split: ``"train"`` or ``"test"``.
      count: number of images.  Fewer images are a prefix of more.

    Returns:
      Images, uint8 ``[count, image_size, image_size, 3]``, and labels, int32
      ``[count]``.

    Raises:
      ValueError: if ``split`` is unknown or ``count`` is negative.
    """
    checks.whole("count", count, "0 draws none", least=0)
    size = config.image_size
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty((count,), np.int32)
    for start, some_images, some_labels in draw_blocks(config, split, count):
        images[start : start + len(some_images)] = some_images
        labels[start : start + len(some_labels)] = some_labels
    return images, labels


def draw_blocks(
    config: Strokes, split: str, count: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Draws the first ``count`` images of a split, one block of ``BLOCK`` at a time.

    Yields:
      The index of the block's first image, its images and its labels, as in ``draw``.

    Raises:
      ValueError: if ``split`` is unknown.
    """
    checks.one_of("split", split, SPLITS)
    templates = class_strokes(config)
    for block, start in enumerate(range(0, count, BLOCK)):
        uniform = _Uniform(config.seed, SPLITS[split], block)
        true_labels = (
            np.arange(start, start + BLOCK, dtype=np.int32) % config.num_classes
        )
        images = _draw_images(uniform, templates[true_labels], config.image_size)
        labels = true_labels
        if split == "train":
            labels = _corrupt(uniform, labels, config)
        kept = min(BLOCK, count - start)
        yield start, images[:kept], labels[:kept]


def class_strokes(config: Strokes) -> np.ndarray:
    """Returns the control points of every class.

    The strokes of a family, shared and own, are chosen one after the other, each as the
    candidate farthest from those already chosen: siblings are alike because they share
    two strokes, never because their third happens to be the same.

    Returns:
      float32 ``[num_classes, 3 strokes, 4 points, (x, y)]`` on ``[-1, 1]^2``.
    """
    classes = []
    for family in range(-(-config.num_classes // FAMILY_SIZE)):
        uniform = _Uniform(config.seed, _CLASS_STREAM, family)
        chosen: list[np.ndarray] = []
        while len(chosen) < 2 + FAMILY_SIZE:
            candidates = 1.7 * uniform(16, 4, 2) - 0.85
            span = np.abs(candidates[:, 0] - candidates[:, 3]).max(-1)
            gaps = [_stroke_gap(candidates, other) for other in chosen]
            # A stroke shorter than 0.7 would read as a dot, so it is ranked last.
            rank = np.min([*gaps, np.full(16, 9.0)], axis=0) - 10.0 * (span < 0.7)
            chosen.append(candidates[rank.argmax()])
        shared, own = chosen[:2], chosen[2:]
        classes += [[*shared, stroke] for stroke in own]
    return np.array(classes[: config.num_classes], np.float32)


def checksum(images: np.ndarray, labels: np.ndarray, start: int = 0) -> int:
    """Continues the CRC-32 ``start`` by images, then labels as little-endian int32."""
    crc = zlib.crc32(images.tobytes(), start)
    return zlib.crc32(labels.astype("<i4").tobytes(), crc)


class _Uniform:
    """float32 numbers uniform on ``[0, 1)``, from the integers of a PCG64 stream."""

    def __init__(self, seed: int, stream: int, block: int):
        entropy = np.random.SeedSequence((VERSION, seed, stream, block))
        self._bits = np.random.PCG64(entropy)

    def __call__(self, *shape: int) -> np.ndarray:
        """Returns numbers of the given shape, with 24 random bits each."""
        words = self._words("<u4", *shape)
        return (words >> 8).astype(np.float32) * np.float32(2.0**-24)

    def bell(self, *shape: int) -> np.ndarray:
        """Returns scaled sums of three uniforms, of mean 0 and variance 1."""
        a, b, c = self(3, *shape)
        return 2.0 * (a + b + c - 1.5)

    def pixel_noise(self, *shape: int) -> np.ndarray:
        """Returns triangular noise of mean 0 and variance 1, with 8 bits a summand."""
        a, b = self._words("u1", 2, *shape)
        return (a.astype(np.float32) - b) * np.float32(1.0 / 104.5)

    def _words(self, dtype: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        per_draw = 8 // np.dtype(dtype).itemsize
        raw = self._bits.random_raw(-(-count // per_draw)).astype("<u8")
        return raw.view(dtype)[:count].reshape(shape)


def _stroke_gap(strokes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the largest difference of coordinates, drawn in either direction."""
    forth = np.abs(strokes - other).max((-2, -1))
    back = np.abs(strokes - other[::-1]).max((-2, -1))
    return np.minimum(forth, back)


def _corrupt(uniform: _Uniform, labels: np.ndarray, config: Strokes) -> np.ndarray:
    """Replaces a fraction ``label_noise`` of the labels by uniform ones."""
    wrong, drawn = uniform(2, len(labels))
    random_labels = (drawn * config.num_classes).astype(np.int32)
    return np.where(wrong < config.label_noise, random_labels, labels)


def _draw_images(uniform: _Uniform, strokes: np.ndarray, size: int) -> np.ndarray:
    """Draws an image of each class template: ``[n, 3, 4, 2]`` to ``[n, h, w, 3]``."""
    n = len(strokes)
    strokes = strokes + 0.045 * uniform.bell(*strokes.shape)
    strokes = _moved(strokes, *_motion(uniform, n))
    clutter = uniform(n, 1, 1, 2) * 1.8 - 0.9 + 0.3 * uniform.bell(n, 1, 4, 2)

    # The pen is never thinner than one pixel, whatever the size of the image.
    radius = np.maximum(0.045 + 0.035 * uniform(n), 0.5 * 2 / size)
    ground, pen = _colours(uniform, n)
    image = _ground(uniform, ground, size)
    _paint(image, pen, radius, clutter, opacity=0.3 + 0.5 * uniform(n))
    _paint(image, pen, radius, strokes, opacity=np.ones(n, np.float32))

    strength = 0.02 + 0.05 * uniform(n, 1, 1, 1)
    image += strength * uniform.pixel_noise(*image.shape)
    pixels = np.clip(image * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _motion(uniform: _Uniform, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws linear maps ``[n, 2, 2]`` and shifts ``[n, 2]``."""
    turn, scale_x, scale_y, shear = 2.0 * uniform(4, n) - 1.0
    # Rotation by up to 21 degrees in half-angle form: rounded exactly, unlike sin, cos.
    t = 0.185 * turn
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    sx, sy, k = 0.98 + 0.17 * scale_x, 0.98 + 0.17 * scale_y, 0.2 * shear
    linear = np.stack(
        [cos * sx, cos * k - sin * sy, sin * sx, sin * k + cos * sy], axis=-1
    ).reshape(n, 2, 2)
    return linear, 0.2 * (uniform(n, 2) - 0.5)


def _moved(points: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``linear @ point + shift``, written out because BLAS may round in any order."""
    x, y = points[..., 0], points[..., 1]
    a = linear[:, :, :, None, None]
    b = shift[:, :, None, None]
    return np.stack(
        [a[:, i, 0] * x + a[:, i, 1] * y + b[:, i] for i in range(2)], axis=-1
    )


def _colours(uniform: _Uniform, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws ground and pen colours ``[n, 3]`` in ``[0, 1]``, of either polarity."""
    lightness = 0.1 + 0.8 * uniform(n, 1)
    room_above, room_below = 0.95 - lightness, lightness - 0.05
    lighter = uniform(n, 1) * (room_above + room_below) < room_above
    room = np.where(lighter, room_above, room_below)
    step = _CONTRAST + np.maximum(room - _CONTRAST, 0.0) * uniform(n, 1)
    pen = lightness + np.where(lighter, step, -step)
    hue_ground, hue_pen = 0.24 * (uniform(2, n, 3) - 0.5)
    return lightness + hue_ground, pen + hue_pen


def _ground(uniform: _Uniform, colour: np.ndarray, size: int) -> np.ndarray:
    """Draws grounds of a colour plus texture, ``[n, 3, size, size]``.

    The texture adds octaves of equal variance, each on a grid twice as fine: a power
    spectrum 1/f^2 in the plane, that is, an amplitude 1/f.

    Returns:
      The grounds.
    """
    n = len(colour)
    side = 2
    texture = uniform(n, side, side) - 0.5
    while side < size:
        side *= 2
        texture = _doubled(_doubled(texture, axis=1), axis=2)
        texture += uniform(n, side, side) - 0.5
    texture = texture[:, None, :size, :size]
    tint = uniform(n, 1, 1, 1) * 0.16 * (0.6 + 0.4 * uniform(n, 3, 1, 1))
    return colour[:, :, None, None] + tint * texture


def _doubled(grid: np.ndarray, axis: int) -> np.ndarray:
    """Interpolates linearly to twice the points along an axis, edges repeated."""
    first, last = np.take(grid, [0], axis), np.take(grid, [-1], axis)
    length = grid.shape[axis]
    before = np.concatenate([first, np.take(grid, range(length - 1), axis)], axis)
    after = np.concatenate([np.take(grid, range(1, length), axis), last], axis)
    pair = np.stack(
        [0.75 * grid + 0.25 * before, 0.75 * grid + 0.25 * after], axis=axis + 1
    )
    shape = list(grid.shape)
    shape[axis] = 2 * length
    return pair.reshape(shape)


def _paint(
    image: np.ndarray,
    pen: np.ndarray,
    radius: np.ndarray,
    strokes: np.ndarray,
    opacity: np.ndarray,
) -> None:
    """Blends the pen's colour into ``image`` ``[n, 3, size, size]``, in place."""
    pixel = 2.0 / image.shape[-1]
    distance = np.sqrt(_squared_distance(strokes, image.shape[-1]))
    # Coverage falls linearly from 1 to 0 over the width of one pixel at the pen's edge.
    edge = (radius / pixel + 0.5).astype(np.float32)[:, None, None]
    cover = np.clip(edge - distance * np.float32(1.0 / pixel), 0.0, 1.0)
    cover *= opacity[:, None, None]
    image += cover[:, None] * (pen[:, :, None, None] - image)


def _squared_distance(strokes: np.ndarray, size: int) -> np.ndarray:
    """Returns the squared distance of each pixel to the nearest stroke.

    A running minimum over points along the curves, closer together than a pen's width;
    the squares separate into a row's and a column's share.  Maps control points
    ``[n, strokes, 4, 2]`` to ``[n, size, size]``.
    """
    n = len(strokes)
    points = _curve_points(strokes, count=max(12, (5 * size) // 4)).reshape(n, -1, 2)
    centres = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
    along_x = np.square(centres - points[:, :, :1], dtype=np.float32)
    along_y = np.square(centres - points[:, :, 1:], dtype=np.float32)
    nearest = np.full((n, size, size), np.inf, np.float32)
    candidate = np.empty_like(nearest)
    for k in range(points.shape[1]):
        np.add(along_y[:, k, :, None], along_x[:, k, None, :], out=candidate)
        np.minimum(nearest, candidate, out=nearest)
    return nearest


def _curve_points(strokes: np.ndarray, count: int) -> np.ndarray:
    """Points of cubic Bezier curves: ``[..., 4, 2]`` to float32 ``[..., count, 2]``."""
    t = (np.arange(count) / (count - 1)).astype(np.float32)[:, None]
    u = 1 - t
    p = strokes.astype(np.float32)[..., None, :]
    return (
        u * u * u * p[..., 0, :, :]
        + 3 * u * u * t * p[..., 1, :, :]
        + 3 * u * t * t * p[..., 2, :, :]
        + t * t * t * p[..., 3, :, :]
    )
