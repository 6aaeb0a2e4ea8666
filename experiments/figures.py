"""One picture of several runs: loss and accuracy against steps and against time."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure
import matplotlib.ticker
from matplotlib.axes import Axes

from experiments import metrics

# Okabe & Ito (2008): told apart under every common form of colour blindness. Marker and
# line style repeat the distinction for print without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Attributes:
        steps: Training steps done.
        seconds: Training time, in seconds.
        values: The metric.
    """

    steps: list[int]
    seconds: list[float]
    values: list[float]


def read_curve(path: str | os.PathLike, kind: str, metric: str) -> Curve:
    """Reads one metric of a run.

    Args:
        path: The run's `metrics.jsonl`.
        kind: `"train"` or `"test"`.
        metric: Name of the metric; records in which it is missing or null are left out.

    Returns:
        The curve, in the order of the file.
    """
    records = [
        record
        for record in metrics.read_json_lines(path)
        if record["kind"] == kind and record.get(metric) is not None
    ]
    return Curve(
        steps=[record["step"] for record in records],
        seconds=[record["seconds"] for record in records],
        values=[record[metric] for record in records],
    )


def draw_runs(
    runs: Mapping[str, str | os.PathLike],
    path: str | os.PathLike,
    *,
    title: str = "",
) -> pathlib.Path:
    """Draws training loss and test accuracy of several runs, against steps and time.

    Args:
        runs: The `metrics.jsonl` of each run, by the name that the legend shows.
        path: File of the picture; its ending chooses the format.
        title: Title over the panels.

    Returns:
        `path`.

    Raises:
        ValueError: If there are no runs, or one has no record of training or test.
    """
    if not runs:
        raise ValueError("runs must name at least one run")
    losses = {name: _some(name, file, "train", "loss") for name, file in runs.items()}
    accuracies = {
        name: _some(name, file, "test", "accuracy") for name, file in runs.items()
    }
    figure = matplotlib.figure.Figure(figsize=(7.2, 5.2), layout="constrained", dpi=160)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, axis in enumerate(("steps", "seconds")):
        _panel(panels[0, column], losses, axis, marked=False)
        _panel(panels[1, column], accuracies, axis, marked=True)
    _label(panels)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _some(name: str, path: str | os.PathLike, kind: str, metric: str) -> Curve:
    curve = read_curve(path, kind, metric)
    if not curve.values:
        raise ValueError(f"run {name!r} has no {kind} {metric} in {path}")
    return curve


def plot(
    panel: Axes,
    index: int,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    *,
    marked: bool = True,
) -> None:
    """Draws one curve in the style of all pictures.

    Args:
        panel: Where.
        index: The curve's number, which chooses colour, line and marker.
        x: Abscissae.
        y: Ordinates.
        label: What the legend calls it.
        marked: Whether its points are marked.
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


def _panel(
    panel: Axes, curves: Mapping[str, Curve], axis: str, *, marked: bool
) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        label = f"{name}, {curve.values[-1]:.1%} at the end" if marked else name
        plot(panel, index, getattr(curve, axis), curve.values, label, marked=marked)


def _label(panels: Sequence[Sequence[Axes]]) -> None:
    panels[0][0].set_ylabel("training loss (nats)")
    panels[1][0].set_ylabel("test accuracy")
    panels[1][0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
    panels[1][0].set_xlabel("step")
    panels[1][1].set_xlabel("training time (s), compilation included")
    for panel in panels[1]:
        panel.set_xlim(left=0)
    panels[1][0].set_ylim(bottom=0)
    panels[1][0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
