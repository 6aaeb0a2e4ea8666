"""Files that grow by whole records, on disks that fail and come back."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import append_only, metrics


class Disk:
    """`os.pwrite` and `os.ftruncate` of a disk with so many bytes left."""

    def __init__(self, monkeypatch):
        self.room, self.cuts = 10**9, True
        self._write, self._cut = os.pwrite, os.ftruncate
        monkeypatch.setattr(append_only.os, "pwrite", self.pwrite)
        monkeypatch.setattr(append_only.os, "ftruncate", self.ftruncate)

    def pwrite(self, file, data, offset):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self._write(file, data[: self.room], offset)
        self.room -= done
        return done

    def ftruncate(self, file, size):
        if not self.cuts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._cut(file, size)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def told():
    return []


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records"


@pytest.fixture
def file(path, told):
    return append_only.AppendOnlyFile(path, told.append)


def test_records_are_there_at_once_and_in_their_order(file, path, told):
    for record in (b"one\n", b"two\n"):
        file.append(record)
        assert path.read_bytes().endswith(record)
    file.close()
    again = append_only.AppendOnlyFile(path, told.append)
    again.append(b"three\n")
    again.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert not told


ROOT = pathlib.Path(append_only.__file__).parents[1]

LIMITED = """
import resource, sys
from experiments import append_only

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

file = append_only.AppendOnlyFile(sys.argv[1], print)
for number in range(100):
    if number == 10:
        limit(500)
    if number == 90:
        assert open(sys.argv[1]).read().endswith("|"), "half a record"
        limit(resource.RLIM_INFINITY)
    file.append(b"record %d |" % number)
file.close()
"""


def test_the_system_limits_a_file(tmp_path):
    # Beyond the limit there is a short write, then EFBIG, as ENOSPC on a full disk.
    path = tmp_path / "records"
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert path.read_text() == "".join(f"record {i} |" for i in range(100))
    assert [line.split(";")[0] for line in run.stdout.splitlines()] == [
        "records could not be written (File too large)",
        "records can be written again",
    ]


def test_a_killed_writer_loses_at_most_its_last_record(tmp_path):
    path = tmp_path / "records.jsonl"
    program = f"""
import itertools
from experiments import append_only
file = append_only.AppendOnlyFile({str(path)!r}, print)
for step in itertools.count(1):
    file.append(b'{{"step": %d, "text": "%s"}}\\n' % (step, b"x" * 5000))
"""
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > 200_000:
            break
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    steps = [record["step"] for record in metrics.read_json_lines(path)]
    assert len(steps) >= 30
    assert steps == list(range(1, len(steps) + 1))


def test_a_short_write_is_finished(file, path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(
        append_only.os, "pwrite", lambda f, data, at: write(f, data[:2], at)
    )
    file.append(b"a long record\n")
    file.close()
    assert path.read_bytes() == b"a long record\n"


def test_a_full_disk_is_told_once_and_nothing_is_lost(disk, file, path, told):
    file.append(b"one\n")
    disk.room = 6
    for record in (b"two\n", b"three\n", b"four\n"):
        file.append(record)
        assert path.read_bytes() == b"one\ntwo\n", "no part of a record stays"
    assert told == [
        "records could not be written (No space left on device); 1 record is kept in "
        "memory and tried again, with those to come"
    ]
    disk.room = 100
    file.append(b"five\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"
    assert told[1:] == ["records can be written again; 3 records are written"]


def test_what_could_not_be_cut_off_is_before_the_next_record(disk, file, path, told):
    disk.room, disk.cuts = 3, False
    file.append(b"a long record\n")
    file.append(b"b\n")
    assert path.read_bytes() == b"a l"
    disk.room, disk.cuts = 100, True
    file.append(b"c\n")
    file.close()
    assert path.read_bytes() == b"a long record\nb\nc\n"
    assert len(told) == 2


def test_each_failure_is_told(disk, file, told):
    for room in (0, 100, 0, 100):
        disk.room = room
        file.append(b"record\n")
    file.close()
    assert [("could not" in message) for message in told] == [True, False] * 2


def test_the_end_tries_once_more(disk, file, path, told):
    disk.room = 0
    file.append(b"one\n")
    disk.room = 100
    file.close()
    assert path.read_bytes() == b"one\n"
    assert "again" in told[-1]


def test_what_is_lost_at_the_end_is_told(disk, file, path, told):
    disk.room = 0
    file.append(b"one\n")
    file.append(b"two\n")
    file.close()
    assert path.read_bytes() == b""
    assert told[-1] == (
        "records could not be written (No space left on device); 2 records are lost"
    )


def test_a_message_may_append_itself(disk, path):
    def tell(message):
        file.append(message.encode() + b"\n")

    file = append_only.AppendOnlyFile(path, tell)
    disk.room = 0
    file.append(b"one\n")
    disk.room = 1000
    file.append(b"two\n")
    file.close()
    lines = path.read_text().splitlines()
    assert lines[0] == "one"
    assert "could not be written" in lines[1]
    assert lines[2] == "two"
    assert "can be written again" in lines[3]
