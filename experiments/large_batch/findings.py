"""Findings of the cells: rows of the record, tables of each problem, a picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from experiments import figures, report, study
from experiments.large_batch.cells import Cell, Outcome
from experiments.large_batch.contestants import CONTESTANTS, VARIANTS, Contestant
from experiments.large_batch.problems import PROBLEMS, Problem


def row_of(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """Returns a line of the record, by seed where a cell has several.

    It holds steps, epochs and seconds to the target (`None` if it was not reached), the
    errors at the fixed budget and at the end, the settings, the processor, and all
    settings that were tried.
    """
    problem = PROBLEMS[cell.problem]
    budget = problem.steps_in_epochs(cell.batch_size)
    steps = [run.steps_to(problem.target) for run in outcome.best]
    epoch = problem.examples / cell.batch_size
    return {
        "problem": cell.problem,
        "optimizer": cell.contestant,
        "batch_size": cell.batch_size,
        "settings": outcome.best[0].settings,
        "steps": steps,
        "epochs": [None if s is None else round(s / epoch, 2) for s in steps],
        "seconds": [
            None if s is None else round(s * run.seconds_a_step, 2)
            for s, run in zip(steps, outcome.best, strict=True)
        ],
        "error_at_budget": [_or_none(run.error_at(budget)) for run in outcome.best],
        "last_error": [_or_none(run.last_error()) for run in outcome.best],
        "seconds_a_step": round(
            statistics.median(run.seconds_a_step for run in outcome.best), 5
        ),
        "processor": outcome.processor,
        "tried": [
            {
                **run.settings,
                "steps": run.steps_to(problem.target),
                "last_error": _or_none(run.last_error()),
            }
            for run in outcome.tried
        ],
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def mean_steps(row: Mapping[str, Any]) -> float | None:
    """Returns the mean over seeds of the steps to the target, if all reached it."""
    steps = row["steps"]
    return None if None in steps else statistics.mean(steps)


def spread(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the numbers of steps between which a repetition should be.

    They are the fewest and the most steps that a seed took to the target, a reading
    more to either side, as errors are known to a reading; `None` if a seed missed it.
    """
    if None in row["steps"]:
        return None
    reading = PROBLEMS[row["problem"]].period(row["batch_size"])
    return min(row["steps"]) - reading, max(row["steps"]) + reading


def compare(row: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """Returns a sentence that compares a repeated cell with the record's row."""
    ends = spread(row)
    before, now = ([s or "–" for s in x["steps"]] for x in (row, again))
    said = f"steps by seed: {before} on record, {now} again"
    if ends is None:
        same = sum(s is None for s in row["steps"]) == sum(
            s is None for s in again["steps"]
        )
        return f"{said}; as many seeds reach the target: {'yes' if same else 'no'}"
    mean = mean_steps(again)
    inside = mean is not None and ends[0] <= mean <= ends[1]
    return (
        f"{said}; the mean is {'within' if inside else 'NOT within'} the spread, "
        f"{ends[0]:g} to {ends[1]:g}"
    )


def best_of(
    rows: Sequence[Mapping[str, Any]], problem: str, batch_size: int, curvature: bool
) -> Mapping[str, Any] | None:
    """Returns the row with the fewest steps to the target, of one kind."""
    reached = [
        row
        for row in rows
        if (row["problem"], row["batch_size"]) == (problem, batch_size)
        and CONTESTANTS[row["optimizer"]].curvature is curvature
        and mean_steps(row) is not None
    ]
    return min(reached, key=lambda row: mean_steps(row) or math.inf, default=None)


def savings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the best of both kinds by batch size, and the share of steps saved."""
    found = []
    for problem in PROBLEMS.values():
        for batch_size in problem.batch_sizes:
            first, second = (
                best_of(rows, problem.name, batch_size, curvature)
                for curvature in (False, True)
            )
            if not (first and second):
                continue
            before, after = mean_steps(first) or 0, mean_steps(second) or 0
            found.append(
                {
                    "problem": problem.name,
                    "batch_size": batch_size,
                    "first_order": first["optimizer"],
                    "second_order": second["optimizer"],
                    "steps": [round(before, 1), round(after, 1)],
                    "saved": round(1 - after / before, 3),
                }
            )
    return found


def table_of_savings(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of what `savings` returns."""
    lines = []
    for line in found:
        names = (CONTESTANTS[line[k]].title for k in ("first_order", "second_order"))
        best = [f"{n}, {s:g}" for n, s in zip(names, line["steps"], strict=True)]
        lines.append(
            [
                line["problem"],
                f"{line['batch_size']:,}",
                *best,
                f"{100 * line['saved']:.0f} %",
            ]
        )
    return report.table(
        ["", "batch", "without curvature", "with", "fewer steps"], lines
    )


def table(rows: Sequence[Mapping[str, Any]], problem: Problem) -> str:
    """Returns a Markdown table of steps and seconds to the target by batch size.

    `(2/3)` marks a target that not all seeds reached, a dash one that none reached; an
    empty cell has not been run.
    """
    lines = []
    for name, contestant in CONTESTANTS.items():
        own = {
            row["batch_size"]: row
            for row in rows
            if (row["problem"], row["optimizer"]) == (problem.name, name)
        }
        if own:
            cells = [_cell(own.get(size)) for size in problem.batch_sizes]
            lines.append([contestant.title, *cells])
    return report.table(["", *(f"{size:,}" for size in problem.batch_sizes)], lines)


def table_of_largest(
    rows: Sequence[Mapping[str, Any]], who: Mapping[str, Contestant] = CONTESTANTS
) -> str:
    """Returns such a table of each problem's largest batch size."""
    found = {
        (row["optimizer"], row["problem"]): row
        for row in rows
        if row["batch_size"] == PROBLEMS[row["problem"]].batch_sizes[-1]
    }
    lines = [
        [c.title, *(_cell(found.get((name, problem))) for problem in PROBLEMS)]
        for name, c in who.items()
    ]
    titles = [f"{p.title}, {p.batch_sizes[-1]:,}" for p in PROBLEMS.values()]
    return report.table(["", *titles], lines)


def table_of_variants(
    rows: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]
) -> str:
    """Returns such a table of K-FAC and its variants."""
    who = {"kfac": CONTESTANTS["kfac"], **VARIANTS}
    return table_of_largest([*rows, *variants], who)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    reached = [(s, t) for s, t in zip(row["steps"], row["seconds"], strict=True) if s]
    if not reached:
        return "–"
    steps, seconds = (statistics.mean(column) for column in zip(*reached, strict=True))
    some = "" if len(reached) == len(row["steps"]) else f" ({len(reached)}/3)"
    return f"{steps:.0f}{some}, {seconds:.1f} s"


def noise_quartiles(readings: Sequence[Sequence[float]]) -> list[float]:
    """Returns the quartiles of `[step, noise scale]`, or nothing for fewer than two.

    Single readings say little: each is the quotient of two noisy numbers.
    """
    scales = [scale for _, scale in readings]
    return statistics.quantiles(scales, n=4) if len(scales) > 1 else []


def draw(
    rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[Sequence[float]]]
) -> matplotlib.figure.Figure:
    """Draws steps to the target, and errors at the fixed budget, by batch size.

    There is a row for each problem. Grey is the middle half of the gradient's noise
    scales along a run, which are `[step, noise scale]` by problem.

    Returns:
      The figure.
    """
    names = [p for p in PROBLEMS if any(row["problem"] == p for row in rows)]
    figure = matplotlib.figure.Figure(
        figsize=(7.2, 3.1 * len(names) + 0.6), layout="constrained", dpi=160
    )
    panels = figure.subplots(len(names), 2, squeeze=False)
    for (steps, errors), name in zip(panels, names, strict=True):
        problem = PROBLEMS[name]
        for index, (optimizer, contestant) in enumerate(CONTESTANTS.items()):
            own = sorted(
                (
                    r
                    for r in rows
                    if (r["problem"], r["optimizer"]) == (name, optimizer)
                ),
                key=lambda row: row["batch_size"],
            )
            reached = [row for row in own if mean_steps(row) is not None]
            figures.plot(
                steps,
                index,
                [row["batch_size"] for row in reached],
                [mean_steps(row) or 0 for row in reached],
                contestant.title,
            )
            at_budget = [row for row in own if None not in row["error_at_budget"]]
            figures.plot(
                errors,
                index,
                [row["batch_size"] for row in at_budget],
                [statistics.mean(row["error_at_budget"]) for row in at_budget],
                contestant.title,
            )
        scales = noise_quartiles(noise.get(name, ()))
        for panel in (steps, errors):
            if scales:
                panel.axvspan(scales[0], scales[2], color="0.93", zorder=0)
            panel.set_xlim(problem.batch_sizes[0] / 1.2, problem.batch_sizes[-1] * 1.2)
            panel.set_xscale("log", base=2)
            if any(len(line.get_xydata()) for line in panel.lines):
                panel.set_yscale("log")
                low, high = panel.get_ylim()
                marks = (1, 1.5, 2, 3, 5, 7) if high < 100 * low else (1, 3)
                panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=marks))
            panel.set_xticks(problem.batch_sizes)
            panel.xaxis.set_major_formatter(
                matplotlib.ticker.StrMethodFormatter("{x:,.0f}")
            )
            panel.yaxis.set_major_formatter(
                matplotlib.ticker.StrMethodFormatter("{x:g}")
            )
            panel.minorticks_off()
            panel.set_xlabel("batch size")
        steps.set_ylabel(f"steps to {problem.error} {problem.target:g}")
        errors.set_ylabel(f"{problem.error} after {problem.epochs} epochs")
        steps.set_title(problem.title, fontsize=9)
    study.legend_below(figure, panels[0][0], fontsize=8)
    return figure
