"""Runs that are killed or told to stop go on as if nothing had happened."""

import random
import signal
import time

import numpy as np
import pytest

from experiments import cluster
from tests.experiments.real_runs import TIMEOUT, Place, until


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("short"), epochs=3)
    place.finish("undisturbed")
    assert place.steps("undisturbed") == list(range(1, 25))
    return place


def in_a_write(place, name, process):
    """Kills a run while a checkpoint is being written."""
    checkpoints = place.root / name / "checkpoints"
    before = time.time()

    def writing():
        try:
            return any(p.stat().st_mtime > before for p in checkpoints.glob("*tmp*"))
        except FileNotFoundError:
            return False

    until(writing, process, lambda: place.log(name))
    process.kill()
    process.wait()


def at_random(place, name, process, before, steps, delay):
    """Kills a run some steps and some time after it went on."""

    def far_enough():
        return len(place.times(name) - before) >= steps

    until(far_enough, process, lambda: place.log(name))
    time.sleep(delay)
    process.kill()
    process.wait()


def assert_same(place, name):
    assert place.losses(name) == place.losses("undisturbed")
    for one, other in zip(place.state(name), place.state("undisturbed"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_is_killed_twice(short):
    """Once in the middle of writing a checkpoint, once at any other time."""
    in_a_write(short, "killed", short.start("killed"))
    before = short.times("killed")
    at_random(short, "killed", short.start("killed"), before, steps=3, delay=0.01)
    short.finish("killed")
    assert_same(short, "killed")


def test_a_run_that_is_told_to_stop(short):
    process = short.start("stopped")
    until(lambda: 5 in short.steps("stopped"), process, lambda: short.log("stopped"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == cluster.ExitCode.PREEMPTED, short.log("stopped")
    assert "start again with --resume" in short.log("stopped")
    done = short.steps("stopped")[-1]
    assert 5 <= done < 24
    assert (short.root / "stopped" / "checkpoints" / str(done)).is_dir()
    short.finish("stopped")
    assert_same(short, "stopped")


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times(tmp_path):
    place, rng = Place(tmp_path, epochs=30), random.Random(0)
    place.finish("undisturbed")
    in_writes = 0
    for number in range(10):
        before, process = place.times("killed"), place.start("killed")
        if number % 2:
            in_a_write(place, "killed", process)
            in_writes += 1
        else:
            steps, delay = rng.randrange(1, 15), rng.uniform(0, 0.1)
            at_random(place, "killed", process, before, steps, delay)
    assert in_writes == 5
    assert len(set(place.steps("killed"))) < 240, "it was to be killed before its end"
    place.finish("killed")
    assert_same(place, "killed")
