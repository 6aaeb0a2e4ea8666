"""A picture of several runs: loss and accuracy against steps and against time."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes

from experiments import metrics

# Okabe & Ito (2008): told apart under every common form of colour blindness. Marker and
# line style repeat the distinction for print without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")


class Curve(NamedTuple):
    """A metric of a run.

    Attributes:
      steps: training steps done.
      seconds: training time, in seconds.
      values: the metric.
    """

    steps: list[int]
    seconds: list[float]
    values: list[float]


def read_curve(path: str | os.PathLike, kind: str, metric: str) -> Curve:
    """Reads a metric of a run.

    Args:
      path: the ``metrics.jsonl`` of the run.
      kind: ``"train"`` or ``"test"``.
      metric: name of the metric; records in which it is missing or null are left out.

    Returns:
      The curve, in the order of the file.
    """
    records = [
        record
        for record in metrics.read_json_lines(path)
        if record["kind"] == kind and record.get(metric) is not None
    ]
    keys = ("step", "seconds", metric)
    return Curve(*([record[key] for record in records] for key in keys))


def draw_runs(
    runs: Mapping[str, str | os.PathLike], path: str | os.PathLike, *, title: str
) -> pathlib.Path:
    """Draws training loss and test accuracy of several runs, against steps and time.

    Args:
      runs: the ``metrics.jsonl`` of each run, by its name in the legend.
      path: file of the picture; its suffix selects the format.
      title: title over the panels.

    Returns:
      ``path``.

    Raises:
      ValueError: if a run has no record of training or of an evaluation.
    """
    figure = matplotlib.figure.Figure(figsize=(7.2, 5.2), layout="constrained", dpi=160)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for index, (name, file) in enumerate(runs.items()):
        loss = _some(name, file, "train", "loss")
        accuracy = _some(name, file, "test", "accuracy")
        label = f"{name}, {accuracy.values[-1]:.1%} at the end"
        for column, axis in enumerate(("steps", "seconds")):
            x, end = getattr(loss, axis), getattr(accuracy, axis)
            plot(panels[0, column], index, x, loss.values, name, marked=False)
            plot(panels[1, column], index, end, accuracy.values, label)
    panels[0, 0].set_ylabel("training loss (nats)")
    panels[1, 0].set_ylabel("test accuracy")
    panels[1, 0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
    panels[1, 0].set_xlabel("step")
    panels[1, 1].set_xlabel("training time (s), compilation included")
    for panel in panels[1]:
        panel.set_xlim(left=0)
    panels[1, 0].set_ylim(bottom=0)
    panels[1, 0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plot(
    panel: Axes,
    index: int,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    *,
    marked: bool = True,
) -> None:
    """Draws a curve in the common style.

    Args:
      panel: the axes.
      index: number of the curve, which selects colour, line style and marker.
      x: abscissae.
      y: ordinates.
      label: text of the legend.
      marked: whether points are marked.
    """
    panel.plot(
        x,
        y,
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)] if marked else "",
        markersize=3.5,
        linewidth=1.5,
    )
    panel.grid(color="0.92", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _some(name: str, path: str | os.PathLike, kind: str, metric: str) -> Curve:
    curve = read_curve(path, kind, metric)
    if not curve.values:
        raise ValueError(
            f"run {name!r} must have a {kind} {metric} in {path}; train it as far as "
            "its first evaluation"
        )
    return curve
