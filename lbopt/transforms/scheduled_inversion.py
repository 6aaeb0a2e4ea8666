"""Inversion of all units at once, in a step at which the host knows they are due.

Nothing is looked up while the step runs: the units of each device and their places are
known when it is compiled.  Over several devices three collectives serve all classes,
whatever their number:

1. an all-to-all brings the shares of each factor to its owner;
2. a second one hands every device its share of each inverse;
3. an all-gather joins the shares, without padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from lbopt import collectives
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.in_place import update_if
from lbopt.sharding import Owners
from lbopt.transforms import inversion, unit_classes
from lbopt.transforms.inversion import Inverted
from lbopt.transforms.unit_classes import UnitClass

# A device that owns fewer units of a class than others skips the rest of its places by
# a loop; those of smaller units it inverts in vain, all at once.
_LOOP_FROM = 512**3


def invert_all(
    owners: Owners,
    factors: Sequence[Float[Array, "_ _"]],
    inverses: Sequence[Any],
    kept: Float[Array, " length"] | None,
    known: Bool[Array, " units"],
    damping: Float[Array, " units"],
    axis: Axis,
) -> tuple[list[Any], Any, Inverted]:
    """Renews the inverses of all units whose statistics are known.

    Args:
      owners: the owner of each unit.
      factors: this device's share of each statistic's factor, ``[copies, share]``.
      inverses: the inverses of each statistic's factor, copies first; None for those
        that stay with their owners.
      kept: this device's buffer of owner-kept inverses; None if all are replicated.
      known: the units whose inverses may be replaced, the same on all devices.
      damping: the number added to each unit's diagonal.
      axis: the devices.

    Returns:
      ``inverses`` and ``kept``, in which an old inverse remains if the new one is not
      finite, and what was done.
    """
    classes = unit_classes.classes_of(owners)
    rows = [jnp.concatenate([factors[i] for i in c.statistics]) for c in classes]
    if axis.name is None:
        made = [
            c.factor.invert(x, damping[c.numbers].astype(x.dtype))
            for c, x in zip(classes, rows, strict=True)
        ]
        mine: list[Array] = []
    else:
        mine = _inverted_by_owners(classes, rows, damping, axis)
        made = _replicated(classes, mine, axis)
    renewed, accepted = list(inverses), []
    queues = unit_classes.queues_of(classes, known)
    for number, (units, queue) in enumerate(zip(classes, queues, strict=True)):
        if units.gathered:
            new = made.pop(0)
            sound = queue.due & jnp.all(jnp.isfinite(new), -1)
            old = [inverses[i] for i in units.statistics]
            replaced = unit_classes.replace_sound(
                owners, units, old, new, sound, always=True
            )
            for i, inverse in zip(units.statistics, replaced, strict=True):
                renewed[i] = inverse
        else:
            assert kept is not None
            places = jnp.asarray(_places(units))

            def read(
                position: Array, own: Array = mine[number], places: Array = places
            ) -> Array:
                return own[places[position]]

            kept, sound = inversion.keep(owners, units, queue, read, kept, axis)
        accepted.append(sound)
    numbers = np.concatenate([units.numbers for units in classes])
    # By gathering: a scatter is a loop on some backends.
    by_unit = jnp.concatenate(accepted)[np.argsort(numbers)]
    rounds = jnp.asarray([units.queues.shape[1] for units in classes])
    count = jnp.asarray([len(units.numbers) for units in classes])
    return renewed, kept, Inverted(by_unit, rounds, rounds, count)


def _inverted_by_owners(
    classes: Sequence[UnitClass],
    shares: Sequence[Float[Array, "_ _"]],
    damping: Float[Array, " units"],
    axis: Axis,
) -> list[Float[Array, "_ _"]]:
    """Returns the packed inverses of the units that this device owns, by class."""
    sent = [
        # Row i of the first axis is for device i; padding repeats the last unit.
        x[np.minimum(units.queues, len(units.numbers) - 1)]
        for units, x in zip(classes, shares, strict=True)
    ]
    received = _joined(lambda x: collectives.exchange(x, axis), sent)
    return [
        _own(units, x, damping, axis)
        for units, x in zip(classes, received, strict=True)
    ]


def _own(
    units: UnitClass,
    received: Float[Array, "devices longest share"],
    damping: Float[Array, " units"],
    axis: Axis,
) -> Float[Array, "longest packed"]:
    """Inverts this device's units of a class, given all shares of their factors."""
    f, me = units.factor, axis.position()
    longest = received.shape[1]
    packed = jnp.moveaxis(received, 1, 0).reshape(longest, -1)[:, : f.size]
    of_mine = jnp.asarray(np.minimum(units.queues, len(units.numbers) - 1))[me]
    amounts = damping[units.numbers][of_mine].astype(packed.dtype)
    if f.work < _LOOP_FROM:
        return f.invert(packed, amounts)
    counts = jnp.asarray(np.sum(units.queues < len(units.numbers), 1))

    def one(k: Array, inverses: Array) -> Array:
        return inverses.at[k].set(f.invert(packed[k], amounts[k]))

    start = jnp.zeros_like(packed, shape=(longest, f.wire))
    if longest == 1:
        # A device that owns none.
        return update_if(counts[me] > 0, lambda x: one(jnp.asarray(0), x), start)
    return unit_classes.repeat(counts[me], one, start)


def _replicated(
    classes: Sequence[UnitClass],
    mine: Sequence[Float[Array, "_ _"]],
    axis: Axis,
) -> list[Float[Array, "_ _"]]:
    """Returns the packed inverses of the classes that every device has."""
    pairs = [(c, x) for c, x in zip(classes, mine, strict=True) if c.gathered]
    if not pairs:
        return []
    sent = [jnp.moveaxis(collectives.cut(x, axis), 1, 0) for _, x in pairs]
    received = _joined(lambda x: collectives.exchange(x, axis), sent)
    # Every device now has a share of each owner's units: those that exist, in order.
    shares = [
        x.reshape(-1, x.shape[-1])[_rows(units)]
        for (units, _), x in zip(pairs, received, strict=True)
    ]

    def gather(row: Array) -> Array:
        return collectives.gather(row, axis).reshape(axis.size, -1)

    # [1, class, share] to [devices, class, share]
    whole = _joined(gather, [x[None] for x in shares])
    return [
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, : units.factor.wire]
        for (units, _), x in zip(pairs, whole, strict=True)
    ]


def _joined(function: Callable[[Array], Array], arrays: Sequence[Array]) -> list[Array]:
    """Applies a collective to several arrays at once, along their first axis."""
    flat = jnp.concatenate([x.reshape(len(x), -1) for x in arrays], 1)
    ends = np.cumsum([x[0].size for x in arrays])
    parts = jnp.split(function(flat), ends[:-1], axis=1)
    return [p.reshape(-1, *x.shape[1:]) for p, x in zip(parts, arrays, strict=True)]


def _places(units: UnitClass) -> np.ndarray:
    """Returns each unit's place among those of its owner, ``[class]``."""
    places = np.zeros(len(units.numbers) + 1, np.int64)
    places[units.queues] = np.arange(units.queues.shape[1])
    return places[:-1]


def _rows(units: UnitClass) -> np.ndarray:
    """Returns each unit's row in an array ``[devices × longest, ...]``, ``[class]``."""
    rows = np.zeros(len(units.numbers) + 1, np.int64)
    rows[units.queues.ravel()] = np.arange(units.queues.size)
    return rows[:-1]
