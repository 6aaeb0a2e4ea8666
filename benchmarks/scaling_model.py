"""The collectives of a step, read from a program and planned; a model of its time."""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lbopt import sharding, training
from lbopt.collectives import Axis
from lbopt.curvature.registry import Layers
from lbopt.transforms import unit_classes

KINDS = ("reduce-scatter", "all-to-all", "all-gather", "all-reduce")
_FLOAT = 4
# Of one image of 224×224: 4.1 G multiplications forward, twice as many backward; and
# the statistics of ResNet-50's inputs and output gradients.
_STEP_FLOP, _STATISTICS_FLOP = 24.6e9, 50.2e9


class Collective(NamedTuple):
    """A collective, the bytes that each device puts in, and the loops around it."""

    kind: str
    bytes: int
    loops: int


Counts = Mapping[Collective, int]
Runs = Mapping[tuple[int, int], Sequence[int]]


class Problem(NamedTuple):
    """A model, its loss as ``lbopt.training`` takes it, and batches, all as shapes."""

    params: Any
    model_state: Any
    layers: Layers
    loss_fn: training.LossFn
    batch: Callable[[int], Any]  # examples -> shapes


class Machine(NamedTuple):
    """The assumptions behind the model of a step's time.

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


# ---------------------------------------------------------------- read from a program


def operand_bytes(shapes: str, kind: str, devices: int) -> int:
    """Returns the bytes that each device puts in, from the result's type in HLO."""
    total = 0
    for bits, dims in re.findall(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", shapes):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * int(bits or 8) // 8
    if kind == "reduce-scatter":
        return total * devices
    return total // devices if kind == "all-gather" else total


def collectives_of(text: str, devices: int) -> Counts:
    """Counts the collectives in a compiled program's HLO text.

    Args:
      text: the program.
      devices: its devices, all of which take part in each collective.

    Returns:
      The number of each collective.

    Raises:
      ValueError: for a collective in two instructions, start and done (the CPU has
        none), or without the name that tells its loops.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    for line in text.splitlines():
        found = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if found is None:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        if found[3] or name is None:
            raise ValueError(f"cannot read the collective {line.strip()[:200]}")
        size = operand_bytes(found[1], found[2], devices)
        counts[Collective(found[2], size, name[1].count("while/body"))] += 1
    return counts


def step_bytes(counts: Counts, runs: Runs, due: bool) -> dict[str, tuple[int, int]]:
    """Returns how often collectives run in a step, and with how many bytes.

    Args:
      counts: a program's collectives.
      runs: the result of ``runs_of``.
      due: whether everything is due, or nothing.

    Returns:
      ``{kind: (runs, bytes)}``.

    Raises:
      ValueError: for a collective in a loop that belongs to no class of units.
    """
    result = {}
    for kind in KINDS:
        total = size = 0
        for one, number in counts.items():
            if one.kind != kind or (one.loops > 1 and not due):
                continue
            times = number
            if one.loops > 2:
                classes = runs.get((one.loops, one.bytes), ())
                if not classes or number % len(classes):
                    raise ValueError(f"{number} × {one} for runs {classes}")
                times = number // len(classes) * sum(classes)
            total, size = total + times, size + times * one.bytes
        result[kind] = (total, size)
    return result


def ring_bytes(kind: str, size: int, devices: int) -> float:
    """Returns the bytes that a ring sends from a device that puts in ``size``."""
    others = devices - 1
    ways = {"all-gather": others, "all-reduce": 2 * others / devices}
    return size * ways.get(kind, others / devices)


# ----------------------------------------------------- planned from the owner table


def runs_of(owners: sharding.Owners) -> dict[tuple[int, int], list[int]]:
    """Returns how often the collectives of each class run if everything is due.

    Args:
      owners: the owner table.

    Returns:
      For ``(loops, bytes)`` a number for each class of units.  Inside three and four
      loops it is the number of rounds, in each of which a device receives or sends a
      unit; inside five the number of units, passed on one by one.
    """
    axis = Axis("data", owners.devices)
    runs: dict[tuple[int, int], list[int]] = {}
    for units in unit_classes.classes_of(owners):
        size = _padded(units.factor.size, axis)
        runs.setdefault((3, size), []).append(units.queues.shape[1])
        if units.gathered:
            runs.setdefault((4, size), []).append(units.queues.shape[1])
            share = (5, size // axis.size)
            runs.setdefault(share, []).append(len(units.numbers))
    return runs


def planned(
    problem: Problem, owners: sharding.Owners, *, adaptive: bool = True
) -> Counts:
    """Returns the collectives that a step should have, none on one device.

    Args:
      problem: the model.
      owners: the owner table.
      adaptive: whether each statistic is sent on its own, or all of them together.

    Returns:
      The number of each collective; of the all-reduces the gradient's alone.
    """
    counts: collections.Counter[Collective] = collections.Counter()
    if owners.devices == 1:
        return counts
    axis = Axis("data", owners.devices)
    rows = collections.Counter((u.statistic, u.factor.size) for u in owners.units)
    statistics = [n * _padded(size, axis) for (_, size), n in rows.items()]
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
        _plan_kept(counts, kept, owners, axis)
    whole = sum(x.size for x in jax.tree.leaves(problem.params))
    if left := _FLOAT * (whole - sum(kept.values())):
        counts[Collective("all-reduce", left, 1)] += 1
    return counts


def _padded(size: int, axis: Axis) -> int:
    return _FLOAT * axis.size * axis.share(size)


def _kept_rows(problem: Problem, owners: sharding.Owners) -> dict[str, int]:
    """Returns gradient sizes of the layers whose inverses stay with their owners."""
    rows: dict[str, int] = {}
    for unit, gathered in zip(owners.units, owners.gathered, strict=True):
        if not gathered:
            location = problem.layers.preconditioned[unit.path].tapped.location
            node = problem.params
            for key in location.keys:
                node = node[key]
            rows[unit.path] = sum(node[name].size for name in location.names)
    return rows


def _plan_kept(
    counts: collections.Counter[Collective],
    rows: Mapping[str, int],
    owners: sharding.Owners,
    axis: Axis,
) -> None:
    """Adds what the layers of ``rows`` send at every step: gradients there and back."""
    gradients = sum(_padded(size, axis) for size in rows.values())
    counts[Collective("reduce-scatter", gradients, 1)] += 1
    counts[Collective("all-gather", gradients // axis.size, 1)] += 1
    owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
    queues: dict[int, list[str]] = {}
    for path in sorted(rows, key=lambda p: (-rows[p], p)):
        queues.setdefault(owner[path], []).append(path)
    for position in range(max(map(len, queues.values()))):
        largest = max(rows[q[position]] for q in queues.values() if position < len(q))
        counts[Collective("all-to-all", _padded(largest, axis), 1)] += 2


# ---------------------------------------------------------- the model of a step's time


def model_seconds(
    problem: Problem, owners: sharding.Owners, machine: Machine, remaining: float
) -> dict[str, float]:
    """Models the parts of a step's time, none of them measured and none overlapping.

    Args:
      problem: the model.
      owners: the owner table.
      machine: the assumptions.
      remaining: share of the statistics and inverses that is renewed.

    Returns:
      Seconds of each part.
    """
    counts, runs = planned(problem, owners), runs_of(owners)
    seconds = []
    for due in (False, True):
        total = 0.0
        for kind, (number, size) in step_bytes(counts, runs, due).items():
            total += ring_bytes(kind, size, owners.devices) / machine.bandwidth
            total += number * machine.latency * math.log2(owners.devices)
        seconds.append(total)
    nothing, everything = seconds
    rate = machine.flops * machine.products
    inverted = 2 * owners.work().sum(1).max()
    return {
        "gradient": machine.images * _STEP_FLOP / rate,
        "statistics": remaining * machine.images * _STATISTICS_FLOP / rate,
        "inversion": remaining * inverted / (machine.flops * machine.inversions),
        "precondition": precondition_flop(owners) / rate,
        "communication": nothing + remaining * (everything - nothing),
    }


def precondition_flop(owners: sharding.Owners) -> int:
    """Returns the operations of the device that multiplies by the most inverses.

    They are those of the gathered layers, which every device multiplies, and of the
    layers that the device owns.
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
