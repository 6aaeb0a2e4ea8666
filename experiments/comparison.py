"""Several runs in one table and one picture."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from experiments import markdown, report_figures, run_records
from experiments.run_records import RunRecords


def write(
    directories: Sequence[str | os.PathLike],
    *,
    output: str | os.PathLike | None = None,
    target: float | None = None,
) -> pathlib.Path:
    """Writes `comparison.md` and `comparison.png`.

    Args:
        directories: The directories of the runs, two or more.
        output: Where it goes; by default the innermost directory that holds them all.
        target: A test accuracy whose first step is of interest.

    Returns:
        The text; the picture is beside it.

    Raises:
        FileNotFoundError: If a directory holds no run.
        ValueError: If a run has not come to its first evaluation, or is named twice.
    """
    paths = [pathlib.Path(directory).resolve() for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"directory: {path} is named twice; name each run once")
    common = pathlib.Path(os.path.commonpath([path.parent for path in paths]))
    runs = {str(path.relative_to(common)): run_records.read(path) for path in paths}
    output = common if output is None else pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    report_figures.draw_curves(runs, output / "comparison.png")
    head, rows = _table(runs, target)
    parts = [
        f"# {len(runs)} runs",
        "![Training loss and test accuracy of the runs](comparison.png)",
        markdown.table(head, rows),
        "Times in the table are those of training, with compilation; images/s is the "
        "median over the run. Statistics renewed: the share of all that could have "
        "been, over the run. Sent: what each device sent of statistics and inverses, "
        "mean of all steps.",
    ]
    path = output / "comparison.md"
    markdown.replace_text(path, "\n\n".join(parts) + "\n")
    return path


def _table(
    runs: Mapping[str, RunRecords], target: float | None
) -> tuple[list[str], list[list[str]]]:
    columns: dict[str, list[str | None]] = {"run": list(runs)}
    found = [run_records.summarize(run) for run in runs.values()]
    columns["steps"] = [f"{run.last['step']:,}" for run in runs.values()]
    columns["accuracy at the end"] = [markdown.percent(s.final_accuracy) for s in found]
    columns["best"] = [markdown.percent(s.best_accuracy) for s in found]
    if target is not None:
        reached = [run_records.steps_to(run, target) for run in runs.values()]
        columns[f"steps to {target:.1%}"] = [
            f"{r['step']:,}" if r else None for r in reached
        ]
        columns[f"time to {target:.1%}"] = [
            markdown.duration(r["seconds"]) if r else None for r in reached
        ]
    columns["images/s"] = [markdown.number(s.images_per_second, 0) for s in found]
    columns["time"] = [markdown.duration(s.seconds) for s in found]
    columns["statistics renewed"] = [markdown.percent(s.refreshed) for s in found]
    columns["sent, a step"] = [markdown.size(s.sent_bytes) for s in found]
    columns["device memory"] = [markdown.size(s.device_memory_bytes) for s in found]
    kept = {name: values for name, values in columns.items() if any(values)}
    rows = zip(*kept.values(), strict=True)
    return list(kept), [[value or "" for value in row] for row in rows]
