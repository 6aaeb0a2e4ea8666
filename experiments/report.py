"""The report of a run, in its directory, and a table of several runs.

    python -m experiments.report runs/a            writes report.md and report.png
    python -m experiments.report runs/a runs/b     prints a table of both

A report is made from ``metrics.jsonl`` (``metrics``) and, where they exist, from
``config.json`` and ``run.json`` (``runs``). A run that goes on, or was killed, is
reported as far as it came.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from flax import traverse_util

from experiments import figures, metrics, settings
from lbopt import sizes

_POINTS = 250  # as many as a curve can show at the width of a panel
# Each panel: its ordinate, the unit, and the labels of its curves.
_PANELS = (
    ("loss (nats)", 1, {"train loss": "training", "test loss": "test"}),
    ("accuracy", 1, {"train accuracy": "training", "test accuracy": "test"}),
    ("learning rate", 1, {"train learning_rate": ""}),
    (
        "norm of the gradient",
        1,
        {"train grad_norm": "", "train device_grad_norm": "of each device's own"},
    ),
    ("factor of the bound in KL", 1, {"train kl_scale": ""}),
    (
        "statistics renewed",
        1,
        {"train refreshed": "by number", "train refreshed_bytes": "by bytes"},
    ),
    (
        "age of inverses (steps)",
        1,
        {"train inverse_age": "mean", "train inverse_age_max": "oldest"},
    ),
    ("sent by a device (MB a step)", 1e6, {"train sent_bytes": ""}),
    ("images/s", 1, {"train images_per_second": ""}),
    (
        "memory (GiB)",
        2**30,
        {
            "train host_memory_bytes": "host process",
            "train device_memory_bytes": "device, peak",
        },
    ),
)
_OF_A_STEP = ("input", "step", "report", "other")


class Records(NamedTuple):
    """The files of a run.

    Attributes:
      name: the name of its directory.
      config: its settings; empty without ``config.json``.
      facts: the facts of its start; empty without ``run.json``.
      train: records of training, at least one.
      test: records of evaluations, at least one.
      events: records of events.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The last record of training or of an evaluation."""
        return max(self.test[-1], self.train[-1], key=lambda r: r["seconds"])

    def curve(self, kind: str, metric: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of a metric of ``"train"`` or ``"test"`` records.

        Records in which the metric is missing or null are left out.
        """
        records = self.train if kind == "train" else self.test
        found = [r for r in records if r.get(metric) is not None]
        return [r["step"] for r in found], [r[metric] for r in found]


def read(directory: str | os.PathLike) -> Records:
    """Reads the files of a run as far as they go.

    Returns:
      The settings, facts and metrics of the run.

    Raises:
      FileNotFoundError: if the directory holds no records.
      ValueError: if there is no record of training or of an evaluation.
    """
    directory = pathlib.Path(directory)
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"directory={directory} must hold {path.name}; name a run's --directory"
        )
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "event": []}
    for record in metrics.read_json_lines(path):
        kinds[record["kind"]].append(record)
    for kind in ("train", "test"):
        if not kinds[kind]:
            raise ValueError(
                f"directory={directory} must hold a record of kind {kind!r}; wait for "
                "the first evaluation of the run"
            )
    name = directory.resolve().name
    files = (directory / name for name in ("config.json", "run.json"))
    config, facts = (json.loads(f.read_text()) if f.exists() else {} for f in files)
    return Records(name, config, facts, *kinds.values())


def write(directory: str | os.PathLike) -> pathlib.Path:
    """Writes the report of a run into its directory.

    Args:
      directory: the directory of the run.

    Returns:
      The path of ``report.md``; its picture, ``report.png``, is beside it.

    Raises:
      FileNotFoundError: if the directory holds no run.
      ValueError: if the run has not come to its first evaluation.
    """
    run = read(directory)
    _draw(run, pathlib.Path(directory, "report.png"))
    title, config = run.name, run.config
    if config:
        title = "{model} on {dataset}: {optimizer}, batch {batch_size:,}".format(
            **config
        )
    parts = [
        f"# {title}",
        table(("", ""), results(run).items()),
        "![Loss, accuracy, curvature, speed and memory by step](report.png)",
        *_time(run),
        *_setup(run),
    ]
    if run.events:
        rows = [
            (f"{e['step']:,}", _duration(e["seconds"]), e["message"])
            for e in run.events
        ]
        parts += ["## Events", table(("step", "training time", "event"), rows)]
    path = pathlib.Path(directory, "report.md")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def results(run: Records) -> dict[str, str]:
    """Returns the results of a run as texts by name, as far as its records tell."""
    last, devices = run.train[-1], run.facts.get("devices", 1)
    total = f" of {run.facts['steps']:,}" if "steps" in run.facts else ""
    found = {"steps": f"{run.last['step']:,}{total}"}
    steps, accuracies = run.curve("test", "accuracy")
    if accuracies:
        best, end = max(accuracies), f"{accuracies[-1]:.1%} (step {steps[-1]:,})"
        at = steps[accuracies.index(best)]
        found["test accuracy at the end"] = end
        found["best test accuracy"] = f"{best:.1%} (step {at:,})"
    if losses := run.curve("test", "loss")[1]:
        found["test loss at the end"] = f"{losses[-1]:.3f}"
    found["training time, with compilation"] = _duration(run.last["seconds"])
    if speeds := run.curve("train", "images_per_second")[1]:
        speed = statistics.median(speeds)
        found["speed"] = f"{speed:,.0f} images/s ({speed / devices:,.0f} per device)"
    if "refreshed" in last:
        share, of_bytes, sent = (
            _mean_over_steps(run.train, metric)
            for metric in ("refreshed", "refreshed_bytes", "sent_bytes")
        )
        found["statistics renewed"] = f"{share:.1%} ({of_bytes:.1%} of their bytes)"
        found["sent by a device, a step"] = sizes.text_of(sent)
        rejected, boosted = last["rejected"], last["boosted"]
        found["statistics and inverses that were not finite"] = f"{rejected:.0f}"
        found["layers with raised damping at the end"] = f"{boosted:.0f}"
    for record in run.train:
        if path := record.get("layer_not_finite"):
            where = f"{path} (step {record['step']:,})"
            found.setdefault("first layer with numbers that were not finite", where)
    for name in ("device", "host"):
        if used := run.curve("train", f"{name}_memory_bytes")[1]:
            found[f"memory of the {name}, peak"] = sizes.text_of(max(used))
    return found


def compare(runs: Mapping[str, Records]) -> str:
    """Returns a table of the results of several runs, by name, in Markdown."""
    columns = [results(run) for run in runs.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(c.get(name, "") for c in columns)) for name in names]
    return table(("", *runs), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown.

    Args:
      head: names of the columns.
      rows: their values.

    Returns:
      Lines of text; from three columns on, all but the first are aligned to the right.
    """
    align = ["---"] + ["--:" if len(head) > 2 else "---"] * (len(head) - 1)
    lines = [head, align, *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(arguments: Sequence[str]) -> None:
    """Runs the command.

    Args:
      arguments: the command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        "experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", type=pathlib.Path, metavar="DIR")
    directories = parser.parse_args(arguments).directories
    try:
        if len(directories) == 1:
            print(write(directories[0]))
        else:
            print(compare({str(path): read(path) for path in directories}))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


# === Parts ============================================================================


def _time(run: Records) -> list[str]:
    """The section on where the time went, if the records tell."""
    last = run.last
    keys = {phase: f"{phase}_seconds" for phase in metrics.PHASES}
    seconds = {phase: last[key] for phase, key in keys.items() if key in last}
    total = sum(seconds.values())
    rows = [
        (
            name,
            f"{spent:,.1f}",
            f"{spent / total:.1%}",
            f"{1e3 * spent / last['step']:,.2f}" if name in _OF_A_STEP else "",
        )
        for name, spent in seconds.items()
    ]
    if not rows:
        return []
    return [
        "## Where the time went",
        table(("phase", "seconds", "share", "ms a step"), rows),
        "Seconds of the process that reports. `compile` is the first step. A `step` "
        "lasts from its dispatch until its metrics have been read; the device may also "
        "compute while the process waits for `input`. Training time is all but "
        "`evaluate` and `checkpoint`.",
    ]


def _setup(run: Records) -> list[str]:
    """The section on the facts and the settings of the run."""
    facts, parts = dict(run.facts), []
    if facts:
        command, plan = facts.pop("command"), facts.pop("memory_plan", {})
        rows = [
            *((key.replace("_", " "), value) for key, value in facts.items()),
            *((f"memory plan: {p}", sizes.text_of(x)) for p, x in plan.items() if x),
        ]
        parts += ["## Set-up", f"```\n{command}\n```", table(("", ""), rows)]
    if changed := _changed(run.config):
        head = ("setting", "value", "default")
        parts += ["## Settings that differ from the defaults", table(head, changed)]
    return parts


def _changed(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns name, value and default of settings, without those of other optimizers.

    Those of K-FAC stay: other optimizers may use it as their preconditioner.
    """
    plain = json.dumps(dataclasses.asdict(settings.Config()), default=str)
    defaults = traverse_util.flatten_dict(json.loads(plain), sep=".")
    groups = {name for name, x in config.items() if isinstance(x, Mapping)}
    groups -= {config.get("optimizer"), "kfac", "recipe"}
    return [
        (f"`{name}`", f"`{json.dumps(x)}`", f"`{json.dumps(defaults.get(name))}`")
        for name, x in traverse_util.flatten_dict(config, sep=".").items()
        if x != defaults.get(name)
        and name not in ("data_dir", "directory", "resume")
        and name.partition(".")[0] not in groups
    ]


# === Picture ==========================================================================


def _draw(run: Records, path: pathlib.Path) -> None:
    """Draws the panels of which the run has metrics."""
    panels = []
    for ordinate, unit, labels in _PANELS:
        curves = {key: run.curve(*key.split()) for key in labels}
        if curves := {key: curve for key, curve in curves.items() if curve[0]}:
            panels.append((ordinate, unit, labels, curves))
    rows = -(-len(panels) // 2)
    figure = matplotlib.figure.Figure(
        figsize=(7.2, 2.4 * rows), layout="constrained", dpi=160
    )
    axes = iter(figure.subplots(rows, 2, squeeze=False).flat)
    for (ordinate, unit, labels, curves), panel in zip(panels, axes, strict=False):
        for index, (key, (steps, values)) in enumerate(curves.items()):
            x, y = thinned(steps), [value / unit for value in thinned(values)]
            marked = key.startswith("test")
            figures.plot(panel, index, x, y, labels[key], marked=marked)
            panel.update_datalim([(x[0], 0)])  # room above a level curve, too
        panel.set(xlabel="step", ylabel=ordinate, ylim=(0, None))
        if ordinate in ("accuracy", "statistics renewed"):
            panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
        if len(curves) > 1:
            panel.legend(loc="best", fontsize=8)
    for panel in axes:  # what is left of the last row
        panel.set_visible(False)
    figure.savefig(path)


def thinned(values: Sequence[float]) -> list[float]:
    """Returns at most 250 values, each the mean of its stretch of the curve."""
    size = max(-(-len(values) // _POINTS), 1)
    starts = range(0, len(values), size)
    return [float(np.mean(values[i : i + size])) for i in starts]


# === Numbers ==========================================================================


def _mean_over_steps(records: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Returns the mean over all steps; each record is the mean of several steps."""
    steps = np.diff([r["step"] for r in records], prepend=0)
    return float(np.average([r[metric] for r in records], weights=steps))


def _duration(seconds: float) -> str:
    """Returns seconds as ``1:02:03``, or as ``12.3 s`` below a minute."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
