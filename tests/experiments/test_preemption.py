"""SIGTERM asks a single process to save and stop; several are in test_launch.py."""

import os
import signal

import jax

from experiments import preemption


def test_sigterm_asks_to_stop():
    assert not jax.distributed.is_initialized()
    came = []
    outer = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with preemption.Preemption() as preempted:
            assert not preempted.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preempted.requested(2)
            # A second one, as at a time limit, does not end the process while it saves.
            os.kill(os.getpid(), signal.SIGTERM)
            assert preempted.requested(3)
        assert came == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, outer)
