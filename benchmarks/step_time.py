"""Step time, compile time and memory of K-FAC beside plain SGD and kfac-jax.

    python -m benchmarks.step_time [--workload resnet20|autoencoder|resnet50|all]

prints a table for each workload.  All optimizers run in one process and take turns at
every step.  A round is four steps (``CYCLE``): the statistics are renewed every second
step and the inverses every fourth, so that a round holds every kind of step.  Ratios
are taken between neighbouring steps and reported as the median over the rounds with
smallest and largest.  Everything runs in float32 with momentum 0.9, rate 1e-3, damping
1e-3 and a decay of 0.95.  kfac-jax takes part if it is installed.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks import contestants, harness, timing
from benchmarks.contestants import Contestant
from benchmarks.workloads import WORKLOADS, Workload

CYCLE = ("full", "none", "stats", "none")
"""What each step renews: statistics and inverses, nothing, statistics, nothing."""

SETTINGS: dict[str, dict[str, float]] = {
    "none": {"none": 1.0},
    "stats": {"stats": 1.0},
    "full": {"full": 1.0},
    "1/10": {"stats": 0.9, "full": 0.1},
    "10/10": {"none": 0.9, "full": 0.1},
}
"""Shares of each kind of step; "a/b" is statistics every a steps, inverses every b."""

_ALL = ("resnet20", "autoencoder", "resnet50")
_WITHOUT_EKFAC = ("resnet50",)  # an eigendecomposition of 4,608 rows takes minutes


def main(argv: Sequence[str] | None = None) -> harness.Record:
    """Runs the command and returns its record."""
    parser = harness.parser(
        "step_time", __doc__, rounds=(10, "timed rounds of four steps")
    )
    parser.add_argument("--workload", default="all", choices=("all", *WORKLOADS))
    options = parser.parse_args(argv)
    record = harness.begin("step_time", argv, contestants.SETTINGS)
    names = _ALL if options.workload == "all" else (options.workload,)
    record["workloads"] = []
    for name in names:
        result = measure(WORKLOADS[name](), options.rounds)
        record["workloads"].append(result)
        print(table(result), flush=True)
        # Written as it grows: a run may take an hour.
        harness.write(record, options.output)
    return record


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Times all contestants on one workload and returns its part of the record."""
    harness.tell(f"{workload.name}: compiling")
    entries = timing.race(
        _contestants(workload),
        lambda _index: workload.batch,
        rounds * len(CYCLE),
        warm_up=len(CYCLE),
        cycle=len(CYCLE),
    )
    for entry in entries:
        seconds = np.asarray(entry["seconds"])  # [rounds, steps of the cycle]
        kinds = {"step": seconds}
        if entry is not entries[0]:
            spreads = ratios(seconds, entries[0]["seconds"])
            entry["ratios"] = {setting: r._asdict() for setting, r in spreads.items()}
            kinds = {kind: seconds[:, _at(kind)] for kind in dict.fromkeys(CYCLE)}
        entry["milliseconds"] = {
            kind: timing.spread((1e3 * s).ravel().tolist())._asdict()
            for kind, s in kinds.items()
        }
    return {
        "name": workload.name,
        "description": workload.description,
        "rounds": rounds,
        "contestants": entries,
    }


def _contestants(workload: Workload) -> list[Contestant]:
    """Compiles all contestants, the baseline first."""
    setup = contestants.set_up(workload)
    runners = [contestants.sgd(workload), contestants.kfac("lbopt", workload, setup)]
    if workload.name not in _WITHOUT_EKFAC:
        runners.append(
            contestants.kfac("lbopt, EKFAC", workload, setup, eigenvalues="corrected")
        )
    if find_spec("kfac_jax") is None:
        print("kfac-jax is left out; pip install 'lbopt[bench]' installs it")
    else:
        from benchmarks import kfac_jax_peer  # optional dependency

        runners.append(kfac_jax_peer.kfac_jax_contestant(workload))
    return runners


def ratios(seconds: Any, baseline: Any) -> dict[str, timing.Spread]:
    """Divides step times by the baseline's in each setting, round by round.

    Args:
      seconds: the contestant's times, ``[rounds, steps of the cycle]``.
      baseline: the baseline's times, likewise.

    Returns:
      The spread of each setting's ratio over the rounds.
    """
    pairs = np.asarray(seconds) / np.asarray(baseline)
    kinds = {kind: pairs[:, _at(kind)].mean(axis=1) for kind in CYCLE}
    return {
        setting: timing.spread(
            np.sum([w * kinds[kind] for kind, w in shares.items()], axis=0).tolist()
        )
        for setting, shares in SETTINGS.items()
    }


def _at(kind: str) -> list[int]:
    """Returns the positions of a kind of step in the cycle."""
    return [i for i, other in enumerate(CYCLE) if other == kind]


def table(result: dict[str, Any]) -> str:
    """Formats the result of ``measure``."""
    runners = result["contestants"]
    base = runners[0]
    plain = timing.Spread(**base["milliseconds"]["step"])
    times: list[tuple[str, ...]] = [
        ("", "nothing", "statistics", "+ inverses", "1/10", "10/10")
    ]
    for r in runners[1:]:
        spreads = [str(timing.Spread(**x)) for x in r["ratios"].values()]
        times.append((f"{r['name']} / {base['name']}", *spreads))
        kinds = (r["milliseconds"][kind] for kind in ("none", "stats", "full"))
        times.append((f"{r['name']} ms", *map(_milliseconds, kinds), "", ""))
    return harness.page(
        f"{result['name']}: {result['description']}",
        f"{base['name']}: {plain.median:.1f} ms a step ({plain.low:.1f}–"
        f"{plain.high:.1f}); ratios are medians of {result['rounds']} rounds "
        "(smallest–largest)",
        times,
        timing.costs(runners),
    )


def _milliseconds(kind: dict[str, float]) -> str:
    return f"{kind['median']:.0f} ({kind['low']:.0f}–{kind['high']:.0f})"


if __name__ == "__main__":
    main()
