"""The benchmark of the input pipeline, on a few photographs."""

import numpy as np
import pytest

from benchmarks import input_pipeline
from experiments.data import decoding

PARTS = ["decode", "decode and crop", "+ read", "+ normalise and batch"]


def test_photographs_are_as_large_as_imagenet_s():
    random = np.random.default_rng(1)
    files = [input_pipeline.photograph(random) for _ in range(6)]
    assert 80e3 < np.mean([len(file) for file in files]) < 150e3
    for file in files:
        height, width, channels = decoding.decode(file).shape
        assert 330 <= height <= 460
        assert 400 <= width <= 560
        assert channels == 3


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_stage_has_its_turns(run_command, workers):
    sizes = input_pipeline.Sizes(1, 16, jpegs=2, records=32, workers=workers)
    record = run_command(input_pipeline.main, "--rounds", "1", sizes=sizes)
    names = [*PARTS, input_pipeline.THREADS, *[input_pipeline.WORKERS][:workers]]
    cores = {turn["cores"] for turn in record["turns"]}
    assert cores in ({1}, {1, 2})
    assert len(record["turns"]) == len(names) * len(cores)
    entries = input_pipeline.summary(record)
    assert [entry["name"] for entry in entries] == names
    assert entries[1]["share"].median == 1
    assert all(entry["rate"].median > 0 for entry in entries)
    text = input_pipeline.table(record)
    for name in names:
        assert text.count(f"{name}  ") >= 1
