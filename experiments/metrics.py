"""What a run reports: a JSONL file, TensorBoard, a progress bar and a line per epoch.

The JSONL file is the record. Each line is one JSON object, appended and flushed at
once, so a run that dies loses at most the line it was writing. Every line holds `kind`
("train" or "test"), `step`, `seconds` (time spent in training so far, compilation
included, evaluation and checkpoints not) and the metrics, each a mean over the step's
batch or the test images.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self, TextIO

import tensorboardX
import tqdm


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Args:
        path: The file; made with its directory if missing.
        last_step: Records of later steps are dropped first: they belong to a run that
            went on after the checkpoint this one starts from, or to an earlier run.
    """

    def __init__(self, path: str | os.PathLike, *, last_step: int):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = read_json_lines(path) if path.exists() else []
        self.kept = [record for record in records if record["step"] <= last_step]
        # Written aside and renamed, so that being killed here loses nothing either.
        aside = path.with_suffix(".partial")
        aside.write_text("".join(map(_line, self.kept)), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record and hands it to the operating system.

        Args:
            record: JSON values and scalar arrays, `step` among them; a number that is
                not finite is written as null.
        """
        self._file.write(_line(record))
        self._file.flush()

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

    Args:
        directory: Directory of the run; gets `metrics.jsonl` and `tensorboard/`.
        name: Name of the run, at the head of the bar and of each line.
        total_steps: Steps of the whole run.
        batch_size: Images in a step.
        steps_per_epoch: Steps of one epoch; need not be whole.
        start_step: Steps that were done before; their records in `directory` are kept.
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
        stream: TextIO | None = None,
    ):
        directory = pathlib.Path(directory)
        self._name = name
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._steps_per_epoch = steps_per_epoch
        self._step = start_step
        self._jsonl = JsonLines(directory / "metrics.jsonl", last_step=start_step)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=start_step + 1
        )
        self._clock = _Clock(max((r["seconds"] for r in self._jsonl.kept), default=0.0))
        self._epoch = _EpochMeans()
        self._bar = tqdm.tqdm(
            desc=name,
            total=total_steps,
            initial=start_step,
            file=sys.stderr if stream is None else stream,
            disable=None,  # off unless the stream is a terminal
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}"
            "{postfix} [{elapsed} < {remaining}]",
        )
        self._bar.set_postfix_str("compiling")
        self._stream = sys.stderr if stream is None else stream

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the bar and closes the files."""
        self._bar.close()
        self._tensorboard.close()
        self._jsonl.close()

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports training up to a step.

        Args:
            step: Steps done so far.
            metrics: Scalars, `loss` and `accuracy` among them.
        """
        metrics = {key: float(value) for key, value in metrics.items()}
        seconds = self._clock.seconds()
        self._epoch.add(metrics, (step - self._step) * self._batch_size, seconds)
        self._step = step
        self._write("train", step, seconds, metrics)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.1%}, "
            f"{self._epoch.speed()}",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def test(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Reports an evaluation, and on one line all that happened since the last.

        Args:
            step: Steps done so far.
            metrics: Scalars, `loss` and `accuracy` among them.
        """
        metrics = {key: float(value) for key, value in metrics.items()}
        seconds = self._clock.seconds()
        self._write("test", step, seconds, metrics)
        epochs = self._total_steps / self._steps_per_epoch
        means = self._epoch.means()
        line = (
            f"{self._name}  epoch {step / self._steps_per_epoch:.3g}/{epochs:.3g}"
            f"  step {step}/{self._total_steps}"
            f"  train loss {means['loss']:.3f} accuracy {means['accuracy']:.1%}"
            f"  test loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.1%}"
            f"  {self._epoch.speed()}"
            f"  {datetime.timedelta(seconds=round(seconds))}"
        )
        self._bar.write(line, file=self._stream)
        self._stream.flush()
        self._epoch.start(seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of `seconds` and of images/s for what is not training."""
        with self._clock.paused():
            yield

    def _write(self, kind: str, step: int, seconds: float, metrics: dict) -> None:
        record = {"kind": kind, "step": step, "seconds": round(seconds, 4), **metrics}
        self._jsonl.write(record)
        for key, value in metrics.items():
            self._tensorboard.add_scalar(f"{kind}/{key}", value, step)
        if kind == "test":
            self._tensorboard.flush()


class _Clock:
    """Seconds of training: wall-clock time less the pauses."""

    def __init__(self, start: float):
        self._start = time.perf_counter() - start
        self._paused_since: float | None = None

    def seconds(self) -> float:
        paused = self._paused_since
        return (time.perf_counter() if paused is None else paused) - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused_since = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - self._paused_since
            self._paused_since = None


class _EpochMeans:
    """Means of the training metrics since the last evaluation, and the speed."""

    def __init__(self):
        # The first call of a process ends a step that was compiled; it is not a speed.
        self._last: float | None = None
        self.start(None)

    def start(self, seconds: float | None) -> None:
        self._metrics: list[tuple[dict[str, float], int]] = []
        self._images, self._busy = 0, 0.0
        if seconds is not None:
            self._last = seconds

    def add(self, metrics: dict[str, float], images: int, seconds: float) -> None:
        self._metrics.append((metrics, images))
        if self._last is not None:
            self._images += images
            self._busy += seconds - self._last
        self._last = seconds

    def means(self) -> dict[str, float]:
        total = sum(images for _, images in self._metrics)
        return {
            key: sum(m[key] * images for m, images in self._metrics) / max(total, 1)
            for key in ("loss", "accuracy")
        }

    def speed(self) -> str:
        rate = f"{self._images / self._busy:,.0f}" if self._busy else "-"
        return f"{rate} images/s"


def _line(record: Mapping[str, Any]) -> str:
    values = {key: _json_value(value) for key, value in record.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else None
