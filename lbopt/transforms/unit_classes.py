"""Classes of units that one loop inverts, and queues of the units that are due.

A class holds all units whose factors have the same kind and size and whose inverses
live in the same place, so that a compiled program contains the code for it once.
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
    """Units of one kind and size.

    Attributes:
      factor: the kind.
      numbers: the units' numbers, ``[class]``.
      statistics: the numbers of their statistics, ascending.
      queues: the positions in the class of the units that each device owns, padded with
        the size of the class, ``[devices, longest]``.
      gathered: whether the inverses are replicated on every device.
    """

    factor: Factor
    numbers: np.ndarray
    statistics: list[int]
    queues: np.ndarray
    gathered: bool


class Queue(NamedTuple):
    """The units of a class that are due, in the order in which devices invert them.

    Attributes:
      due: flags, ``[class]``.
      positions: ``UnitClass.queues`` with the units that are due moved to the front,
        ``[devices, longest]``.
      lengths: the number of each device's units that are due, ``[devices]``.
    """

    due: Array
    positions: Array
    lengths: Array


def classes_of(owners: Owners) -> list[UnitClass]:
    """Groups units into classes.

    Args:
      owners: the units and their owners.

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
        none = len(numbers)  # a position that no unit has
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


def queues_of(classes: Sequence[UnitClass], due: Bool[Array, " units"]) -> list[Queue]:
    """Returns each class's queue of the units that are due."""
    return [_queue_of(units, due[units.numbers]) for units in classes]


def longest_queues(queues: Sequence[Queue]) -> Int[Array, " classes"]:
    """Returns the length of each class's longest queue over the devices."""
    return jnp.stack([jnp.max(queue.lengths) for queue in queues])


def due_counts(queues: Sequence[Queue]) -> Int[Array, " classes"]:
    """Returns the number of units of each class that are due on all devices."""
    return jnp.stack([jnp.sum(queue.due) for queue in queues])


def _queue_of(units: UnitClass, due: Bool[Array, " class"]) -> Queue:
    # The appended flag is that of the padding, which is never due.
    flags = jnp.append(due, False)[units.queues]  # [devices, longest]
    order = jnp.argsort(~flags, axis=1, stable=True)
    positions = jnp.take_along_axis(jnp.asarray(units.queues), order, 1)
    return Queue(due, positions, jnp.sum(flags, 1, dtype=jnp.int32))


def repeat(count: Array, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """Runs ``body(0, …)`` to ``body(count - 1, …)`` with a traced count."""
    # Under jax.disable_jit the counter is a Python number.
    return jax.lax.fori_loop(
        jnp.zeros_like(count), count, lambda k, x: body(jnp.asarray(k), x), start
    )


def replace_sound(
    owners: Owners,
    units: UnitClass,
    old: list[Any],
    inverses: Array,
    sound: Array,
    *,
    always: bool = False,
) -> list[Any]:
    """Returns a class's inverses with those rows replaced whose new ones are sound.

    Args:
      owners: the units and their owners.
      units: the class.
      old: the inverses of each of its statistics, copies first in any shape.
      inverses: the packed new inverses, ``[class, packed]``.
      sound: which of them to take, ``[class]``.
      always: whether nearly every row is new, so that a condition would be in vain.

    Returns:
      The inverses of each statistic, in the shapes and dtypes of the old ones.
    """
    new, first = [], 0
    for statistic, inverse in zip(units.statistics, old, strict=True):
        count = sum(owners.units[i].statistic == statistic for i in units.numbers)
        rows = slice(first, first + count)
        first += count

        def replace_rows(
            old: Any, inverses: Array = inverses[rows], sound: Array = sound[rows]
        ) -> Any:
            return _chosen(units.factor.expand(inverses), sound, old)

        # Without a sound row the old arrays are passed on, not copied.
        new.append(
            replace_rows(inverse)
            if always
            else update_if(jnp.any(sound[rows]), replace_rows, inverse)
        )
    return new


def _chosen(new: Any, sound: Bool[Array, " rows"], old: Any) -> Any:
    """Returns new inverses where they are sound, in the shapes of the old ones."""

    def choose(new: Array, before: Array) -> Array:
        # One flag for each row, broadcast over its numbers.
        flags = sound.reshape(-1, *[1] * (new.ndim - 1))
        chosen = jnp.where(flags, new, before.reshape(new.shape))
        return chosen.astype(before.dtype).reshape(before.shape)

    return jax.tree.map(choose, new, old)
