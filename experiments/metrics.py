"""What a run reports: a JSONL file, TensorBoard, a progress bar and a line per epoch.

The JSONL file is the record. Each line is one JSON object, handed to the operating
system at once, so a run that dies loses at most the line it was writing, and a run on a
full disk goes on and writes its lines when it can. Every line holds `kind`, `step`,
`epoch` and `seconds` (time spent in training so far, compilation included, evaluation
and checkpoints not):

- `"train"`: the metrics of the steps since the last such line, each a mean over these
  steps and the images of their batches (of counters the largest); `images_per_second`
  since then and `images_per_second_per_device`; memory in use (`memory_use`); and the
  seconds that went into each phase so far, as `input_seconds` and so on (`Reporter`).
- `"test"`: the metrics, each a mean over the test images, and the same seconds.
- `"event"`: a `message`.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TextIO

import tqdm

from experiments import append_only, memory_use, phases, step_means, tensorboard

Metrics = Mapping[str, Any]


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Args:
        path: The file; made with its directory if missing.
        last_step: Records of later steps are dropped first: they belong to a run that
            went on after the checkpoint this one starts from, or to an earlier run.
            Events are kept: they happened.
        tell: Told when the file cannot be written; see `AppendOnlyFile`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        last_step: int,
        tell: Callable[[str], None],
    ):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = read_json_lines(path) if path.exists() else []
        self.kept = [
            record
            for record in records
            if record["step"] <= last_step or record.get("kind") == "event"
        ]
        lines = "".join(map(_line, self.kept))
        if not path.exists() or path.read_text(encoding="utf-8") != lines:
            # Aside and renamed, so that being killed here loses nothing either.
            aside = path.with_suffix(".partial")
            aside.write_text(lines, encoding="utf-8")
            aside.replace(path)
        self._file = append_only.AppendOnlyFile(path, tell)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and hands it to the operating system.

        Args:
            record: JSON values and scalar arrays, `step` among them; a number that is
                not finite is written as null.
        """
        self._file.append(_line(record).encode())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file that `JsonLines` wrote, even if its writer was killed.

    Args:
        path: The file.

    Returns:
        The records. A last line that does not end is incomplete and left out.

    Raises:
        ValueError: If a complete line is not JSON, naming the line.
    """
    complete, _, _ = pathlib.Path(path).read_text(encoding="utf-8").rpartition("\n")
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {line[:80]!r}") from error
    return records


class Reporter:
    """Reports one run to its files and to whoever watches it.

    On a terminal a progress bar shows the last loss and accuracy, images/s and the time
    left; elsewhere (a cluster's log, a pipe) there is only the line per epoch. Use as a
    context manager.

    Every second of the process is booked under one phase:

    - `compile`: the first `phase("step")` of a process, which traces and compiles;
    - `input`: waiting for the next batch;
    - `step`: dispatching a step, and waiting, in `train`, for the metrics that it is
      given, hence for the device. A device that still has steps of its own to do
      computes during `input` and `report` as well, so that with metrics that are read
      at every step `step` is the device's time, and with metrics read more seldom it
      is what the device takes longer than the rest;
    - `evaluate` and `checkpoint`, which are no training: `seconds` and images/s leave
      them out;
    - `report`: writing records;
    - `other`: everything else.

    Args:
        directory: Directory of the run; gets `metrics.jsonl` and `tensorboard/`.
        name: Name of the run, at the head of the bar and of each line.
        total_steps: Steps of the whole run.
        batch_size: Images in a step, on all devices.
        steps_per_epoch: Steps of one epoch; need not be whole.
        start_step: Steps that were done before; their records in `directory` are kept.
        devices: Devices that share a step.
        writes: Whether this process reports; of several only one may. The others time
            their phases and read their metrics alike, and write and print nothing.
        stream: Where bar and lines go; standard error by default.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        name: str,
        total_steps: int,
        batch_size: int,
        steps_per_epoch: float,
        start_step: int = 0,
        devices: int = 1,
        writes: bool = True,
        stream: TextIO | None = None,
    ):
        self._name = name
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._steps_per_epoch = steps_per_epoch
        self._devices = devices
        self._step = start_step
        self._stream = sys.stderr if stream is None else stream
        self._writes = writes
        self._bar = tqdm.tqdm(
            desc=name,
            total=total_steps,
            initial=start_step,
            file=self._stream,
            disable=None if writes else True,  # None: off unless it is a terminal
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}"
            "{postfix} [{elapsed} < {remaining}]",
        )
        self._bar.set_postfix_str("compiling")
        self._compiled = self._closing = False
        self._phases = phases.Phases({})
        self._epoch = step_means.EpochMeans()
        if writes:
            self._open_files(pathlib.Path(directory))
        if start_step:
            self.event(f"resumed at step {start_step:,}")

    def _open_files(self, directory: pathlib.Path) -> None:
        """Opens the files; the clock goes on where their records end."""
        self._jsonl = JsonLines(
            directory / "metrics.jsonl", last_step=self._step, tell=self._note
        )
        before = [r for r in self._jsonl.kept if r["kind"] != "event"]
        self._phases = _phases_after(before[-1] if before else {})
        self._tensorboard = tensorboard.EventFile(
            directory / "tensorboard", first_step=self._step + 1, tell=self._note
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        """Notes what ends the run early, if anything does, and closes the files."""
        if kind is not None:
            self.event(f"stopped by {kind.__name__}: {error}".rstrip(": "))
        self._bar.close()
        if self._writes:
            self._tensorboard.close()
            self._closing = True
            self._jsonl.close()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Books the time of what happens inside.

        Args:
            name: `"input"`, `"step"`, `"evaluate"` or `"checkpoint"`.

        Returns:
            The context; inside another the inner one counts.
        """
        if name == "step" and not self._compiled:
            self._compiled, name = True, "compile"
        return self._phases.phase(name)

    def train(self, step: int, metrics: Metrics | Sequence[Metrics]) -> None:
        """Reports training up to a step, when its metrics are there.

        Args:
            step: Steps done so far.
            metrics: Scalars, `loss` and `accuracy` among them: those of each step since
                the last report, or of the last step alone.
        """
        single = isinstance(metrics, Mapping)
        with self._phases.phase("step"):
            of_steps = step_means.read([metrics] if single else metrics)
        with self._phases.phase("report"):
            self._train(step, of_steps)

    def test(self, step: int, metrics: Metrics) -> None:
        """Reports an evaluation, and on one line all that happened since the last.

        Args:
            step: Steps done so far.
            metrics: Scalars, `loss` and `accuracy` among them.
        """
        with self._phases.phase("report"):
            (read,) = step_means.read([metrics])
            seconds = self._phases.training()
            self._write("test", step, seconds, {**read, **self._seconds_by_phase()})
            self._print(self._epoch_line(step, seconds, read))
            self._epoch.start(seconds)

    def event(self, message: str, step: int | None = None) -> None:
        """Records that something happened, and prints it.

        Args:
            message: What happened, in one line.
            step: Steps done then; by default up to the last report.
        """
        step = self._step if step is None else step
        self._print(f"{self._name}  step {step}/{self._total_steps}  {message}")
        if self._writes:
            seconds = self._phases.training()
            self._jsonl.write(self._record("event", step, seconds, message=message))

    def _train(self, step: int, of_steps: list[dict[str, float]]) -> None:
        seconds = self._phases.training()
        images = (step - self._step) * self._batch_size
        speed = self._epoch.add(of_steps, images, seconds)
        metrics = step_means.joined(of_steps)
        self._step = step
        if speed is not None:
            metrics["images_per_second"] = speed
            metrics["images_per_second_per_device"] = speed / self._devices
        metrics |= memory_use.read() | self._seconds_by_phase()
        self._write("train", step, seconds, metrics)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
            f"{self._epoch.speed()}",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def _seconds_by_phase(self) -> dict[str, float]:
        seconds = self._phases.seconds().items()
        return {f"{name}_seconds": round(spent, 4) for name, spent in seconds}

    def _epoch_line(self, step: int, seconds: float, test: dict[str, float]) -> str:
        epochs = self._total_steps / self._steps_per_epoch
        train = self._epoch.means()
        refreshed = (
            f"  refreshed {train['refreshed']:.1%}" if train["refreshed"] else ""
        )
        return (
            f"{self._name}  epoch {step / self._steps_per_epoch:.3g}/{epochs:.3g}"
            f"  step {step}/{self._total_steps}"
            f"  train loss {train['loss']:.3f} accuracy {train['accuracy']:.1%}"
            f"  test loss {test['loss']:.3f} accuracy {test['accuracy']:.1%}"
            f"{refreshed}"
            f"  {self._epoch.speed()}"
            f"  {datetime.timedelta(seconds=round(seconds))}"
        )

    def _record(self, kind: str, step: int, seconds: float, **fields: Any) -> dict:
        epoch = round(step / self._steps_per_epoch, 6)
        when = {"step": step, "epoch": epoch, "seconds": round(seconds, 4)}
        return {"kind": kind, **when, **fields}

    def _write(self, kind: str, step: int, seconds: float, metrics: dict) -> None:
        if self._writes:
            self._jsonl.write(self._record(kind, step, seconds, **metrics))
            tags = {f"{kind}/{key}": value for key, value in metrics.items()}
            self._tensorboard.write(step, tags)

    def _note(self, message: str) -> None:
        """Tells of a file that cannot be written, in the other files as well."""
        if self._closing:
            self._print(f"{self._name}  {message}")
        else:
            self.event(message)

    def _print(self, line: str) -> None:
        # A log is often a file on the disk that is full.
        with contextlib.suppress(OSError):
            if self._writes:
                self._bar.write(line, file=self._stream)
                self._stream.flush()


def _phases_after(record: Mapping[str, Any]) -> phases.Phases:
    """The clock of a run that goes on after a record."""
    before = {name: record.get(f"{name}_seconds", 0.0) for name in phases.PHASES}
    # Records of a run that did not tell its phases have their sum alone.
    if "other_seconds" not in record:
        before["other"] = record.get("seconds", 0.0)
    return phases.Phases(before)


def _line(record: Mapping[str, Any]) -> str:
    values = {key: _json_value(value) for key, value in record.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else None
