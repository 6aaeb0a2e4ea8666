"""From factors to inverses: each unit is sent to its owner and inverted there.

A *unit* is what is inverted as a whole: one copy or diagonal block of a factor.  Units
of equal kind and size form a class, whose loops appear in a program once, whatever the
number of devices.  Over several devices an inversion has three parts:

1. The shares of the factors that are due are collected in their owners' buffers.
2. Every device inverts what is in its buffer, without waiting for the others.
3. The inverses are delivered: replicated on every device, or stored by their owners.

With a delay the third part follows some steps after the others, and the buffers are
part of the state in between.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lbopt import collectives
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature.factor import Factor
from lbopt.in_place import update_if
from lbopt.sharding import Owners
from lbopt.transforms import owner_buffers
from lbopt.transforms.unit_classes import (
    Queue,
    UnitClass,
    classes_of,
    due_counts,
    longest_queues,
    queues_of,
    repeat,
    replace_sound,
)


class Inverted(NamedTuple):
    """What an inversion did, the same on all devices.

    Attributes:
      accepted: which units have a new inverse, ``[units]``.
      rounds: the most units of each class that one device inverted, ``[classes]``.
      delivered_rounds: the most that one device delivered, likewise.
      delivered: the units of each class that were delivered, ``[classes]``.
    """

    accepted: Any
    rounds: Any
    delivered_rounds: Any
    delivered: Any


def nothing_inverted(owners: Owners) -> Inverted:
    """Returns the report of a step that inverts nothing."""
    none = jnp.zeros(len(classes_of(owners)), jnp.int32)
    return Inverted(jnp.zeros(len(owners.units), bool), none, none, none)


def invert(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    kept: Float[Array, " length"] | None,
    due: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
) -> tuple[Sequence[Any], Any, Inverted]:
    """Renews the inverses of the units that are due.

    Args:
      owners: the owner of each unit.
      factors: this device's share of each statistic's factor, ``[copies, share]``.
      inverses: the inverses of each statistic's factor, copies first; None for those
        that stay with their owners.
      kept: this device's buffer of owner-kept inverses; None if all are replicated.
      due: the units to invert, the same on all devices.
      damping: the number added to each unit's diagonal.
      axis: the devices.

    Returns:
      ``inverses`` and ``kept``, in which an old inverse remains if the new one is not
      finite, and what was done.
    """
    classes = classes_of(owners)
    queues = queues_of(classes, due)
    accepted = jnp.zeros(len(owners.units), bool)
    rounds = longest_queues(queues)
    found = Inverted(accepted, rounds, rounds, due_counts(queues))
    if axis.name is None:
        renewed = list(inverses)
        for units, queue in zip(classes, queues, strict=True):
            shares = jnp.concatenate([factors[i] for i in units.statistics])
            old = [inverses[i] for i in units.statistics]
            new, sound = _invert_here(owners, units, queue, shares, damping, old)
            accepted = accepted.at[units.numbers].set(sound)
            for i, inverse in zip(units.statistics, new, strict=True):
                renewed[i] = inverse
        return renewed, kept, found._replace(accepted=accepted)

    def renew(carry: Any) -> Any:
        layout = layout_of_all(owners)
        buffer = jnp.zeros(layout.length, jnp.result_type(*factors))
        buffer = _fill(classes, queues, factors, damping, buffer, layout, axis)
        return _deliver(owners, classes, queues, buffer, layout, carry, axis)

    start = (list(inverses), kept, accepted)
    inverses, kept, accepted = update_if(jnp.any(due), renew, start)
    return inverses, kept, found._replace(accepted=accepted)


def invert_later(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    kept: Float[Array, " length"] | None,
    waiting: Float[Array, " room"],
    due: Bool[Array, " units"],
    ready: Bool[Array, " units"],
    first: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
) -> tuple[Sequence[Any], Any, Float[Array, " room"], Inverted]:
    """Inverts the units that are due, and delivers inverses made at earlier steps.

    Args:
      owners: as for ``invert``.
      factors: likewise.
      inverses: likewise.
      kept: likewise.
      waiting: this device's buffer of inverses that are not delivered yet.
      due: the units to invert.
      ready: the units whose inverses are delivered from the buffers before that.
      first: the units, among those due, whose new inverses are delivered at once.
      damping: as for ``invert``.
      axis: likewise.

    Returns:
      ``inverses``, ``kept`` and ``waiting``, and what was done; accepted are units
      whose inverses were delivered and are finite.
    """
    classes, layout = classes_of(owners), layout_of_all(owners)

    def one_pass(number: Array, carry: Any) -> Any:
        waiting, inverses = carry
        begun = due & (number == 1)
        coming = jnp.where(number == 1, first, ready)

        def begin(waiting: Array) -> Array:
            queues = queues_of(classes, begun)
            return _fill(classes, queues, factors, damping, waiting, layout, axis)

        def deliver(inverses: Any) -> Any:
            queues = queues_of(classes, coming)
            return _deliver(owners, classes, queues, waiting, layout, inverses, axis)

        waiting = update_if(jnp.any(begun), begin, waiting)
        return waiting, update_if(jnp.any(coming), deliver, inverses)

    # Pass 0 delivers what is ready, before pass 1 overwrites its place; a loop of two
    # passes, so that the program contains each part once.
    nothing = jnp.zeros(len(owners.units), bool)
    start = (waiting, (list(inverses), kept, nothing))
    waiting, (inverses, kept, accepted) = jax.lax.fori_loop(0, 2, one_pass, start)
    before, after = queues_of(classes, ready), queues_of(classes, first)
    found = Inverted(
        accepted,
        longest_queues(queues_of(classes, due)),
        longest_queues(before) + longest_queues(after),
        due_counts(before) + due_counts(after),
    )
    return inverses, kept, waiting, found


def layout_of_all(owners: Owners) -> owner_buffers.Layout:
    """Returns the layout of the buffers in which units are inverted in place."""
    everything = range(len(owners.units))
    # A packed factor and its packed inverse may differ in size, and share a place.
    return owner_buffers.layout_of(owners, everything, lambda f: max(f.size, f.wire))


# -------------------------------------------------------------------- on one device


def _invert_here(
    owners: Owners,
    units: UnitClass,
    queue: Queue,
    rows: Float[Array, "class size"],
    damping: Array,
    old: list[Any],
) -> tuple[list[Any], Array]:
    """Inverts the units that are due on the only device.

    Returns:
      The inverses of each statistic, and which of the class's units have a new one.
    """
    f, size = units.factor, len(units.numbers)

    def one(k: Array, inverses: Array) -> Array:
        position = queue.positions[0, k]  # the only device is number 0
        amount = damping[jnp.asarray(units.numbers)[position]].astype(rows.dtype)
        inverse = f.invert(rows[position], amount)
        return inverses.at[position].set(inverse.astype(inverses.dtype))

    def renew(carry: Any) -> Any:
        inverses = jnp.zeros_like(rows, shape=(size, f.wire))
        inverses = repeat(queue.lengths[0], one, inverses)
        sound = queue.due & jnp.all(jnp.isfinite(inverses), -1)  # [class]
        return replace_sound(owners, units, carry[0], inverses, sound), sound

    return update_if(queue.lengths[0] > 0, renew, (old, jnp.zeros(size, bool)))


# --------------------------------------------------------------- over several devices


def _fill(
    classes: Sequence[UnitClass],
    queues: Sequence[Queue],
    factors: Sequence[Array],
    damping: Array,
    buffer: Float[Array, " length"],
    layout: owner_buffers.Layout,
    axis: Axis,
) -> Float[Array, " length"]:
    """Returns the buffers with the inverses of the units that are due."""
    # All exchanges come first, so that no device waits for another's inversions.
    for units, queue in zip(classes, queues, strict=True):
        shares = jnp.concatenate([factors[i] for i in units.statistics])
        buffer = _collect(units, queue, shares, buffer, layout, axis)
    for units, queue in zip(classes, queues, strict=True):
        buffer = _invert_owned(units, queue, damping, buffer, layout, axis)
    return buffer


def _deliver(
    owners: Owners,
    classes: Sequence[UnitClass],
    queues: Sequence[Queue],
    buffer: Float[Array, " length"],
    layout: owner_buffers.Layout,
    carry: Any,
    axis: Axis,
) -> tuple[list[Any], Any, Bool[Array, " units"]]:
    """Delivers finished inverses from each owner's buffer.

    Returns:
      The replicated inverses, the buffer of owner-kept ones, and which units were
      accepted.
    """
    inverses, kept, accepted = carry
    renewed = list(inverses)
    for units, queue in zip(classes, queues, strict=True):
        if units.gathered:
            old = [inverses[i] for i in units.statistics]
            new, sound = _replicate(owners, units, queue, buffer, layout, old, axis)
            for i, inverse in zip(units.statistics, new, strict=True):
                renewed[i] = inverse
        else:
            offsets = jnp.asarray(layout.offsets[units.numbers])

            def read(
                position: Array, f: Factor = units.factor, offsets: Array = offsets
            ) -> Array:
                return jax.lax.dynamic_slice(buffer, (offsets[position],), (f.wire,))

            kept, sound = keep(owners, units, queue, read, kept, axis)
        accepted = accepted.at[units.numbers].set(accepted[units.numbers] | sound)
    return renewed, kept, accepted


def _collect(
    units: UnitClass,
    queue: Queue,
    shares: Float[Array, "class share"],
    buffer: Float[Array, " length"],
    layout: owner_buffers.Layout,
    axis: Axis,
) -> Float[Array, " length"]:
    """Collects the packed factors of a class that are due in their owners' buffers."""
    f, last, me = units.factor, len(units.numbers) - 1, axis.position()
    offsets = jnp.asarray(layout.offsets[units.numbers])

    def one(k: Array, buffer: Array) -> Array:
        # In round k every owner gets its k-th unit; padding is clipped to any row.
        rows = jnp.minimum(jnp.take(queue.positions, k, axis=1), last)  # [devices]
        received = collectives.exchange(shares[rows], axis).reshape(-1)[: f.size]
        mine = k < queue.lengths[me]
        at = jnp.where(mine, offsets[rows[me]], 0)
        before = jax.lax.dynamic_slice(buffer, (at,), (f.size,))
        # A device whose queue has ended still sends its shares of others' units.
        after = jnp.where(mine, received.astype(buffer.dtype), before)
        return jax.lax.dynamic_update_slice(buffer, after, (at,))

    return repeat(jnp.max(queue.lengths), one, buffer)


def _invert_owned(
    units: UnitClass,
    queue: Queue,
    damping: Float[Array, " units"],
    buffer: Float[Array, " length"],
    layout: owner_buffers.Layout,
    axis: Axis,
) -> Float[Array, " length"]:
    """Replaces a class's factors in this device's buffer by their inverses."""
    f, me = units.factor, axis.position()
    offsets = jnp.asarray(layout.offsets[units.numbers])
    amounts = damping[units.numbers].astype(buffer.dtype)

    def one(k: Array, buffer: Array) -> Array:
        position = queue.positions[me, k]
        at = offsets[position]
        packed = jax.lax.dynamic_slice(buffer, (at,), (f.size,))
        inverse = f.invert(packed, amounts[position])
        return jax.lax.dynamic_update_slice(buffer, inverse, (at,))

    return repeat(queue.lengths[me], one, buffer)


def _replicate(
    owners: Owners,
    units: UnitClass,
    queue: Queue,
    buffer: Float[Array, " length"],
    layout: owner_buffers.Layout,
    old: list[Any],
    axis: Axis,
) -> tuple[list[Any], Bool[Array, " class"]]:
    """Replicates a class's new inverses on every device.

    Returns:
      The inverses of each statistic, and which of the class's units have a new one.
    """
    f, size, me = units.factor, len(units.numbers), axis.position()
    # Padding of the queue reads from offset 0, and what it reads is never sent.
    offsets = jnp.append(jnp.asarray(layout.offsets[units.numbers]), 0)

    def one(k: Array, inverses: Array) -> Array:
        valid = k < queue.lengths  # the devices that own a k-th unit
        devices = jnp.argsort(~valid, stable=True)
        at = jnp.where(valid[me], offsets[queue.positions[me, k]], 0)
        inverse = jax.lax.dynamic_slice(buffer, (at,), (f.wire,))
        # Each device receives a share of every owner's row, and all-gathers the shares
        # row by row: rows of devices whose queues have ended are never sent.
        shares = collectives.exchange(collectives.cut(inverse[None], axis)[0], axis)

        def pass_on(i: Array, inverses: Array) -> Array:
            whole = collectives.gather(shares[devices[i]][None], axis)[0, : f.wire]
            position = queue.positions[devices[i], k]
            return inverses.at[position].set(whole.astype(inverses.dtype))

        return repeat(jnp.sum(valid, dtype=jnp.int32), pass_on, inverses)

    def renew(carry: Any) -> Any:
        inverses = jnp.zeros_like(buffer, shape=(size, f.wire))
        inverses = repeat(jnp.max(queue.lengths), one, inverses)
        sound = queue.due & jnp.all(jnp.isfinite(inverses), -1)  # [class]
        return replace_sound(owners, units, carry[0], inverses, sound), sound

    # If nothing of the class is due, not even memory for its inverses is allocated.
    return update_if(jnp.any(queue.due), renew, (old, jnp.zeros(size, bool)))


def keep(
    owners: Owners,
    units: UnitClass,
    queue: Queue,
    read: Callable[[Array], Array],
    kept: Float[Array, " kept"],
    axis: Axis,
) -> tuple[Float[Array, " kept"], Bool[Array, " class"]]:
    """Stores a class's new inverses in this device's buffer of owner-kept ones.

    Args:
      owners: the owner of each unit.
      units: the class.
      queue: its units that are due.
      read: returns the packed inverse of the unit at a position in the class, which
        this device owns.
      kept: this device's buffer.
      axis: the devices.

    Returns:
      The buffer, and which of the class's units have a new inverse, on all devices.
    """
    f, me = units.factor, axis.position()
    places = jnp.asarray(owner_buffers.kept_layout(owners).offsets[units.numbers])

    def one(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, sound = carry
        position = queue.positions[me, k]
        inverse = read(position)
        finite = jnp.all(jnp.isfinite(inverse))
        new = owner_buffers.flat(f.expand(inverse)).astype(kept.dtype)
        at = places[position]
        before = jax.lax.dynamic_slice(kept, (at,), new.shape)
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(finite, new, before), (at,))
        return kept, sound.at[position].set(finite.astype(jnp.int32))

    # Flags as integers, because only their owner knows them and others add zeros.
    start = (kept, jnp.zeros(len(units.numbers), jnp.int32))
    kept, sound = repeat(queue.lengths[me], one, start)
    return kept, collectives.total(sound, axis) > 0
