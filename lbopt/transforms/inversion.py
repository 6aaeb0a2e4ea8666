"""From factors to inverses: each unit travels to its owner, is inverted, and returns.

Units whose factors are of one kind and size are served by one loop.  In each of its
rounds every device inverts at most one unit of its own that is due, so that nothing
else is sent or inverted, and a program holds each size once whatever the devices.
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
from lbopt.in_place import update_if
from lbopt.sharding import Owners


class Inverted(NamedTuple):
    """What inverting found out.

    Attributes:
      accepted: which units have a new inverse, ``[units]``.
      rounds: rounds of each class, ``[classes]``.
    """

    accepted: Any
    rounds: Any


def classes_of(owners: Owners) -> list[list[int]]:
    """The numbers of the units, those together that one loop serves."""
    found: dict[Any, list[int]] = {}
    for number, unit in enumerate(owners.units):
        key = (unit.factor.invert, unit.factor.shape)
        found.setdefault(key, []).append(number)
    return list(found.values())


def invert(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    due: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
    gather_dtype: Any = None,
) -> tuple[list[Any], Inverted]:
    """Renews the inverses of the units that are due, on every device.

    Args:
      owners: who inverts what.
      factors: this device's share of each statistic's factor, ``[copies, share]``.
      inverses: the inverses of every factor, copies first.
      due: which units are, the same on all devices.
      damping: what is added to each unit's diagonal.
      axis: the devices.
      gather_dtype: type in which inverses travel, their own if None.

    Returns:
      The inverses, the old ones where the new are not finite, and what was found out.
    """
    inverses = list(inverses)
    accepted = jnp.zeros(len(owners.units), bool)
    rounds = []
    for numbers in classes_of(owners):
        units = [owners.units[i] for i in numbers]
        statistics = sorted({unit.statistic for unit in units})
        ids = np.asarray(numbers)

        def renew(old: Any, units: Any = units, ids: Any = ids) -> Any:
            own = [factors[i] for i in sorted({u.statistic for u in units})]
            wires, rounds = _rounds(
                owners,
                ids,
                jnp.concatenate(own),
                due[ids],
                damping[ids],
                axis,
                gather_dtype,
            )
            sound = due[ids] & jnp.all(jnp.isfinite(wires), -1)
            new = _replaced(units, old[0], wires, sound)
            return new, sound, rounds

        start = (
            [inverses[i] for i in statistics],
            jnp.zeros(len(ids), bool),
            jnp.zeros([], jnp.int32),
        )
        new, sound, count = update_if(jnp.any(due[ids]), renew, start)
        for i, inverse in zip(statistics, new, strict=True):
            inverses[i] = inverse
        accepted = accepted.at[ids].set(sound)
        rounds.append(count)
    return inverses, Inverted(accepted, jnp.stack(rounds))


def _queues(owners: Owners, ids: np.ndarray, due: Array) -> tuple[Array, Array]:
    """Each device's due units of a class in turn, and how many they are."""
    by_owner = [
        [k for k, i in enumerate(ids) if owners.owner[i] == device]
        for device in range(owners.devices)
    ]
    longest = max(map(len, by_owner))
    none = len(ids)
    table = np.asarray([own + [none] * (longest - len(own)) for own in by_owner])
    flags = jnp.append(due, False)[table]
    order = jnp.argsort(~flags, axis=1, stable=True)
    return jnp.take_along_axis(jnp.asarray(table), order, 1), jnp.sum(
        flags, 1, dtype=jnp.int32
    )


def _rounds(
    owners: Owners,
    ids: np.ndarray,
    shares: Float[Array, "class share"],
    due: Array,
    damping: Array,
    axis: Axis,
    gather_dtype: Any,
) -> tuple[Float[Array, "class wire"], Array]:
    """The compact inverses of the units of one class that are due, and the rounds."""
    factor = owners.units[ids[0]].factor
    queues, lengths = _queues(owners, ids, due)
    me = axis.position()
    travels = shares.dtype if gather_dtype is None else gather_dtype

    def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        number, wires = carry
        turns = jnp.take(queues, number, axis=1)
        mine = jnp.minimum(turns[me], len(ids) - 1)
        rows = shares[jnp.minimum(turns, len(ids) - 1)]
        packed = collectives.to_owners(rows, axis)[: factor.size]

        def work(packed: Array) -> Array:
            return factor.invert(packed, damping[mine].astype(packed.dtype))

        # A device whose queue is empty only passes shares on.
        wire = jax.lax.cond(
            number < lengths[me],
            work,
            lambda packed: jnp.zeros_like(packed, shape=factor.wire),
            packed,
        )
        back = collectives.from_owners(wire.astype(travels), axis)
        whole = collectives.gather(back, axis)[:, : factor.wire].astype(wires.dtype)
        valid = jnp.where(number < lengths, turns, len(ids))
        return number + 1, wires.at[valid].set(whole, mode="drop")

    last = jnp.max(lengths)
    start = (
        jnp.zeros([], last.dtype),
        jnp.zeros_like(shares, shape=(len(ids), factor.wire)),
    )
    return jax.lax.while_loop(lambda carry: carry[0] < last, turn, start)[1], last


def _replaced(units: Any, old: Sequence[Any], wires: Array, sound: Array) -> list[Any]:
    """The inverses of whole factors with the sound units' new ones put in."""
    new, start = [], 0
    for statistic, inverse in zip(
        sorted({u.statistic for u in units}), old, strict=True
    ):
        count = sum(u.statistic == statistic for u in units)
        rows = slice(start, start + count)
        start += count
        factor = next(u.factor for u in units if u.statistic == statistic)

        def put(inverse: Any, rows: slice = rows, factor: Any = factor) -> Any:
            expanded = factor.expand(wires[rows])

            def choose(n: Array, o: Array) -> Array:
                flat = o.reshape(n.shape)
                flags = sound[rows].reshape(-1, *[1] * (n.ndim - 1))
                return jnp.where(flags, n, flat).astype(o.dtype).reshape(o.shape)

            return jax.tree.map(choose, expanded, inverse)

        new.append(update_if(jnp.any(sound[rows]), put, inverse))
    return new
