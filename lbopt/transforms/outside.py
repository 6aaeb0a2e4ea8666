"""Inversion outside of the step: what leaves an optimizer's state, and what comes back.

Both are functions of the whole state, outside of ``shard_map``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lbopt._typing import Array
from lbopt.curvature.registry import Layer
from lbopt.transforms import desk, kfac_state, unit_classes
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.renewal import (
    can_be_inverted,
    inverse_leaves,
    noted,
    with_inverses,
)
from lbopt.transforms.reshard import joined, owners_in


class Order(NamedTuple):
    """What is to be inverted.

    Attributes:
      factors: the packed factors of each class of units, ``[class, size]``.
      damping: what is added to their diagonals, ``[class]`` each.
      known: which units' factors are known, ``[units]``.
      made: the step of the factors.
    """

    factors: Any
    damping: Any
    known: Any
    made: Any


def take_out(own: Mapping[str, Layer], state: KfacState) -> Order:
    """All factors of a state, as the classes of units are inverted.

    Args:
      own: the layers by path.
      state: the state, of all devices.

    Returns:
      The order.
    """
    owners = owners_in(own, state)
    classes = unit_classes.classes_of(owners)
    whole = jax.tree.leaves(joined(own, state.factors))
    rows = [
        x.reshape(-1, f.size) for x, f in zip(whole, kfac_state.kinds(own), strict=True)
    ]
    return Order(
        [jnp.concatenate([rows[i] for i in c.statistics]) for c in classes],
        [state.damping[c.numbers] for c in classes],
        can_be_inverted(own, owners, state),
        state.count - 1,
    )


def bring_in(
    own: Mapping[str, Layer],
    state: KfacState,
    wires: Sequence[Float[Array, "_ _"]],
    known: Bool[Array, " units"],
    made: Int[Array, ""],
) -> KfacState:
    """The state with inverses that were made elsewhere.

    Args:
      own: the layers by path.
      state: the state, of all devices.
      wires: the inverses of each class, ``[class, wire]``.
      known: which of them were made from factors that were known.
      made: the step whose factors they were made from.

    Returns:
      The state; an inverse that is not finite is refused.
    """
    owners = owners_in(own, state)
    inverses, kept = inverse_leaves(own, state), plain(state.kept)
    accepted = jnp.zeros(len(owners.units), bool)
    plan = desk.kept_desk(owners)
    for units, rows in zip(unit_classes.classes_of(owners), wires, strict=True):
        sound = known[units.numbers] & jnp.all(jnp.isfinite(rows), -1)
        accepted = accepted.at[units.numbers].set(sound)
        if units.gathered:
            old = [inverses[i] for i in units.statistics]
            new = unit_classes.put(owners, units, old, rows, sound)
            for i, inverse in zip(units.statistics, new, strict=True):
                inverses[i] = inverse
            continue
        for position, number in enumerate(units.numbers):
            numbers = desk.flat(units.factor.expand(rows[position]))
            at = (owners.owner[number], plan.offsets[number])
            before = jax.lax.dynamic_slice(kept, at, (1, numbers.size))
            after = jnp.where(sound[position], numbers[None].astype(kept.dtype), before)
            kept = jax.lax.dynamic_update_slice(kept, after, at)
    state = with_inverses(
        own, state, inverses, None if isinstance(kept, tuple) else kept
    )
    return noted(own, owners, state, known, accepted, made)
