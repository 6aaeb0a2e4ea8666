"""Two processes of two devices do what one process of four does.

Whatever happens, the tests end by themselves and leave no process behind.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.problems import assert_close
from tests.process_worker import DEVICES, RUNS, file_of

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600.0  # seconds; a few times what a busy machine needs
GRACE = 15.0  # for the others to end by themselves once one has failed
# Gloo adds up the processes' numbers in another order than one process does: float32's
# 6e-8, which six steps made 2.4e-7 where this was written.  A gradient or statistic of
# one process alone would make it 1e-2 and more.
ROUNDING = 1e-5


class RunError(Exception):
    """Processes did not all end well in time; tells how each ended and what it said."""


def run_together(commands, folder, *, timeout, grace=GRACE, env=None):
    """Runs commands side by side to their ends, or stops them all.

    Raises ``RunError`` unless all of them end with 0 before the timeout; once one ends
    otherwise the rest have ``grace`` seconds.  On return none of them runs, nor does
    anything that they started.
    """
    logs = [folder / f"log{number}.txt" for number in range(len(commands))]
    running, stopped = [], set()
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline, failing = time.monotonic() + timeout, False
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            if not failing and any(p.poll() for p in running):
                failing, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
    finally:
        for number, process in enumerate(running):
            if process.poll() is None:
                stopped.add(number)
            # Nothing of the group may be left; macOS says "not permitted" then.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if stopped or any(p.returncode for p in running):
        ends = [
            f"--- process {number} "
            + (
                "was stopped by the test"
                if number in stopped
                else f"ended with {process.returncode}"
            )
            + f":\n{log.read_text(errors='replace')[-4000:]}"
            for number, (process, log) in enumerate(zip(running, logs, strict=True))
        ]
        raise RunError("\n".join(ends))


def workers(processes, folder, *options):
    """The commands of a run on so many processes, and their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [
        [
            *(sys.executable, "-m", "tests.process_worker"),
            *(f"--port={port}", f"--processes={processes}", f"--process={number}"),
            # Before the test stops it, so that it can say where it was.
            *(f"--seconds={TIMEOUT - GRACE}", f"--out={folder}", *options),
        ]
        for number in range(processes)
    ]
    # No proxy stands between processes of one machine, and gRPC would ask one.
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    # Compiling takes nearly all the time.
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return commands, env


def test_two_processes_do_what_one_does(tmp_path):
    # One after the other they would leave a second core idle.
    one, env = workers(1, tmp_path)
    two, _ = workers(2, tmp_path)
    run_together([*one, *two], tmp_path, timeout=TIMEOUT, env=env)

    def found(name, processes, process):
        with np.load(tmp_path / file_of(name, processes, process)) as arrays:
            return dict(arrays)

    for name in RUNS:
        expected = found(name, 1, 0)
        processes = [found(name, 2, number) for number in range(2)]
        for actual in processes:
            # The decisions first: were one to differ, so would all that follows.
            np.testing.assert_array_equal(actual.pop("due"), expected["due"])
            assert_close(actual.pop("metrics"), expected["metrics"], ROUNDING, ROUNDING)
        if name.startswith("SP-NGD"):
            assert expected["due"][0].all()
            assert 0 < expected["due"][-1].mean() < 1
        assert len(processes[0]) == 8  # kernels, scales and biases
        for path in processes[0]:
            held = np.concatenate([actual[path] for actual in processes])
            assert len(held) == DEVICES
            assert_close(held[0], expected[path][0], ROUNDING, ROUNDING)
            # Every device has the very same numbers, or they would drift apart.
            np.testing.assert_array_equal(held, np.broadcast_to(held[0], held.shape))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(tmp_path):
    """The other waits for it in a collective until its heartbeats are missed."""
    name = next(iter(RUNS))
    options = (f"--runs={name}", "--die-at=1", "--heartbeat=5")
    commands, env = workers(2, tmp_path, *options)
    begin = time.monotonic()
    with pytest.raises(RunError) as failure:
        run_together(commands, tmp_path, timeout=TIMEOUT, env=env)
    assert time.monotonic() - begin < TIMEOUT / 2
    report = str(failure.value)
    # On its own, by SIGABRT from jax's client, or by us; but never as if all were well.
    assert re.search("process 0 (was stopped|ended with -?[1-9])", report)
    assert "process 1 ended with -9" in report
    assert "step 1" in report


# ------------------------------------------------------------------ the runner itself

HANG = "import time; print('waiting', flush=True); time.sleep(1000)"
# Leaves a child behind that holds a lock.
PARENT = f"""
import fcntl, subprocess, sys
lock = open({{path!r}}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen([sys.executable, "-c", {HANG!r}], pass_fds=[lock.fileno()])
"""


def python(*programs):
    return [[sys.executable, "-S", "-c", program] for program in programs]


def test_runs_that_end_well(tmp_path):
    run_together(python("print(1)", "print(2)"), tmp_path, timeout=60)
    assert (tmp_path / "log1.txt").read_text() == "2\n"


@pytest.mark.parametrize(
    ("other", "seconds", "says"),
    [
        ("print('fine')", (3, 15), "1 ended with 0:\nfine"),
        ("raise SystemExit('no luck')", (600, 1), "1 ended with 1:\nno luck"),
    ],
    ids=["too late", "another has failed"],
)
def test_a_run_that_hangs_is_stopped(tmp_path, other, seconds, says):
    programs, begin = python(HANG, other), time.monotonic()
    with pytest.raises(RunError) as failure:
        run_together(programs, tmp_path, timeout=seconds[0], grace=seconds[1])
    assert "0 was stopped by the test:\nwaiting" in str(failure.value)
    assert says in str(failure.value)
    assert time.monotonic() - begin < 60


def test_what_a_process_started_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    run_together(python(PARENT.format(path=str(path))), tmp_path, timeout=60)
    with path.open() as lock:
        for _ in range(100):
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
    pytest.fail("the child still holds its lock")
