"""What a run leaves behind, also when it dies, and what it shows."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import memory_use, metrics
from tests.test_processes import ROOT

SAME = {"loss": 1.0, "accuracy": 0.5}


class Terminal(io.StringIO):
    """A stream that a progress bar takes for a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Spends seconds of the process."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def reporter(directory, **options):
    usual = {"total_steps": 10, "batch_size": 64, "steps_per_epoch": 5, **options}
    return metrics.Reporter(directory, name="kfac", **usual)


def report(directory, steps, **options):
    with reporter(directory, **options) as run:
        for step in steps:
            run.train(step, [{"loss": jnp.float32(1 / step), "accuracy": 0.5}])
            if step % 5 == 0:
                with run.phase("evaluate"):
                    run.test(step, {"loss": 0.25, "accuracy": 0.75})


def records(directory, *kinds):
    found = metrics.read_json_lines(directory / "metrics.jsonl")
    return [record for record in found if not kinds or record["kind"] in kinds]


def read_scalars(directory):
    """The scalars of a TensorBoard file, read as its framing of records demands."""
    (path,) = (directory / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while len(data) > 12:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
        data = data[12 + length + 4 :]
    return scalars


# === The files ========================================================================


def test_every_record_says_what_and_when(tmp_path):
    report(tmp_path, range(1, 6))
    found = records(tmp_path)
    assert [r["kind"] for r in found] == ["train"] * 5 + ["test"]
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 5]
    assert found[1]["loss"] == 0.5
    assert found[-1]["accuracy"] == 0.75
    seconds = [r["seconds"] for r in found]
    assert seconds == sorted(seconds)
    scalars = read_scalars(tmp_path)
    for record in found:
        tag = (f"{record['kind']}/loss", record["step"])
        assert scalars[tag] == pytest.approx(record["loss"])


def test_tensorboard_is_up_to_date_at_each_evaluation(tmp_path):
    with reporter(tmp_path) as run:
        run.train(1, [SAME])
        run.test(1, SAME)
        assert read_scalars(tmp_path).keys() >= {("train/loss", 1), ("test/loss", 1)}


def test_numbers_that_are_not_finite_become_null_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    lines = metrics.JsonLines(path, last_step=5, tell=pytest.fail)
    lines.write({"step": 2, "a": float("nan"), "b": -float("inf"), "c": "x", "d": 0.5})
    assert lines.close() == 0
    last = {"step": 2, "a": None, "b": None, "c": "x", "d": 0.5}
    assert metrics.read_json_lines(path) == [{"step": 1}, last]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step":\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2=.* must be JSON"):
        metrics.read_json_lines(path)


def test_a_killed_writer_loses_at_most_its_last_record(tmp_path):
    path = tmp_path / "records.jsonl"
    program = f"""
import itertools
from experiments import metrics
file = metrics.JsonLines({str(path)!r}, last_step=0, tell=print)
for step in itertools.count(1):
    file.write({{"step": step, "text": "x" * 5000}})
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


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    report(tmp_path, range(1, 9))
    before = records(tmp_path)
    report(tmp_path, range(6, 11), start_step=5)
    found = records(tmp_path)
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 11))
    events = [(r["step"], r["message"]) for r in records(tmp_path, "event")]
    assert events == [(5, "resumed at step 5")]
    assert found[:6] == before[:6]
    seconds = [r["seconds"] for r in found]
    assert seconds == sorted(seconds), "the clock goes on where it stopped"
    newest = max((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime)
    data = newest.read_bytes()
    data = data[12 + int.from_bytes(data[:8], "little") + 4 :]  # after the version
    event = event_pb2.Event.FromString(
        data[12 : 12 + int.from_bytes(data[:8], "little")]
    )
    assert (event.step, event.session_log.status) == (6, event_pb2.SessionLog.START)


def test_events_are_told_and_stay(tmp_path, capsys):
    def run():
        with reporter(tmp_path, steps_per_epoch=3) as run:
            run.train(1, [SAME])
            run.event("the checkpoint was skipped", 3)
            raise KeyError("x")

    with pytest.raises(KeyError):
        run()
    told = capsys.readouterr().err
    assert "kfac  step 3/10  the checkpoint was skipped\n" in told
    report(tmp_path, [])  # another run, which does not inherit the record of step 1
    found = [
        (r["kind"], r["step"], r["epoch"], r["message"]) for r in records(tmp_path)
    ]
    assert found == [
        ("event", 3, 1, "the checkpoint was skipped"),
        ("event", 1, 0.333333, "stopped by KeyError: 'x'"),
    ]


def test_only_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    report(tmp_path / "run", range(3, 6), start_step=2, writes=False)
    assert not (tmp_path / "run").exists()
    assert sys.stderr.getvalue() == ""


# === A disk that is full ==============================================================


@pytest.fixture
def room():
    """Limits the size of each file that this process writes; None: no limit.

    Beyond the limit the system writes a part, then fails, as a full disk does.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def test_a_run_on_a_full_disk_goes_on_and_loses_nothing(tmp_path, room, capsys):
    path = tmp_path / "metrics.jsonl"
    with reporter(tmp_path, total_steps=60) as run:
        for step in range(1, 61):
            if step == 20:
                whole = path.stat().st_size
                room(whole + 100)
                run.test(20, SAME)  # writes what TensorBoard's file has buffered
            if step == 50:
                assert path.stat().st_size == whole + 100
                assert len(records(tmp_path, "train")) == 19, "as long as it is full"
                room(None)
            run.train(step, [SAME])
        run.test(60, SAME)
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 61))
    told = capsys.readouterr().err
    events = [r["message"] for r in records(tmp_path, "event")]
    assert events == [
        "metrics.jsonl cannot be written (File too large); its lines wait in memory "
        "until it can",
        "tensorboard/ cannot be written (File too large) and ends here; metrics.jsonl "
        "goes on",
        "metrics.jsonl can be written again; no line is lost",
    ]
    assert all(told.count(message) == 1 for message in events)
    shown = {step for tag, step in read_scalars(tmp_path) if tag == "train/loss"}
    assert shown == set(range(1, max(shown) + 1)), "whole up to its end"


def test_the_end_tries_once_more_and_tells_what_is_lost(tmp_path, room, capsys):
    with reporter(tmp_path) as run:
        for message in ("one", "three"):
            room(0)
            run.event(message)
            room(None)
            if message == "one":
                run.event("two")
    told = [r["message"].removeprefix("metrics.jsonl ")[:6] for r in records(tmp_path)]
    assert told == ["one", "cannot", "two", "can be", "three", "cannot", "can be"]
    with reporter(tmp_path, start_step=1) as run:
        room(0)
        run.event("four")
    assert capsys.readouterr().err.endswith("kfac  3 lines of metrics.jsonl are lost\n")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    report(tmp_path, range(1, 11))
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 11))


# === What is shown ====================================================================


def test_a_log_gets_one_plain_line_an_epoch(tmp_path, capsys):
    report(tmp_path, range(1, 11))
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert len(lines) == 2
    assert "\r" not in shown
    assert lines[1].startswith("kfac  epoch 2/2  step 10/10  train loss 0.129")
    assert "test loss 0.250 accuracy 75.0%" in lines[1]
    assert "images/s" in lines[1]


def test_a_terminal_gets_a_bar_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    report(tmp_path, range(1, 11))
    shown = sys.stderr.getvalue()
    assert "nan" not in shown
    parts = "compiling", "loss 0.1", "accuracy 50.0%", "images/s", "10/10", "epoch 1/2"
    assert all(part in shown for part in parts)


# === Times ============================================================================


def test_every_second_is_in_one_phase(clock):
    run = metrics.Clock({"step": 5.0})
    clock(1)
    with run.phase("input"):
        clock(2)
    with run.phase("evaluate"):
        clock(4)
        with run.phase("report"):
            clock(8)
            assert run.seconds()["report"] == 8, "also while it lasts"
        clock(16)

    def fail():
        with run.phase("step"):
            clock(32)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock(64)
    expected = dict.fromkeys(metrics.PHASES, 0.0)
    expected |= {"other": 65, "input": 2, "evaluate": 20, "report": 8, "step": 37}
    assert run.seconds() == expected
    assert run.training() == 65 + 2 + 8 + 37


def test_records_tell_where_the_time_went(tmp_path, clock, capsys):
    with reporter(tmp_path) as run:
        for step in (1, 2):
            for phase, seconds in (("input", 1), ("step", 50 if step == 1 else 2)):
                with run.phase(phase):
                    clock(seconds)
            run.train(step, [SAME])
            for phase, seconds in (("evaluate", 4), ("checkpoint", 8)):
                with run.phase(phase):
                    clock(seconds)
        run.test(2, SAME)
    last = records(tmp_path)[-1]
    expected = {"compile": 50, "input": 2, "step": 2, "evaluate": 8, "checkpoint": 16}
    spent = {name: last[f"{name}_seconds"] for name in metrics.PHASES}
    assert spent == {**dict.fromkeys(metrics.PHASES, 0), **expected}
    assert last["seconds"] == 54, "without pauses"
    assert "  21 images/s  0:00:54" in capsys.readouterr().err, "64 in 3 s, compiled"
    # A process that goes on compiles anew, and adds to the sums.
    with reporter(tmp_path, start_step=2) as run:
        with run.phase("step"):
            clock(30)
        run.train(3, [SAME])
    last = records(tmp_path)[-1]
    assert (last["compile_seconds"], last["checkpoint_seconds"]) == (80, 16)
    assert last["seconds"] == 84


def test_records_of_several_steps(tmp_path, clock, capsys):
    with reporter(tmp_path, batch_size=100, steps_per_epoch=10) as run:
        for step in (4, 8):
            clock(16)
            of_steps = [
                {"loss": loss, "accuracy": 0.5, "skipped": loss, "inverse_age_max": 9}
                for loss in jnp.arange(step - 4.0, step)
            ]
            run.train(step, of_steps)
        run.test(8, SAME)
    first, second = records(tmp_path, "train")
    assert (first["loss"], second["loss"]) == (1.5, 5.5), "the mean of their steps"
    assert (first["skipped"], second["skipped"]) == (3, 7), "of counters the last"
    assert first["inverse_age_max"] == 9
    assert "images_per_second" not in first, "it was compiled"
    assert second["images_per_second"] == 25.0
    assert second["epoch"] == 0.8
    assert "train loss 3.500" in capsys.readouterr().err


def test_the_first_layer_that_is_not_finite_is_told_and_recorded(tmp_path, capsys):
    found = [  # position, skipped
        *((-1, 0), (2, 1), (2, 2)),  # one message for steps in a row
        *((-1, 2), (-1, 3), (-1, 3)),  # a loss that is not finite by itself
        *((1, 3), (0, 3)),  # a statistic that was rejected in a sound step
    ]
    of_steps = [
        SAME | {"first_not_finite": first, "skipped": skipped}
        for first, skipped in found
    ]
    with reporter(tmp_path, layers=("stem", "body", "head")) as run:
        for i in (0, 3, 6):
            run.train(i + len(of_steps[i : i + 3]), of_steps[i : i + 3])
        run.test(8, SAME)
    train = records(tmp_path, "train")
    assert [r["first_not_finite"] for r in train] == [2, -1, 1]
    assert [r.get("layer_not_finite") for r in train] == ["head", None, "body"]
    assert "train/layer_not_finite" not in read_scalars(tmp_path)
    told = [(r["step"], r["message"]) for r in records(tmp_path, "event")]
    assert told == [
        (2, "numbers that are not finite in layer head; the step is skipped"),
        (5, "numbers that are not finite in the loss or a gradient; the step is "
            "skipped"),
        (7, "numbers that are not finite in layer body"),
    ]  # fmt: skip
    assert told[0][1] in capsys.readouterr().err


def test_steps_skipped_before_a_run_resumed_are_not_told_again(tmp_path):
    with reporter(tmp_path, start_step=4) as run:
        run.train(5, [SAME | {"skipped": 2}])
        run.train(6, [SAME | {"skipped": 3}])
    steps = [r["step"] for r in records(tmp_path, "event") if "finite" in r["message"]]
    assert steps == [6]


def test_a_step_lasts_until_its_metrics_are_read(tmp_path, clock):
    class Slow:
        """A number that the device has after three seconds."""

        def __array__(self, dtype=None, copy=None):
            clock(3)
            return np.float32(1.0).__array__(dtype)

        def __float__(self):
            return float(self.__array__())

    with reporter(tmp_path) as run:
        run.train(1, [{"loss": Slow(), "accuracy": 0.0}])
    assert records(tmp_path)[0]["step_seconds"] >= 3


def test_memory(tmp_path, monkeypatch):
    class Device:
        def __init__(self, **stats):
            self.memory_stats = lambda: stats or None

    report(tmp_path, [1])
    (record,) = records(tmp_path)
    assert 50 * 2**20 < record["host_memory_bytes"] < 2**40  # numpy and jax are in it
    assert "device_memory_bytes" not in record, "a CPU's is the host's"
    devices = [Device(bytes_in_use=1, peak_bytes_in_use=n) for n in (3, 9, 5)]
    monkeypatch.setattr(memory_use.jax, "local_devices", lambda: [*devices, Device()])
    report(tmp_path, [1])
    assert records(tmp_path)[0]["device_memory_bytes"] == 9
