"""Crops and flips: right pixels, and randomness that belongs to the position."""

import cv2
import numpy as np
import pytest

from experiments.data import augment


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def images():
    return noise(64, 12, 10, 3)


def test_uniforms_are_uniform_and_distinct():
    draws = augment.uniforms(3, np.arange(20_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(np.unique(draws)) == draws.size
    # The mean of n uniforms deviates by 0.29 / sqrt(n) = 0.002; correlations by 0.007.
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(draws.T), np.eye(4), atol=0.03)


def test_seeds_give_unrelated_numbers():
    one, two = (augment.uniforms(seed, np.arange(5000), 1).ravel() for seed in (0, 1))
    assert not np.isin(one, two).any()
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("border", "mode"), [({}, "reflect"), ({"border": "zero"}, "constant")]
)
def test_a_crop_is_a_window_of_the_padded_image(images, border, mode):
    positions = np.arange(64)
    cropped = augment.pad_crop_flip(images, positions, 0, pad=2, flip=False, **border)
    across, down, _ = augment.uniforms(0, positions, 3).T
    for i in range(64):
        padded = np.pad(images[i], ((2, 2), (2, 2), (0, 0)), mode=mode)
        y, x = int(down[i] * 5), int(across[i] * 5)
        np.testing.assert_array_equal(cropped[i], padded[y : y + 12, x : x + 10])


def test_half_of_the_images_are_mirrored(images):
    flipped = augment.pad_crop_flip(images, np.arange(64), 0, pad=0, flip=True)
    mirrored = np.array(
        [(f == i[:, ::-1]).all() for f, i in zip(flipped, images, strict=True)]
    )
    same = np.array([(f == i).all() for f, i in zip(flipped, images, strict=True)])
    assert (mirrored ^ same).all()
    untouched = augment.pad_crop_flip(images, np.arange(64), 0, pad=0, flip=False)
    np.testing.assert_array_equal(untouched, images)
    assert 16 < mirrored.sum() < 48


def test_an_image_is_treated_alike_alone_and_in_a_batch(images):
    positions = np.arange(1000, 1064)
    together = augment.pad_crop_flip(images, positions, 7, pad=3, flip=True)
    for i in (0, 13, 63):
        alone = augment.pad_crop_flip(
            images[i : i + 1], positions[i : i + 1], 7, pad=3, flip=True
        )
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("shape", [(50, 70, 3), (300, 60, 3), (1, 1, 3)])
def test_random_resized_crops_have_the_size_and_vary(shape):
    image = noise(*shape)
    draws = augment.uniforms(0, np.arange(20), augment.RESIZED_CROP_DRAWS)
    crops = [augment.random_resized_crop(image, row, 16) for row in draws]
    assert {crop.shape for crop in crops} == {(16, 16, 3)}
    again = augment.random_resized_crop(image, draws[5], 16)
    np.testing.assert_array_equal(again, crops[5])
    if shape != (1, 1, 3):
        assert len({crop.tobytes() for crop in crops}) > 10


def test_the_centre_crop_is_centred():
    image = np.zeros((80, 120, 3), np.uint8)
    image[5:75, 25:95] = 200  # the central square of 7/8 of the shorter side
    np.testing.assert_array_equal(augment.centre_crop(image, 35), 200)
    image[4, 30] = image[75, 30] = image[30, 24] = image[30, 95] = 0
    np.testing.assert_array_equal(augment.centre_crop(image, 35), 200)


def test_a_squashed_crop_is_a_window_of_the_resized_image():
    image = noise(40, 90, 3)
    squashed = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
    windows = {
        squashed[y : y + 253, x : x + 253].tobytes(): (y, x)
        for y in range(4)
        for x in range(4)
    }
    mirrored, places = 0, []
    for draws in augment.uniforms(5, np.arange(200), augment.SQUASHED_CROP_DRAWS):
        crop = augment.random_squashed_crop(image, draws, 253)
        again = augment.random_squashed_crop(image, draws, 253)
        np.testing.assert_array_equal(crop, again)
        mirror = crop.tobytes() not in windows
        mirrored += mirror
        places.append(windows[(crop[:, ::-1] if mirror else crop).tobytes()])
    assert 70 < mirrored < 130
    # Each of the 16 places has 12.5 of 200 crops in the mean.
    counts = np.bincount([4 * y + x for y, x in places], minlength=16)
    assert counts.min() > 2
    assert counts.max() < 28


@pytest.mark.parametrize(("size", "start"), [(227, 14), (224, 16), (256, 0)])
def test_the_centre_squashed_crop_is_the_one_of_caffe(size, start):
    image = noise(300, 50, 3)
    squashed = cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR)
    crop = augment.centre_squashed_crop(image, size)
    end = start + size
    np.testing.assert_array_equal(crop, squashed[start:end, start:end])


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_bilinear(images, channels):
    images = images[..., :channels]
    resized = augment.resize(images, 30)
    assert (resized.shape, resized.dtype) == ((64, 30, 30, channels), np.uint8)
    # Between the pixels' centres; beyond the outermost ones, their values.
    y, x = (np.clip((np.arange(30) + 0.5) * n / 30 - 0.5, 0, n - 1) for n in (12, 10))
    for image, got in zip(images.astype(float), resized, strict=True):
        rows = [
            [np.interp(y, np.arange(12), c) for c in r.T] for r in image.swapaxes(0, 1)
        ]
        columns = np.array(rows).transpose(2, 1, 0)  # y, channel, x
        expected = [[np.interp(x, np.arange(10), c) for c in r] for r in columns]
        expected = np.array(expected).swapaxes(1, 2)
        np.testing.assert_allclose(got, expected, atol=1)
