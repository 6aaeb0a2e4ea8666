"""What a run has left in its directory, read also while it goes on or after it died."""

import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import metrics, phases


class RunRecords(NamedTuple):
    """The files of one run.

    Attributes:
        directory: The directory of the run.
        config: Its settings, from `config.json`; empty if there is none.
        facts: What was known at its start, from `run.json`; empty if there is none.
        train: Records of training, in their order; at least one.
        test: Records of evaluations; at least one.
        events: What happened besides.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    facts: dict[str, Any]
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The last record of training or of a test."""
        return max(self.test[-1], self.train[-1], key=lambda r: r["seconds"])

    def curve(self, kind: str, metric: str, axis: str) -> tuple[list, list]:
        """One metric of the run.

        Args:
            kind: `"train"` or `"test"`.
            metric: Its name; records in which it is missing or null are left out.
            axis: `"step"`, `"epoch"`, `"seconds"`, or `"after_compiling"`: the seconds
                without those of compilation.

        Returns:
            Abscissae and ordinates; empty if nothing has both.
        """
        records = self.train if kind == "train" else self.test
        keys = (axis, metric)
        found = [r for r in records if all(r.get(key) is not None for key in keys)]
        return [r[axis] for r in found], [r[metric] for r in found]


class Summary(NamedTuple):
    """A run in numbers; None for what its records do not tell.

    Attributes:
        final_accuracy: Test accuracy of the last evaluation.
        best_accuracy: The largest test accuracy.
        best_step: The step that had it first.
        final_loss: Test loss of the last evaluation.
        seconds: Training time, compilation included.
        images_per_second: Median over the stretches between records.
        images_per_second_per_device: Likewise.
        refreshed: Share of the statistics that were renewed, over all steps.
        refreshed_bytes: The same, in bytes.
        sent_bytes: What a device sent of statistics and inverses, mean of all steps.
        device_memory_bytes: The largest peak of a device.
        host_memory_bytes: The largest resident set of the process that reports.
    """

    final_accuracy: float | None
    best_accuracy: float | None
    best_step: int | None
    final_loss: float | None
    seconds: float
    images_per_second: float | None
    images_per_second_per_device: float | None
    refreshed: float | None
    refreshed_bytes: float | None
    sent_bytes: float | None
    device_memory_bytes: float | None
    host_memory_bytes: float | None


def read(directory: str | os.PathLike) -> RunRecords:
    """Reads the files of a run as far as they go.

    Args:
        directory: The directory of the run.

    Returns:
        Its records.

    Raises:
        FileNotFoundError: If the directory holds no records.
        ValueError: If there is no record of training or of a test, or a file is broken.
    """
    directory = pathlib.Path(directory)
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"directory: {directory} holds no run (there is no {path.name} in it); "
            "name the --directory of a run"
        )
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "event": []}
    for record in metrics.read_json_lines(path):
        if "compile_seconds" in record:
            record["after_compiling"] = record["seconds"] - record["compile_seconds"]
        kinds[record["kind"]].append(record)
    for kind, what in (("train", "step"), ("test", "evaluation")):
        if not kinds[kind]:
            raise ValueError(
                f"directory: {path} has no {kind} record; a report needs a run that "
                f"has come to its first {what}"
            )
    config, facts = (_json(directory / name) for name in ("config.json", "run.json"))
    return RunRecords(
        directory, config, facts, kinds["train"], kinds["test"], kinds["event"]
    )


def summarize(run: RunRecords) -> Summary:
    """A run in numbers.

    Args:
        run: Its records.

    Returns:
        The numbers.
    """
    steps, accuracies = run.curve("test", "accuracy", "step")
    best = max(accuracies, default=None)
    _, losses = run.curve("test", "loss", "step")
    return Summary(
        final_accuracy=accuracies[-1] if accuracies else None,
        best_accuracy=best,
        best_step=None if best is None else steps[accuracies.index(best)],
        final_loss=losses[-1] if losses else None,
        seconds=run.last["seconds"],
        images_per_second=_over(run, "images_per_second", statistics.median),
        images_per_second_per_device=_over(
            run, "images_per_second_per_device", statistics.median
        ),
        refreshed=_mean_of_steps(run, "refreshed"),
        refreshed_bytes=_mean_of_steps(run, "refreshed_bytes"),
        sent_bytes=_mean_of_steps(run, "sent_bytes"),
        device_memory_bytes=_over(run, "device_memory_bytes", max),
        host_memory_bytes=_over(run, "host_memory_bytes", max),
    )


def steps_to(run: RunRecords, accuracy: float) -> dict[str, Any] | None:
    """The first evaluation that reached an accuracy.

    Args:
        run: The records of a run.
        accuracy: The test accuracy.

    Returns:
        Its record; None if the run did not reach it.
    """
    reached = (r for r in run.test if (r.get("accuracy") or 0.0) >= accuracy)
    return next(reached, None)


def seconds_by_phase(run: RunRecords) -> dict[str, float]:
    """Where the time of a run went, as far as its records tell.

    Args:
        run: Its records.

    Returns:
        Seconds by phase; empty if the run did not tell.
    """
    keys = {name: f"{name}_seconds" for name in phases.PHASES}
    last = run.last
    return {name: last[key] for name, key in keys.items() if key in last}


def _over(run: RunRecords, metric: str, of: Callable[[list], float]) -> float | None:
    _, values = run.curve("train", metric, "step")
    return of(values) if values else None


def _mean_of_steps(run: RunRecords, metric: str) -> float | None:
    """The mean of a metric that each record gives for the steps since the last."""
    total, number, before = 0.0, 0, 0
    for record in run.train:
        steps, before = record["step"] - before, record["step"]
        if record.get(metric) is not None:
            total, number = total + steps * record[metric], number + steps
    return total / number if number else None


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove or mend it") from error
