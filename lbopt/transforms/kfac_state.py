"""The state of the curvature transform, and its report of what a step did."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature import refresh as clocks
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import desk, inversion, unit_classes

KINDS = ("A", "G", "F")
"""Kinds of statistics in reports: inputs, output gradients, and all others."""


class Report(NamedTuple):
    """What the last update did.

    Attributes:
      statistics: statistics that were due, by kind, ``[3]``.
      statistic_bytes: what each device put into the collectives that ran for them, by
        kind, padding included; 0 without an axis.
      inversions: units inverted, on all devices together.
      inverse_bytes: what each device put into the collectives that ran for inverses.
    """

    statistics: Any
    statistic_bytes: Any
    inversions: Any
    inverse_bytes: Any


class Pending(NamedTuple):
    """Inverses that were made and do not have effect yet.

    Attributes:
      desks: the desks of the units' owners, ``[length]``; with an axis ``[axis_size,
        length]``, marked ``Sharded``.
      step: the step whose factors a unit's was made from, ``[units]``; ``NONE`` where
        nothing is under way, ``AGAIN`` where it was lost: it is made at the next step,
        and has effect at once.
    """

    desks: Any
    step: Any


NONE, AGAIN = -1, -2


class KfacState(NamedTuple):
    """State of ``scale_by_kfac``; layers by path, numbered in alphabetical order.

    Attributes:
      count: steps taken.
      factors: running averages of the statistics, packed; change with the statistics.
        With an axis each array is cut into shares ``[axis_size, *copies, share]`` and
        marked ``Sharded``.
      before: the statistics before the last, likewise, where refreshing is adaptive.
      traces: the traces of each factor's copies, in the type of the factors.
      refresh: the clocks of statistics and inverses.
      inverses: damped inverses, whole, of the layers whose every device has them.
      kept: the other layers' inverses, on the desks of their owners (see ``desk``),
        ``[axis_size, length]``, marked ``Sharded``; ``()`` if there are none.
      pending: inverses that have effect later; ``()`` without a delay.
      moments: the eigenvalues of layers where they are corrected, by path; see
        ``transforms.eigen_moments``.
      damping: what the last step added to the diagonals that it inverted, or would
        have, ``[units]``.
      boost: what each layer's damping is multiplied by, 1 unless its inverse failed.
      rejected: how often a layer's statistic or inverse was not finite and was refused.
      report: what the last update did.
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
    boost: Any
    rejected: Any
    report: Any


def init_state(
    own: Mapping[str, Layer],
    owners: Owners,
    axis: Axis,
    adaptive: bool,
    delayed: bool = False,
) -> KfacState:
    """The state before the first step.

    Args:
      own: the layers by path.
      owners: who inverts what.
      axis: the devices.
      adaptive: whether refreshing is.
      delayed: whether inverses have effect later than they are made.

    Returns:
      The state; no two of its arrays share a buffer.
    """

    def shares(path: str) -> Any:
        layer = own[path]
        return jax.tree.map(
            lambda x, f: jnp.zeros(_shape_of_shares(x, f, axis), x.dtype),
            layer.factor_shapes(),
            layer.block.factors,
        )

    def split() -> Any:
        whole = {path: shares(path) for path in own}
        return whole if axis.name is None else Sharded(whole)

    factors = split()
    gathered = {u.path for u, g in zip(owners.units, owners.gathered, strict=True) if g}
    dtype = next(iter(own.values())).block.sums[0].dtype
    kept = () if all(owners.gathered) else Sharded(desk.identities(owners, dtype))
    pending: Any = ()
    if delayed:
        room = inversion.desk_of_all(owners).length
        desks: Any = jnp.zeros((axis.size, room), dtype)
        desks = desks.reshape(-1) if axis.name is None else Sharded(desks)
        pending = Pending(desks, jnp.full(len(owners.units), NONE, jnp.int32))
    traces = {
        path: jax.tree.map(
            lambda x, f: jnp.zeros(x.size // f.size, x.dtype),
            layer.factor_shapes(),
            layer.block.factors,
        )
        for path, layer in own.items()
    }
    return KfacState(
        count=jnp.zeros([], jnp.int32),
        factors=factors,
        before=split() if adaptive else (),
        traces=traces,
        refresh=clocks.init_refresh(len(jax.tree.leaves(factors)), len(owners.units)),
        inverses={
            path: layer.block.init(layer.tapped.copies)[1]
            for path, layer in own.items()
            if path in gathered
        },
        kept=kept,
        pending=pending,
        moments={},
        damping=jnp.zeros(len(owners.units), dtype),
        boost=jnp.ones(len(own)),
        rejected=jnp.zeros(len(own), jnp.int32),
        report=Report(
            statistics=jnp.zeros(len(KINDS), jnp.int32),
            statistic_bytes=jnp.zeros(len(KINDS), jnp.float32),
            inversions=jnp.zeros([], jnp.int32),
            inverse_bytes=jnp.zeros([], jnp.float32),
        ),
    )


def plain(tree: Any) -> Any:
    """A tree without the mark of how it lies on devices."""
    return tree.shards if isinstance(tree, Sharded) else tree


def local(desks: Any) -> Any:
    """This device's desk under ``shard_map`` or ``pmap``; None if there is none."""
    if isinstance(desks, Sharded):
        # The axis of devices, of size 1 under shard_map, is gone under pmap.
        return desks.shards.reshape(-1)
    return None if isinstance(desks, tuple) else desks


def as_in(desks: Any, new: Any) -> Any:
    """A device's new desk in the shape of the old one in its state."""
    if isinstance(desks, Sharded):
        return Sharded(new.reshape(desks.shards.shape))
    return desks if new is None else new


def kinds(own: Mapping[str, Layer]) -> list[Any]:
    """The kind of each statistic's factor."""
    return [f for layer in own.values() for f in layer.block.factors]


def rows(x: Array, factor: Any, axis: Axis) -> Array:
    """This device's part of a factor, a row for each copy."""
    return x.reshape(-1, axis.share(factor.size))


def by_layer(
    flags: Bool[Array, " statistics"], own: Mapping[str, Layer]
) -> Int[Array, " layers"]:
    """Sums flags of statistics for each layer."""
    layer_of = [i for i, x in enumerate(own.values()) for _ in x.block.factors]
    counts = flags.astype(jnp.int32)
    return jax.ops.segment_sum(counts, np.asarray(layer_of), len(own))


def report(
    own: Mapping[str, Layer],
    owners: Owners,
    due: Bool[Array, " statistics"],
    inverted: inversion.Inverted,
    joint: bool,
    axis: Axis,
    moments: Mapping[str, Any],
) -> Report:
    """What ran in an update.

    Args:
      own: the layers by path.
      owners: who inverted what.
      due: the statistics that were due.
      inverted: what inverting found out.
      joint: whether all statistics travel together.
      axis: the devices.
      moments: the second moments of gradients, with what was due of them.

    Returns:
      The report.
    """
    kinds, sizes = [], []
    for layer in own.values():
        shapes = layer.factor_shapes()
        for name, x, f in zip(shapes._fields, shapes, layer.block.factors, strict=True):
            kinds.append(KINDS.index({"a": "A", "g": "G"}.get(name, "F")))
            rows = x.size // f.size
            sizes.append(rows * axis.share(f.size) * axis.size * x.dtype.itemsize)
    away, back = [], []
    for units in unit_classes.classes_of(owners):
        f, path = units.factor, owners.units[units.numbers[0]].path
        dtype = own[path].block.sums[0].dtype
        away.append(jnp.dtype(dtype).itemsize * axis.share(f.size))
        wire = jnp.dtype(dtype).itemsize * axis.share(f.wire)
        back.append(units.gathered * wire)
    remote = float(axis.name is not None)
    sent = jnp.broadcast_to(jnp.any(due), due.shape) if joint else due
    if moments:
        squares_due = jnp.stack([one.due for one in moments.values()])
        due = jnp.concatenate([due, squares_due])
        some = jnp.broadcast_to(jnp.any(squares_due), squares_due.shape)
        sent = jnp.concatenate([sent, some])
        sizes += [one.s.size * one.s.dtype.itemsize for one in moments.values()]
        kinds += [KINDS.index("F")] * len(moments)
    moved = remote * jnp.asarray(sizes, jnp.float32) * sent
    # To the owners and back a row for each device; and a row for each unit to all.
    rows = axis.size * inverted.rounds * jnp.asarray(away, jnp.float32)
    returned = axis.size * inverted.handed_rounds + inverted.handed
    rows += returned * jnp.asarray(back, jnp.float32)
    kind = np.asarray(kinds)
    return Report(
        statistics=jax.ops.segment_sum(due.astype(jnp.int32), kind, len(KINDS)),
        statistic_bytes=jax.ops.segment_sum(moved, kind, len(KINDS)),
        inversions=jnp.sum(inverted.accepted, dtype=jnp.int32),
        inverse_bytes=remote * jnp.sum(rows),
    )


def _shape_of_shares(x: Any, factor: Any, axis: Axis) -> tuple[int, ...]:
    if axis.name is None:
        return x.shape
    copies = x.shape[: len(x.shape) - len(factor.shape)]
    return (axis.size, *copies, axis.share(factor.size))
