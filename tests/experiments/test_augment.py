"""Crops and flips: right pixels, and randomness that belongs to the position."""

import numpy as np
import pytest

from experiments.data import augment


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 12, 10, 3)).astype(np.uint8)


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


def test_a_crop_is_a_window_of_the_reflected_image(images):
    positions = np.arange(64)
    cropped = augment.pad_crop_flip(images, positions, 0, pad=2, flip=False)
    across, down, _ = augment.uniforms(0, positions, 3).T
    for i in (0, 1, 63):
        padded = np.pad(images[i], ((2, 2), (2, 2), (0, 0)), mode="reflect")
        y, x = int(down[i] * 5), int(across[i] * 5)
        np.testing.assert_array_equal(cropped[i], padded[y : y + 12, x : x + 10])


def test_half_of_the_images_are_mirrored(images):
    flipped = augment.pad_crop_flip(images, np.arange(64), 0, pad=0, flip=True)
    mirrored = np.array(
        [(f == i[:, ::-1]).all() for f, i in zip(flipped, images, strict=True)]
    )
    same = np.array([(f == i).all() for f, i in zip(flipped, images, strict=True)])
    assert (mirrored ^ same).all()
    assert 16 < mirrored.sum() < 48


def test_an_image_is_treated_alike_alone_and_in_a_batch(images):
    positions = np.arange(1000, 1064)
    together = augment.pad_crop_flip(images, positions, 7, pad=3, flip=True)
    for i in (0, 13, 63):
        alone = augment.pad_crop_flip(
            images[i : i + 1], positions[i : i + 1], 7, pad=3, flip=True
        )
        np.testing.assert_array_equal(alone[0], together[i])


def test_nothing_is_done_unless_asked_for(images):
    untouched = augment.pad_crop_flip(images, np.arange(64), 0, pad=0, flip=False)
    np.testing.assert_array_equal(untouched, images)


@pytest.mark.parametrize("shape", [(50, 70, 3), (300, 60, 3), (1, 1, 3)])
def test_random_resized_crops_have_the_size_and_vary(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    crops = [augment.random_resized_crop(image, i, 0, 16) for i in range(20)]
    assert {crop.shape for crop in crops} == {(16, 16, 3)}
    again = augment.random_resized_crop(image, 5, 0, 16)
    np.testing.assert_array_equal(again, crops[5])
    if shape != (1, 1, 3):
        assert len({crop.tobytes() for crop in crops}) > 10


def test_the_centre_crop_is_centred():
    image = np.zeros((80, 120, 3), np.uint8)
    image[5:75, 25:95] = 200  # the central square of 7/8 of the shorter side
    np.testing.assert_array_equal(augment.centre_crop(image, 35), 200)
    assert augment.centre_crop(image, 40, share=1.0).min() == 0
