"""Step times and memory of all optimizers on an accelerator, and the largest batch.

Each optimizer runs beside SGD, the two taking turns at every step, so that a ratio
divides neighbouring steps.  A step that is waited for includes the time to start it,
which training hides; steps that are queued without waiting are timed too.
"""

import functools
import gc
import time
from typing import Any

import jax
import numpy as np

import lbopt
from benchmarks import contestants, harness, step_time, timing
from benchmarks.accelerator_entrants import (
    CURVATURE,
    CYCLE,
    GROUPS,
    SGD,
    Network,
    Prepared,
    bytes_of,
    if_it_fits,
    lowered_steps,
    new_state,
    peak_bytes,
    prepare,
)
from benchmarks.contestants import Contestant
from benchmarks.harness import Record
from benchmarks.parts import NotNeededError, Run
from benchmarks.workloads import Workload

# Statistics that stay similar are renewed at the steps 0, 1, 2, 4, 7, 12 and 20.
ADAPTIVE_STEPS = 20


def measure(
    run: Run,
    *,
    network: Network,
    group: str,
    batch_size: int | None,
    rounds: int,
) -> None:
    """Times the optimizers of a group beside SGD.

    Args:
      run: gets a row for each optimizer, SGD first.
      network: what is trained.
      group: a name in ``GROUPS``.
      batch_size: examples; None for the largest batch that was found before.
      rounds: timed rounds of four steps.

    Raises:
      NotNeededError: if no larger batch was found than the one of the other parts.
    """
    network = Network(*network)
    workload = network.workload(batch_size or largest(run))
    layers = contestants.set_up(workload).layers
    entrants = {"SGD": SGD, **GROUPS[group]}
    sgd, *others = prepare(entrants, workload, layers)
    for entrant in (sgd, *others):
        schedule = entrants[entrant.name].schedule
        row = if_it_fits(
            functools.partial(_beside_sgd, entrant, sgd, workload, schedule, rounds)
        )
        row |= {"bytes": entrant.bytes(), "compile_seconds": entrant.seconds}
        run.report(entrant.name, row | {"batch_size": len(workload.batch["targets"])})
        gc.collect()  # states in cycles would stay on the device


def _beside_sgd(
    entrant: Prepared, sgd: Prepared, workload: Workload, schedule: str, rounds: int
) -> Record:
    """Returns an optimizer's times; SGD's own are those of SGD beside itself."""
    adaptive = schedule == "adaptive"
    shares: list[float] = []
    skipped: list[int] = []

    def watch(name: str, _index: int, state: Any) -> None:
        if name != base.name:
            skipped.append(int(state.skipped))
            if adaptive:
                shares.append(_share_due(state))

    own, base = entrant.contestant(workload), sgd.contestant(workload)
    base = base._replace(name="SGD, the baseline")
    cycle = len(CYCLE)
    steps = max(ADAPTIVE_STEPS, rounds * cycle) if adaptive else rounds * cycle
    cycles = {"cycle": 1, "warm_up": 1} if adaptive else {"cycle": cycle}
    options: dict[str, Any] = {"warm_up": cycle, **cycles, "watch": watch}
    pair = timing.race([own, base], lambda _: workload.batch, steps, **options)
    seconds, plain = (np.asarray(entry["seconds"]) for entry in pair)
    if schedule == "fixed":
        ratios = step_time.ratios(seconds, plain)
        kinds = {
            kind: seconds[:, [k == kind for k in CYCLE]].ravel()
            for kind in dict.fromkeys(CYCLE)
        }
    else:
        masks = {"step": np.ones(seconds.shape, bool)}
        if adaptive:
            # Before timed step i + 1 the share that step i left: the first is watched.
            due = np.asarray(shares[: len(seconds)])
            masks = {"none": due == 0, "some": (due > 0) & (due < 1), "full": due == 1}
            masks = {kind: mask for kind, mask in masks.items() if mask.any()}
        kinds = {kind: seconds[mask] for kind, mask in masks.items()}
        ratios = {
            kind: timing.spread((seconds[mask] / plain[mask]).tolist())
            for kind, mask in masks.items()
        }
    queued = [_queued(who.contestant(workload), workload, 2) for who in (entrant, sgd)]
    losses = pair[0]["losses"]
    return {
        "ratios": {kind: ratio._asdict() for kind, ratio in ratios.items()},
        "milliseconds": {
            kind: timing.spread((1e3 * x).ravel().tolist())._asdict()
            for kind, x in kinds.items()
        },
        "queued_milliseconds": 1e3 * queued[0],
        "queued_ratio": queued[0] / queued[1],
        # With the rate of the adaptive refresh nothing is learned, on purpose.
        "course": f"{losses[-1]:.3f}, rate ~0" if adaptive else harness.course(losses),
        "skipped": skipped[-1],
        "state_bytes": pair[0]["state_bytes"],
        "peak_bytes_so_far": peak_bytes(),
    }


def _share_due(state: Any) -> float:
    """The share of the statistics that the next step renews."""
    flags = jax.tree.leaves(jax.device_get(lbopt.refresh(state.opt_state)))
    return float(np.mean([np.mean(flag) for flag in flags]))


def _queued(contestant: Contestant, workload: Workload, rounds: int) -> float:
    """Returns the seconds a step of steps that are queued without waiting."""
    state = contestant.state
    for index in range(len(CYCLE)):
        state, _ = contestant.step(state, workload.batch, index)
    jax.block_until_ready(state)
    steps = range(len(CYCLE), len(CYCLE) * (1 + rounds))
    start = time.perf_counter()
    for index in steps:
        state, _ = contestant.step(state, workload.batch, index)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / len(steps)


# === The largest batch ================================================================


def largest_batch(
    run: Run, *, network: Network, batch_size: int, most: int, seconds: float
) -> None:
    """Doubles the batch until a step of K-FAC that renews everything does not fit.

    SGD's state is on the device too, as when the steps are timed.  Where the device
    tells its limit, sizes are left out that half of it holds by the compiler's count.

    Args:
      run: gets a row for each size: ``fits``, and the compiler's count of bytes.
      network: what is trained.
      batch_size: the first size.
      most: the last size.
      seconds: no further size is begun with less than that left.
    """
    network = Network(*network)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    size = batch_size
    while size <= most and run.left() > seconds:
        row = _one_step(network, size)
        run.report(str(size), row)
        gc.collect()
        if not row["fits"]:
            return
        temporary = row["bytes"]["temporary"]
        rest = row["bytes"]["total"] - temporary
        grown = 2
        while limit and rest + 2 * grown * temporary < limit / 2:
            grown *= 2
        size *= grown


def _one_step(network: Network, batch_size: int) -> Record:
    """Compiles and runs a step of K-FAC in which everything is due."""
    row: Record = {"fits": False, "bytes": None}

    def step() -> Record:
        workload = network.workload(batch_size)
        layers = contestants.set_up(workload).layers
        entrant = CURVATURE["K-FAC"]
        tx = entrant.make(layers)
        program = lowered_steps(tx, entrant, workload, layers)["full"].compile()
        row["bytes"] = bytes_of(program)
        beside = new_state(SGD.make(layers), workload)
        results = program(new_state(tx, workload), workload.batch)
        # Waited for here: what fails later fails where it is waited for.
        jax.block_until_ready((beside, results))
        return {"fits": True, "peak_bytes_so_far": peak_bytes()}

    return row | if_it_fits(step)


def largest(run: Run) -> int:
    """Returns the largest batch that fitted, if it is not the first that was tried.

    Raises:
      NotNeededError: if it is, or if none was tried.
    """
    rows = run.rows.get("largest batch", {})
    sizes = [int(size) for size, row in rows.items() if row["fits"]]
    if len(sizes) < 2:
        raise NotNeededError("no larger batch than that of the other parts was found")
    return max(sizes)
