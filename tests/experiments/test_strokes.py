"""The drawings: the same everywhere, balanced, learnable, and confusable by family."""

import numpy as np
import pytest

from experiments.data import strokes


@pytest.fixture(scope="module")
def drawn():
    config = strokes.Strokes()
    return strokes.draw(config, "train", 4000), strokes.draw(config, "test", 1000)


def test_images_follow_from_the_config_alone(drawn):
    (images, labels), _ = drawn
    again, labels_again = strokes.draw(strokes.Strokes(), "train", 4000)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
    np.testing.assert_array_equal(np.bincount(labels), np.full(20, 200))
    assert images.shape == (4000, 32, 32, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_fewer_images_are_a_prefix_of_more(drawn):
    (images, labels), _ = drawn
    few, few_labels = strokes.draw(strokes.Strokes(), "train", strokes.BLOCK + 3)
    np.testing.assert_array_equal(few, images[: strokes.BLOCK + 3])
    np.testing.assert_array_equal(few_labels, labels[: strokes.BLOCK + 3])


@pytest.mark.parametrize(
    "other", [(strokes.Strokes(seed=1), "train"), (strokes.Strokes(), "test")]
)
def test_seed_and_split_change_the_images(drawn, other):
    (images, _), _ = drawn
    assert np.mean(strokes.draw(*other, 64)[0] == images[:64]) < 0.1


def test_no_image_occurs_twice(drawn):
    (train, _), (test, _) = drawn
    flat = np.concatenate([train, test]).reshape(5000, -1)
    assert len(np.unique(flat, axis=0)) == 5000


def test_more_classes_keep_the_first_ones():
    few = strokes.class_strokes(strokes.Strokes(num_classes=12))
    many = strokes.class_strokes(strokes.Strokes(num_classes=30))
    np.testing.assert_array_equal(few, many[:12])


def test_a_family_shares_two_strokes_and_no_two_classes_three():
    templates = strokes.class_strokes(strokes.Strokes(num_classes=30))
    for i, one in enumerate(templates):
        for j, other in enumerate(templates[:i]):
            shared = sum(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
            family = i // strokes.FAMILY_SIZE == j // strokes.FAMILY_SIZE
            assert shared == (2 if family else 0)


def test_label_noise_replaces_that_share_of_training_labels_only():
    noisy = strokes.Strokes(label_noise=0.4)
    _, clean_labels = strokes.draw(strokes.Strokes(), "train", 4000)
    _, labels = strokes.draw(noisy, "train", 4000)
    # A drawn label is true in 1 of 20 cases; the share deviates by 0.008.
    assert np.mean(labels != clean_labels) == pytest.approx(0.4 * 19 / 20, abs=0.03)
    test, test_labels = strokes.draw(noisy, "test", 300)
    clean_test, clean_test_labels = strokes.draw(strokes.Strokes(), "test", 300)
    np.testing.assert_array_equal(test_labels, clean_test_labels)
    np.testing.assert_array_equal(test, clean_test)


def _outline(images: np.ndarray) -> np.ndarray:
    """Unit vectors that forget colour and polarity: gradient magnitudes, blurred."""
    grey = images.mean(-1)
    down = np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    across = np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:]))
    edges = down + across
    for axis in (1, 2):
        for _ in range(3):
            edges = edges + np.roll(edges, 1, axis) + np.roll(edges, -1, axis)
    flat = edges.reshape(len(images), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_classes_are_learnable_and_confused_within_their_families(drawn):
    (train, labels), (test, true) = drawn
    nearest = (_outline(test) @ _outline(train).T).argmax(1)
    predicted = labels[nearest]
    right = np.mean(predicted == true)
    family = np.mean(predicted // strokes.FAMILY_SIZE == true // strokes.FAMILY_SIZE)
    assert right > 0.25, "chance is 0.05"
    assert right < 0.95, "a nearest neighbour must not solve the set"
    # If errors ignored families, 4 of the 19 wrong classes would be siblings.
    assert (family - right) / (1 - right) > 2 * 4 / 19


def test_pixels_of_an_untrained_eye_say_little(drawn):
    (train, labels), (test, true) = drawn
    train, test = (
        x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True)
        for x in (train.astype(np.float32), test.astype(np.float32))
    )
    means = np.stack([train[labels == k].mean(0) for k in range(20)])
    predicted = (test @ means.T).argmax(1)
    # Either polarity is as likely, so class means of raw pixels cancel.
    assert np.mean(predicted == true) < 0.2


@pytest.mark.parametrize("size", [8, 20, 64])
def test_other_sizes(size):
    images, _ = strokes.draw(strokes.Strokes(image_size=size), "train", 40)
    assert images.shape == (40, size, size, 3)
    assert images.std() > 30


def test_bad_settings_are_refused_by_name():
    bounds = {"num_classes": (2, 1), "image_size": (8, 7), "seed": (0, -1)}
    bounds["label_noise"] = (1.0, 1.01)
    for name, (least, beyond) in bounds.items():
        strokes.Strokes(**{name: least})
        with pytest.raises(ValueError, match=f"{name}={beyond} must"):
            strokes.Strokes(**{name: beyond})
    with pytest.raises(ValueError, match="split='validation' must be"):
        strokes.draw(strokes.Strokes(), "validation", 10)
    with pytest.raises(ValueError, match="count=-1 must"):
        strokes.draw(strokes.Strokes(), "train", -1)
