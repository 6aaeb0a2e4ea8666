"""What a run leaves behind, also when it dies, and what it shows."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import metrics, phases


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
                with reporter.paused():
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


def test_a_killed_writer_loses_at_most_its_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = f"""
import itertools
from experiments import metrics
lines = metrics.JsonLines({str(path)!r}, last_step=0, tell=print)
for step in itertools.count(1):
    lines.write({{"step": step, "text": "x" * 5000}})
"""
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=_root())
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


def _root():
    return metrics.pathlib.Path(metrics.__file__).parents[1]


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
            with reporter.paused():
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
