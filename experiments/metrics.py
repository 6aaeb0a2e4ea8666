"""The metrics of a run: a JSONL file, TensorBoard, a progress bar, a line per epoch.

``metrics.jsonl`` is the record. Each line is one JSON object, passed to the operating
system at once, so a run that is killed loses at most its last line, and a run on a full
disk goes on and writes its lines when it can. Every line holds ``kind``, ``step``,
``epoch`` and ``seconds`` (training time so far, with compilation, without evaluation
and checkpoints):

- ``"train"``: the metrics of the steps since the last such line, each a mean over these
  steps (of counters the largest); ``images_per_second`` since then; the memory in use
  (``memory_use``); the seconds of each phase so far, as ``input_seconds`` etc.
  (``Clock``); and the path of a layer that was not finite, as ``layer_not_finite``.
- ``"test"``: the metrics, each a mean over the test images, and the same seconds.
- ``"event"``: a ``message``.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import tqdm
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from experiments import memory_use, not_finite, runs

PHASES = ("compile", "input", "step", "evaluate", "checkpoint", "report", "other")
"""The phases of a process; ``other`` is the time spent in none of them."""

_NOT_TRAINING = ("evaluate", "checkpoint")
# A mean would hide that a step was skipped, or how old an inverse became.
_LARGEST = ("skipped", "rejected", "boosted", "inverse_age_max")
_JOINED = dict.fromkeys(_LARGEST, max) | {not_finite.METRIC: not_finite.first}
"""The functions that make one number of several steps'; a mean where there is none."""
# Their classes are created at import, where no type checker sees them.
_EVENTS: Any = event_pb2
_SUMMARIES: Any = summary_pb2


class JsonLines:
    """An append-only file of JSON objects, one per line.

    A line that cannot be written (the disk is full) waits in memory and is written
    before the next one.

    Args:
      path: the file; created with its directory if missing.
      last_step: records of later steps are dropped first: they belong to a run that
        went on after the checkpoint from which this one resumes, or to an earlier run.
        Events are kept.
      tell: called with a message when writing fails, and when it succeeds again.
    """

    def __init__(
        self, path: str | os.PathLike, *, last_step: int, tell: Callable[[str], None]
    ):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [
            record
            for record in (read_json_lines(path) if path.exists() else [])
            if record["step"] <= last_step or record["kind"] == "event"
        ]
        runs.write_text(path, "".join(map(_line, self.kept)))
        self._name, self._tell = path.name, tell
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._waiting, self._failed = b"", False

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; a number that is not finite is written as null."""
        self._waiting += _line(record).encode()
        self._flush()

    def close(self) -> int:
        """Closes the file; returns how many lines could not be written."""
        self._flush()
        os.close(self._file)
        return self._waiting.count(b"\n")

    def _flush(self) -> None:
        try:
            # A disk that fills takes a part of a line; the rest follows when it can.
            while self._waiting:
                done = os.write(self._file, self._waiting)
                self._waiting = self._waiting[done:]
        except OSError as error:
            if not self._failed:
                self._failed = True  # before the message, which is a line itself
                self._tell(
                    f"{self._name} cannot be written ({error.strerror}); its lines "
                    "wait in memory until it can"
                )
            return
        if self._failed:
            self._failed = False
            self._tell(f"{self._name} can be written again; no line is lost")


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file, without a last line that does not end.

    Raises:
      ValueError: if a complete line is not JSON, naming the line.
    """
    complete, _, _ = pathlib.Path(path).read_text(encoding="utf-8").rpartition("\n")
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}={line[:80]!r} must be JSON; repair or remove the line"
            ) from error
    return records


class EventFile:
    """An event file of TensorBoard for scalars; ends early if it cannot be written.

    tensorboardX's ``SummaryWriter`` passes events to a thread through a queue, and the
    program waits for that queue forever once a full disk has ended the thread (seen
    with tensorboardX 2.6.5). ``RecordWriter``, below it, writes without a thread.

    Args:
      directory: the directory of the run's event files; created if missing.
      first_step: TensorBoard hides scalars of this step and later ones that earlier
        event files hold: the run resumes before them.
      tell: called with a message when writing fails.
    """

    def __init__(
        self, directory: pathlib.Path, *, first_step: int, tell: Callable[[str], None]
    ):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"events.out.tfevents.{time.time_ns()}"
        self._writer = record_writer.RecordWriter(str(path))
        self._tell, self._failed = tell, False
        self._write(_EVENTS.Event(file_version="brain.Event:2"))
        start = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._write(_EVENTS.Event(step=first_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of a step, by tag, to the buffer of the file."""
        values = [
            _SUMMARIES.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
        ]
        summary = _SUMMARIES.Summary(value=values)
        self._write(_EVENTS.Event(step=step, summary=summary))

    def flush(self) -> None:
        """Writes the buffer to disk."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """Closes the file."""
        self._try(self._writer.close)

    def _write(self, event: Any) -> None:
        if not self._failed:  # else the buffer may end within an event
            event.wall_time = time.time()
            self._try(lambda: self._writer.write(event.SerializeToString()))

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._tell(
                    f"tensorboard/ cannot be written ({error.strerror}) and ends here; "
                    "metrics.jsonl goes on"
                )


class Clock:
    """Books every second of a process under one phase.

    JAX dispatches asynchronously: these are seconds of the process; the device may
    compute during any of them.

    Args:
      before: seconds by phase of the processes that carried the run so far.
    """

    def __init__(self, before: Mapping[str, float]):
        self._seconds = {name: before.get(name, 0.0) for name in PHASES}
        self._open = ["other"]
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the time inside under a phase; the innermost phase counts."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase so far."""
        self._book()
        return dict(self._seconds)

    def training(self) -> float:
        """Returns the seconds so far without evaluation and checkpoints."""
        seconds = self.seconds()
        return sum(s for name, s in seconds.items() if name not in _NOT_TRAINING)

    def _book(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


class Reporter:
    """Reports a run to its files and to standard error; a context manager.

    On a terminal a progress bar shows the last loss and accuracy, images/s and the time
    left; elsewhere (a cluster's log, a pipe) there is only the line per epoch.

    The phases of the process are ``compile``, the first ``phase("step")``, which traces
    and compiles; ``input``, waiting for a batch; ``step``, dispatching a step and
    waiting, in ``train``, for its metrics, hence for the device; ``evaluate`` and
    ``checkpoint``, which ``seconds`` and images/s leave out; ``report``, writing
    records; and ``other``. If metrics are read at every step, ``step`` is the device's
    time; if they are read less often, the device also computes during ``input`` and
    ``report``.

    Args:
      directory: directory of the run; gets ``metrics.jsonl`` and ``tensorboard/``.
      name: name of the run, at the head of the bar and of each line.
      total_steps: steps of the whole run.
      batch_size: images in a step, on all devices.
      steps_per_epoch: steps of one epoch; may be a fraction.
      start_step: steps done before; their records in ``directory`` are kept.
      writes: whether this process writes and prints; of several processes one does. The
        others read their metrics alike.
      layers: the paths of the layers with curvature, to name one that is not finite.
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
        writes: bool = True,
        layers: Sequence[str] = (),
    ):
        self._not_finite = not_finite.Watch(layers, resumed=start_step > 0)
        self._name, self._total_steps = name, total_steps
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._step, self._writes, self._compiled = start_step, writes, False
        self._bar = tqdm.tqdm(
            desc=name,
            total=total_steps,
            initial=start_step,
            file=sys.stderr,
            disable=None if writes else True,  # None: off unless it is a terminal
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}"
            "{postfix} [{elapsed} < {remaining}]",
        )
        self._bar.set_postfix_str("compiling")
        self._clock = Clock({})
        self._since_test: list[dict[str, float]] = []
        self._images, self._busy = 0, 0.0
        self._last: float | None = None  # time of the last record of this process
        if writes:
            self._open_files(pathlib.Path(directory))
        if start_step:
            self.event(f"resumed at step {start_step:,}")

    def _open_files(self, directory: pathlib.Path) -> None:
        """Opens the files; the clock goes on from their last record."""
        self._jsonl = JsonLines(
            directory / "metrics.jsonl", last_step=self._step, tell=self.event
        )
        before = [r for r in self._jsonl.kept if r["kind"] != "event"][-1:]
        seconds = {p: r.get(f"{p}_seconds", 0.0) for r in before for p in PHASES}
        self._clock = Clock(seconds)
        self._tensorboard = EventFile(
            directory / "tensorboard", first_step=self._step + 1, tell=self.event
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        """Records the error that ends the run early, if any, and closes the files."""
        del trace
        if kind is not None:
            self.event(f"stopped by {kind.__name__}: {error}".rstrip(": "))
        self._bar.close()
        if self._writes:
            self._tensorboard.close()
            if lost := self._jsonl.close():
                self._print(f"{self._name}  {lost:,} lines of metrics.jsonl are lost")

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Books the time inside under a phase; the innermost phase counts.

        Args:
          name: ``"input"``, ``"step"``, ``"evaluate"`` or ``"checkpoint"``.

        Returns:
          The context.
        """
        if name == "step" and not self._compiled:
            self._compiled, name = True, "compile"
        return self._clock.phase(name)

    def train(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Waits for the metrics of steps, and records their means.

        Args:
          step: steps done so far.
          metrics: of each step since the last call, scalars, ``loss`` and ``accuracy``
            among them.
        """
        with self._clock.phase("step"):
            of_steps = [_numbers(of_step) for of_step in jax.device_get(list(metrics))]
        with self._clock.phase("report"):
            self._since_test += of_steps
            values = {
                key: _JOINED.get(key, _mean)([m[key] for m in of_steps])
                for key in of_steps[-1]
            }
            for at, message in self._not_finite.messages(step, of_steps):
                self.event(message, at)
            seconds, before = self._clock.training(), self._last
            images, self._last = (step - self._step) * self._batch_size, seconds
            self._step = step
            # The first record of a process ends a step that was compiled.
            if before is not None and seconds > before:
                self._images += images
                self._busy += seconds - before
                values["images_per_second"] = images / (seconds - before)
            values |= memory_use.read()
            self._write("train", step, seconds, self._not_finite.named(values))
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.1%}, "
                f"{self._speed()}",
                refresh=False,
            )
            self._bar.update(step - self._bar.n)

    def test(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records an evaluation, and prints a line about the steps since the last.

        Args:
          step: steps done so far.
          metrics: scalars, ``loss`` and ``accuracy`` among them.
        """
        with self._clock.phase("report"):
            values, seconds = _numbers(metrics), self._clock.training()
            self._write("test", step, seconds, values)
            if self._writes:
                self._tensorboard.flush()
            self._print(self._epoch_line(step, seconds, values))
            self._since_test, self._images, self._busy = [], 0, 0.0

    def event(self, message: str, step: int | None = None) -> None:
        """Records a message of one line, and prints it.

        Args:
          message: the message.
          step: steps done then; by default those of the last record.
        """
        step = self._step if step is None else step
        self._print(f"{self._name}  step {step}/{self._total_steps}  {message}")
        if self._writes:
            record = self._record("event", step, self._clock.training())
            self._jsonl.write(record | {"message": message})

    def _epoch_line(self, step: int, seconds: float, test: dict[str, float]) -> str:
        loss, accuracy, refreshed = (
            _mean([m.get(key, 0.0) for m in self._since_test])
            for key in ("loss", "accuracy", "refreshed")
        )
        renewed = f"  refreshed {refreshed:.1%}" if refreshed else ""
        return (
            f"{self._name}  epoch {step / self._steps_per_epoch:.3g}"
            f"/{self._total_steps / self._steps_per_epoch:.3g}"
            f"  step {step}/{self._total_steps}"
            f"  train loss {loss:.3f} accuracy {accuracy:.1%}"
            f"  test loss {test['loss']:.3f} accuracy {test['accuracy']:.1%}{renewed}"
            f"  {self._speed()}  {datetime.timedelta(seconds=round(seconds))}"
        )

    def _speed(self) -> str:
        """Returns the images/s since the last evaluation, or a dash if unknown."""
        speed = f"{self._images / self._busy:,.0f}" if self._busy else "-"
        return f"{speed} images/s"

    def _record(self, kind: str, step: int, seconds: float) -> dict[str, Any]:
        epoch = round(step / self._steps_per_epoch, 6)
        seconds = round(seconds, 4)
        return {"kind": kind, "step": step, "epoch": epoch, "seconds": seconds}

    def _write(
        self, kind: str, step: int, seconds: float, values: Mapping[str, float | str]
    ) -> None:
        if self._writes:
            phases = self._clock.seconds().items()
            values = {**values, **{f"{p}_seconds": round(s, 4) for p, s in phases}}
            self._jsonl.write(self._record(kind, step, seconds) | values)
            tags = {
                f"{kind}/{k}": x for k, x in values.items() if not isinstance(x, str)
            }
            self._tensorboard.write(step, tags)

    def _print(self, line: str) -> None:
        # A log is often a file on the disk that is full.
        with contextlib.suppress(OSError):
            if self._writes:
                self._bar.write(line, file=sys.stderr)
                sys.stderr.flush()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(x, float) and not math.isfinite(x) else x
        for key, x in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
