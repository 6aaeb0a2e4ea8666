"""The picture: written, readable, and drawn from the files of the runs."""

import json

import cv2
import matplotlib.colors
import numpy as np
import pytest

from experiments import figures


@pytest.fixture
def runs(tmp_path):
    files = {}
    for index, name in enumerate(("sgd", "kfac")):
        records = []
        for step in range(1, 21):
            when = {"step": step, "seconds": 2.0 * step + index}
            loss = None if step == 4 else 3.0 / (step + index)
            records.append({"kind": "train", **when, "loss": loss, "accuracy": 0.1})
            if step % 5 == 0:
                accuracy = (step + index) / 25
                records.append({"kind": "test", **when, "accuracy": accuracy})
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(r) + "\n" for r in records))
    return files


def test_a_curve_is_read_by_kind_and_metric(runs):
    test = figures.read_curve(runs["kfac"], "test", "accuracy")
    assert test == (
        [5, 10, 15, 20],
        [11, 21, 31, 41],
        [x / 25 for x in (6, 11, 16, 21)],
    )
    loss = figures.read_curve(runs["sgd"], "train", "loss")
    assert loss.steps == [step for step in range(1, 21) if step != 4], "where known"


def test_the_picture_shows_every_run_in_its_colour(runs, tmp_path):
    path = figures.draw_runs(runs, tmp_path / "new" / "figure.png", title="a title")
    image = cv2.imread(str(path))[..., ::-1] / 255
    assert min(image.shape[:2]) > 600
    for colour in figures._COLOURS[:2]:
        drawn = np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
        height, width = np.nonzero(drawn)
        assert len(height) > 1000
        # Curves in all four panels, so both halves of the picture hold the colour.
        for along, size in ((height, image.shape[0]), (width, image.shape[1])):
            assert (along < size / 2).any()
            assert (along > size / 2).any()


def test_vector_formats_keep_the_words(runs, tmp_path):
    runs |= {f"run {i}": runs["sgd"] for i in range(7)}  # more than there are colours
    path = figures.draw_runs(runs, tmp_path / "figure.svg", title="resnet8, batch 64")
    text = path.read_text()
    words = ["training loss (nats)", "test accuracy", "training time (s)", "resnet8"]
    for word in [*words, "sgd, 80.0% at the end", "kfac, 84.0% at the end", "run 6"]:
        assert word in text


def test_nothing_to_draw_is_refused(runs, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"'new' must have a train loss in .*empty"):
        figures.draw_runs({**runs, "new": empty}, tmp_path / "figure.png", title="")
