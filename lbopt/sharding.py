"""Where things live: meshes, the split of the optimizer's state, and who inverts what.

Factors (and their history) are cut into equal shares, one a device, whatever their
sizes; see ``lbopt.collectives``.  Inversion is not cut: each *unit*, one copy or one
diagonal block of a factor, belongs to one device, its owner.
"""

import collections
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lbopt import collectives
from lbopt._typing import OptState, Updates
from lbopt.collectives import Axis
from lbopt.curvature import discovery
from lbopt.curvature.factor import Factor
from lbopt.curvature.registry import Layer, Layers


class Sharded(NamedTuple):
    """Marks arrays of a state whose first axis numbers the devices."""

    shards: Any


def make_mesh(devices: Sequence[Any] | None = None, *, axis_name: str = "data") -> Mesh:
    """A mesh of one axis over the given devices, all of the machine's by default.

    Args:
      devices: the devices in order.
      axis_name: the axis's name.

    Returns:
      The mesh, its axis of type Auto: under the Explicit type, which ``jax.make_mesh``
      makes by default, products over a sharded batch have to name their sharding.

    Examples:
      >>> from lbopt import sharding
      >>> sharding.make_mesh().axis_names
      ('data',)
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (axis_name,), axis_types=(AxisType.Auto,))


def specs(tree: Any, axis_name: str) -> Any:
    """How a state lies on the mesh: sharded arrays by their first axis, others whole.

    Args:
      tree: a state, or its shapes.
      axis_name: the axis of the optimizer.

    Returns:
      ``PartitionSpec`` for each array, in the state's structure.
    """

    def spec(node: Any) -> Any:
        split = isinstance(node, Sharded)
        one = PartitionSpec(axis_name) if split else PartitionSpec()
        return jax.tree.map(lambda _: one, node)

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, Sharded))


def split_layers(opt_state: OptState) -> set[str]:
    """The layers whose gradients and statistics the optimizer itself combines.

    Args:
      opt_state: the state of any optax chain.

    Returns:
      The paths of the layers whose factors are split over devices.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Sharded))
    split = [node.shards for node in nodes if isinstance(node, Sharded)]
    return {path for shards in split if isinstance(shards, dict) for path in shards}


def mean_of_others(tree: Updates, layers: Iterable[Layer], axis: Axis) -> Updates:
    """The mean over devices of all arrays but those of some layers.

    Args:
      tree: gradients.
      layers: the layers whose arrays stay as they are.
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


def place(tree: Any, mesh: Mesh, axis_name: str) -> Any:
    """Puts a state onto the mesh as ``specs`` says.

    Args:
      tree: the state; where the mesh spans several processes, the same on each.
      mesh: the devices.
      axis_name: the axis of the optimizer.

    Returns:
      The same state, in place on the devices.
    """
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        specs(tree, axis_name),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if mesh.is_multi_process:
        # Each process fills its own devices.
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
      layer: the layer's number in alphabetical order.
      statistic: the number of its statistic, as the factors' leaves are numbered.
      kind: the statistic's name, as in ``KroneckerFactors``.
      row: which copy and diagonal block of the factor, counted through.
      factor: the kind of factor.
    """

    path: str
    layer: int
    statistic: int
    kind: str
    row: int
    factor: Factor


def units_of(layers: Mapping[str, Layer]) -> list[Unit]:
    """The units of all layers, numbered through.

    Args:
      layers: what ``scale_by_kfac`` preconditions, by path.

    Returns:
      The units in the order of the factors' leaves.
    """
    units: list[Unit] = []
    statistic = 0
    for number, path in enumerate(sorted(layers)):
        layer = layers[path]
        shapes = layer.factor_shapes()
        for kind, leaf, factor in zip(
            shapes._fields, shapes, layer.block.factors, strict=True
        ):
            rows = leaf.size // factor.size
            units += [
                Unit(path, number, statistic, kind, row, factor) for row in range(rows)
            ]
            statistic += 1
    return units


class Owners(NamedTuple):
    """Which device inverts which unit, and at which step of the period.

    ``print`` shows the work and the units of each device.

    Attributes:
      units: the units.
      owner: each unit's device.
      phase: the step of the inversion period at which its turn is.
      gathered: whether every device gets its inverse, or its owner alone keeps it.
      devices: how many devices there are.
      period: steps from one inversion of a unit to the next.
    """

    units: tuple[Unit, ...]
    owner: tuple[int, ...]
    phase: tuple[int, ...]
    gathered: tuple[bool, ...]
    devices: int
    period: int

    def work(self) -> np.ndarray:
        """Multiplications (d³) of each device at each step of the period.

        Returns:
          ``[devices, period]``.
        """
        table = np.zeros((self.devices, self.period), np.int64)
        for unit, owner, phase in zip(self.units, self.owner, self.phase, strict=True):
            table[owner, phase] += unit.factor.work
        return table

    def balance(self) -> float:
        """The longest device's work over max(total / devices, largest unit)."""
        loads = self.work().sum(1)
        largest = max(unit.factor.work for unit in self.units)
        return float(loads.max() / max(loads.sum() / self.devices, largest))

    def __repr__(self) -> str:
        """The table: units, largest order and work of each device, and the totals."""
        work = self.work()
        lines = ["device  units  largest       work  share of the longest"]
        longest = max(int(work.sum(1).max()), 1)
        for device in range(self.devices):
            own = [
                u for u, o in zip(self.units, self.owner, strict=True) if o == device
            ]
            largest = _rows(max(own, key=lambda u: u.factor.work).factor) if own else 0
            load = int(work[device].sum())
            lines.append(
                f"{device:6d}  {len(own):5d}  {largest:7d}  {load:9.3g}  "
                f"{load / longest:6.1%}"
            )
        steps = work.max(0)
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
        """max(longest device's work / period, largest unit), a step's least work."""
        largest = max(unit.factor.work for unit in self.units)
        return max(float(self.work().sum(1).max()) / self.period, float(largest))


def _rows(factor: Factor) -> int:
    return -(-factor.order // factor.parts)


def assign(
    work: Sequence[int],
    bins: int,
    before: Sequence[int] | None = None,
    kinds: Sequence[Any] | None = None,
) -> list[int]:
    """Longest first, each to the bin that has the least.

    Args:
      work: what each item costs.
      bins: how many bins.
      before: what the bins have from elsewhere, which decides between equals.
      kinds: of which kind each item is; a bin gets at most half as many again of each
        as an even split would give it, rounded up.  None for no such bound.

    Returns:
      Each item's bin.

    Examples:
      >>> from lbopt import sharding
      >>> sharding.assign([5, 4, 3, 3], 2)
      [0, 1, 1, 0]
    """
    heap = [(0, 0 if before is None else before[i], 0, i) for i in range(bins)]
    heapq.heapify(heap)
    kinds = list(range(len(work))) if kinds is None else kinds
    most = {k: -(-3 * n // (2 * bins)) for k, n in collections.Counter(kinds).items()}
    filled: collections.Counter[Any] = collections.Counter()
    chosen = [0] * len(work)
    for item in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        kind, passed = kinds[item], []
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
    """Splits units over the steps of a period, and over devices.

    The split over steps does not depend on the number of devices, so that a run's
    numbers do not either.

    Args:
      units: the units.
      devices: how many devices.
      period: steps from one inversion to the next; 1 if all take turns together.
      gathered: the layers whose inverses every device gets; None for all.  A layer that
        is not among them has one owner, and a unit of any other may go anywhere.

    Returns:
      The owner table.
    """
    work = [unit.factor.work for unit in units]
    phase = assign(work, period)
    flags = [gathered is None or unit.path in gathered for unit in units]
    owner, loads = [0] * len(units), [0] * devices

    kept: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        if not flags[i]:
            kept.setdefault(unit.path, []).append(i)
    cost = [sum(work[i] for i in ids) for ids in kept.values()]
    for ids, device in zip(kept.values(), assign(cost, devices), strict=True):
        for i in ids:
            owner[i] = device
            loads[device] += work[i]

    for turn in range(period):
        ids = [i for i in range(len(units)) if flags[i] and phase[i] == turn]
        # Units of one kind are exchanged in rounds of one a device.
        kinds = [(units[i].factor.invert, units[i].factor.shape) for i in ids]
        chosen = assign([work[i] for i in ids], devices, loads, kinds)
        for i, device in zip(ids, chosen, strict=True):
            owner[i] = device
            loads[device] += work[i]
    return Owners(
        tuple(units), tuple(owner), tuple(phase), tuple(flags), devices, period
    )


def gathered_layers(
    layers: Mapping[str, Layer], placement: float | int | str
) -> list[str]:
    """The layers whose inverses every device gets.

    Args:
      layers: layers by path.
      placement: ``"comm"`` for all, ``"memory"`` for none, or the share of the bytes of
        all inverses that each device may hold besides its own; the smallest first,
        because they cost the least memory for the gradients that need not travel.

    Returns:
      Their paths.
    """
    share = {"comm": 1.0, "memory": 0.0}.get(str(placement), placement)
    sizes = {
        path: sum(u.factor.wire for u in units_of({path: layer}))
        for path, layer in layers.items()
    }
    left, chosen = float(share) * sum(sizes.values()), []
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
    """The owner table of a model, to look at before a run.

    Args:
      layers: what ``trace_layers`` found.
      devices: how many devices.
      block_size: as for ``scale_by_kfac``.
      inverse_period: steps from one inversion to the next, staggered.
      placement: where inverses live, as in ``lbopt.Placement``.

    Returns:
      The table; ``print`` shows it.

    Raises:
      ValueError: for a number of devices below 1.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Dense(3), jnp.ones((8, 5))
      >>> params = {"top": model.init(jax.random.key(0), x)["params"]}
      >>> layers = lbopt.trace_layers(
      ...     lambda p, x: model.apply({"params": p["top"]}, x).mean(), params, x)
      >>> lbopt.sharding.owner_table(layers, 2).owner  # A has 6 rows, G has 3
      (0, 1)
    """
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    own = configured(layers.preconditioned, block_size=block_size)
    return owners_of(
        units_of(own),
        devices,
        period=inverse_period,
        gathered=gathered_layers(own, placement),
    )


def configured(
    layers: Mapping[str, Layer],
    *,
    block_size: int | None = None,
    corrected: bool = False,
) -> dict[str, Layer]:
    """Layers with the variant of their blocks that an optimizer's settings ask for.

    Args:
      layers: layers by path.
      block_size: as for ``scale_by_kfac``.
      corrected: whether blocks that may have eigenvalues of their own are to.

    Returns:
      The layers by path.
    """

    def one(layer: Layer) -> Layer:
        make = layer.block.variant
        if make is None:
            return layer
        in_bases = corrected and layer.block.moments is not None
        block = make(in_bases, block_size)
        return layer._replace(tapped=layer.tapped._replace(block=block))

    return {path: one(layer) for path, layer in layers.items()}
