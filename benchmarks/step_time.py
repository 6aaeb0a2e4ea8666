"""Step time, compile time and memory of K-FAC beside plain SGD and beside kfac-jax.

    python -m benchmarks.step_time [--workload resnet20|autoencoder|resnet50|all]

prints one table per workload.  All optimizers run in one process and take turns at
every step; ratios are taken between neighbouring steps and reported as the median over
the rounds with smallest and largest (see ``benchmarks.timing``).  Everything runs in
float32 with momentum 0.9, rate 1e-3, damping 1e-3 and a decay of 0.95.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contestants, reporting, timing
from benchmarks.workloads import WORKLOADS, Workload

PEERS = ("kfac_jax",)
_ALL = ("resnet20", "autoencoder", "resnet50")
_SETTINGS = {
    "learning_rate": contestants.LEARNING_RATE,
    "momentum": contestants.MOMENTUM,
    "damping": contestants.DAMPING,
    "factor_decay": contestants.FACTOR_DECAY,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    record = reporting.begin("step_time", argv, _SETTINGS)
    peers = [peer for peer in options.peers if _installed(peer)]
    names = _ALL if options.workload == "all" else (options.workload,)
    record["workloads"] = []
    for name in names:
        result = measure(
            WORKLOADS[name](), options.rounds, peers=peers, fisher=options.fisher
        )
        record["workloads"].append(result)
        print(table(result), flush=True)
        # Written as it grows: a run may take an hour.
        reporting.write(record, options.output)
    return record


def measure(
    workload: Workload,
    rounds: int,
    *,
    peers: Sequence[str] = (),
    fisher: Any = "empirical",
) -> dict[str, Any]:
    """Times all contestants on one workload.

    Args:
      workload: the problem.
      rounds: rounds of four steps that are timed.
      peers: other libraries that take part.
      fisher: the Fisher matrix of lbopt's K-FAC.

    Returns:
      The workload's part of the record.
    """
    jax.jit(jnp.sin).lower(0.0).compile()  # the compiler's own start is nobody's
    reporting.tell(f"{workload.name}: compiling")
    runners = [contestants.sgd(workload), contestants.kfac(workload, fisher)]
    if "kfac_jax" in peers:
        from benchmarks import kfac_jax_peer  # optional dependency

        runners.append(kfac_jax_peer.kfac_jax_contestant(workload))
    samples = timing.interleave(
        runners,
        lambda index: workload.batch,
        rounds,
        report=lambda line: reporting.tell(f"{workload.name}: {line}"),
    )
    return {
        "name": workload.name,
        "description": workload.description,
        "rounds": rounds,
        "fisher": fisher,
        "contestants": [
            _result(runner, samples[runner.name], samples[runners[0].name])
            for runner in runners
        ],
    }


def _result(
    runner: timing.Contestant, own: timing.Samples, baseline: timing.Samples
) -> dict[str, Any]:
    result = reporting.entry(runner, own.seconds, own.losses)
    if runner.has_curvature:
        kinds = timing.milliseconds(own.seconds)
        ratios = timing.ratios(own.seconds, baseline.seconds)
        result["ratios"] = {setting: r._asdict() for setting, r in ratios.items()}
    else:
        kinds = {
            "step": timing.spread([1e3 * s for row in own.seconds for s in row]),
        }
    result["milliseconds"] = {kind: s._asdict() for kind, s in kinds.items()}
    return result


def table(result: dict[str, Any]) -> str:
    """The tables of one workload.

    Args:
      result: what ``measure`` returned.

    Returns:
      Text of several lines.
    """
    runners = result["contestants"]
    base = runners[0]
    plain = timing.Spread(**base["milliseconds"]["step"])
    times: list[tuple[str, ...]] = [
        ("", "nothing", "statistics", "+ inverses", "1/10", "10/10")
    ]
    for r in runners:
        if "ratios" in r:
            ratios = [str(timing.Spread(**x)) for x in r["ratios"].values()]
            times.append((f"{r['name']} / {base['name']}", *ratios))
            kinds = (r["milliseconds"][kind] for kind in ("none", "stats", "full"))
            times.append((f"{r['name']} ms", *(_ms(k) for k in kinds), "", ""))
    return "\n".join(
        [
            "",
            f"{result['name']}: {result['description']}; {result['fisher']} Fisher",
            f"{base['name']}: {plain.median:.1f} ms a step"
            f" ({plain.low:.1f}–{plain.high:.1f}); ratios are medians of"
            f" {result['rounds']} rounds (smallest–largest)",
            *reporting.aligned(times),
            "",
            *reporting.costs(runners),
        ]
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("step_time", __doc__)
    parser.add_argument("--workload", default="all", choices=("all", *WORKLOADS))
    parser.add_argument(
        "--rounds",
        type=reporting.positive,
        default=10,
        help="timed rounds of four steps",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=PEERS,
        choices=PEERS,
        help="other libraries to run beside; --peers alone for none",
    )
    parser.add_argument(
        "--fisher",
        default="empirical",
        choices=("empirical", "sampled"),
        help="the Fisher matrix of lbopt's K-FAC",
    )
    return parser.parse_args(argv)


def _installed(peer: str) -> bool:
    if find_spec(peer) is not None:
        return True
    print(f"{peer} is not installed and left out; pip install 'lbopt[bench]' has it")
    return False


def _ms(kind: dict[str, float]) -> str:
    return f"{kind['median']:.0f} ({kind['low']:.0f}–{kind['high']:.0f})"


if __name__ == "__main__":
    main()
