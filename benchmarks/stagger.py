"""How even K-FAC's steps are over an inversion period, staggered and all at once.

    python -m benchmarks.stagger [--workload resnet50] [--rounds 5]

SGD and K-FAC with ``Periods(inverses=10)``, with and without ``stagger``, run in one
process and take turns at every step; each step of K-FAC is divided by SGD's beside it.
Statistics are renewed at the first step alone, which belongs to the round that is not
timed: steps then differ in nothing but their inversions, and none has to be left out.
Beside the times stands what the owner table counts for the same period.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lbopt
from benchmarks import contestants, reporting, timing
from benchmarks.workloads import WORKLOADS, Workload
from lbopt import sharding
from lbopt.curvature.registry import Layers

PERIOD = 10
BLOCK_SIZE = 256
DEVICES = (1, 4, 8)
BOUND = 1.3
"""The longest step over the median, at most, where devices have enough to spread."""
ENOUGH = 10
"""So many blocks of the largest size on each device are enough."""
_NEVER_AGAIN = 10**9
_SETTINGS = {
    "learning_rate": contestants.LEARNING_RATE,
    "momentum": contestants.MOMENTUM,
    "damping": contestants.DAMPING,
    "inverse_period": PERIOD,
    "block_size": BLOCK_SIZE,
}
_NAMES = ("SGD", "at once", "staggered")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    record = reporting.begin("stagger", argv, _SETTINGS)
    record |= measure(WORKLOADS[options.workload](), options.rounds)
    reporting.write(record, options.output)
    print(table(record))
    return record


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Times the steps of the period, and counts their work.

    Args:
      workload: the problem.
      rounds: periods that are timed.

    Returns:
      The record without its head.
    """
    jax.jit(jnp.sin).lower(0.0).compile()  # the compiler's own start is nobody's
    reporting.tell("compiling")
    sgd, at_once, staggered = _NAMES
    setup = contestants.set_up(workload)
    runners = [
        contestants.sgd(workload),
        contestants.with_curvature(at_once, workload, setup, _kfac(stagger=False)),
        contestants.with_curvature(staggered, workload, setup, _kfac(stagger=True)),
    ]
    samples = timing.interleave(
        runners, lambda index: workload.batch, rounds, PERIOD, reporting.tell
    )
    entries = []
    for runner in runners:
        own = samples[runner.name]
        result = reporting.entry(runner, own.seconds, own.losses)
        if runner.has_curvature:
            spreads = ratios(own.seconds, samples[sgd].seconds)
            result["ratios"] = [s._asdict() for s in spreads]
            result["longest_over_median"] = evenness([s.median for s in spreads])
        entries.append(result)
    return {
        "workload": workload.name,
        "description": workload.description,
        "rounds": rounds,
        "contestants": entries,
        "counted": [counted(setup.layers, devices) for devices in DEVICES],
    }


def ratios(
    own: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> list[timing.Spread]:
    """Each step of the period over the baseline's beside it.

    Args:
      own: seconds of the contestant, by round and step.
      base: those of the baseline.

    Returns:
      For each step the spread over the rounds.
    """
    quotients = np.asarray(own) / np.asarray(base)
    return [timing.spread(step.tolist()) for step in quotients.T]


def evenness(steps: Sequence[float]) -> float:
    """The longest step over the median one; 1 where all are alike."""
    return max(steps) / statistics.median(steps)


def counted(layers: Layers, devices: int) -> dict[str, Any]:
    """What the owner table says of a period of staggered inversions.

    Args:
      layers: those of the model.
      devices: how many devices.

    Returns:
      ``work``, the longest device's multiplications at each step;
      ``longest_over_median`` of them; ``fewest_blocks``, of the largest size, that a
      device owns; and whether the acceptance bound applies and is kept.
    """
    owners = sharding.owner_table(
        layers, devices, block_size=BLOCK_SIZE, inverse_period=PERIOD
    )
    work = owners.work().max(0).tolist()  # the others wait for the longest device
    largest = max(unit.factor.work for unit in owners.units)
    blocks = [
        owner
        for unit, owner in zip(owners.units, owners.owner, strict=True)
        if unit.factor.work == largest
    ]
    fewest = int(np.bincount(blocks, minlength=devices).min())
    longest = evenness(work)
    return {
        "devices": devices,
        "work": work,
        "longest_over_median": longest,
        "fewest_blocks": fewest,
        "bound_applies": fewest >= ENOUGH,
        "bound_kept": longest <= BOUND,
    }


def table(record: dict[str, Any]) -> str:
    """The tables of a record.

    Args:
      record: what ``measure`` returned.

    Returns:
      Text of several lines.
    """
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
    bounds = [("devices", "blocks on a device", f"longest ≤ {BOUND} × median")]
    bounds += [
        (str(one["devices"]), f"≥ {one['fewest_blocks']}", _verdict(one))
        for one in record["counted"]
    ]
    return "\n".join(
        [
            "",
            f"{record['workload']}: {record['description']}; inverses every {PERIOD} "
            f"steps, blocks of {BLOCK_SIZE}, statistics once",
            f"SGD: {1e3 * plain:.1f} ms a step; ratios are medians of "
            f"{record['rounds']} rounds; counted: multiplications of the longest "
            "device, staggered",
            *reporting.aligned(steps),
            "",
            *reporting.aligned(bounds),
            "",
            *reporting.costs(record["contestants"]),
        ]
    )


def _verdict(one: dict[str, Any]) -> str:
    kept = "kept" if one["bound_kept"] else "NOT KEPT"
    return kept if one["bound_applies"] else f"{kept}, not required"


def _kfac(*, stagger: bool) -> Any:
    return functools.partial(
        lbopt.kfac,
        contestants.LEARNING_RATE,
        momentum=contestants.MOMENTUM,
        damping=contestants.DAMPING,
        periods=lbopt.Periods(_NEVER_AGAIN, PERIOD, stagger),
        block_size=BLOCK_SIZE,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("stagger", __doc__)
    parser.add_argument("--workload", default="resnet50", choices=WORKLOADS)
    parser.add_argument(
        "--rounds", type=reporting.positive, default=5, help="timed periods of 10 steps"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
