"""What a run leaves behind, also when it dies, and what it shows."""

import errno
import io
import json
import math
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import append_only, memory_use, metrics, phases


class Terminal(io.StringIO):
    """A stream that a progress bar takes for a terminal."""

    def isatty(self):
        return True


def report(directory, steps, *, start=0, stream=None, total=10):
    with metrics.Reporter(
        directory,
        name="kfac",
        total_steps=total,
        batch_size=64,
        steps_per_epoch=5,
        start_step=start,
        stream=stream or io.StringIO(),
    ) as reporter:
        for step in steps:
            reporter.train(step, {"loss": jnp.float32(1 / step), "accuracy": 0.5})
            if step % 5 == 0:
                with reporter.phase("evaluate"):
                    reporter.test(step, {"loss": 0.25, "accuracy": 0.75})


def test_every_record_says_what_and_when(tmp_path):
    report(tmp_path, range(1, 6))
    records = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["train"] * 5 + ["test"]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 5]
    assert records[1]["loss"] == 0.5
    assert records[-1]["accuracy"] == 0.75
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_arrays_and_numbers_that_are_not_finite_become_json(tmp_path):
    lines = metrics.JsonLines(tmp_path / "a.jsonl", last_step=0, tell=pytest.fail)
    lines.write({"step": np.int64(1), "a": jnp.float32(0.5), "b": math.nan, "c": "x"})
    lines.write({"step": 2, "a": np.float32(np.inf), "b": True, "c": None})
    lines.close()
    first, second = metrics.read_json_lines(tmp_path / "a.jsonl")
    assert first == {"step": 1, "a": 0.5, "b": None, "c": "x"}
    assert second == {"step": 2, "a": None, "b": True, "c": None}


def test_an_unfinished_line_is_ignored_and_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    assert metrics.read_json_lines(path) == [{"step": 1}]
    lines = metrics.JsonLines(path, last_step=5, tell=pytest.fail)
    lines.write({"step": 2})
    lines.close()
    assert metrics.read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step":\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        metrics.read_json_lines(path)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    report(tmp_path, range(1, 9))
    before = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    report(tmp_path, range(6, 11), start=5)
    records = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    train = [r["step"] for r in records if r["kind"] == "train"]
    assert train == list(range(1, 11))
    events = [(r["step"], r["message"]) for r in records if r["kind"] == "event"]
    assert events == [(5, "resumed at step 5")]
    assert records[:6] == before[:6]
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds), "the clock goes on where it stopped"


def test_a_new_run_does_not_inherit_an_old_one(tmp_path):
    report(tmp_path, range(1, 6))
    report(tmp_path, range(1, 3))
    records = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2]


def test_pauses_do_not_count_as_training(tmp_path):
    with metrics.Reporter(
        tmp_path, name="sgd", total_steps=2, batch_size=1, steps_per_epoch=1,
        stream=io.StringIO(),
    ) as reporter:  # fmt: skip
        for step in (1, 2):
            reporter.train(step, {"loss": 1.0, "accuracy": 0.0})
            with reporter.phase("checkpoint"):
                time.sleep(0.3)
                reporter.test(step, {"loss": 1.0, "accuracy": 0.0})
    seconds = [
        r["seconds"] for r in metrics.read_json_lines(tmp_path / "metrics.jsonl")
    ]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 0.25


def test_a_log_gets_one_plain_line_an_epoch(tmp_path):
    stream = io.StringIO()
    report(tmp_path, range(1, 11), stream=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "\r" not in stream.getvalue()
    assert lines[1].startswith("kfac  epoch 2/2  step 10/10  train loss 0.129")
    assert "test loss 0.250 accuracy 75.0%" in lines[1]
    assert "images/s" in lines[1]


def test_a_terminal_gets_a_bar_as_well(tmp_path):
    stream = Terminal()
    report(tmp_path, range(1, 11), stream=stream)
    shown = stream.getvalue()
    assert "compiling" in shown
    assert "nan" not in shown
    for part in ("loss 0.1", "accuracy 50.0%", "images/s", "step 10/10", "epoch 1/2"):
        assert part in shown


def test_images_per_second_leave_out_compilation(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    with metrics.Reporter(
        tmp_path, name="sgd", total_steps=3, batch_size=100, steps_per_epoch=3,
        stream=stream,
    ) as reporter:  # fmt: skip
        for step, seconds in ((1, 60.0), (2, 2.0), (3, 2.0)):
            now[0] += seconds
            reporter.train(step, {"loss": 1.0, "accuracy": 0.0})
        reporter.test(3, {"loss": 1.0, "accuracy": 0.0})
    assert "  50 images/s  0:01:04" in stream.getvalue()


def timed(tmp_path, monkeypatch, now, **options):
    """A reporter on a clock of the test's."""
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    return metrics.Reporter(
        tmp_path, name="sgd", total_steps=100, batch_size=100, steps_per_epoch=10,
        stream=io.StringIO(), **options,
    )  # fmt: skip


def train_records(directory):
    records = metrics.read_json_lines(directory / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train"]


def test_records_of_several_steps(tmp_path, monkeypatch):
    now = [0.0]
    with timed(tmp_path, monkeypatch, now, devices=4) as reporter:
        for step in (4, 8):
            now[0] += 16.0
            of_steps = [
                {"loss": loss, "accuracy": 0.5, "skipped": loss, "inverse_age_max": 9}
                for loss in jnp.arange(step - 4.0, step)
            ]
            reporter.train(step, of_steps)
        reporter.test(8, {"loss": 1.0, "accuracy": 0.0})
    first, second = train_records(tmp_path)
    assert (first["loss"], second["loss"]) == (1.5, 5.5), "the mean of their steps"
    assert (first["skipped"], second["skipped"]) == (3, 7), "of counters the last"
    assert first["inverse_age_max"] == 9
    assert "images_per_second" not in first, "it was compiled"
    assert second["images_per_second"] == 25.0
    assert second["images_per_second_per_device"] == 6.25
    assert second["epoch"] == 0.8
    assert "train loss 3.500" in reporter._stream.getvalue()


def test_records_tell_where_the_time_went(tmp_path, monkeypatch):
    now = [0.0]
    with timed(tmp_path, monkeypatch, now) as reporter:
        for step in (1, 2):
            with reporter.phase("input"):
                now[0] += 1.0
            with reporter.phase("step"):
                now[0] += 50.0 if step == 1 else 2.0
            reporter.train(step, {"loss": 1.0, "accuracy": 0.0})
            with reporter.phase("evaluate"):
                now[0] += 4.0
            with reporter.phase("checkpoint"):
                now[0] += 8.0
        reporter.test(2, {"loss": 1.0, "accuracy": 0.0})
    last = metrics.read_json_lines(tmp_path / "metrics.jsonl")[-1]
    expected = {"compile": 50, "input": 2, "step": 2, "evaluate": 8, "checkpoint": 16}
    spent = {name: last[f"{name}_seconds"] for name in phases.PHASES}
    assert spent == {**dict.fromkeys(phases.PHASES, 0), **expected}
    assert last["seconds"] == 54
    # A process that goes on compiles anew, and adds to the sums.
    with timed(tmp_path, monkeypatch, now, start_step=2) as reporter:
        with reporter.phase("step"):
            now[0] += 30.0
        reporter.train(3, {"loss": 1.0, "accuracy": 0.0})
    last = train_records(tmp_path)[-1]
    assert last["compile_seconds"] == 80
    assert last["checkpoint_seconds"] == 16
    assert last["seconds"] == 84


def test_a_step_lasts_until_its_metrics_are_read(tmp_path, monkeypatch):
    now = [0.0]

    class Slow:
        """A number that the device has after three seconds."""

        def __array__(self, dtype=None, copy=None):
            now[0] += 3.0
            return np.float32(1.0).__array__(dtype)

        def __float__(self):
            return float(self.__array__())

    with timed(tmp_path, monkeypatch, now) as reporter:
        reporter.train(1, {"loss": Slow(), "accuracy": 0.0})
    assert train_records(tmp_path)[0]["step_seconds"] >= 3


def test_memory(tmp_path, monkeypatch):
    class Device:
        def __init__(self, **stats):
            self.memory_stats = lambda: stats or None

    report(tmp_path, [1])
    (record,) = train_records(tmp_path)
    page = 2**20  # this process has numpy and jax in it
    assert 50 * page < record["host_memory_bytes"] < 2**40
    assert "device_memory_bytes" not in record, "a CPU's is the host's"
    devices = [Device(bytes_in_use=1, peak_bytes_in_use=n) for n in (3, 9, 5)]
    monkeypatch.setattr(memory_use.jax, "local_devices", lambda: [*devices, Device()])
    report(tmp_path, [1])
    assert train_records(tmp_path)[0]["device_memory_bytes"] == 9


def test_events_are_told_and_stay(tmp_path):
    stream = io.StringIO()

    def run():
        with metrics.Reporter(
            tmp_path, name="sgd", total_steps=9, batch_size=1, steps_per_epoch=3,
            stream=stream,
        ) as reporter:  # fmt: skip
            reporter.train(1, {"loss": 1.0, "accuracy": 0.0})
            reporter.event("the checkpoint was skipped", 3)
            raise KeyError("x")

    with pytest.raises(KeyError):
        run()
    assert "sgd  step 3/9  the checkpoint was skipped\n" in stream.getvalue()
    report(tmp_path, [], start=0)
    records = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    events = [(r["kind"], r["step"], r["epoch"], r["message"]) for r in records]
    assert events == [
        ("event", 3, 1, "the checkpoint was skipped"),
        ("event", 1, 0.333333, "stopped by KeyError: 'x'"),
    ]


def test_only_one_process_writes(tmp_path):
    stream = Terminal()
    with metrics.Reporter(
        tmp_path / "run", name="sgd", total_steps=4, batch_size=1, steps_per_epoch=2,
        start_step=2, writes=False, stream=stream,
    ) as reporter:  # fmt: skip
        with reporter.phase("step"):
            pass
        reporter.train(3, {"loss": 1.0, "accuracy": 0.0})
        reporter.test(3, {"loss": 1.0, "accuracy": 0.0})
        reporter.event("something")
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def test_a_run_on_a_full_disk_goes_on_and_loses_nothing(tmp_path, monkeypatch):
    stream, room, write = io.StringIO(), [10**6], os.pwrite

    def pwrite(file, data, offset):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(file, data[: room[0]], offset)
        room[0] -= done
        return done

    monkeypatch.setattr(append_only.os, "pwrite", pwrite)
    path = tmp_path / "metrics.jsonl"
    with metrics.Reporter(
        tmp_path, name="sgd", total_steps=60, batch_size=1, steps_per_epoch=60,
        stream=stream,
    ) as reporter:  # fmt: skip
        for step in range(1, 61):
            if step == 20:
                room[0] = 4321
            if step == 50:
                assert path.read_text().endswith("}\n"), "half a line"
                assert path.read_text().count("train") < 45
                room[0] = 10**6
            reporter.train(step, {"loss": 1.0, "accuracy": 0.5})
        reporter.test(60, {"loss": 1.0, "accuracy": 0.5})
    assert [r["step"] for r in train_records(tmp_path)] == list(range(1, 61))
    scalars = read_scalars(tmp_path)
    assert sum(tag == "train/loss" for tag, _ in scalars) == 60
    for name in ("metrics.jsonl", "events.out"):
        told = [line for line in stream.getvalue().splitlines() if name in line]
        assert len(told) == 2, told
        assert "could not be written (No space left on device); 1 record is" in told[0]
        assert "can be written again" in told[1]
    events = [r for r in metrics.read_json_lines(path) if r["kind"] == "event"]
    assert any("metrics.jsonl could not be" in event["message"] for event in events)


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    report(tmp_path, range(1, 11), stream=Full())
    assert [r["step"] for r in train_records(tmp_path)] == list(range(1, 11))


def read_scalars(directory):
    """The scalars of a TensorBoard file, read as its framing of records demands."""
    (path,) = (directory / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
        data = data[12 + length + 4 :]
    return scalars


def test_tensorboard_gets_the_same_numbers(tmp_path):
    report(tmp_path, range(1, 6))
    scalars = read_scalars(tmp_path)
    assert scalars["train/loss", 4] == 0.25
    assert scalars["test/accuracy", 5] == 0.75
    for record in metrics.read_json_lines(tmp_path / "metrics.jsonl"):
        tag = (f"{record['kind']}/loss", record["step"])
        assert scalars[tag] == pytest.approx(record["loss"])


def test_lines_are_json(tmp_path):
    report(tmp_path, range(1, 3))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
