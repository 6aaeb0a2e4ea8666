"""The benchmark of the input pipeline, whole, on a few photographs.

Nothing is asserted of the rates themselves.
"""

import json

import numpy as np
import pytest

from benchmarks import input_pipeline
from experiments.data import decoding

SIZES = {"rounds": 1, "batches": 1, "batch": 16, "jpegs": 2, "records": 32}
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


def run(path, *arguments):
    for name, value in SIZES.items():
        arguments += (f"--{name}", str(value))
    record = input_pipeline.main([*arguments, "--output", str(path)])
    assert json.loads(path.read_text("utf-8")) == record
    return record


def check(record, names):
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


def test_every_stage_has_its_turns(tmp_path):
    record = run(tmp_path / "record.json", "--workers", "0")
    check(record, [*PARTS, input_pipeline.THREADS])


@pytest.mark.slow
def test_workers_take_part(tmp_path):
    record = run(tmp_path / "record.json", "--workers", "1")
    check(record, [*PARTS, input_pipeline.THREADS, input_pipeline.WORKERS])


def test_batches_must_fill_groups(capsys):
    with pytest.raises(SystemExit):
        input_pipeline.main(["--batch", "9", "--batches", "3"])
    assert "multiple of 16, not 27" in capsys.readouterr().err
