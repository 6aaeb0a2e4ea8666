"""The parts that all studies share: their places, programs, records and legends."""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import matplotlib.figure
from matplotlib.axes import Axes

from experiments.runs import write_text

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "figures"

Outcome = TypeVar("Outcome")


def write_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes a record as the JSON file that is committed."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def outcomes_in(
    path: pathlib.Path,
    contestants: Mapping[str, Any],
    train: Callable[..., Mapping[str, Any]],
    outcome: Callable[..., Outcome],
) -> dict[str, Outcome]:
    """Returns the outcomes of the contestants, from a file if they have run before.

    The file is written when all have run; `outcome` is the dataclass of an outcome.
    """
    if not path.exists():
        print(f"{path.stem}: training {len(contestants)} contestants", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = train(contestants)
        kept = {name: dataclasses.asdict(x) for name, x in outcomes.items()}
        write_text(path, json.dumps(kept))
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {name: outcome(**values) for name, values in kept.items()}


def legend_below(
    figure: matplotlib.figure.Figure, panel: Axes, fontsize: float | None = None
) -> None:
    """Draws the legend of a panel's curves below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    options = {} if fontsize is None else {"fontsize": fontsize}
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, **options
    )
