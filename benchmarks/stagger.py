"""Step times of K-FAC over an inversion period, staggered and all at once.

    python -m benchmarks.stagger [--rounds 5]

SGD and K-FAC with inverses at every tenth step and blocks of 256 rows, with and without
``stagger``, train ResNet-50 in one process and take turns at every step; each step of
K-FAC is divided by SGD's next to it.  Statistics are renewed at the first step alone,
which belongs to the round that is not timed, so that the timed steps differ in nothing
but their inversions.  The work that the owner table counts for the same period is
printed beside the times.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import lbopt
from benchmarks import contestants, harness, timing
from benchmarks.workloads import Workload, resnet50
from lbopt import sharding
from lbopt.curvature.registry import Layers

PERIOD = 10
BLOCK_SIZE = 256
DEVICES = (1, 4, 8)


def measure(rounds: int, make: Callable[[], Workload] = resnet50) -> harness.Record:
    """Times ``rounds`` periods on one workload, and counts their work."""
    workload = make()
    harness.tell("compiling")
    setup = contestants.set_up(workload)
    runners = [
        contestants.sgd(workload),
        *(
            contestants.kfac(
                name,
                workload,
                setup,
                periods=lbopt.Periods(10**9, PERIOD, stagger),
                block_size=BLOCK_SIZE,
            )
            for name, stagger in (("at once", False), ("staggered", True))
        ),
    ]
    entries = timing.race(
        runners,
        lambda _index: workload.batch,
        rounds * PERIOD,
        warm_up=PERIOD,
        cycle=PERIOD,
    )
    base = np.asarray(entries[0]["seconds"])
    for entry in entries[1:]:
        quotients = np.asarray(entry["seconds"]) / base  # [rounds, PERIOD]
        spreads = [timing.spread(step) for step in quotients.T.tolist()]
        entry["ratios"] = [s._asdict() for s in spreads]
        entry["longest_over_median"] = evenness([s.median for s in spreads])
    return {
        "workload": workload.name,
        "description": workload.description,
        "rounds": rounds,
        "contestants": entries,
        "counted": [counted(setup.layers, devices) for devices in DEVICES],
    }


def evenness(steps: Sequence[float]) -> float:
    """Returns the longest step over the median one; 1 if all are alike."""
    return max(steps) / statistics.median(steps)


def counted(layers: Layers, devices: int) -> dict[str, Any]:
    """Counts the longest device's multiplications at each step, if staggered."""
    owners = sharding.owner_table(
        layers, devices, block_size=BLOCK_SIZE, inverse_period=PERIOD
    )
    work = owners.work().max(0).tolist()  # the others wait for the longest device
    return {"devices": devices, "work": work, "longest_over_median": evenness(work)}


def table(record: harness.Record) -> str:
    """Formats a record."""
    sgd, *others = record["contestants"]
    plain = statistics.median(s for row in sgd["seconds"] for s in row)
    steps = [
        ("step of the period", *map(str, range(PERIOD)), "longest / median"),
        *(
            (
                f"{runner['name']} / SGD",
                *(f"{step['median']:.2f}" for step in runner["ratios"]),
                f"{runner['longest_over_median']:.2f}",
            )
            for runner in others
        ),
        *(
            (
                f"counted, {one['devices']} devices",
                *(f"{work:.3g}" for work in one["work"]),
                f"{one['longest_over_median']:.2f}",
            )
            for one in record["counted"]
        ),
    ]
    return harness.page(
        f"{record['workload']}: {record['description']}; inverses at every {PERIOD}th "
        f"step, blocks of {BLOCK_SIZE}, statistics once",
        f"SGD: {1e3 * plain:.1f} ms a step; ratios are medians of {record['rounds']} "
        "rounds; counted: multiplications of the longest device, staggered",
        steps,
        timing.costs(record["contestants"]),
    )


main = harness.command(
    "stagger",
    __doc__,
    measure,
    table,
    contestants.SETTINGS | {"inverse_period": PERIOD, "block_size": BLOCK_SIZE},
    rounds=(5, "timed periods of ten steps, after one that is not timed"),
)

if __name__ == "__main__":
    main()
