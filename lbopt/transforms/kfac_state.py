"""The state of the curvature transform, and its report of what a step did."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from lbopt._typing import Array, OptState
from lbopt.collectives import Axis
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import inversion, owner_buffers, unit_classes

KINDS = ("A", "G", "F")
"""Kinds of statistics in reports: of inputs, of output gradients, and all others."""


class Report(NamedTuple):
    """Work and communication of the last update.

    Attributes:
      statistics: the number of statistics that were due, by kind, ``[3]``.
      statistic_bytes: the bytes that each device sent for them, by kind, padding
        included; 0 without an axis.
      inversions: the number of units inverted, on all devices together.
      inverse_bytes: the bytes that each device sent for inversions.
    """

    statistics: Any
    statistic_bytes: Any
    inversions: Any
    inverse_bytes: Any


class Pending(NamedTuple):
    """Inverses that are computed but not in effect yet.

    Attributes:
      desks: the buffers of the units' owners, ``[length]``; with an axis ``[axis_size,
        length]``, marked ``Sharded``.
      step: the step whose factors each unit's inverse is of, ``[units]``; ``NONE`` if
        nothing is pending, ``AGAIN`` if it was lost: it is then recomputed at the next
        step and takes effect at once.
    """

    desks: Any
    step: Any


NONE, AGAIN = -1, -2


class KfacState(NamedTuple):
    """State of ``scale_by_kfac``; layers by path, numbered in alphabetical order.

    Attributes:
      count: steps taken.
      factors: running averages of the statistics, packed.  With an axis each array is
        cut into shares ``[axis_size, *copies, share]`` and marked ``Sharded``.
      before: the statistics before the last, likewise, if the refresh is adaptive.
      traces: the traces of each factor's copies, in the dtype of the factors.
      refresh: the clocks of statistics and inverses.
      inverses: damped inverses, whole, of the layers that have them replicated.
      kept: the other layers' inverses, in the buffers of their owners,
        ``[axis_size, length]``, marked ``Sharded``; ``()`` if there are none.
      pending: inverses that take effect later; ``()`` without a delay.
      moments: the corrected eigenvalues by layer; see ``transforms.eigen_moments``.
      damping: the number added to each unit's diagonal if it was due at the last step,
        ``[units]``.
      last_damping: λ of the last step; of the last before it at which it was positive
        and finite, if it was not.
      boost: the factor on each layer's damping; 1 unless its last inverse failed.
      rejected: the number of each layer's statistics and inverses that were not finite,
        and of steps whose λ was not positive and finite.
      report: work and communication of the last update.
    """

    count: Any
    factors: Any
    before: Any
    traces: Any
    refresh: Any
    inverses: Any
    kept: Any
    pending: Any
    moments: Any
    damping: Any
    last_damping: Any
    boost: Any
    rejected: Any
    report: Any


def init_state(
    layers: Mapping[str, Layer],
    owners: Owners,
    axis: Axis,
    adaptive: bool,
    delayed: bool = False,
    periods: tuple[int, int] = (0, 0),
) -> KfacState:
    """Returns the state before the first step.

    Args:
      layers: the layers by path.
      owners: the owner of each unit.
      axis: the devices.
      adaptive: whether the refresh is adaptive.
      delayed: whether inverses take effect later than they are computed.
      periods: as in ``curvature.refresh.Refresh``.

    Returns:
      The state; no two of its arrays share a buffer.
    """

    def shares(path: str) -> Any:
        layer = layers[path]
        return jax.tree.map(
            lambda x, f: jnp.zeros(_shape_of_shares(x, f, axis), x.dtype),
            layer.factor_shapes(),
            layer.block.factors,
        )

    def split() -> Any:
        whole = {path: shares(path) for path in layers}
        return whole if axis.name is None else Sharded(whole)

    # Made twice where the refresh is adaptive: donation forbids a shared buffer.
    factors = split()
    gathered = {u.path for u, g in zip(owners.units, owners.gathered, strict=True) if g}
    dtype = next(iter(layers.values())).block.sums[0].dtype
    kept = (
        () if all(owners.gathered) else Sharded(owner_buffers.identities(owners, dtype))
    )
    pending: Any = ()
    if delayed:
        room = inversion.layout_of_all(owners).length
        buffers: Any = jnp.zeros((axis.size, room), dtype)
        buffers = buffers.reshape(-1) if axis.name is None else Sharded(buffers)
        pending = Pending(buffers, jnp.full(len(owners.units), NONE, jnp.int32))
    traces = {
        path: jax.tree.map(
            lambda x, f: jnp.zeros(x.size // f.size, x.dtype),  # [copies]
            layer.factor_shapes(),
            layer.block.factors,
        )
        for path, layer in layers.items()
    }
    return KfacState(
        count=jnp.zeros([], jnp.int32),
        factors=factors,
        before=split() if adaptive else (),
        traces=traces,
        refresh=clocks.init_refresh(
            len(jax.tree.leaves(factors)), len(owners.units), periods
        ),
        inverses={
            path: layer.block.init(layer.tapped.copies)[1]
            for path, layer in layers.items()
            if path in gathered
        },
        kept=kept,
        pending=pending,
        moments={},  # scale_by_kfac adds them if eigenvalues are corrected
        damping=jnp.zeros(len(owners.units), dtype),
        last_damping=jnp.zeros([]),  # scale_by_kfac knows the first
        boost=jnp.ones(len(layers)),
        rejected=jnp.zeros(len(layers), jnp.int32),
        report=Report(
            statistics=jnp.zeros(len(KINDS), jnp.int32),
            statistic_bytes=jnp.zeros(len(KINDS), jnp.float32),
            inversions=jnp.zeros([], jnp.int32),
            inverse_bytes=jnp.zeros([], jnp.float32),
        ),
    )


def curvature_state(opt_state: OptState) -> KfacState:
    """Returns the curvature's state from an optimizer's or a training state.

    Args:
      opt_state: the state of any optax chain with ``lbopt.scale_by_kfac`` in it, or
        anything that holds one.

    Returns:
      The state, with the fields of ``KfacState``.

    Raises:
      ValueError: unless there is exactly one.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> state = lbopt.kfac(0.1, layers).init(params)
      >>> lbopt.curvature_state(state).rejected.tolist()
      [0]
    """
    found = curvature_states(opt_state)
    if len(found) != 1:
        way_out = "pass the state of a chain with one lbopt.scale_by_kfac"
        raise ValueError(
            f"opt_state={type(opt_state).__name__} must hold one curvature transform, "
            f"not {len(found)}; {clocks.lost_types(opt_state) or way_out}"
        )
    return found[0]


def require_state(state: Any) -> None:
    """Raises ValueError unless a state is of type ``KfacState``."""
    if not is_curvature_state(state):
        way_out = clocks.lost_types(state) or "pass what init or the last update gave"
        raise ValueError(
            f"state={type(state).__name__} must be the state of scale_by_kfac; "
            f"{way_out}"
        )


def curvature_states(tree: Any) -> list[KfacState]:
    """Returns the states of all curvature transforms in a tree, in its order."""
    nodes = jax.tree.leaves(tree, is_leaf=is_curvature_state)
    return [node for node in nodes if is_curvature_state(node)]


def is_curvature_state(node: Any) -> bool:
    """Whether a node of a tree is a curvature transform's state."""
    return isinstance(node, KfacState)


def plain(tree: Any) -> Any:
    """Returns a tree without the mark that its arrays are sharded."""
    return tree.shards if isinstance(tree, Sharded) else tree


def local(buffers: Any) -> Any:
    """Returns this device's buffer under ``shard_map`` or ``pmap``, None if none."""
    if isinstance(buffers, Sharded):
        # The axis of devices has size 1 under shard_map, and is gone under pmap.
        return buffers.shards.reshape(-1)
    return None if isinstance(buffers, tuple) else buffers


def as_in(buffers: Any, new: Any) -> Any:
    """Returns a device's new buffer with the shape and mark of the one in its state."""
    if isinstance(buffers, Sharded):
        return Sharded(new.reshape(buffers.shards.shape))
    return buffers if new is None else new


def kinds(layers: Mapping[str, Layer]) -> list[Any]:
    """Returns the kind of each statistic's factor."""
    return [f for layer in layers.values() for f in layer.block.factors]


def rows(x: Array, factor: Any, axis: Axis) -> Array:
    """Returns this device's share of a factor, ``[copies, share]``."""
    return x.reshape(-1, axis.share(factor.size))


def by_layer(
    flags: Bool[Array, " statistics"], layers: Mapping[str, Layer]
) -> Int[Array, " layers"]:
    """Sums flags of statistics for each layer."""
    # A layer has as many statistics as factors, in the order of the leaves.
    layer_of = [i for i, x in enumerate(layers.values()) for _ in x.block.factors]
    return sums_of_groups(flags.astype(jnp.int32), np.asarray(layer_of), len(layers))


def sums_of_groups(numbers: Array, group_of: np.ndarray, groups: int) -> Array:
    """Sums numbers by their group.

    Args:
      numbers: the numbers, ``[items]``.
      group_of: the group of each.
      groups: the number of groups.

    Returns:
      The sums, ``[groups]``.
    """
    # Not by jax.ops.segment_sum: its scatter is a loop on some backends.
    mine = np.arange(groups)[:, None] == group_of[None]
    return jnp.sum(jnp.where(mine, numbers[None], 0), 1, dtype=numbers.dtype)


def report(
    layers: Mapping[str, Layer],
    owners: Owners,
    due: Bool[Array, " statistics"],
    inverted: inversion.Inverted,
    joint: bool,
    axis: Axis,
    moments: Mapping[str, Any],
) -> Report:
    """Counts the work and the bytes sent of an update.

    Args:
      layers: the layers by path.
      owners: the owner of each unit.
      due: the statistics that were due.
      inverted: what was inverted and delivered.
      joint: whether all statistics share one collective.
      axis: the devices.
      moments: the second moments of gradients, with flags of those that were due.

    Returns:
      The report.
    """
    kinds, sizes = [], []
    for layer in layers.values():
        shapes = layer.factor_shapes()
        for name, x, f in zip(shapes._fields, shapes, layer.block.factors, strict=True):
            kinds.append(KINDS.index({"a": "A", "g": "G"}.get(name, "F")))
            rows = x.size // f.size
            # Each device sends a share to every device, padding included.
            sizes.append(rows * axis.share(f.size) * axis.size * x.dtype.itemsize)
    away, back = [], []  # bytes of a row of shares, to owners and from them
    for units in unit_classes.classes_of(owners):
        f, path = units.factor, owners.units[units.numbers[0]].path
        dtype = layers[path].block.sums[0].dtype
        away.append(jnp.dtype(dtype).itemsize * axis.share(f.size))
        wire = jnp.dtype(dtype).itemsize * axis.share(f.wire)
        back.append(units.gathered * wire)
    remote = float(axis.name is not None)
    # A joint collective sends all statistics as soon as one is due.
    sent = jnp.broadcast_to(jnp.any(due), due.shape) if joint else due
    if moments:
        squares_due = jnp.stack([one.due for one in moments.values()])
        due = jnp.concatenate([due, squares_due])
        # Second moments of all layers share one all-reduce.
        some = jnp.broadcast_to(jnp.any(squares_due), squares_due.shape)
        sent = jnp.concatenate([sent, some])
        sizes += [one.s.size * one.s.dtype.itemsize for one in moments.values()]
        kinds += [KINDS.index("F")] * len(moments)
    moved = remote * jnp.asarray(sizes, jnp.float32) * sent
    # A round of all-to-all sends a row to each device, to owners and back; then each
    # unit's share is gathered once.
    rows = axis.size * inverted.rounds * jnp.asarray(away, jnp.float32)
    returned = axis.size * inverted.delivered_rounds + inverted.delivered
    rows += returned * jnp.asarray(back, jnp.float32)
    kind = np.asarray(kinds)
    return Report(
        statistics=sums_of_groups(due.astype(jnp.int32), kind, len(KINDS)),
        statistic_bytes=sums_of_groups(moved, kind, len(KINDS)),
        inversions=jnp.sum(inverted.accepted, dtype=jnp.int32),
        inverse_bytes=remote * jnp.sum(rows),
    )


def _shape_of_shares(x: Any, factor: Any, axis: Axis) -> tuple[int, ...]:
    if axis.name is None:
        return x.shape
    copies = x.shape[: len(x.shape) - len(factor.shape)]
    return (axis.size, *copies, axis.share(factor.size))
