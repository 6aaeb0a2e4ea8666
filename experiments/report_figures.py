"""The pictures of reports: curves of one run or several, and what else a run did."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from experiments import figures, markdown
from experiments.run_records import RunRecords, seconds_by_phase

# As many points as a curve can show at this width.
_POINTS = 250

PHASE_NAMES = {
    "compile": "first step, compiling",
    "input": "waiting for input",
    "step": "step",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "report": "reporting",
    "other": "other",
}
"""What pictures and tables call the phases of a run."""

OF_A_STEP = ("input", "step", "report", "other")
"""Phases that every step goes through."""

# Okabe & Ito's, light and dark in turn, so that neighbours differ in grey as well.
_PHASE_COLOURS = {
    "compile": "#CC79A7",
    "input": "#D55E00",
    "step": "#0072B2",
    "evaluate": "#56B4E9",
    "checkpoint": "#009E73",
    "report": "#F0E442",
    "other": "#BBBBBB",
}
_DARK = ("step", "input", "checkpoint")


class Axis(NamedTuple):
    """What curves are drawn against.

    Attributes:
        key: Its name in the records.
        label: Its name in the picture.
        scale: Units of the records in one of the picture.
    """

    key: str
    label: str
    scale: float = 1.0


def axes_of(runs: Sequence[RunRecords]) -> list[Axis]:
    """What all runs can be drawn against: steps, epochs if they tell them, and time.

    Args:
        runs: The runs.

    Returns:
        The axes.
    """
    records = [r for run in runs for r in (*run.train, *run.test)]
    axes = [Axis("step", "step")]
    if all("epoch" in r for r in records):
        axes.append(Axis("epoch", "epoch"))
    time, compiling = "seconds", "with"
    if all("after_compiling" in r for r in records):
        time, compiling = "after_compiling", "without"
    longest = max(r[time] for r in records)
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0))
        if longest >= 2 * scale or unit == "s"
    )
    return [
        *axes,
        Axis(time, f"training time ({unit})\n{compiling} compilation", scale),
    ]


def draw_curves(runs: Mapping[str, RunRecords], path: str | os.PathLike) -> None:
    """Draws training loss and test accuracy against steps, epochs and time.

    Args:
        runs: The runs by name; a single one gets no legend, and its training accuracy.
        path: File of the picture.
    """
    alone = len(runs) == 1
    axes = axes_of(list(runs.values()))
    if alone:
        axes = [axis for axis in axes if axis.key != "epoch"]
    figure = _figure(3.1 * max(len(axes), 2.4), 5.4)
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        loss, accuracy = panels[:, column]
        for index, (name, run) in enumerate(runs.items()):
            if alone:
                for number, kind in ((0, "train"), (1, "test")):
                    label = {"train": "training"}.get(kind, kind)
                    _draw(loss, number, run, kind, "loss", axis, label)
                    _draw(accuracy, number, run, kind, "accuracy", axis, label)
            else:
                _draw(loss, index, run, "train", "loss", axis, name)
                _draw(accuracy, index, run, "test", "accuracy", axis, name)
        accuracy.set_xlabel(axis.label)
        accuracy.set_xlim(left=0)
    if alone:
        _add_epochs(panels[0, 0], next(iter(runs.values())))
    panels[0, 0].set_ylabel("loss (nats)" if alone else "training loss (nats)")
    panels[1, 0].set_ylabel("accuracy" if alone else "test accuracy")
    _percent(panels[1, 0])
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def draw_time(run: RunRecords, path: str | os.PathLike) -> None:
    """Draws where the time of a run and of its steps went, as stacked bars.

    Args:
        run: The run; its records tell the seconds of each phase.
        path: File of the picture.
    """
    whole = seconds_by_phase(run)
    of_steps = {name: whole[name] for name in OF_A_STEP}
    milliseconds = 1e3 * sum(of_steps.values()) / run.last["step"]
    digits = 0 if milliseconds >= 100 else 1
    figure = _figure(7.2, 2.6)
    panel = figure.subplots()
    rows = {
        f"whole run\n{markdown.duration(sum(whole.values()))}": whole,
        f"mean step\n{milliseconds:,.{digits}f} ms": of_steps,
    }
    for row, seconds in enumerate(rows.values()):
        _stack(panel, row, seconds)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.set_xlim(0, 1)
    panel.set_xlabel("share of time")
    panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def draw_curvature(run: RunRecords, path: str | os.PathLike) -> None:
    """Draws what was renewed of the curvature, its age, and what it cost to send.

    Args:
        run: The run; its records hold `refreshed`.
        path: File of the picture.
    """
    sends = any(r.get("sent_bytes") for r in run.train)
    figure = _figure(7.2, 5.6 if sends else 4.0)
    panels = figure.subplots(3 if sends else 2, 1, sharex=True)
    axis = Axis("step", "step")
    share, age = panels[:2]
    _draw(share, 0, run, "train", "refreshed", axis, "of statistics")
    _draw(share, 1, run, "train", "refreshed_bytes", axis, "of their bytes")
    share.set_ylabel("renewed")
    share.set_ylim(-0.03, 1.03)
    _percent(share)
    _draw(age, 0, run, "train", "inverse_age", axis, "mean")
    _draw(age, 1, run, "train", "inverse_age_max", axis, "oldest")
    age.set_ylabel("age of inverses\n(steps)")
    age.set_ylim(bottom=0)
    for panel in (share, age):
        panel.legend(loc="best", fontsize=8, framealpha=0.9)
    if sends:
        steps, sent = _thinned(*run.curve("train", "sent_bytes", "step"))
        figures.plot(panels[2], 0, steps, [x / 1e6 for x in sent], "", marked=False)
        panels[2].set_ylabel("sent by a device\n(MB a step)")
        panels[2].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    figure.savefig(path)


def draw_resources(run: RunRecords, path: str | os.PathLike) -> None:
    """Draws speed and memory over the run.

    Args:
        run: The run; its records hold `images_per_second` and memory.
        path: File of the picture.
    """
    figure = _figure(7.2, 2.6)
    speed, memory = figure.subplots(1, 2)
    _draw(speed, 0, run, "train", "images_per_second", Axis("step", "step"), "")
    speed.set_ylabel("images/s")
    names = {"host_memory_bytes": "host process", "device_memory_bytes": "device, peak"}
    for index, (key, name) in enumerate(names.items()):
        steps, used = run.curve("train", key, "step")
        if steps:
            used = [x / 2**30 for x in used]
            figures.plot(memory, index, steps, used, name, marked=False)
    memory.set_ylabel("memory (GiB)")
    memory.legend(loc="lower right", fontsize=8)
    for panel in (speed, memory):
        panel.set_ylim(bottom=0)
        panel.set_xlabel("step")
        panel.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    figure.savefig(path)


def _stack(panel: Axes, row: int, seconds: Mapping[str, float]) -> None:
    """One bar of the shares of phases, with numbers where they fit."""
    left, total = 0.0, sum(seconds.values())
    for name, spent in seconds.items():
        share = spent / total if total else 0.0
        panel.barh(
            row,
            share,
            left=left,
            color=_PHASE_COLOURS[name],
            edgecolor="white",
            linewidth=0.5,
            label=PHASE_NAMES[name] if row == 0 else None,
        )
        if share >= 0.06:
            ink = "white" if name in _DARK else "black"
            middle = left + share / 2
            panel.text(middle, row, f"{share:.0%}", color=ink, ha="center", va="center")
        left += share


def _figure(width: float, height: float) -> matplotlib.figure.Figure:
    return matplotlib.figure.Figure(
        figsize=(width, height), layout="constrained", dpi=160
    )


def _draw(
    panel: Axes,
    index: int,
    run: RunRecords,
    kind: str,
    metric: str,
    axis: Axis,
    label: str,
) -> None:
    x, y = _thinned(*run.curve(kind, metric, axis.key))
    x = [value / axis.scale for value in x]
    figures.plot(panel, index, x, y, label, marked=kind == "test")


def _add_epochs(panel: Axes, run: RunRecords) -> None:
    """A second scale for a panel over steps."""
    if "epoch" in run.last:
        steps = run.last["step"] / run.last["epoch"]
        scale = (lambda step: step / steps, lambda epoch: epoch * steps)
        panel.secondary_xaxis("top", functions=scale).set_xlabel("epoch")


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list, list]:
    """A curve of at most so many points, each a mean over its stretch."""
    size = -(-len(x) // _POINTS)
    if size <= 1:
        return list(x), list(y)
    starts = range(0, len(x), size)
    return (
        [float(np.mean(x[i : i + size])) for i in starts],
        [float(np.mean(y[i : i + size])) for i in starts],
    )


def _percent(panel: Axes) -> None:
    panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
