"""Step time, compile time and memory of K-FAC beside plain SGD and beside kfac-jax.

    python -m benchmarks.step_time [--workload resnet20|autoencoder|resnet50|all]

prints one table per workload.  All optimizers run in one process and take turns at
every step; ratios are taken between neighbouring steps and reported as the median over
the rounds with smallest and largest (see ``benchmarks.timing``).  Everything runs in
float32 with momentum 0.9, rate 1e-3, damping 1e-3 and a decay of 0.95.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contestants, timing
from benchmarks.workloads import WORKLOADS, Workload

PEERS = ("kfac_jax",)
_ALL = ("resnet20", "autoencoder", "resnet50")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "kfac-jax")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what the command line asks for, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    jax.config.update("jax_enable_compilation_cache", False)
    record = environment(sys.argv[1:] if argv is None else argv)
    print(f"{record['processor']}, {record['cores']} cores, {record['device']}")
    peers = [peer for peer in options.peers if _installed(peer)]
    names = _ALL if options.workload == "all" else (options.workload,)
    record["workloads"] = []
    for name in names:
        result = measure(
            WORKLOADS[name](), options.rounds, peers=peers, fisher=options.fisher
        )
        record["workloads"].append(result)
        print(table(result), flush=True)
        if options.output is not None:  # written as it grows: a run may take an hour
            options.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
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
    _report(f"{workload.name}: compiling")
    runners = [contestants.sgd(workload), contestants.kfac(workload, fisher)]
    if "kfac_jax" in peers:
        from benchmarks import kfac_jax_peer  # optional dependency

        runners.append(kfac_jax_peer.kfac_jax_contestant(workload))
    samples = timing.interleave(
        runners, rounds, lambda line: _report(f"{workload.name}: {line}")
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
    result: dict[str, Any] = {
        "name": runner.name,
        "setup_seconds": runner.setup_seconds,
        "compile_seconds": runner.compile_seconds,
        "state_bytes": runner.state_bytes,
        "temporary_bytes": runner.temporary_bytes,
        "losses": own.losses,
        "seconds": own.seconds,
    }
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
    costs = [("", "setup s", "compile s", "state MB", "temporary MB", "loss")]
    for r in runners:
        if "ratios" in r:
            ratios = [str(timing.Spread(**x)) for x in r["ratios"].values()]
            times.append((f"{r['name']} / {base['name']}", *ratios))
            kinds = (r["milliseconds"][kind] for kind in ("none", "stats", "full"))
            times.append((f"{r['name']} ms", *(_ms(k) for k in kinds), "", ""))
        costs.append(
            (
                r["name"],
                f"{r['setup_seconds']:.1f}",
                f"{r['compile_seconds']:.1f}"
                f" ({r['compile_seconds'] / base['compile_seconds']:.1f}×)",
                f"{r['state_bytes'] / 1e6:.1f}",
                f"{r['temporary_bytes'] / 1e6:.1f}",
                _course(r["losses"]),
            )
        )
    return "\n".join(
        [
            "",
            f"{result['name']}: {result['description']}; {result['fisher']} Fisher",
            f"{base['name']}: {plain.median:.1f} ms a step"
            f" ({plain.low:.1f}–{plain.high:.1f}); ratios are medians of"
            f" {result['rounds']} rounds (smallest–largest)",
            *_aligned(times),
            "",
            *_aligned(costs),
        ]
    )


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Where and when the figures were taken.

    Args:
      argv: arguments of the command line.

    Returns:
      The head of the record.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "command": " ".join(["python -m benchmarks.step_time", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "python": platform.python_version(),
        "versions": {name: v for name, v in versions.items() if v},
        "settings": {
            "learning_rate": contestants.LEARNING_RATE,
            "momentum": contestants.MOMENTUM,
            "damping": contestants.DAMPING,
            "factor_decay": contestants.FACTOR_DECAY,
        },
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--workload", default="all", choices=("all", *WORKLOADS))
    parser.add_argument(
        "--rounds", type=_positive, default=10, help="timed rounds of four steps"
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
    parser.add_argument(
        "--output", type=pathlib.Path, help="a JSON file for every figure"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _installed(peer: str) -> bool:
    if find_spec(peer) is not None:
        return True
    print(f"{peer} is not installed and left out; pip install 'lbopt[bench]' has it")
    return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _course(losses: Sequence[float]) -> str:
    """First and last loss, and whether training works at all."""
    course = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    if not all(map(math.isfinite, losses)):
        return f"{course} NOT FINITE"
    return course if losses[-1] < losses[0] else f"{course} NOT FALLING"


def _ms(kind: dict[str, float]) -> str:
    return f"{kind['median']:.0f} ({kind['low']:.0f}–{kind['high']:.0f})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
