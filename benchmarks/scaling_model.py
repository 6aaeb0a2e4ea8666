"""What the owner table says a step sends, and a model of the step's time."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.program_bytes import Collective, Counts, sent, step_bytes
from lbopt import sharding, training
from lbopt.collectives import Axis
from lbopt.curvature.registry import Layers
from lbopt.transforms import unit_classes

_FLOAT = 4
# Of one image of 224×224: 4.1 G multiplications forward, twice as many backward; and
# the statistics of ResNet-50's inputs and output gradients.
_STEP_FLOP, _STATISTICS_FLOP = 24.6e9, 50.2e9


class Problem(NamedTuple):
    """A model and its loss, as shapes.

    Attributes:
      params: shapes of the parameters.
      model_state: shapes of the other collections.
      layers: what ``trace_layers`` found.
      loss_fn: the loss as ``lbopt.training`` takes it.
      batch: ``examples -> `` shapes of a batch.
    """

    params: Any
    model_state: Any
    layers: Layers
    loss_fn: training.LossFn
    batch: Callable[[int], Any]


class Machine(NamedTuple):
    """What the model of a step's time takes for granted.

    Attributes:
      flops: operations a second by the data sheet.
      products: share of it that convolutions and products reach.
      inversions: share of it that Cholesky-based inversion reaches.
      bandwidth: bytes a second that a device sends.
      latency: seconds of each collective for each doubling of the devices.
      images: images a device and step.
    """

    flops: float = 15.7e12
    products: float = 0.5
    inversions: float = 0.2
    bandwidth: float = 6.25e9
    latency: float = 5e-6
    images: int = 32


def turns_of(owners: sharding.Owners) -> dict[tuple[int, int], list[int]]:
    """How often the collectives of each class of units run when everything is due.

    Args:
      owners: who inverts what.

    Returns:
      By loops around them and bytes: in three and four loops rounds, in which each
      device receives a unit or sends one; in five the units, passed on one by one.
    """
    axis = Axis("data", owners.devices)
    turns: dict[tuple[int, int], list[int]] = {}
    for units in unit_classes.classes_of(owners):
        size = _padded(units.factor.size, axis)
        turns.setdefault((3, size), []).append(units.queues.shape[1])
        if units.gathered:
            turns.setdefault((4, size), []).append(units.queues.shape[1])
            share = (5, size // axis.size)
            turns.setdefault(share, []).append(len(units.numbers))
    return turns


def planned(
    problem: Problem, owners: sharding.Owners, *, adaptive: bool = True
) -> Counts:
    """The collectives that a step should have; of the all-reduces the gradient's alone.

    Args:
      problem: the model.
      owners: who inverts what.
      adaptive: whether each statistic travels on its own.

    Returns:
      Numbers of equal collectives; none on one device.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    if owners.devices == 1:
        return counts
    axis = Axis("data", owners.devices)
    layers = sharding.configured(problem.layers.preconditioned)
    statistics = [
        x.size // f.size * _padded(f.size, axis)
        for layer in layers.values()
        for x, f in zip(layer.factor_shapes(), layer.block.factors, strict=True)
    ]
    for size in statistics if adaptive else [sum(statistics)]:
        counts[Collective("reduce-scatter", size, 2)] += 1
    for units in unit_classes.classes_of(owners):
        size = _padded(units.factor.size, axis)
        counts[Collective("all-to-all", size, 3)] += 1
        if units.gathered:
            counts[Collective("all-to-all", size, 4)] += 1
            counts[Collective("all-gather", size // axis.size, 5)] += 1
    kept = _kept_rows(problem, owners)
    if kept:
        _plan_pipeline(counts, kept, owners, axis)
    whole = sum(x.size for x in jax.tree.leaves(problem.params))
    if left := _FLOAT * (whole - sum(kept.values())):
        counts[Collective("all-reduce", left, 1)] += 1
    return counts


def _padded(size: int, axis: Axis) -> int:
    return _FLOAT * axis.size * axis.share(size)


def _kept_rows(problem: Problem, owners: sharding.Owners) -> dict[str, int]:
    """Numbers of the gradients of the layers whose inverses stay with their owners."""
    rows: dict[str, int] = {}
    for unit, gathered in zip(owners.units, owners.gathered, strict=True):
        if not gathered:
            location = problem.layers.preconditioned[unit.path].tapped.location
            node = problem.params
            for key in location.keys:
                node = node[key]
            rows[unit.path] = sum(node[name].size for name in location.names)
    return rows


def _plan_pipeline(
    counts: collections.Counter[Collective],
    rows: Mapping[str, int],
    owners: sharding.Owners,
    axis: Axis,
) -> None:
    """Adds what placement "memory" sends at every step."""
    gradients = sum(_padded(size, axis) for size in rows.values())
    counts[Collective("reduce-scatter", gradients, 1)] += 1
    counts[Collective("all-gather", gradients // axis.size, 1)] += 1
    owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
    queues: dict[int, list[str]] = {}
    for path in sorted(rows, key=lambda p: (-rows[p], p)):
        queues.setdefault(owner[path], []).append(path)
    for turn in range(max(map(len, queues.values()))):
        largest = max(rows[q[turn]] for q in queues.values() if turn < len(q))
        counts[Collective("all-to-all", _padded(largest, axis), 1)] += 2


def model_seconds(
    problem: Problem, owners: sharding.Owners, machine: Machine, remaining: float
) -> dict[str, float]:
    """A step's time by its parts, none of them measured and none overlapping.

    Args:
      problem: the model.
      owners: who inverts what.
      machine: the assumptions.
      remaining: share of the statistics and inverses that is renewed.

    Returns:
      Seconds of each part.
    """
    counts, turns = planned(problem, owners), turns_of(owners)
    seconds = []
    for due in (False, True):
        total = 0.0
        for kind, (runs, size) in step_bytes(counts, turns, due).items():
            total += sent(kind, size, owners.devices) / machine.bandwidth
            total += runs * machine.latency * math.log2(owners.devices)
        seconds.append(total)
    nothing, everything = seconds
    rate = machine.flops * machine.products
    applied = precondition_flop(problem, owners)
    return {
        "gradient": machine.images * _STEP_FLOP / rate,
        "statistics": remaining * machine.images * _STATISTICS_FLOP / rate,
        "inversion": remaining
        * 2
        * owners.work().sum(1).max()
        / (machine.flops * machine.inversions),
        "precondition": applied / rate,
        "communication": nothing + remaining * (everything - nothing),
    }


def precondition_flop(problem: Problem, owners: sharding.Owners) -> int:
    """Operations of the device that multiplies gradients by the most inverses.

    Args:
      problem: the model.
      owners: who has which inverses.

    Returns:
      Operations of gathered layers, which are everybody's, and of the longest owner's.
    """
    everybody, own = 0, [0] * owners.devices
    orders: dict[str, list[int]] = {}
    for unit in owners.units:
        if unit.row == 0 and unit.kind in ("a", "g"):
            orders.setdefault(unit.path, []).append(unit.factor.order)
    place = {
        u.path: (o, g)
        for u, o, g in zip(owners.units, owners.owner, owners.gathered, strict=True)
    }
    for path, sizes in orders.items():
        flop = 2 * math.prod(sizes) * sum(sizes)
        owner, gathered = place[path]
        everybody += flop * gathered
        own[owner] += flop * (not gathered)
    return everybody + max(own)
