"""Tasks in several processes: results, errors, and an end when the parent ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import tasks

ABANDONED = """
import os, sys, time
from experiments import tasks

def main():
    for _, pid in tasks.completed(os.getpid, [()] * 2, workers=2):
        print(pid, flush=True)
    for _ in tasks.completed(time.sleep, [(0.0,), (600.0,), (600.0,)], workers=2):
        print("one is done", flush=True)

if __name__ == "__main__":
    main()
"""


def test_one_process():
    # Lazily: what has been yielded is done, the rest has not begun.
    done = tasks.completed(int, [("1",), ("x",)], workers=1)
    assert next(done) == (("1",), 1)
    with pytest.raises(ValueError, match="invalid literal"):
        next(done)
    assert list(tasks.completed(int, [], workers=3)) == []


def test_several_processes():
    arguments = [(2, n) for n in range(20)]
    done = dict(tasks.completed(pow, arguments, workers=2))
    assert done == {(2, n): 2**n for n in range(20)}
    with pytest.raises(ValueError, match="invalid literal"):
        list(tasks.completed(int, [("1",), ("x",), ("2",)], workers=2))


def children(pid):
    """Process ids of what a process has started, from Linux's list of processes."""
    found = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_workers_end_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        while "one is done" not in parent.stdout.readline():
            assert parent.poll() is None
        workers = children(parent.pid)
        assert len(workers) >= 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    with tasks.Progress("train", 4_000, 1_000, "images") as progress:
        for now[0], count in [(1.0, 500), (40.0, 500), (50.0, 500), (60.0, 1_500)]:
            progress.update(count)
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "train: 2,000 of 4,000 images",  # at 40 s
        "train: 4,000 of 4,000 images",  # at the end
    ]
    assert output.err == ""
