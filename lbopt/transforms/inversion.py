"""From factors to inverses: each unit travels to its owner and is inverted there.

Units whose factors are of one kind and size are a class, served by loops that a program
holds once, whatever the number of devices.  Over several devices a step has three
parts: shares of the units that are due are collected on the desks of their owners;
every device inverts its own, without waiting for the others; and the inverses are
handed out to every device, or stay where they are.  With a delay the third part comes
some steps after the others, and until then the desks are a part of the state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lbopt import collectives
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.in_place import update_if
from lbopt.sharding import Owners
from lbopt.transforms import desk
from lbopt.transforms.unit_classes import (
    Turns,
    UnitClass,
    classes_of,
    count_of,
    most_of,
    put,
    repeat,
    turns_of,
)


class Inverted(NamedTuple):
    """What inverting found out.

    Attributes:
      accepted: which units have a new inverse, ``[units]``.
      rounds: the most units that one device had to invert of each class, ``[classes]``.
      handed_rounds: the most that one device had to hand out, likewise.
      handed: units of each class that were handed out, ``[classes]``.
    """

    accepted: Any
    rounds: Any
    handed_rounds: Any
    handed: Any


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
      owners: who inverts what.
      factors: this device's share of each statistic's factor, ``[copies, share]``.
      inverses: the inverses of each statistic's factor, copies first; None where they
        stay with their owners.
      kept: this device's own, on its desk; None if every device gets all.
      due: which units are, the same on all devices.
      damping: what is added to each unit's diagonal.
      axis: the devices.

    Returns:
      ``inverses`` and ``kept``, with the old ones where the new are not finite, and
      what was found out.
    """
    classes = classes_of(owners)
    turns = turns_of(classes, due)
    accepted = jnp.zeros(len(owners.units), bool)
    found = Inverted(
        accepted,
        most_of(turns),
        most_of(turns),
        count_of(turns),
    )
    if axis.name is None:
        renewed = list(inverses)
        for units, turn in zip(classes, turns, strict=True):
            shares = jnp.concatenate([factors[i] for i in units.statistics])
            old = [inverses[i] for i in units.statistics]
            new, sound = _invert_here(owners, units, turn, shares, damping, old)
            accepted = accepted.at[units.numbers].set(sound)
            for i, inverse in zip(units.statistics, new, strict=True):
                renewed[i] = inverse
        return renewed, kept, found._replace(accepted=accepted)

    def renew(carry: Any) -> Any:
        plan = desk_of_all(owners)
        buffer = jnp.zeros(plan.length, jnp.result_type(*factors))
        buffer = _begin(classes, turns, factors, damping, buffer, plan, axis)
        return _deliver(owners, classes, turns, buffer, plan, carry, axis)

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
    """Inverts the units that are due, and delivers inverses that were made before.

    Args:
      owners: as for ``invert``.
      factors: likewise.
      inverses: likewise.
      kept: likewise.
      waiting: this device's desk of inverses that are not delivered yet.
      due: which units are to be inverted.
      ready: which inverses on the desks are to be delivered before that.
      first: which of those that are due are to be delivered at once.
      damping: as for ``invert``.
      axis: likewise.

    Returns:
      ``inverses``, ``kept`` and ``waiting``, and what was found out; accepted are units
      that were delivered and are finite.
    """
    classes, plan = classes_of(owners), desk_of_all(owners)

    def turn(number: Array, carry: Any) -> Any:
        waiting, delivered = carry
        begun = due & (number == 1)
        handed = jnp.where(number == 1, first, ready)

        def begin(waiting: Array) -> Array:
            turns = turns_of(classes, begun)
            return _begin(classes, turns, factors, damping, waiting, plan, axis)

        def deliver(delivered: Any) -> Any:
            turns = turns_of(classes, handed)
            return _deliver(owners, classes, turns, waiting, plan, delivered, axis)

        waiting = update_if(jnp.any(begun), begin, waiting)
        return waiting, update_if(jnp.any(handed), deliver, delivered)

    # A loop of two turns, so that the program holds each part once.
    nothing = jnp.zeros(len(owners.units), bool)
    start = (waiting, (list(inverses), kept, nothing))
    waiting, (inverses, kept, accepted) = jax.lax.fori_loop(0, 2, turn, start)
    before, after = (
        turns_of(classes, ready),
        turns_of(classes, first),
    )
    found = Inverted(
        accepted,
        most_of(turns_of(classes, due)),
        most_of(before) + most_of(after),
        count_of(before) + count_of(after),
    )
    return inverses, kept, waiting, found


def desk_of_all(owners: Owners) -> desk.Desk:
    """The plan of the desks on which all units are inverted."""
    everything = range(len(owners.units))
    return desk.lay_out(owners, everything, lambda f: max(f.size, f.wire))


# -------------------------------------------------------------------- on one device


def _invert_here(
    owners: Owners,
    units: UnitClass,
    turn: Turns,
    rows: Float[Array, "class size"],
    damping: Array,
    old: list[Any],
) -> tuple[list[Any], Array]:
    """The inverses with those that are due renewed, and which are sound."""
    f, size = units.factor, len(units.numbers)

    def one(k: Array, wires: Array) -> Array:
        position = turn.positions[0, k]
        amount = damping[jnp.asarray(units.numbers)[position]].astype(rows.dtype)
        wire = f.invert(rows[position], amount)
        return wires.at[position].set(wire.astype(wires.dtype))

    def renew(carry: Any) -> Any:
        wires = jnp.zeros_like(rows, shape=(size, f.wire))
        wires = repeat(turn.lengths[0], one, wires)
        sound = turn.due & jnp.all(jnp.isfinite(wires), -1)
        return put(owners, units, carry[0], wires, sound), sound

    return update_if(turn.lengths[0] > 0, renew, (old, jnp.zeros(size, bool)))


# --------------------------------------------------------------- over several devices


def _begin(
    classes: Sequence[UnitClass],
    turns: Sequence[Turns],
    factors: Sequence[Array],
    damping: Array,
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    axis: Axis,
) -> Float[Array, " length"]:
    """The desks with the inverses of the units that are due."""
    for units, turn in zip(classes, turns, strict=True):
        shares = jnp.concatenate([factors[i] for i in units.statistics])
        buffer = _collect(units, turn, shares, buffer, plan, axis)
    for units, turn in zip(classes, turns, strict=True):
        buffer = _work(units, turn, damping, buffer, plan, axis)
    return buffer


def _deliver(
    owners: Owners,
    classes: Sequence[UnitClass],
    turns: Sequence[Turns],
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    carry: Any,
    axis: Axis,
) -> tuple[list[Any], Any, Bool[Array, " units"]]:
    """The inverses, those kept, and the accepted, with what the desks have for them."""
    inverses, kept, accepted = carry
    renewed = list(inverses)
    for units, turn in zip(classes, turns, strict=True):
        if units.gathered:
            old = [inverses[i] for i in units.statistics]
            new, sound = _hand_out(owners, units, turn, buffer, plan, old, axis)
            for i, inverse in zip(units.statistics, new, strict=True):
                renewed[i] = inverse
        else:
            kept, sound = _put_away(owners, units, turn, buffer, plan, kept, axis)
        accepted = accepted.at[units.numbers].set(accepted[units.numbers] | sound)
    return renewed, kept, accepted


def _collect(
    units: UnitClass,
    turn: Turns,
    shares: Float[Array, "class share"],
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    axis: Axis,
) -> Float[Array, " length"]:
    """The desks with the packed factors of the class that are due."""
    f, last, me = units.factor, len(units.numbers) - 1, axis.position()
    offsets = jnp.asarray(plan.offsets[units.numbers])

    def one(k: Array, buffer: Array) -> Array:
        rows = jnp.minimum(jnp.take(turn.positions, k, axis=1), last)
        received = collectives.exchange(shares[rows], axis).reshape(-1)[: f.size]
        mine = k < turn.lengths[me]
        at = jnp.where(mine, offsets[rows[me]], 0)
        before = jax.lax.dynamic_slice(buffer, (at,), (f.size,))
        # A device that has no more of the class only passes shares on.
        after = jnp.where(mine, received.astype(buffer.dtype), before)
        return jax.lax.dynamic_update_slice(buffer, after, (at,))

    return repeat(jnp.max(turn.lengths), one, buffer)


def _work(
    units: UnitClass,
    turn: Turns,
    damping: Float[Array, " units"],
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    axis: Axis,
) -> Float[Array, " length"]:
    """The desks with inverses in the place of the class's factors."""
    f, me = units.factor, axis.position()
    offsets = jnp.asarray(plan.offsets[units.numbers])
    amounts = damping[units.numbers].astype(buffer.dtype)

    def one(k: Array, buffer: Array) -> Array:
        position = turn.positions[me, k]
        at = offsets[position]
        packed = jax.lax.dynamic_slice(buffer, (at,), (f.size,))
        wire = f.invert(packed, amounts[position])
        return jax.lax.dynamic_update_slice(buffer, wire, (at,))

    return repeat(turn.lengths[me], one, buffer)


def _hand_out(
    owners: Owners,
    units: UnitClass,
    turn: Turns,
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    old: list[Any],
    axis: Axis,
) -> tuple[list[Any], Bool[Array, " class"]]:
    """The class's inverses on every device with new ones, and which are sound."""
    f, size, me = units.factor, len(units.numbers), axis.position()
    offsets = jnp.append(jnp.asarray(plan.offsets[units.numbers]), 0)

    def one(k: Array, wires: Array) -> Array:
        valid = k < turn.lengths
        devices = jnp.argsort(~valid, stable=True)
        at = jnp.where(valid[me], offsets[turn.positions[me, k]], 0)
        wire = jax.lax.dynamic_slice(buffer, (at,), (f.wire,))
        # Each device takes a share of every owner's row, and passes it to all others:
        # a row moves once, however many devices have none in this round.
        shares = collectives.exchange(collectives.cut(wire[None], axis)[0], axis)

        def pass_on(i: Array, wires: Array) -> Array:
            whole = collectives.gather(shares[devices[i]][None], axis)[0, : f.wire]
            position = turn.positions[devices[i], k]
            return wires.at[position].set(whole.astype(wires.dtype))

        return repeat(jnp.sum(valid, dtype=jnp.int32), pass_on, wires)

    def renew(carry: Any) -> Any:
        wires = jnp.zeros_like(buffer, shape=(size, f.wire))
        wires = repeat(jnp.max(turn.lengths), one, wires)
        sound = turn.due & jnp.all(jnp.isfinite(wires), -1)
        return put(owners, units, carry[0], wires, sound), sound

    # Not even room is made for the inverses of a class of which nothing is due.
    return update_if(jnp.any(turn.due), renew, (old, jnp.zeros(size, bool)))


def _put_away(
    owners: Owners,
    units: UnitClass,
    turn: Turns,
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    kept: Float[Array, " kept"],
    axis: Axis,
) -> tuple[Float[Array, " kept"], Bool[Array, " class"]]:
    """The class's new inverses among those kept, and which are sound (told to all)."""
    f, me = units.factor, axis.position()
    offsets = jnp.asarray(plan.offsets[units.numbers])
    places = jnp.asarray(desk.kept_desk(owners).offsets[units.numbers])

    def one(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, sound = carry
        position = turn.positions[me, k]
        wire = jax.lax.dynamic_slice(buffer, (offsets[position],), (f.wire,))
        finite = jnp.all(jnp.isfinite(wire))
        new = desk.flat(f.expand(wire)).astype(kept.dtype)
        at = places[position]
        before = jax.lax.dynamic_slice(kept, (at,), new.shape)
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(finite, new, before), (at,))
        return kept, sound.at[position].set(finite.astype(jnp.int32))

    start = (kept, jnp.zeros(len(units.numbers), jnp.int32))
    kept, sound = repeat(turn.lengths[me], one, start)
    return kept, collectives.total(sound, axis) > 0
