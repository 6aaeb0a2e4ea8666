"""From factors to inverses: each unit travels to its owner and is inverted there.

Units whose factors are of one kind and size are a class, served by one loop.  In each
of its rounds every device inverts at most one unit of its own that is due, so that
nothing else is sent or inverted, and a program holds each size once whatever the
devices.  Inverses then go to every device, or stay with their owners.
"""

from collections.abc import Sequence
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


class UnitClass(NamedTuple):
    """Units that one loop serves.

    Attributes:
      factor: their kind.
      numbers: their numbers, ``[class]``.
      statistics: the statistics that they are copies of, in order.
      queues: the positions in the class of each device's units, padded with the size of
        the class, ``[devices, longest]``; the column is a unit's slot.
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
      rounds: rounds of each class, ``[classes]``.
    """

    accepted: Any
    rounds: Any


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


def kept_inverses(owners: Owners, dtype: Any) -> list[Any]:
    """The inverses that stay with their owners, before the first statistic.

    Args:
      owners: who keeps what.
      dtype: their type.

    Returns:
      For each class that is not gathered the identity ``[devices, slots, ...]``.
    """
    kept = []
    for units in classes_of(owners):
        if not units.gathered:
            f = units.factor
            eye = jnp.broadcast_to(f.identity(dtype), (*units.queues.shape, f.wire))
            kept.append(f.expand(eye))
    return kept


def invert(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    kept: Sequence[Any],
    due: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
    gather_dtype: Any = None,
) -> tuple[list[Any], list[Any], Inverted]:
    """Renews the inverses of the units that are due.

    Args:
      owners: who inverts what.
      factors: this device's share of each statistic's factor, ``[copies, share]``.
      inverses: the inverses of each statistic's factor, copies first; None where they
        stay with their owners.
      kept: this device's own, ``[slots, ...]`` for each class that is not gathered.
      due: which units are, the same on all devices.
      damping: what is added to each unit's diagonal.
      axis: the devices.
      gather_dtype: type in which inverses travel, their own if None.

    Returns:
      ``inverses`` and ``kept``, with the old ones where the new are not finite, and
      what was found out.
    """
    inverses, kept = list(inverses), list(kept)
    accepted = jnp.zeros(len(owners.units), bool)
    rounds = []
    own = iter(range(len(kept)))
    for units in classes_of(owners):
        ids = units.numbers
        place = None if units.gathered else next(own)
        old = [inverses[i] for i in units.statistics] if place is None else kept[place]

        def renew(carry: Any, units: UnitClass = units, ids: Any = ids) -> Any:
            shares = jnp.concatenate([factors[i] for i in units.statistics])
            run = _gathered if units.gathered else _kept
            return run(
                owners,
                units,
                carry[0],
                shares,
                due[ids],
                damping[ids],
                axis,
                gather_dtype,
            )

        start = (old, jnp.zeros(len(ids), bool), jnp.zeros([], jnp.int32))
        new, sound, count = update_if(jnp.any(due[ids]), renew, start)
        if place is None:
            for i, inverse in zip(units.statistics, new, strict=True):
                inverses[i] = inverse
        else:
            kept[place] = new
        accepted = accepted.at[ids].set(sound)
        rounds.append(count)
    return inverses, kept, Inverted(accepted, jnp.stack(rounds))


def _turns(units: UnitClass, due: Array) -> tuple[Array, Array, Array]:
    """Each device's due units in turn, their slots, and how many they are."""
    flags = jnp.append(due, False)[units.queues]
    slots = jnp.argsort(~flags, axis=1, stable=True)
    queues = jnp.take_along_axis(jnp.asarray(units.queues), slots, 1)
    return queues, slots, jnp.sum(flags, 1, dtype=jnp.int32)


class _Round(NamedTuple):
    """One round: this device's unit is inverted.

    Attributes:
      number: of the round.
      turns: the position in the class of each device's unit, ``[devices]``, or the size
        of the class.
      slot: this device's slot of its unit, or the number of slots.
      wire: its inverse.
    """

    number: Array
    turns: Array
    slot: Array
    wire: Array


def _rounds(
    units: UnitClass, shares: Array, due: Array, damping: Array, axis: Axis, take, start
) -> tuple[Any, Array]:
    """Runs the rounds that are needed; ``take(round, results) -> results``."""
    f, size, me = units.factor, len(units.numbers), axis.position()
    queues, slots, lengths = _turns(units, due)
    last = jnp.max(lengths)

    def turn(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        number, results = carry
        valid = number < lengths
        turns = jnp.where(valid, jnp.take(queues, number, axis=1), size)
        row = jnp.minimum(turns, size - 1)
        packed = collectives.exchange(shares[row], axis).reshape(-1)[: f.size]
        # A device whose queue is empty only passes shares on.
        wire = jax.lax.cond(
            valid[me],
            lambda packed: f.invert(packed, damping[row[me]].astype(packed.dtype)),
            lambda packed: jnp.zeros_like(packed, shape=f.wire),
            packed,
        )
        slot = jnp.where(valid[me], slots[me, number], units.queues.shape[1])
        return number + 1, take(_Round(number, turns, slot, wire), results)

    begin = (jnp.zeros([], jnp.int32), start)
    return jax.lax.while_loop(lambda carry: carry[0] < last, turn, begin)[1], last


def _gathered(
    owners, units, old, shares, due, damping, axis, gather_dtype
) -> tuple[list[Any], Array, Array]:
    """New inverses on every device, which are sound, and the rounds."""
    f = units.factor
    travels = shares.dtype if gather_dtype is None else gather_dtype

    def take(one: _Round, wires: Array) -> Array:
        mine = collectives.cut(one.wire.astype(travels)[None], axis)[0]
        whole = collectives.gather(collectives.exchange(mine, axis), axis)
        whole = whole[:, : f.wire].astype(wires.dtype)
        return wires.at[one.turns].set(whole, mode="drop")

    start = jnp.zeros_like(shares, shape=(len(units.numbers), f.wire))
    wires, rounds = _rounds(units, shares, due, damping, axis, take, start)
    sound = due & jnp.all(jnp.isfinite(wires), -1)
    new, first = [], 0
    for statistic, inverse in zip(units.statistics, old, strict=True):
        count = sum(owners.units[i].statistic == statistic for i in units.numbers)
        rows = slice(first, first + count)
        first += count
        new.append(_put(f, inverse, wires[rows], sound[rows]))
    return new, sound, rounds


def _kept(
    owners, units, old, shares, due, damping, axis, gather_dtype
) -> tuple[Any, Array, Array]:
    """New inverses on their owners, which are sound (told to all), and the rounds."""
    del owners, gather_dtype
    f, slots = units.factor, units.queues.shape[1]

    def take(one: _Round, results: tuple[Array, Array]) -> tuple[Array, Array]:
        wires, done = results
        wires = wires.at[one.slot].set(one.wire, mode="drop")
        return wires, done.at[one.slot].set(True, mode="drop")

    start = (jnp.zeros_like(shares, shape=(slots, f.wire)), jnp.zeros(slots, bool))
    results, rounds = _rounds(units, shares, due, damping, axis, take, start)
    wires, done = results
    sound = done & jnp.all(jnp.isfinite(wires), -1)
    mine = jnp.asarray(units.queues)[axis.position()]
    flags = (
        jnp.zeros(len(units.numbers), jnp.int32)
        .at[mine]
        .add(sound.astype(jnp.int32), mode="drop")
    )
    return _put(f, old, wires, sound), collectives.total(flags, axis) > 0, rounds


def _put(factor: Factor, old: Any, wires: Array, sound: Array) -> Any:
    """Inverses with the sound ones of new ones put in; copies in any shape."""

    def put(old: Any) -> Any:
        def choose(new: Array, before: Array) -> Array:
            flags = sound.reshape(-1, *[1] * (new.ndim - 1))
            chosen = jnp.where(flags, new, before.reshape(new.shape))
            return chosen.astype(before.dtype).reshape(before.shape)

        return jax.tree.map(choose, factor.expand(wires), old)

    return update_if(jnp.any(sound), put, old)
