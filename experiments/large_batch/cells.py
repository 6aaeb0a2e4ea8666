"""One cell of the study: an optimizer at a batch size, searched, then repeated.

A cell is kept in a file of its own as soon as it is done, so that a study goes on where
it was stopped, and cells can be run by several processes.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

from experiments import processor
from experiments.large_batch.contestants import CONTESTANTS, EVERYONE, VARIANTS
from experiments.large_batch.problems import PROBLEMS, Problem, Task
from experiments.large_batch.runs import Run, Runner
from experiments.runs import write_text

TRIALS = 8
"""Settings tried of every optimizer at every batch size, with seed 0."""
SEEDS = (0, 1, 2)
"""Seeds with which the best setting runs."""


class Cell(NamedTuple):
    """An optimizer on a problem, at a batch size."""

    problem: str
    contestant: str
    batch_size: int

    def __str__(self) -> str:
        """Returns the name on the command line: `strokes/kfac/640`."""
        return "/".join(map(str, self))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        tried: A run of each setting, seed 0.
        best: The runs of the best setting, one a seed, the first of them from `tried`.
        processor: The processor that they ran on.
    """

    tried: list[Run]
    best: list[Run]
    processor: str

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Outcome":
        """Builds an outcome from what `dataclasses.asdict` returned for it."""
        runs = {k: [Run(**run) for run in kept[k]] for k in ("tried", "best")}
        return cls(**runs, processor=kept["processor"])


def all_cells() -> list[Cell]:
    """Returns every cell: contestants at all batch sizes, variants at the largest."""
    return [
        Cell(problem.name, name, batch_size)
        for problem in PROBLEMS.values()
        for batch_size in problem.batch_sizes
        for name in CONTESTANTS
    ] + [
        Cell(problem.name, name, problem.batch_sizes[-1])
        for problem in PROBLEMS.values()
        for name in VARIANTS
    ]


def parse(text: str) -> Cell:
    """Returns a cell from its name, such as `strokes/kfac/640`.

    Raises:
        ValueError: If there is no such cell.
    """
    named = {str(cell): cell for cell in all_cells()}
    if text not in named:
        raise ValueError(
            f"cell={text!r} must be PROBLEM/OPTIMIZER/BATCH with {list(PROBLEMS)}, "
            f"{list(CONTESTANTS)} and one of the problem's batch sizes: "
            + ", ".join(f"{p.name} {p.batch_sizes}" for p in PROBLEMS.values())
            + f"; at the largest also {list(VARIANTS)}"
        )
    return named[text]


def order(run: Run, problem: Problem) -> tuple[float, float]:
    """Returns the sort key of a run: fewest steps to the target, then lowest error."""
    steps = run.steps_to(problem.target)
    return (math.inf if steps is None else steps, run.last_error())


def measure(cell: Cell, task: Task) -> Outcome:
    """Runs a cell on its problem's opened task, and returns the outcome."""
    problem, contestant = PROBLEMS[cell.problem], EVERYONE[cell.contestant]
    runner = Runner(problem, contestant, cell.batch_size, task)
    tried = [
        runner.run(settings, SEEDS[0]) for settings in contestant.draw(problem, TRIALS)
    ]
    first = min(tried, key=lambda run: order(run, problem))
    best = [first, *(runner.run(first.settings, seed) for seed in SEEDS[1:])]
    return Outcome(tried, best, processor.name())


def path_of(cell: Cell, folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of a cell's file."""
    return folder / f"{'-'.join(map(str, cell))}.json"


def keep(cell: Cell, outcome: Outcome, folder: pathlib.Path) -> None:
    """Writes a cell's file as a whole."""
    write_text(path_of(cell, folder), json.dumps(dataclasses.asdict(outcome)))


def kept(cell: Cell, folder: pathlib.Path) -> Outcome | None:
    """Returns the outcome of a cell that has been run, else None."""
    path = path_of(cell, folder)
    if not path.exists():
        return None
    return Outcome.from_json(json.loads(path.read_text(encoding="utf-8")))
