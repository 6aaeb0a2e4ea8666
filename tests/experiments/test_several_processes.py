"""Several real processes train as one does, and one goes on where several stopped."""

import signal

import numpy as np
import pytest

from experiments import cluster
from tests.experiments.real_runs import ALL_AT_ONCE, Place, until

# Gloo and other numbers of devices add up in another order than one process does:
# float32's 6e-8 of a loss near 1, which grows by the inverses of some thirty steps.
# Other images, or other random numbers, would make it 1e-2 and more.
ROUNDING = 2e-4


def assert_close(place, name, other):
    ours, theirs = place.losses(name), place.losses(other)
    assert [(r["kind"], r["step"]) for r in ours] == [
        (r["kind"], r["step"]) for r in theirs
    ]
    for key in ("loss", "accuracy"):
        np.testing.assert_allclose(
            [r[key] for r in ours], [r[key] for r in theirs], atol=ROUNDING, rtol=0
        )


@pytest.mark.slow  # test_processes has two processes in the ordinary run
def test_two_processes_and_one_with_other_devices_carry_on_one_run(tmp_path):
    """Two processes with four devices, told to stop; then one process with two."""
    place = Place(tmp_path, epochs=2, micro_batch_size=8, placement="memory")
    place.finish("undisturbed", devices=4)
    running = place.start_several("ours", 2, devices=4)
    until(lambda: 5 in place.steps("ours"), running[0], lambda: place.log("ours"))
    running[1].send_signal(signal.SIGTERM)  # and not the one that writes
    place.expect({cluster.ExitCode.PREEMPTED}, "ours", running)
    done = place.steps("ours")[-1]
    assert 5 <= done < 16
    place.finish("ours", devices=2, placement="comm")
    assert "goes on with 2 devices instead of 4" in place.log("ours")
    assert_close(place, "ours", "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, ALL_AT_ONCE], ids=["K-FAC", "all at once"])
def test_two_and_four_processes_do_what_one_does(tmp_path, settings):
    place = Place(tmp_path, epochs=3, **settings)
    settings = {"devices": 4, "micro_batch_size": 4}  # two micro-batches on each
    for name, processes in (("undisturbed", 1), ("two", 2), ("four", 4)):
        place.finish(name, processes, **settings)
    assert_close(place, "two", "undisturbed")
    assert_close(place, "four", "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_and_the_job_goes_on(tmp_path, victim):
    place = Place(tmp_path, epochs=3, devices=4, micro_batch_size=8)
    place.finish("undisturbed")
    running = place.start_several("ours", 2, heartbeat_timeout=20)
    until(lambda: 6 in place.steps("ours"), running[0], lambda: place.log("ours"))
    running[victim].kill()
    running[victim].wait()
    other = running[1 - victim]
    # By Gloo's error, or by jax's abort: of process 0 at once, of another one after
    # the heartbeats, where the checkpoint took the error and the next step waits.
    ends = {cluster.ExitCode.UNAVAILABLE, -signal.SIGABRT}
    place.expect(ends, "ours", [other], timeout=60)
    if other.returncode == cluster.ExitCode.UNAVAILABLE:
        assert "lost contact with another process" in place.log("ours")
        assert "start again with --resume" in place.log("ours")
    else:
        assert "most likely indicates that another task died" in place.log("ours")
    place.finish("ours", 2)
    assert_close(place, "ours", "undisturbed")
