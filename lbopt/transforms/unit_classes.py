"""Units that one loop serves, and whose turn it is among them.

Units whose factors are of one kind and size are a class.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from lbopt._typing import Array
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
        the class, ``[devices, longest]``.
      gathered: whether every device gets the inverses.
    """

    factor: Factor
    numbers: np.ndarray
    statistics: list[int]
    queues: np.ndarray
    gathered: bool


class Turns(NamedTuple):
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


def turns_of(classes: Sequence[UnitClass], due: Bool[Array, " units"]) -> list[Turns]:
    """Whose turn it is in each class."""
    return [_turns_of(units, due[units.numbers]) for units in classes]


def most_of(turns: Sequence[Turns]) -> Int[Array, " classes"]:
    """The most turns that one device has of each class."""
    return jnp.stack([jnp.max(t.lengths) for t in turns])


def count_of(turns: Sequence[Turns]) -> Int[Array, " classes"]:
    """How many turns there are of each class."""
    return jnp.stack([jnp.sum(t.due) for t in turns])


def _turns_of(units: UnitClass, due: Bool[Array, " class"]) -> Turns:
    flags = jnp.append(due, False)[units.queues]
    order = jnp.argsort(~flags, axis=1, stable=True)
    positions = jnp.take_along_axis(jnp.asarray(units.queues), order, 1)
    return Turns(due, positions, jnp.sum(flags, 1, dtype=jnp.int32))


def repeat(count: Array, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """``body(0, ...)`` to ``body(count - 1, ...)``."""
    return jax.lax.fori_loop(jnp.zeros_like(count), count, body, start)


def put(
    owners: Owners, units: UnitClass, old: list[Any], wires: Array, sound: Array
) -> list[Any]:
    """Inverses with the sound ones of new ones put in; copies in any shape."""
    new, first = [], 0
    for statistic, inverse in zip(units.statistics, old, strict=True):
        count = sum(owners.units[i].statistic == statistic for i in units.numbers)
        rows = slice(first, first + count)
        first += count

        def put_rows(
            old: Any, wires: Array = wires[rows], sound: Array = sound[rows]
        ) -> Any:
            def choose(new: Array, before: Array) -> Array:
                flags = sound.reshape(-1, *[1] * (new.ndim - 1))
                chosen = jnp.where(flags, new, before.reshape(new.shape))
                return chosen.astype(before.dtype).reshape(before.shape)

            return jax.tree.map(choose, units.factor.expand(wires), old)

        new.append(update_if(jnp.any(sound[rows]), put_rows, inverse))
    return new
