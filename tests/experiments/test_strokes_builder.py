"""Preparation on disk: complete, once, checked, and harmless when it is interrupted."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import strokes, strokes_builder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tiny(data_dir):
    return strokes_builder.prepare("tiny", data_dir)


def test_records_are_the_drawings_in_order(tiny):
    config = strokes_builder.CONFIGS["tiny"]
    for split, count in (("train", config.num_train), ("test", config.num_test)):
        images, labels = strokes.draw(config.drawing, split, count)
        records = tiny.as_data_source(split)
        assert len(records) == count
        read = [records[i] for i in range(count)]
        np.testing.assert_array_equal(np.stack([r["image"] for r in read]), images)
        np.testing.assert_array_equal([r["label"] for r in read], labels)


def test_tfds_finds_it_by_name(tiny, data_dir):
    records = tfds.data_source("strokes/tiny", split="test[:10%]", data_dir=data_dir)
    assert len(records) == 10
    assert tiny.info.features["label"].num_classes == 5


def test_it_is_made_once(tiny, data_dir, monkeypatch):
    def draw_blocks(*arguments):
        raise AssertionError(f"drawn again: {arguments}")

    monkeypatch.setattr(strokes, "draw_blocks", draw_blocks)
    again = strokes_builder.prepare("tiny", data_dir)
    assert again.checksum() == tiny.checksum()


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    draw_blocks = strokes.draw_blocks

    def interrupted(*arguments):
        yield next(draw_blocks(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(strokes, "draw_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            strokes_builder.prepare("tiny", tmp_path)
    assert not list(tmp_path.rglob("*.array_record*"))
    builder = strokes_builder.prepare("tiny", tmp_path)
    assert builder.checksum() == strokes_builder.CHECKSUMS["tiny"]


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    draw_blocks = strokes.draw_blocks
    raced = []

    def overtaken(*arguments):
        if not raced:
            raced.append(True)
            strokes_builder.prepare("tiny", tmp_path)
        yield from draw_blocks(*arguments)

    monkeypatch.setattr(strokes, "draw_blocks", overtaken)
    builder = strokes_builder.prepare("tiny", tmp_path)
    assert builder.checksum() == strokes_builder.CHECKSUMS["tiny"]
    assert len(builder.as_data_source("train")) == 256


def test_other_images_than_the_published_ones_are_announced(
    tiny, data_dir, monkeypatch
):
    monkeypatch.setitem(strokes_builder.CHECKSUMS, "tiny", 1)
    with pytest.warns(strokes_builder.ChecksumWarning, match="NumPy"):
        strokes_builder.prepare("tiny", data_dir)


@pytest.mark.parametrize("name", ["20", "20_noisy"])
def test_checksums_are_those_of_the_published_images(name):
    config = strokes_builder.CONFIGS[name]
    crc = 0
    for split, count in (("train", config.num_train), ("test", config.num_test)):
        for _, images, labels in strokes.draw_blocks(config.drawing, split, count):
            crc = strokes.checksum(images, labels, start=crc)
    assert crc == strokes_builder.CHECKSUMS[name]


def test_every_config_has_a_checksum():
    assert strokes_builder.CHECKSUMS.keys() == strokes_builder.CONFIGS.keys()
    assert len(set(strokes_builder.CHECKSUMS.values())) == len(strokes_builder.CONFIGS)


def test_unknown_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"configs.*not '21'"):
        strokes_builder.prepare("21", tmp_path)
