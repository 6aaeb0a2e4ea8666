"""Random crops and flips, functions of an image's position in the stream.

Random numbers are a hash of ``(seed, position, draw)``, where ``position`` counts the
images that training has seen on all processes together.  An image is therefore cropped
the same way whether it is read alone or in a batch, by one process or by many, before
or after a resume.
"""

from typing import Literal

import cv2
import numpy as np

Border = Literal["reflect", "zero"]
"""Padding beyond the edges of an image: its mirror image, or black."""

SQUASHED_SIZE = 256
"""Height and width, in pixels, that ``random_squashed_crop`` crops from."""

RESIZED_CROP_DRAWS = 41
"""Random numbers that ``random_resized_crop`` needs: four a try, and the mirror's."""

SQUASHED_CROP_DRAWS = 3
"""Random numbers that ``random_squashed_crop`` needs: top, left, and the mirror's."""

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of splitmix64


def uniforms(seed: int, positions: np.ndarray, draws: int) -> np.ndarray:
    """Returns numbers uniform on ``[0, 1)`` by the splitmix64 hash.

    Args:
      seed: not negative.
      positions: integers ``[n]``, one per image.
      draws: numbers per image.

    Returns:
      float64 ``[n, draws]``.
    """
    counter = np.asarray(positions, np.uint64)[:, None] * np.uint64(draws)
    counter = counter + np.arange(draws, dtype=np.uint64)
    # Hashing the seed first keeps neighbouring seeds from sharing shifted streams.
    key = _splitmix64(np.array([seed], np.uint64) * np.uint64(_GOLDEN))
    return (_splitmix64(counter ^ key) >> np.uint64(11)) * 2.0**-53


def pad_crop_flip(
    images: np.ndarray,
    positions: np.ndarray,
    seed: int,
    *,
    pad: int,
    flip: bool,
    border: Border = "reflect",
) -> np.ndarray:
    """Shifts each image by up to ``pad`` pixels and mirrors half of them.

    Args:
      images: ``[n, height, width, channels]``.
      positions: integers ``[n]``, the images' positions in the stream.
      seed: seed of the run.
      pad: largest shift along each axis, in pixels; 0 for none.
      flip: whether to mirror left and right with probability 1/2.
      border: padding that a shift brings in.

    Returns:
      The images, of the same shape.
    """
    n, height, width, _ = images.shape
    across, down, mirror = uniforms(seed, positions, 3).T
    if pad:
        x, y = (across * (2 * pad + 1)).astype(int), (down * (2 * pad + 1)).astype(int)
        widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        mode = "reflect" if border == "reflect" else "constant"
        padded = np.pad(images, widths, mode=mode)
        images = np.empty_like(images)
        for i in range(n):
            images[i] = padded[i, y[i] : y[i] + height, x[i] : x[i] + width]
    if flip:
        mirrored = (mirror < 0.5)[:, None, None, None]
        images = np.where(mirrored, images[:, :, ::-1], images)
    return images


def random_resized_crop(image: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """The crop of Szegedy et al. (2015), mirrored with probability 1/2.

    A rectangle of 8 % to 100 % of the area and aspect ratio 3/4 to 4/3 (log-uniform)
    that fits into the image, found in ten tries, else the largest centred square.

    Args:
      image: uint8 ``[height, width, channels]``, of any height and width.
      draws: the image's ``RESIZED_CROP_DRAWS`` numbers of ``uniforms``.
      size: height and width of the result, in pixels.

    Returns:
      uint8 ``[size, size, channels]``.
    """
    *numbers, mirror = draws.tolist()
    crop = _sampled_crop(image, numbers)
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(crop, 1) if mirror < 0.5 else crop


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centred square of 7/8 of the shorter side (224 of 256), resized to ``size``.

    Args:
      image: uint8 ``[height, width, channels]``.
      size: height and width of the result, in pixels.

    Returns:
      uint8 ``[size, size, channels]``.
    """
    side = max(1, round(0.875 * min(image.shape[:2])))
    crop = _window(image, side, side, 0.5, 0.5)
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


def random_squashed_crop(image: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """A square from anywhere in the image, mirrored with probability 1/2.

    The image is resized to 256x256 beforehand, whatever its aspect ratio, as Caffe's
    tools do.

    Args:
      image: uint8 ``[height, width, channels]``, of any height and width.
      draws: the image's ``SQUASHED_CROP_DRAWS`` numbers of ``uniforms``.
      size: height and width of the result, at most 256 pixels.

    Returns:
      uint8 ``[size, size, channels]``.
    """
    top, left, mirror = draws.tolist()
    crop = _window(_squashed(image), size, size, top, left)
    return cv2.flip(crop, 1) if mirror < 0.5 else crop


def centre_squashed_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre of the 256x256 image that ``random_squashed_crop`` crops from."""
    # Caffe rounds an odd remainder down, which `_window` does not.
    start = (SQUASHED_SIZE - size) // 2
    return _squashed(image)[start : start + size, start : start + size]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes images uint8 ``[n, height, width, channels]`` bilinearly to squares."""
    resized = np.empty((len(images), size, size, images.shape[-1]), images.dtype)
    for image, target in zip(images, resized, strict=True):
        # OpenCV drops the axis of a single channel.
        target[:] = cv2.resize(image, (size, size)).reshape(target.shape)
    return resized


def _squashed(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (SQUASHED_SIZE, SQUASHED_SIZE))


def _sampled_crop(image: np.ndarray, numbers: list[float]) -> np.ndarray:
    height, width = image.shape[:2]
    for i in range(0, len(numbers), 4):
        area_draw, ratio_draw, top, left = numbers[i : i + 4]
        area = height * width * (0.08 + 0.92 * area_draw)
        ratio = (3 / 4) * (16 / 9) ** ratio_draw
        crop_width = round((area * ratio) ** 0.5)
        crop_height = round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return _window(image, crop_height, crop_width, top, left)
    side = min(height, width)
    return _window(image, side, side, 0.5, 0.5)


def _window(
    image: np.ndarray, height: int, width: int, top: float, left: float
) -> np.ndarray:
    """A window of the image, placed by ``top`` and ``left`` in ``[0, 1)``."""
    y = int(top * (image.shape[0] - height + 1))
    x = int(left * (image.shape[1] - width + 1))
    return image[y : y + height, x : x + width]


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea & Flood (2014): one step of the generator on each element."""
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
