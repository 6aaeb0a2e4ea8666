"""Meshes, the placement of training state on them, and the owners of inversions.

Factors and their history are cut into equal shares, one for each device, whatever their
sizes; see ``lbopt.collectives``.  Inversions are not cut: each *unit*, one copy or one
diagonal block of a factor, is inverted by one device, its *owner*.
"""

import collections
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lbopt import checks, collectives
from lbopt._typing import AxisName, Number, Updates
from lbopt.collectives import Axis
from lbopt.curvature import discovery, layer_table
from lbopt.curvature.factor import Factor
from lbopt.curvature.registry import Layer, Layers

__all__ = ["Owners", "Sharded", "make_mesh", "owner_table", "place", "specs"]


class Sharded(NamedTuple):
    """Marks arrays of a state whose first axis is one row for each device."""

    shards: Any


def make_mesh(devices: Sequence[Any] | None = None, *, axis_name: str = "data") -> Mesh:
    """A mesh with one axis over the given devices.

    Args:
      devices: the devices in order; None for all of the machine's, those of a TPU in
        the order of their places in the torus.
      axis_name: the axis's name.

    Returns:
      The mesh, with an axis of type Auto.

    Examples:
      >>> from lbopt import sharding
      >>> sharding.make_mesh().axis_names
      ('data',)
    """
    devices = collectives.by_place(jax.devices()) if devices is None else devices
    # Explicit axes, jax.make_mesh's default, want a sharding named for every product.
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def specs(tree: Any, axis_name: AxisName | None) -> Any:
    """Partition specs of a state: ``Sharded`` arrays along the axis, others whole.

    They are what a ``jax.shard_map`` of your own needs for the state of an optimizer
    with ``placement``, among its ``in_specs`` and its ``out_specs``.

    Args:
      tree: the optimizer's state, any tree that contains it, or its shapes.
      axis_name: the optimizer's axis, or several that count as one.

    Returns:
      A ``PartitionSpec`` for each array, in the structure of the state.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Dense(3), jnp.ones((8, 5))
      >>> params = {"top": model.init(jax.random.key(0), x)["params"]}
      >>> layers = lbopt.trace_layers(
      ...     lambda p, x: model.apply({"params": p["top"]}, x).mean(), params, x)
      >>> tx = lbopt.scale_by_kfac(layers, placement=lbopt.Placement("data", 2))
      >>> specs = lbopt.sharding.specs(tx.init(params), "data")
      >>> P = jax.sharding.PartitionSpec
      >>> specs.factors.shards["top"].a == P("data"), specs.count == P()
      (True, True)
    """

    def spec(node: Any) -> Any:
        split = isinstance(node, Sharded)
        one = PartitionSpec(axis_name) if split else PartitionSpec()
        return jax.tree.map(lambda _: one, node)

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, Sharded))


def mean_of_others(tree: Updates, layers: Iterable[Layer], axis: Axis) -> Updates:
    """Averages gradients over devices, except those of some layers.

    Args:
      tree: gradients.
      layers: the layers whose gradients stay each device's own.
      axis: the devices.

    Returns:
      The gradients.
    """
    own = {
        (*layer.tapped.location.keys, name)
        for layer in layers
        for name in layer.tapped.location.names
    }
    return jax.tree_util.tree_map_with_path(
        lambda at, x: x if discovery.keys_of(at) in own else collectives.mean(x, axis),
        tree,
    )


def require_rows(tree: Any, axis: Axis) -> None:
    """Raises ValueError unless ``Sharded`` arrays have a row for each device."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Sharded))
    for node in nodes:
        rows = {len(x) for x in jax.tree.leaves(node) if isinstance(node, Sharded)}
        if rows - {axis.size}:
            raise ValueError(
                f"axis_size={min(rows)} of the optimizer's placement, but the axis "
                f"{axis.name!r} has {axis.size} devices; make the optimizer with "
                f"lbopt.Placement({axis.name!r}, {axis.size}), and convert a state of "
                "another placement with lbopt.reshard"
            )


def place(tree: Any, mesh: Mesh, axis_name: AxisName) -> Any:
    """Places a state on a mesh, with the layout of ``specs``.

    Args:
      tree: the state; on a mesh of several processes, the same in each of them.
      mesh: the devices.
      axis_name: the optimizer's axis, or several that count as one.

    Returns:
      The same state, on the devices of the mesh.

    Raises:
      ValueError: for a mesh without the axis, and for an optimizer that was made for
        another number of devices.
    """
    require_rows(tree, collectives.axis_of(mesh, axis_name))
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        specs(tree, axis_name),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if mesh.is_multi_process:
        # device_put cannot reach other processes' devices: each fills its own.
        return jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: x[at]),
            tree,
            shardings,
        )
    return jax.device_put(tree, shardings)


class Unit(NamedTuple):
    """One matrix to invert.

    Attributes:
      path: the layer.
      layer: the layer's index in alphabetical order.
      statistic: the index of its statistic among the leaves of all factors.
      kind: the statistic's name, as in ``KroneckerFactors``.
      row: the index of the copy and diagonal block within the factor.
      factor: the kind of factor.
    """

    path: str
    layer: int
    statistic: int
    kind: str
    row: int
    factor: Factor


def units_of(layers: Mapping[str, Layer]) -> list[Unit]:
    """The units of all layers.

    Args:
      layers: the preconditioned layers by path.

    Returns:
      The units in the order of the factors' leaves.
    """
    units: list[Unit] = []
    statistic = 0
    for number, path in enumerate(sorted(layers)):  # the order of a dict's leaves
        layer = layers[path]
        shapes = layer.factor_shapes()
        for kind, leaf, factor in zip(
            shapes._fields, shapes, layer.block.factors, strict=True
        ):
            rows = leaf.size // factor.size  # copies × diagonal blocks
            units += [
                Unit(path, number, statistic, kind, row, factor) for row in range(rows)
            ]
            statistic += 1
    return units


class Owners(NamedTuple):
    """The device that inverts each unit, and the step of the period at which it does.

    ``print`` shows each device's units and work.

    Attributes:
      units: the units.
      owner: each unit's device.
      phase: the step of the inversion period at which the unit is inverted.
      gathered: whether its inverse is replicated on every device, or stays on its
        owner.
      devices: number of devices.
      period: steps from one inversion of a unit to the next.
    """

    units: tuple[Unit, ...]
    owner: tuple[int, ...]
    phase: tuple[int, ...]
    gathered: tuple[bool, ...]
    devices: int
    period: int

    def work(self) -> np.ndarray:
        """Multiplications (d³) of each device at each step: ``[devices, period]``."""
        table = np.zeros((self.devices, self.period), np.int64)
        for unit, owner, phase in zip(self.units, self.owner, self.phase, strict=True):
            table[owner, phase] += unit.factor.work
        return table

    def balance(self) -> float:
        """The largest load of a device over max(total / devices, largest unit)."""
        loads = self.work().sum(1)
        largest = max(unit.factor.work for unit in self.units)
        return float(loads.max() / max(loads.sum() / self.devices, largest))

    def __repr__(self) -> str:
        """A table of each device's units, largest matrix and work, and the totals."""
        work = self.work()
        lines = ["device  units  largest       work  share of the longest"]
        longest = max(int(work.sum(1).max()), 1)  # there may be no units at all
        for device in range(self.devices):
            own = [
                u for u, o in zip(self.units, self.owner, strict=True) if o == device
            ]
            largest = max((u.factor for u in own), key=lambda f: f.work, default=None)
            # Rounded up, because the last diagonal block is padded.
            rows = 0 if largest is None else -(-largest.order // largest.parts)
            load = int(work[device].sum())
            lines.append(
                f"{device:6d}  {len(own):5d}  {rows:7d}  {load:9.3g}  "
                f"{load / longest:6.1%}"
            )
        steps = work.max(0)  # a step takes as long as its longest device
        lines.append(
            f"{len(self.units)} units, work {int(work.sum()):.4g} in all, "
            f"{longest:.4g} on the longest device: {self.balance():.3f} × "
            "max(total / devices, largest)"
        )
        if self.period > 1:
            lines.append(
                f"a step of the period of {self.period}: longest {steps.max():.4g}, "
                f"median {np.median(steps):.4g}, bound max(device's work / period, "
                f"largest) {self.step_bound():.4g}"
            )
        return "\n".join(lines)

    def step_bound(self) -> float:
        """The least work of a step: max(longest device / period, largest unit)."""
        largest = max(unit.factor.work for unit in self.units)
        return max(float(self.work().sum(1).max()) / self.period, float(largest))


def assign(
    work: Sequence[int],
    bins: int,
    before: Sequence[int] | None = None,
    kinds: Sequence[Any] | None = None,
) -> list[int]:
    """Assigns items to bins, longest first, each to the bin with the least work.

    Args:
      work: the cost of each item.
      bins: number of bins.
      before: earlier work of each bin, which decides between equals.
      kinds: the kind of each item; a bin gets at most 3/2 of its even share of the
        items of a kind, rounded up.  None for no such bound.

    Returns:
      Each item's bin.

    Examples:
      >>> from lbopt import sharding
      >>> sharding.assign([5, 4, 3, 3], 2)
      [0, 1, 1, 0]

    Source: Graham 1969 (longest processing time first).
    """
    # (load, earlier load, count, bin): without the count, items that cost nothing would
    # all go to one bin.
    heap = [(0, 0 if before is None else before[i], 0, i) for i in range(bins)]
    heapq.heapify(heap)
    kinds = list(range(len(work))) if kinds is None else kinds
    most = {k: -(-3 * n // (2 * bins)) for k, n in collections.Counter(kinds).items()}
    filled: collections.Counter[Any] = collections.Counter()
    chosen = [0] * len(work)
    for item in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        kind, passed = kinds[item], []  # bins that are full of this kind
        while filled[kind, heap[0][-1]] == most[kind]:
            passed.append(heapq.heappop(heap))
        load, other, count, i = heapq.heappop(heap)
        chosen[item] = i
        filled[kind, i] += 1
        for entry in (*passed, (load + work[item], other, count + 1, i)):
            heapq.heappush(heap, entry)
    return chosen


def owners_of(
    units: Sequence[Unit],
    devices: int,
    *,
    period: int = 1,
    gathered: Collection[str] | None = None,
) -> Owners:
    """Distributes units over the steps of a period and over devices.

    Args:
      units: the units.
      devices: number of devices.
      period: steps from one inversion to the next; 1 to invert all in the same step.
      gathered: the layers whose inverses are replicated; None for all.  Each other
        layer has a single owner.

    Returns:
      The owner table.
    """
    work = [unit.factor.work for unit in units]
    # Steps before devices: a unit's step, and with it a run's numbers, must not depend
    # on the number of devices.
    phase = assign(work, period)
    flags = [gathered is None or unit.path in gathered for unit in units]
    owner, loads = [0] * len(units), [0] * devices

    # Layers with one owner are the largest pieces, and are placed first.
    kept: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        if not flags[i]:
            kept.setdefault(unit.path, []).append(i)
    cost = [sum(work[i] for i in ids) for ids in kept.values()]
    for ids, device in zip(kept.values(), assign(cost, devices), strict=True):
        for i in ids:
            owner[i] = device
            loads[device] += work[i]

    for step in range(period):
        ids = [i for i in range(len(units)) if flags[i] and phase[i] == step]
        # Units of one kind are exchanged in rounds of one for each device: a device
        # with many of them would make many rounds.
        kinds = [(units[i].factor.invert, units[i].factor.shape) for i in ids]
        chosen = assign([work[i] for i in ids], devices, loads, kinds)
        for i, device in zip(ids, chosen, strict=True):
            owner[i] = device
            loads[device] += work[i]
    return Owners(
        tuple(units), tuple(owner), tuple(phase), tuple(flags), devices, period
    )


def gathered_layers(layers: Mapping[str, Layer], placement: Number | str) -> list[str]:
    """The layers whose inverses are replicated on every device.

    Args:
      layers: layers by path.
      placement: ``"comm"`` for all, ``"memory"`` for none, or the share of the bytes of
        all inverses that each device may hold besides its own.

    Returns:
      Their paths.
    """
    share = {"comm": 1.0, "memory": 0.0}.get(str(placement), placement)
    sizes = {
        path: sum(u.factor.wire for u in units_of({path: layer}))
        for path, layer in layers.items()
    }
    left, chosen = float(share) * sum(sizes.values()), []
    # The smallest first: they save the most communication for their memory.
    for path in sorted(sizes, key=lambda p: (sizes[p], p)):
        left -= sizes[path]
        if left < 0:
            break
        chosen.append(path)
    return chosen


def owner_table(
    layers: Layers,
    devices: int,
    *,
    block_size: int | None = None,
    inverse_period: int = 1,
    placement: float | int | str = "comm",
) -> Owners:
    """The owner table that a model would have in a run.

    Args:
      layers: from ``trace_layers``.
      devices: number of devices.
      block_size: as for ``scale_by_kfac``.
      inverse_period: steps from one inversion to the next, staggered over the units.
      placement: where inverses live, as in ``lbopt.Placement``.

    Returns:
      The table; ``print`` shows it.

    Raises:
      ValueError: for settings out of range.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Dense(3), jnp.ones((8, 5))
      >>> params = {"top": model.init(jax.random.key(0), x)["params"]}
      >>> layers = lbopt.trace_layers(
      ...     lambda p, x: model.apply({"params": p["top"]}, x).mean(), params, x)
      >>> lbopt.sharding.owner_table(layers, 2).owner  # A has 6 rows, G has 3
      (0, 1)
    """
    checks.whole("devices", devices, "1 is a run without a mesh")
    checks.whole("inverse_period", inverse_period, "1 inverts at every step")
    if block_size is not None:
        checks.whole("block_size", block_size, "None keeps factors whole")
    if not isinstance(placement, str):
        checks.share("placement", placement, "'comm' replicates all", zero=True)
    elif placement not in ("comm", "memory"):
        raise ValueError(
            f"placement={placement!r} must be 'comm', 'memory' or a number; 0.5 "
            "replicates half of the bytes of all inverses"
        )
    own = layer_table.configured(layers.preconditioned, block_size=block_size)
    return owners_of(
        units_of(own),
        devices,
        period=inverse_period,
        gathered=gathered_layers(own, placement),
    )
