"""The report of a run, in its directory, and the comparison of several.

    python -m experiments.report runs/a                       report.md with pictures
    python -m experiments.report runs/a runs/b --target 0.7   comparison.md and .png

It is made from what runs leave: `metrics.jsonl` (`experiments.metrics`), `config.json`
(`experiments.runs`) and `run.json` (`experiments.run_facts`), of which the last two may
be missing. A run that goes on, or was killed, is reported as far as it came.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from experiments import comparison, markdown, report_figures, run_facts, run_records
from experiments.run_records import RunRecords


def write(directory: str | os.PathLike, *, target: float | None = None) -> pathlib.Path:
    """Writes the report of a run beside its records.

    Args:
        directory: The directory of the run.
        target: A test accuracy whose first step is of interest.

    Returns:
        The report; its pictures, `report_*.png`, are beside it.

    Raises:
        FileNotFoundError: If the directory holds no run.
        ValueError: If the run has not come to its first evaluation.
    """
    run = run_records.read(directory)
    summary = run_records.summarize(run)
    parts = [
        f"# {_title(run)}",
        _status(run),
        markdown.table(("", ""), _results(run, summary, target)),
        _curves(run),
        _time(run),
        _curvature(run, summary),
        _resources(run),
        _setup(run),
        _events(run),
    ]
    path = run.directory / "report.md"
    markdown.replace_text(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for.

    Args:
        arguments: The command line.
    """
    parser = argparse.ArgumentParser(
        "experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--target", type=float, help="a test accuracy, such as 0.7")
    parser.add_argument(
        "--output", type=pathlib.Path, help="where a comparison goes; beside the runs"
    )
    options = parser.parse_args(arguments)
    try:
        if options.target is not None and not 0 < options.target <= 1:
            raise ValueError(f"--target must be in (0, 1], got {options.target}")
        if len(options.directories) > 1:
            path = comparison.write(
                options.directories, output=options.output, target=options.target
            )
        elif options.output is not None:
            raise ValueError(
                "--output is for comparisons; the report of a run is put beside its "
                "records"
            )
        else:
            path = write(options.directories[0], target=options.target)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(path)


# === Parts ============================================================================


def _title(run: RunRecords) -> str:
    if not run.config:
        return run.directory.resolve().name
    config = run.config
    return (
        f"{config['model']} on {config['dataset']}: {config['optimizer']}, batch "
        f"{config['batch_size']:,}"
    )


def _status(run: RunRecords) -> str:
    done, total = run.last["step"], run.facts.get("steps")
    if total is None:
        return f"{done:,} steps on record."
    if done >= total:
        return f"Finished: {total:,} steps."
    return f"{done:,} of {total:,} steps: the run goes on, or was stopped."


def _results(
    run: RunRecords, summary: run_records.Summary, target: float | None
) -> list[tuple[str, str]]:
    last = run.test[-1]
    epoch = f", epoch {last['epoch']:.4g}" if "epoch" in last else ""
    rows = [
        ("test accuracy at the end", f"{markdown.percent(summary.final_accuracy)} "
         f"(step {last['step']:,}{epoch})"),
        ("best test accuracy", f"{markdown.percent(summary.best_accuracy)} "
         f"(step {summary.best_step:,})" if summary.best_step else None),
        ("test loss at the end", markdown.number(summary.final_loss, 3)),
        ("training time, with compilation", markdown.duration(summary.seconds)),
        ("speed", _speed(summary)),
        ("statistics renewed", _renewed(summary)),
        ("sent by a device, a step", markdown.size(summary.sent_bytes)
         if summary.sent_bytes else None),
        ("device memory, peak", markdown.size(summary.device_memory_bytes)),
        ("memory of the process, peak", markdown.size(summary.host_memory_bytes)),
    ]  # fmt: skip
    if target is not None:
        reached = run_records.steps_to(run, target)
        when = f"step {reached['step']:,}" if reached else "not reached"
        rows.insert(2, (f"test accuracy of {target:.1%}", when))
    return [(name, text) for name, text in rows if text]


def _speed(summary: run_records.Summary) -> str | None:
    if summary.images_per_second is None:
        return None
    per_device = summary.images_per_second_per_device
    return f"{summary.images_per_second:,.0f} images/s ({per_device:,.0f} a device)"


def _renewed(summary: run_records.Summary) -> str | None:
    if summary.refreshed is None:
        return None
    of_bytes = markdown.percent(summary.refreshed_bytes)
    return f"{summary.refreshed:.1%} ({of_bytes} of their bytes)"


def _curves(run: RunRecords) -> str:
    report_figures.draw_curves({"run": run}, run.directory / "report_curves.png")
    return "## Curves\n\n![Loss and accuracy, in training and test](report_curves.png)"


def _time(run: RunRecords) -> str:
    seconds = run_records.seconds_by_phase(run)
    if not seconds:
        return ""
    report_figures.draw_time(run, run.directory / "report_time.png")
    total, steps = sum(seconds.values()), run.last["step"]
    rows = [
        (
            report_figures.PHASE_NAMES[name],
            f"{spent:,.1f}",
            f"{spent / total:.1%}",
            f"{1e3 * spent / steps:,.2f}" if name in report_figures.OF_A_STEP else "",
        )
        for name, spent in seconds.items()
    ]
    head = ("phase", "seconds", "share", "ms a step")
    return (
        "## Where the time went\n\n"
        "![Shares of the phases of the run and of a step](report_time.png)\n\n"
        f"{markdown.table(head, rows)}\n\n"
        "Seconds of the process that reports. A step lasts from its dispatch until its "
        "metrics have been read; the device may also compute while the process waits "
        "for input. Training time is all but evaluation and checkpoints."
    )


def _curvature(run: RunRecords, summary: run_records.Summary) -> str:
    if summary.refreshed is None:
        return ""
    report_figures.draw_curvature(run, run.directory / "report_curvature.png")
    last = run.train[-1]
    text = (
        "## Curvature\n\n"
        "![Statistics renewed and age of inverses](report_curvature.png)"
    )
    if "rejected" in last:
        text += (
            "\n\nStatistics and inverses that were not finite: "
            f"{last['rejected']:.0f}. "
            f"Layers with raised damping at the end: {last['boosted']:.0f}."
        )
    return text


def _resources(run: RunRecords) -> str:
    if not run.curve("train", "images_per_second", "step")[0]:
        return ""
    report_figures.draw_resources(run, run.directory / "report_resources.png")
    return (
        "## Speed and memory\n\n"
        "![Images per second and memory in use](report_resources.png)"
    )


def _setup(run: RunRecords) -> str:
    facts = run.facts
    parts = ["## Set-up"]
    if "command" in facts:
        parts.append(f"```\n{facts['command']}\n```")
    rows = run_facts.rows(run.config, facts)
    if rows:
        parts.append(markdown.table(("", ""), rows))
    if run.config:
        changed = run_facts.settings_changed(run.config)
        parts.append("Settings that differ from the defaults:" if changed else
                     "All settings are the defaults.")  # fmt: skip
        if changed:
            parts.append(markdown.table(("setting", "value", "default"), changed))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _events(run: RunRecords) -> str:
    if not run.events:
        return ""
    rows = [
        (f"{e['step']:,}", markdown.duration(e["seconds"]), e["message"])
        for e in run.events
    ]
    return f"## Events\n\n{markdown.table(('step', 'training time', 'event'), rows)}"


if __name__ == "__main__":
    main(sys.argv[1:])
