"""From factors to inverses: each unit travels to its owner and is inverted there.

Units whose factors are of one kind and size are a class, served by loops that a program
holds once, whatever the number of devices.  Over several devices a step has three
parts: shares of the units that are due are collected on the desks of their owners;
every device inverts its own, without waiting for the others; and the inverses are
handed out to every device, or stay where they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from lbopt import collectives
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature.factor import Factor
from lbopt.in_place import update_if
from lbopt.sharding import Owners
from lbopt.transforms import desk


class UnitClass(NamedTuple):
    """Units that one loop serves.

    Attributes:
      factor: their kind.
      numbers: their numbers, ``[class]``.
      statistics: the statistics that they are copies of, in order.
      queues: the positions in the class of each device's units, padded with the size of
        the class, ``[devices, longest]``.
      gathered: whether every device gets the inverses.
    """

    factor: Factor
    numbers: np.ndarray
    statistics: list[int]
    queues: np.ndarray
    gathered: bool


class Inverted(NamedTuple):
    """What inverting found out.

    Attributes:
      accepted: which units have a new inverse, ``[units]``.
      rounds: the most units that one device had to invert of each class, ``[classes]``.
      due: units of each class that were due, ``[classes]``.
    """

    accepted: Any
    rounds: Any
    due: Any


class _Turns(NamedTuple):
    """Which units of a class are due, device by device.

    Attributes:
      due: flags, ``[class]``.
      positions: positions in the class, those that are due first, ``[devices,
        longest]``.
      lengths: how many are due, ``[devices]``.
    """

    due: Array
    positions: Array
    lengths: Array


def classes_of(owners: Owners) -> list[UnitClass]:
    """The classes of an owner table's units.

    Args:
      owners: the table.

    Returns:
      The classes, in the order of their first units.
    """
    found: dict[Any, list[int]] = {}
    for number, unit in enumerate(owners.units):
        key = (unit.factor.invert, unit.factor.shape, owners.gathered[number])
        found.setdefault(key, []).append(number)
    classes = []
    for numbers in found.values():
        lists: list[list[int]] = [[] for _ in range(owners.devices)]
        for position, number in enumerate(numbers):
            lists[owners.owner[number]].append(position)
        longest = max(map(len, lists))
        none = len(numbers)
        first = owners.units[numbers[0]]
        classes.append(
            UnitClass(
                factor=first.factor,
                numbers=np.asarray(numbers),
                statistics=sorted({owners.units[i].statistic for i in numbers}),
                queues=np.asarray([x + [none] * (longest - len(x)) for x in lists]),
                gathered=owners.gathered[numbers[0]],
            )
        )
    return classes


def invert(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    kept: Float[Array, " length"] | None,
    due: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
    gather_dtype: Any = None,
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
      gather_dtype: type in which inverses travel, their own if None.

    Returns:
      ``inverses`` and ``kept``, with the old ones where the new are not finite, and
      what was found out.
    """
    classes = classes_of(owners)
    turns = [_turns_of(units, due[units.numbers]) for units in classes]
    found = Inverted(
        jnp.zeros(len(owners.units), bool),
        jnp.stack([jnp.max(t.lengths) for t in turns]),
        jnp.stack([jnp.sum(t.due) for t in turns]),
    )
    travels = jnp.result_type(*factors) if gather_dtype is None else gather_dtype
    if axis.name is None:
        renewed = list(inverses)
        accepted = found.accepted
        for units, turn in zip(classes, turns, strict=True):
            shares = jnp.concatenate([factors[i] for i in units.statistics])
            old = [inverses[i] for i in units.statistics]
            new, sound = _invert_here(
                owners, units, turn, shares, damping, old, travels
            )
            accepted = accepted.at[units.numbers].set(sound)
            for i, inverse in zip(units.statistics, new, strict=True):
                renewed[i] = inverse
        return renewed, kept, found._replace(accepted=accepted)

    def renew(carry: Any) -> Any:
        inverses, kept, accepted = carry
        everything = range(len(owners.units))
        plan = desk.lay_out(owners, everything, lambda f: max(f.size, f.wire))
        buffer = jnp.zeros(plan.length, jnp.result_type(*factors))
        for units, turn in zip(classes, turns, strict=True):
            shares = jnp.concatenate([factors[i] for i in units.statistics])
            buffer = _collect(units, turn, shares, buffer, plan, axis)
        for units, turn in zip(classes, turns, strict=True):
            buffer = _work(units, turn, damping, buffer, plan, axis)
        renewed = list(inverses)
        for units, turn in zip(classes, turns, strict=True):
            if units.gathered:
                old = [inverses[i] for i in units.statistics]
                new, sound = _hand_out(
                    owners, units, turn, buffer, plan, old, axis, travels
                )
                for i, inverse in zip(units.statistics, new, strict=True):
                    renewed[i] = inverse
            else:
                kept, sound = _put_away(owners, units, turn, buffer, plan, kept, axis)
            accepted = accepted.at[units.numbers].set(sound)
        return renewed, kept, accepted

    start = (list(inverses), kept, found.accepted)
    inverses, kept, accepted = update_if(jnp.any(due), renew, start)
    return inverses, kept, found._replace(accepted=accepted)


def _turns_of(units: UnitClass, due: Bool[Array, " class"]) -> _Turns:
    flags = jnp.append(due, False)[units.queues]
    order = jnp.argsort(~flags, axis=1, stable=True)
    positions = jnp.take_along_axis(jnp.asarray(units.queues), order, 1)
    return _Turns(due, positions, jnp.sum(flags, 1, dtype=jnp.int32))


def _repeat(count: Array, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """``body(0, ...)`` to ``body(count - 1, ...)``."""
    return jax.lax.fori_loop(jnp.zeros_like(count), count, body, start)


# -------------------------------------------------------------------- on one device


def _invert_here(
    owners: Owners,
    units: UnitClass,
    turn: _Turns,
    rows: Float[Array, "class size"],
    damping: Array,
    old: list[Any],
    travels: Any,
) -> tuple[list[Any], Array]:
    """The inverses with those that are due renewed, and which are sound."""
    f, size = units.factor, len(units.numbers)

    def one(k: Array, wires: Array) -> Array:
        position = turn.positions[0, k]
        amount = damping[jnp.asarray(units.numbers)[position]].astype(rows.dtype)
        # Rounded as on its way between devices: their number changes no result.
        wire = f.invert(rows[position], amount).astype(travels)
        return wires.at[position].set(wire.astype(wires.dtype))

    def renew(carry: Any) -> Any:
        wires = jnp.zeros_like(rows, shape=(size, f.wire))
        wires = _repeat(turn.lengths[0], one, wires)
        sound = turn.due & jnp.all(jnp.isfinite(wires), -1)
        return _put(owners, units, carry[0], wires, sound), sound

    return update_if(turn.lengths[0] > 0, renew, (old, jnp.zeros(size, bool)))


def _put(
    owners: Owners, units: UnitClass, old: list[Any], wires: Array, sound: Array
) -> list[Any]:
    """Inverses with the sound ones of new ones put in; copies in any shape."""
    new, first = [], 0
    for statistic, inverse in zip(units.statistics, old, strict=True):
        count = sum(owners.units[i].statistic == statistic for i in units.numbers)
        rows = slice(first, first + count)
        first += count

        def put(
            old: Any, wires: Array = wires[rows], sound: Array = sound[rows]
        ) -> Any:
            def choose(new: Array, before: Array) -> Array:
                flags = sound.reshape(-1, *[1] * (new.ndim - 1))
                chosen = jnp.where(flags, new, before.reshape(new.shape))
                return chosen.astype(before.dtype).reshape(before.shape)

            return jax.tree.map(choose, units.factor.expand(wires), old)

        new.append(update_if(jnp.any(sound[rows]), put, inverse))
    return new


# --------------------------------------------------------------- over several devices


def _collect(
    units: UnitClass,
    turn: _Turns,
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

    return _repeat(jnp.max(turn.lengths), one, buffer)


def _work(
    units: UnitClass,
    turn: _Turns,
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

    return _repeat(turn.lengths[me], one, buffer)


def _hand_out(
    owners: Owners,
    units: UnitClass,
    turn: _Turns,
    buffer: Float[Array, " length"],
    plan: desk.Desk,
    old: list[Any],
    axis: Axis,
    travels: Any,
) -> tuple[list[Any], Bool[Array, " class"]]:
    """The class's inverses on every device with new ones, and which are sound."""
    f, size, me = units.factor, len(units.numbers), axis.position()
    offsets = jnp.append(jnp.asarray(plan.offsets[units.numbers]), 0)

    def one(k: Array, wires: Array) -> Array:
        valid = k < turn.lengths
        devices = jnp.argsort(~valid, stable=True)
        at = jnp.where(valid[me], offsets[turn.positions[me, k]], 0)
        wire = jax.lax.dynamic_slice(buffer, (at,), (f.wire,)).astype(travels)
        # Each device takes a share of every owner's row, and passes it to all others:
        # a row moves once, however many devices have none in this round.
        shares = collectives.exchange(collectives.cut(wire[None], axis)[0], axis)

        def pass_on(i: Array, wires: Array) -> Array:
            whole = collectives.gather(shares[devices[i]][None], axis)[0, : f.wire]
            position = turn.positions[devices[i], k]
            return wires.at[position].set(whole.astype(wires.dtype))

        return _repeat(jnp.sum(valid, dtype=jnp.int32), pass_on, wires)

    def renew(carry: Any) -> Any:
        wires = jnp.zeros_like(buffer, shape=(size, f.wire))
        wires = _repeat(jnp.max(turn.lengths), one, wires)
        sound = turn.due & jnp.all(jnp.isfinite(wires), -1)
        return _put(owners, units, carry[0], wires, sound), sound

    # Not even room is made for the inverses of a class of which nothing is due.
    return update_if(jnp.any(turn.due), renew, (old, jnp.zeros(size, bool)))


def _put_away(
    owners: Owners,
    units: UnitClass,
    turn: _Turns,
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
    kept, sound = _repeat(turn.lengths[me], one, start)
    return kept, collectives.total(sound, axis) > 0
