"""SP-NGD's step time over SGD's with stale statistics, in steady state.

    python -m benchmarks.stale_steps [--steps 200] [--batch-size 128]

Momentum SGD, SP-NGD that renews everything at every step, and SP-NGD that renews a
statistic when it has changed by more than 0.1 (``stale_threshold``) train ResNet-20 in
one process and take turns at every step.  Each step has a fresh batch, the same for all
three: on a fixed batch, statistics would change with the parameters alone.  40 % of the
labels are exchanged: otherwise the loss of these pictures vanishes within twenty steps,
and statistics of the few examples that still have a gradient are never similar.  Steady
state is the last half of the steps; figures of the whole run leave out the first step,
at which everything is due.

Renewals are counted by kind of statistic (A, G, and F for all others) and weighed: a
statistic by its numbers, which devices would send, an inversion by its multiplications.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lbopt
from benchmarks import contestants, harness, timing
from benchmarks.workloads import Workload, resnet20
from lbopt import sharding
from lbopt.curvature import layer_table
from lbopt.sharding import Unit
from lbopt.transforms.kfac_state import KINDS

SGD_RATE = 0.05
SP_NGD_RATE = 1e-3
DAMPING = 2.5e-4
_SETTINGS = {
    "sgd_rate": SGD_RATE,
    "sp_ngd_rate": SP_NGD_RATE,
    "momentum": contestants.MOMENTUM,
    "damping": DAMPING,
}
_PARTS = {"steady": "last half of the steps", "whole": "all steps but the first"}
Renewed = dict[str, list[int]]
_NEVER, _STALE = "SP-NGD never stale", "SP-NGD stale"


def measure(
    steps: int,
    batch_size: int,
    make: Callable[[int], Workload] = resnet20,
    threshold: float = 0.1,
    label_noise: float = 0.4,
) -> harness.Record:
    """Times the three contestants and counts what they renew.

    Args:
      steps: steps of each, at least 2.
      batch_size: examples in a batch.
      make: makes the workload, given a batch size.
      threshold: α of the adaptive refresh.
      label_noise: share of the labels that are exchanged.

    Returns:
      The record without its head.
    """
    workload = make(batch_size)
    harness.tell("compiling")
    setup = contestants.set_up(workload)
    runners = [
        contestants.sgd(workload, SGD_RATE),
        contestants.trained(_NEVER, workload, _sp_ngd(setup, None), setup),
        contestants.trained(_STALE, workload, _sp_ngd(setup, threshold), setup),
    ]
    units = sharding.units_of(layer_table.configured(setup.layers.preconditioned))
    renewed: dict[str, list[Renewed]] = {_NEVER: [], _STALE: []}

    def watch(name: str, index: int, state: Any) -> None:
        if name in renewed:
            clocks = state.opt_state[0].refresh
            flags = (clocks.statistic_step == index, clocks.inverse_step == index)
            renewed[name].append(amounts(units, *map(np.asarray, flags)))

    entries = timing.race(runners, fresh(workload, label_noise), steps, watch=watch)
    base = entries[0]["seconds"]
    for entry in entries[1:]:
        history = entry["renewed"] = renewed[entry["name"]]
        entry["parts"] = {
            part: {
                **timing.stretched_ratios(entry["seconds"][start:], base[start:]),
                "shares": shares(units, history[start:]),
            }
            for part, start in {"steady": steps // 2, "whole": 1}.items()
        }
    return {
        "workload": workload.name,
        "description": workload.description,
        "steps": steps,
        "threshold": threshold,
        "label_noise": label_noise,
        "contestants": entries,
    }


def _sp_ngd(setup: contestants.Setup, threshold: float | None) -> Any:
    return lbopt.sp_ngd(
        SP_NGD_RATE,
        setup.layers,
        momentum=contestants.MOMENTUM,
        damping=DAMPING,
        kl_clip=None,
        stale_threshold=threshold,
        rescale="always",
    )


def fresh(workload: Workload, label_noise: float) -> Callable[[int], Any]:
    """Returns ``index -> batch``, with some labels exchanged for other examples'."""

    @jax.jit
    def batch(rng: jax.Array) -> dict[str, jax.Array]:
        sample_rng, which_rng, order_rng = jax.random.split(rng, 3)
        batch = workload.sample(sample_rng)
        labels = batch["targets"]
        wrong = jax.random.bernoulli(which_rng, label_noise, labels.shape)
        others = jax.random.permutation(order_rng, labels)
        return {**batch, "targets": jnp.where(wrong, others, labels)}

    return lambda index: batch(jax.random.fold_in(jax.random.key(2), index))


def amounts(units: Sequence[Unit], measured: Any, inverted: Any) -> Renewed:
    """Adds up the statistics and inversions of a step, by kind.

    Args:
      units: the transform's units.
      measured: for each statistic, whether it was renewed.
      inverted: for each unit, whether it was inverted.

    Returns:
      ``statistics``, ``numbers`` in them, ``inversions`` and their ``work`` in
      multiplications, up to a constant; each a number for A, G and the others.
    """
    kinds = [KINDS.index({"a": "A", "g": "G"}.get(unit.kind, "F")) for unit in units]
    measured = measured[[unit.statistic for unit in units]]
    weighted = {
        "statistics": measured * [unit.row == 0 for unit in units],
        "numbers": measured * [unit.factor.size for unit in units],
        "inversions": inverted,
        "work": inverted * [unit.factor.work for unit in units],
    }
    return {
        name: np.bincount(kinds, x, len(KINDS)).astype(int).tolist()
        for name, x in weighted.items()
    }


def everything(units: Sequence[Unit]) -> Renewed:
    """Returns the amounts of a step that renews everything."""
    statistics = 1 + max(unit.statistic for unit in units)
    return amounts(units, np.ones(statistics, bool), np.ones(len(units), bool))


def shares(
    units: Sequence[Unit], steps: Sequence[Renewed]
) -> dict[str, dict[str, float]]:
    """Divides the mean of ``steps`` by ``everything``, for each kind and all."""
    result: dict[str, dict[str, float]] = {}
    for name, whole in everything(units).items():
        mean = np.mean([step[name] for step in steps], axis=0)
        there = {kind: i for i, kind in enumerate(KINDS) if whole[i]}
        result[name] = {
            **{kind: float(mean[i] / whole[i]) for kind, i in there.items()},
            "all": float(mean.sum() / sum(whole)),
        }
    return result


def table(record: harness.Record) -> str:
    """Formats a record."""
    sgd, *others = record["contestants"]
    half = sgd["seconds"][record["steps"] // 2 :]
    tables = []
    for part, title in _PARTS.items():
        figures = {runner["name"]: runner["parts"][part] for runner in others}
        kinds = list(figures[_NEVER]["shares"]["statistics"])
        renewed = [("renewed", *kinds)]
        renewed += [
            (f"{name}: {field}", *(f"{share[kind]:.1%}" for kind in kinds))
            for name, f in figures.items()
            for field, share in f["shares"].items()
        ]
        tables += [f"{part}, {title}", timing.stretched_rows(figures), renewed]
    return harness.page(
        f"{record['workload']}: {record['description']}; a fresh batch at every step, "
        f"{record['steps']} steps, threshold {record['threshold']}, label noise "
        f"{record['label_noise']}",
        f"SGD: {1e3 * statistics.median(half):.1f} ms a step; in brackets smallest and "
        f"largest of {timing.STRETCHES} stretches",
        *tables,
        timing.costs(record["contestants"]),
    )


main = harness.command(
    "stale_steps",
    __doc__,
    measure,
    table,
    _SETTINGS,
    steps=(200, "steps of each optimizer"),
    batch_size=(128, "examples in a batch"),
)

if __name__ == "__main__":
    main()
