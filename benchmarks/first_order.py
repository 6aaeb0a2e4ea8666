"""Step time, compile time and memory of LARS and NLCG beside plain SGD.

    python -m benchmarks.first_order [--workload resnet20] [--steps 200]

All optimizers run in one process through the same training step and take turns at every
step; ratios are taken between neighbouring steps.  NLCG has its defaults (Fletcher and
Reeves, the diagonal of BFGS, step control) and, beside them, Polak and Ribière.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import optax

import lbopt
from benchmarks import contestants, reporting, timing
from benchmarks.workloads import WORKLOADS, Workload

_SETTINGS = {"learning_rate": contestants.LEARNING_RATE}


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizers by name; the first is the baseline."""
    rate, momentum = contestants.LEARNING_RATE, contestants.MOMENTUM
    return {
        "SGD": optax.sgd(rate, momentum=momentum),
        "LARS": lbopt.lars(rate, momentum=momentum),
        "optax.lars": lbopt.lars(rate, momentum=momentum, variant="optax"),
        "NLCG": lbopt.nlcg(rate),
        "NLCG, Polak-Ribière": lbopt.nlcg(rate, beta="polak_ribiere"),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    record = reporting.begin("first_order", argv, _SETTINGS)
    record |= measure(WORKLOADS[options.workload](), options.steps)
    reporting.write(record, options.output)
    print(table(record))
    return record


def measure(workload: Workload, steps: int) -> dict[str, Any]:
    """Times all optimizers on one workload.

    Args:
      workload: the problem.
      steps: of each, after one that is not timed.

    Returns:
      The workload's part of the record.
    """
    reporting.tell(f"{workload.name}: compiling")
    runners = [
        contestants.without_curvature(name, workload, tx)
        for name, tx in optimizers().items()
    ]
    seconds: dict[str, list[float]] = {r.name: [] for r in runners}
    losses: dict[str, list[float]] = {r.name: [] for r in runners}
    for turn in timing.turns(runners, lambda index: workload.batch, steps + 1):
        losses[turn.name].append(turn.loss)
        if turn.index:
            seconds[turn.name].append(turn.seconds)
    base = seconds[runners[0].name]
    entries = []
    for runner in runners:
        own = seconds[runner.name]
        entry = reporting.entry(runner, own, losses[runner.name])
        entries.append(entry | {"ratios": timing.stretched_ratios(own, base)})
    return {
        "workload": workload.name,
        "description": workload.description,
        "steps": steps,
        "contestants": entries,
    }


def table(record: dict[str, Any]) -> str:
    """The tables of a record.

    Args:
      record: what ``measure`` returned.

    Returns:
      Text of several lines.
    """
    base, *others = record["contestants"]
    rows: list[tuple[str, ...]] = [("over SGD", "total / total", "median of steps")]
    for entry in others:
        figures = (timing.Spread(**entry["ratios"][k]) for k in ("total", "paired"))
        rows.append((entry["name"], *map(str, figures)))
    return "\n".join(
        [
            "",
            f"{record['workload']}: {record['description']}, {record['steps']} steps",
            f"SGD: {1e3 * statistics.median(base['seconds']):.1f} ms a step; in "
            f"brackets smallest and largest of {timing.STRETCHES} stretches",
            *reporting.aligned(rows),
            "",
            *reporting.costs(record["contestants"]),
        ]
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("first_order", __doc__)
    parser.add_argument("--workload", default="resnet20", choices=WORKLOADS)
    parser.add_argument("--steps", type=reporting.positive, default=200)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
