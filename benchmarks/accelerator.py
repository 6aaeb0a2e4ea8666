"""One accelerator in a few minutes: agreement with the CPU, times, shares and memory.

    python -m benchmarks.accelerator [--small] [--budget 470] [--again] [--folder DIR]

writes ``record.json`` and ``table.md`` into the folder, the record after each row.
Its parts are, in the order in which they are measured:

* agreement: small models of each kind of block, on the accelerator and on the host's
  CPU, in float32 and bfloat16;
* inverses: Cholesky, ``lbopt.linalg.damped_inverse`` and eigh, 64 to 4,608 rows;
* step times of K-FAC and SP-NGD by kind of step beside SGD, ResNet-50 at 224×224 in
  bfloat16, batch 64; the shares of gradient, statistics, averaging, inversion and
  update;
* the largest batch that fits; the same there;
* LARS, AdamW, Muon and NLCG beside SGD; EKFAC on ResNet-20.

Each part has a time limit of its own, and is skipped if the budget is spent.  The same
command continues: parts that are done are not repeated, unless code or device are
others, and compiled programs are in the folder.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import (
    accelerator_agreement,
    accelerator_inverses,
    accelerator_shares,
    accelerator_steps,
    accelerator_tables,
    contestants,
    harness,
    parts,
)
from benchmarks.accelerator_entrants import ADAPTIVE_RATE, LARS_RATE, RATE, Network
from benchmarks.harness import Record
from benchmarks.parts import Part, Run
from experiments.runs import write_text

# Seconds; with the start of this process it stays below eight minutes.
_BUDGET = 470.0
# Seconds: below eight minutes with the start of this process.
_BUDGET = 470.0
# A process may take nearly all of the device's memory: no other one runs.
_MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

_RESNET50 = Network("resnet50", 224, 1000, "bfloat16")
_RESNET20 = Network("resnet20", 32, 10, "bfloat16")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are those of an accelerator.

    Attributes:
      network: what is trained.
      eigen_network: the same for EKFAC.
      batch_size: the smaller batch.
      eigen_batch: examples for EKFAC.
      most: the largest batch that is tried.
      matrices: numbers of matrices and their rows.
      eigh_most: rows of the largest matrix whose eigenvalues are found.
      rounds: timed rounds of four steps.
    """

    network: Network = _RESNET50
    eigen_network: Network = _RESNET20
    batch_size: int = 64
    eigen_batch: int = 128
    most: int = 4096
    matrices: tuple[tuple[int, int], ...] = (
        *((1, n) for n in (64, 128, 256, 512, 1024)),
        *((64, 64), (32, 256), (16, 512), (4, 1024)),
        *((1, 2304), (1, 4608)),
    )
    eigh_most: int = 4608
    rounds: int = 8


SMALL = Sizes(
    network=_RESNET20,
    eigen_network=Network("tiny", 8, 3, "bfloat16"),
    batch_size=8,
    eigen_batch=8,
    most=16,
    matrices=((1, 64), (1, 300), (4, 64)),
    eigh_most=300,
    rounds=1,
)
"""Sizes for a CPU, to try the command out."""


def main(
    argv: Sequence[str] | None = None,
    *,
    sizes: Sizes | None = None,
    start: parts.Start = parts.in_own_process,
) -> Record:
    """Runs the command and returns its record.

    Args:
      argv: the command's arguments; None for those of the process.
      sizes: None for those that the arguments choose.
      start: carries out one part.

    Returns:
      The record, as written.

    Raises:
      RuntimeError: if jax finds no device.
    """
    options = _parser().parse_args(argv)
    end = time.time() + options.budget
    # This process must not touch the device, which belongs to the parts.
    os.environ.setdefault(*_MEMORY)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    sizes = sizes or (SMALL if options.small else Sizes())

    found: dict[str, Record] = {}
    look = Run(found.__setitem__, end, {})
    outcome = start(Part("machine", machine, 60.0, {"argv": argv}), look, folder)
    if outcome.status != "done":
        raise RuntimeError(f"no device was found: {outcome.status}, {outcome.why}")
    record = harness.read(path) | found["machine"] | parts.code()
    record["environment"] = {_MEMORY[0]: os.environ[_MEMORY[0]]}
    identity = {
        "code": record["digest"],
        "device": record["device"],
        "jax": record["versions"]["jax"],
    }
    parts.carry_out(
        plan(sizes, options.budget),
        record,
        folder,
        identity,
        budget=end - time.time(),
        again=options.again,
        start=start,
    )
    table = accelerator_tables.table(record)
    write_text(folder / "table.md", table)
    print(table)
    return record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=pathlib.Path("runs/accelerator"),
        help="folder of the record, the table and the compiled programs",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=_BUDGET,
        help="seconds for all parts together; with more, each may take longer",
    )
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    return parser


def machine(run: Run, *, argv: Sequence[str] | None) -> None:
    """Reports the machine, its device and the versions."""
    settings = {
        "learning_rate": RATE,
        "lars_learning_rate": LARS_RATE,
        "adaptive_learning_rate": ADAPTIVE_RATE,
        "momentum_of_sgd": contestants.MOMENTUM,
        "statistics_period": contestants.STATS_PERIOD,
        "inverse_period": contestants.INVERSE_PERIOD,
    }
    record = harness.begin("accelerator", argv, settings)
    jax.config.update("jax_enable_compilation_cache", True)  # begin turns it off
    device = jax.devices()[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    more = {"platform": device.platform, "device_bytes": stats.get("bytes_limit")}
    run.report("machine", record | more)


def plan(sizes: Sizes, budget: float = _BUDGET) -> list[Part]:
    """Returns the parts, the most important ones first.

    Args:
      sizes: what is measured.
      budget: seconds for all parts; above the usual number their limits grow with it.

    Returns:
      The parts.
    """
    network = {"network": sizes.network, "rounds": sizes.rounds}
    small, large = {"batch_size": sizes.batch_size}, {"batch_size": None}

    def steps(name: str, limit: float, group: str, **own: Any) -> Part:
        settings = {**network, "group": group, **own}
        return Part(name, accelerator_steps.measure, limit, settings)

    shares = functools.partial(Part, measure=accelerator_shares.measure)
    of_doubling = {"network": sizes.network, "most": sizes.most, "seconds": 20.0}
    of_inverses = {"cases": sizes.matrices, "eigh_most": sizes.eigh_most}
    ekfac = {"network": sizes.eigen_network, "batch_size": sizes.eigen_batch}
    found = [
        Part("agreement", accelerator_agreement.measure, 100.0, {}),
        steps("curvature", 150.0, "curvature", **small),
        shares("shares", limit=80.0, settings=network | small),
        Part(
            "largest batch",
            accelerator_steps.largest_batch,
            90.0,
            of_doubling | small,
        ),
        steps("curvature, largest batch", 110.0, "curvature", **large),
        Part(
            "inverses",
            accelerator_inverses.measure,
            70.0,
            {**of_inverses, "repeats": 10, "seconds": 1.0},
        ),
        steps("first order", 60.0, "first order", **small),
        steps("EKFAC", 60.0, "EKFAC", **ekfac),
        steps("first order, largest batch", 60.0, "first order", **large),
        shares("shares, largest batch", limit=60.0, settings=network | large),
    ]
    slower = max(1.0, budget / _BUDGET)
    return [part._replace(limit=slower * part.limit) for part in found]


if __name__ == "__main__":
    main()
