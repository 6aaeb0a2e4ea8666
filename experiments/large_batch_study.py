"""Ten optimizers by batch size, each tuned alike: steps to a target, and time.

    python -m experiments.large_batch_study                  all cells that are missing
    python -m experiments.large_batch_study --minutes 30     for so long, then stop
    python -m experiments.large_batch_study --again CELL     one, beside the record's
    python -m experiments.large_batch_study --draw           record, picture and tables

A cell is an optimizer at a batch size on a problem, such as `strokes/kfac/640`. Eight
settings are tried with seed 0, drawn alike for everyone at every batch size; the best,
which needs the fewest steps to the target or comes closest to it, is repeated with two
more seeds. Variants of K-FAC, such as `strokes/kfac_data_labels/2560`, show what its
steps depend on at the largest batches. Cells are run by as many processes as there are
cores, each with one thread; what is finished is kept in
`experiments/results/large_batch_study` and not repeated.

The gradient's noise scale is read along a run of SGD, training loss beside test error
along three runs at the largest batch, and the quadratic model's momentum. Writes
`experiments/results/large_batch_study.json`, `docs/figures/large_batch.png` and
`docs/figures/large_batch_curves.png`.
"""

import argparse
import datetime
import functools
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import study, tasks
from experiments.large_batch import cells, curves, findings, noise_scale
from experiments.large_batch.cells import Cell, Outcome
from experiments.large_batch.contestants import CONTESTANTS, VARIANTS
from experiments.large_batch.problems import PROBLEMS, Task
from experiments.large_batch.runs import Runner

RESULTS = study.RESULTS / "large_batch_study.json"
CELLS = RESULTS.with_suffix("")
FIGURE = study.FIGURES / "large_batch.png"
CURVES_FIGURE = FIGURE.with_stem("large_batch_curves")
COMMAND = "python -m experiments.large_batch_study"
Known = dict[Cell, Outcome]
NOISE_BATCH = 640
"""Batch size at which the noise scale is read along SGD, or the nearest."""
CURVES_PROBLEM = "strokes"
"""The problem of the single runs that are read."""
LOSSES_OF = ("muon", "kfac", "kfac_quadratic")
"""The optimizers whose training loss is read beside the error."""
LENGTHS_AT = (640, 2560)
"""Batch sizes at which the steps under the quadratic model are read."""


@functools.cache
def task_of(problem: str) -> Task:
    """Returns a problem's task, opened once in a process."""
    return PROBLEMS[problem].task()


def run_cell(cell: Cell, deadline: float) -> float | None:
    """Runs and keeps a cell; returns its seconds, or None after the deadline."""
    if (begin := time.time()) > deadline:
        return None
    cells.keep(cell, cells.measure(cell, task_of(cell.problem)), CELLS)
    jax.clear_caches()
    return time.time() - begin


def run_missing(minutes: float, processes: int) -> None:
    """Runs the missing cells, several at a time, and begins none after `minutes`."""
    missing = [cell for cell in cells.all_cells() if not cells.kept(cell, CELLS)]
    deadline = time.time() + 60 * minutes
    # The largest batches first: what they say is what the study is for.
    queue = [(cell, deadline) for cell in sorted(missing, key=_rank_of_batch)]
    left = len(queue)
    for (cell, _), seconds in tasks.completed(run_cell, queue, processes):
        if seconds is not None:
            left -= 1
            print(f"{cell}: {seconds:.0f} s, {left} to go", flush=True)


def _rank_of_batch(cell: Cell) -> int:
    """Returns 0 for a problem's largest batch size, 1 for the next."""
    return PROBLEMS[cell.problem].batch_sizes[::-1].index(cell.batch_size)


def noise_cell(problem_name: str, known: Known) -> Cell | None:
    """Returns the cell of SGD along whose best run the noise scale is read."""
    sizes = sorted(
        PROBLEMS[problem_name].batch_sizes, key=lambda size: abs(size - NOISE_BATCH)
    )
    ranked = (Cell(problem_name, "sgd", size) for size in sizes)
    return next((cell for cell in ranked if cell in known), None)


def read_noise(problem_name: str, known: Known) -> list[list[float]]:
    """Returns `[step, noise scale]` along the best run of SGD, if it is known."""
    problem = PROBLEMS[problem_name]
    cell = noise_cell(problem_name, known)
    if cell is None:
        return []
    task = task_of(problem_name)
    runner = Runner(problem, CONTESTANTS["sgd"], cell.batch_size, task)
    examples = problem.batch_sizes[-1]
    parts = max(parts for parts in range(2, 11) if examples % parts == 0)
    batch = {name: jnp.asarray(x[:examples]) for name, x in task.train.items()}

    @jax.jit
    def read(params: Any, model_state: Any) -> tuple[jax.Array, jax.Array]:
        def gradient(part: Any) -> Any:
            def loss(params: Any) -> Any:
                return task.loss_fn(params, model_state, part, None)[0]

            return jax.grad(loss)(params)

        return noise_scale.simple_noise_scale(gradient, batch, parts)

    found: list[list[float]] = []

    def at_reading(step: int, error: float, state: Any) -> None:
        del error
        noise, signal = map(float, read(state.params, state.model_state))
        if signal > 0 and noise > 0:
            found.append([step, round(noise / signal, 1)])

    runner.run(known[cell].best[0].settings, 0, at_reading)
    return found


def losses_cells() -> list[Cell]:
    """Returns the cells whose training loss is read beside the error."""
    largest = PROBLEMS[CURVES_PROBLEM].batch_sizes[-1]
    return [Cell(CURVES_PROBLEM, name, largest) for name in LOSSES_OF]


def lengths_cells() -> list[Cell]:
    """Returns the cells whose steps under the quadratic model are read."""
    return [Cell(CURVES_PROBLEM, "kfac_quadratic", size) for size in LENGTHS_AT]


def read_losses(known: Known) -> dict[str, list[list[float]]]:
    """Returns training losses and errors along the best runs, by optimizer."""
    problem, task = PROBLEMS[CURVES_PROBLEM], task_of(CURVES_PROBLEM)
    return {
        cell.contestant: curves.read_losses(
            problem, CONTESTANTS[cell.contestant], known[cell].best[0].settings, task
        )
        for cell in losses_cells()
        if cell in known
    }


def read_lengths(known: Known) -> dict[str, list[list[float]]]:
    """Returns the steps under the quadratic model, by batch size."""
    problem, task = PROBLEMS[CURVES_PROBLEM], task_of(CURVES_PROBLEM)
    return {
        str(cell.batch_size): curves.read_lengths(
            problem, cell.batch_size, known[cell].best[0].settings, task
        )
        for cell in lengths_cells()
        if cell in known
    }


def read_along(known: Known) -> dict[str, dict[str, float]]:
    """Returns the settings of the single runs by cell; if they change, all are anew."""
    noise = [noise_cell(name, known) for name in PROBLEMS]
    return {
        str(cell): known[cell].best[0].settings
        for cell in (*noise, *losses_cells(), *lengths_cells())
        if cell is not None and cell in known
    }


def known_cells() -> Known:
    """Returns the cells that have been run."""
    found = {cell: cells.kept(cell, CELLS) for cell in cells.all_cells()}
    return {cell: outcome for cell, outcome in found.items() if outcome is not None}


def write_record() -> dict[str, Any]:
    """Writes the record and the pictures from the cells; returns the record."""
    known = known_cells()
    rows, variants = (
        [
            findings.row_of(cell, outcome)
            for cell, outcome in known.items()
            if cell.contestant in who
        ]
        for who in (CONTESTANTS, VARIANTS)
    )
    before = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    along = read_along(known)
    if before.get("read_along") == along:
        noise, losses, lengths = (
            before[kind] for kind in ("noise_scale", "losses", "lengths")
        )
    else:
        noise = {name: read_noise(name, known) for name in PROBLEMS}
        losses, lengths = read_losses(known), read_lengths(known)
    record = {
        "command": COMMAND,
        "date": datetime.date.today().isoformat(),
        "processors": sorted({row["processor"] for row in rows}),
        "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
        "budget": {
            "trials": cells.TRIALS,
            "seeds": list(cells.SEEDS),
            "problems": {
                p.name: {
                    "target": p.target,
                    "epochs": p.epochs,
                    "least_steps": p.least_steps,
                }
                for p in PROBLEMS.values()
            },
        },
        "missing": [str(c) for c in cells.all_cells() if c not in known],
        "savings": findings.savings(rows),
        "read_along": along,
        "noise_scale": noise,
        "losses": losses,
        "lengths": lengths,
        "rows": rows,
        "variants": variants,
    }
    study.write_record(RESULTS, record)
    if rows:
        findings.draw(rows, noise).savefig(FIGURE)
    if losses:
        problem = PROBLEMS[CURVES_PROBLEM]
        curves.draw(losses, lengths, problem).savefig(CURVES_FIGURE)
    return record


def show(record: dict[str, Any]) -> None:
    """Prints the tables and the budget of a record."""
    for problem in PROBLEMS.values():
        print(f"\n{problem.title}: steps to {problem.error} {problem.target:g}, time\n")
        print(findings.table(record["rows"], problem))
        scales = findings.noise_quartiles(record["noise_scale"][problem.name])
        print(
            f"\ngradient noise scale along SGD, quartiles: {[round(x) for x in scales]}"
        )
    print(f"\nlargest batches\n\n{findings.table_of_largest(record['rows'])}")
    variants = findings.table_of_variants(record["rows"], record["variants"])
    print(f"\nK-FAC changed\n\n{variants}\n")
    print(f"best by batch size\n\n{findings.table_of_savings(record['savings'])}\n")
    budget = record["budget"]
    print(
        f"budget: {budget['trials']} settings and {len(budget['seeds'])} seeds of each "
        f"optimizer at each batch size; {len(record['missing'])} cells are missing"
    )


def repeat(cell: Cell) -> None:
    """Runs a cell again, keeps nothing, and prints it beside the record."""
    again = findings.row_of(cell, cells.measure(cell, task_of(cell.problem)))
    known = cells.kept(cell, CELLS)
    if known is not None:
        row = findings.row_of(cell, known)
        print("record", row)
    print("again", again)
    if known is not None:
        print(findings.compare(row, again))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with an error if a cell is not known."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", metavar="CELL", help="such as strokes/kfac/640")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    # A cell has one thread to itself, so that times of cells can be compared.
    flags = "--xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    if options.again:
        try:
            cell = cells.parse(options.again)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        repeat(cell)
        return
    if not options.draw:
        run_missing(options.minutes, options.processes)
    show(write_record())


if __name__ == "__main__":
    main()
