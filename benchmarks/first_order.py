"""Step time, compile time and memory of LARS and NLCG beside plain SGD.

    python -m benchmarks.first_order [--steps 200]

All optimizers train ResNet-20 in one process through the same training step and take
turns at every step.  NLCG has its defaults (Fletcher and Reeves, diagonal BFGS, step
control) and runs once more with Polak and Ribière's formula.
"""

import statistics
from collections.abc import Callable

import optax

import lbopt
from benchmarks import contestants, harness, timing
from benchmarks.workloads import Workload, resnet20


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers by name, the baseline first."""
    rate, momentum = contestants.LEARNING_RATE, contestants.MOMENTUM
    return {
        "SGD": optax.sgd(rate, momentum=momentum),
        "LARS": lbopt.lars(rate, momentum=momentum),
        "optax.lars": lbopt.lars(rate, momentum=momentum, variant="optax"),
        "NLCG": lbopt.nlcg(rate),
        "NLCG, Polak-Ribière": lbopt.nlcg(rate, beta="polak_ribiere"),
    }


def measure(steps: int, make: Callable[[], Workload] = resnet20) -> harness.Record:
    """Times all optimizers on one workload."""
    workload = make()
    harness.tell("compiling")
    runners = [
        contestants.trained(name, workload, tx) for name, tx in optimizers().items()
    ]
    entries = timing.race(runners, lambda _index: workload.batch, steps, warm_up=1)
    for entry in entries:
        entry["ratios"] = timing.stretched_ratios(
            entry["seconds"], entries[0]["seconds"]
        )
    return {
        "workload": workload.name,
        "description": workload.description,
        "steps": steps,
        "contestants": entries,
    }


def table(record: harness.Record) -> str:
    """Formats a record."""
    base, *others = record["contestants"]
    return harness.page(
        f"{record['workload']}: {record['description']}, {record['steps']} steps",
        f"SGD: {1e3 * statistics.median(base['seconds']):.1f} ms a step; in "
        f"brackets smallest and largest of {timing.STRETCHES} stretches",
        timing.stretched_rows({e["name"]: e["ratios"] for e in others}),
        timing.costs(record["contestants"]),
    )


main = harness.command(
    "first_order",
    __doc__,
    measure,
    table,
    {"learning_rate": contestants.LEARNING_RATE},
    steps=(200, "timed steps of each optimizer, after one that is not timed"),
)

if __name__ == "__main__":
    main()
