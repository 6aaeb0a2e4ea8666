"""Runs that are killed or told to stop go on as if nothing had happened."""

import random
import signal
import time

import numpy as np
import pytest

from experiments import cluster
from tests.experiments.real_runs import ALL_AT_ONCE, Place, until


def kill(process, when, log):
    """Kills a run when a condition holds."""
    until(when, process, log)
    process.kill()
    process.wait()


def in_a_write(place, name):
    """Carries the run on and kills it while a checkpoint is being written."""
    checkpoints = place.root / name / "checkpoints"
    before, process = time.time(), place.start(name)

    def writing():
        try:
            return any(p.stat().st_mtime > before for p in checkpoints.glob("*tmp*"))
        except FileNotFoundError:
            return False

    kill(process, writing, lambda: place.log(name))


def at_random(place, name, rng):
    """Carries the run on and kills it some steps and some time later."""
    before, process = place.times(name), place.start(name)
    steps, delay = rng.randrange(1, 15), rng.uniform(0, 0.1)

    def far_enough():
        return len(place.times(name) - before) >= steps and not time.sleep(delay)

    kill(process, far_enough, lambda: place.log(name))


def assert_same(place, name):
    assert place.losses(name) == place.losses("undisturbed")
    for one, other in zip(place.state(name), place.state("undisturbed"), strict=True):
        np.testing.assert_array_equal(one, other)


def stop(place, name, process, at):
    """Tells a run to stop once it has done some steps; returns how many."""
    until(lambda: at in place.steps(name), process, lambda: place.log(name))
    process.send_signal(signal.SIGTERM)
    place.expect({cluster.ExitCode.PREEMPTED}, name, [process])
    assert "start again with --resume" in place.log(name)
    done = place.steps(name)[-1]
    assert (place.root / name / "checkpoints" / str(done)).is_dir()
    return done


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_and_then_told_to_stop(tmp_path):
    place = Place(tmp_path, epochs=3)
    place.finish("undisturbed")
    assert place.steps("undisturbed") == list(range(1, 25))
    in_a_write(place, "disturbed")
    assert 7 <= stop(place, "disturbed", place.start("disturbed"), at=7) < 24
    place.finish("disturbed")
    assert_same(place, "disturbed")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, ALL_AT_ONCE], ids=["K-FAC", "all at once"])
def test_a_run_that_is_killed_ten_times(tmp_path, settings):
    """Five times in the middle of writing a checkpoint, five times at any moment."""
    place, rng = Place(tmp_path, epochs=30, **settings), random.Random(0)
    place.finish("undisturbed")
    for number in range(10):
        if number % 2:
            in_a_write(place, "disturbed")
        else:
            at_random(place, "disturbed", rng)
    assert place.steps("disturbed")[-1] < 240, "it was to be killed before its end"
    stop(place, "disturbed", place.start("disturbed"), at=200)
    place.finish("disturbed")
    assert_same(place, "disturbed")
