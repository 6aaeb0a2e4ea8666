"""Worker processes: the stream of the threads, errors, and an end with the parent."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.data import decoding, pipeline, splits

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {"batch_size": 32, "seed": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def split(data_dir):
    return splits.open_split("strokes/tiny", "train", data_dir, memory_limit=0)


@pytest.mark.slow
def test_workers_give_the_stream_of_the_threads_and_resume(split):
    threads = pipeline.TrainingBatches(split, **SETTINGS)
    workers = pipeline.TrainingBatches(split, num_workers=2, **SETTINGS)
    try:
        for taken in (0, 7):
            workers.set_state(taken)
            threads.set_state(taken)
            for _ in range(5):
                batch, expected = next(workers), next(threads)
                assert batch.keys() == expected.keys()
                for key in batch:
                    np.testing.assert_array_equal(batch[key], expected[key])
            assert workers.get_state() == taken + 5
    finally:
        workers.close()


@pytest.mark.slow
def test_a_worker_s_error_comes_soon_and_in_its_place(split, data_dir):
    (shard,) = split.origin.shards
    content = pathlib.Path(shard.path).read_bytes()
    try:
        with open(shard.path, "r+b") as file:
            file.seek(len(content) // 2)
            file.write(bytes(3000))
        states = []
        for workers in (0, 2):
            batches = pipeline.TrainingBatches(split, num_workers=workers, **SETTINGS)
            start = time.monotonic()
            with pytest.raises(decoding.RecordError, match=r"strokes/tiny.*--verify"):
                list(itertools.islice(batches, 9))
            assert time.monotonic() - start < 300
            states.append(batches.get_state())
        assert states[0] == states[1]
    finally:
        pathlib.Path(shard.path).write_bytes(content)


STREAM = """
import sys
import multiprocessing
from experiments.data import pipeline, splits

split = splits.open_split("strokes/tiny", "train", sys.argv[1], memory_limit=0)
batches = pipeline.TrainingBatches(split, batch_size=32, seed=1, num_workers=2)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


def started(data_dir, rest=""):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STREAM + rest, str(data_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(done, seconds):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_workers_die_with_a_parent_that_is_killed(split, data_dir):
    del split  # only made
    parent = started(data_dir, "input()")
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    assert all(map(is_running, children))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: not any(map(is_running, children)), 60)


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["", "batches.close()"])
def test_a_program_ends_without_a_word_closed_or_not(split, data_dir, rest):
    del split
    parent = started(data_dir, rest)
    printed, errors = parent.communicate(timeout=600)
    assert parent.returncode == 0
    assert errors == ""
    assert not any(is_running(int(pid)) for pid in printed.split())
