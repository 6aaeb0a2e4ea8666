"""Sends factors to another process and reads back their inverses.

Both functions take the whole state, outside of ``shard_map``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lbopt._typing import Array
from lbopt.curvature.registry import Layer
from lbopt.transforms import kfac_state, owner_buffers, unit_classes
from lbopt.transforms.kfac_state import KfacState, plain
from lbopt.transforms.renewal import (
    can_be_inverted,
    inverse_leaves,
    with_inverses,
    with_outcome,
)
from lbopt.transforms.reshard import joined, owners_in


class ExportedFactors(NamedTuple):
    """Factors to invert, and their damping.

    Attributes:
      factors: the packed factors of each class of units, ``[class, size]``.
      damping: the numbers added to their diagonals, ``[class]`` each.
      known: the units of layers all of whose statistics are known, ``[units]``.
      made: the step of the factors.
    """

    factors: Any
    damping: Any
    known: Any
    made: Any


def export_factors(layers: Mapping[str, Layer], state: KfacState) -> ExportedFactors:
    """Returns all factors of a state, grouped by class of units.

    Args:
      layers: the layers by path.
      state: the state, of all devices.

    Returns:
      The factors and their damping.
    """
    owners = owners_in(layers, state)
    classes = unit_classes.classes_of(owners)
    whole = jax.tree.leaves(joined(layers, state.factors))
    rows = [
        x.reshape(-1, f.size)
        for x, f in zip(whole, kfac_state.kinds(layers), strict=True)
    ]
    return ExportedFactors(
        [jnp.concatenate([rows[i] for i in c.statistics]) for c in classes],
        [state.damping[c.numbers] for c in classes],
        can_be_inverted(layers, owners, state),
        state.count - 1,  # of the last step, which ``count`` already includes
    )


def import_inverses(
    layers: Mapping[str, Layer],
    state: KfacState,
    packed: Sequence[Float[Array, "_ _"]],
    known: Bool[Array, " units"],
    made: Int[Array, ""],
) -> KfacState:
    """Returns the state with inverses that another process computed.

    Args:
      layers: the layers by path.
      state: the state, of all devices.
      packed: the inverses of each class, ``[class, packed size]``.
      known: ``ExportedFactors.known``.
      made: the step of the factors.

    Returns:
      The state; an inverse that is not finite leaves the old one in effect.
    """
    owners = owners_in(layers, state)
    inverses, kept = inverse_leaves(layers, state), plain(state.kept)
    accepted = jnp.zeros(len(owners.units), bool)
    layout = owner_buffers.kept_layout(owners)
    for units, rows in zip(unit_classes.classes_of(owners), packed, strict=True):
        sound = known[units.numbers] & jnp.all(jnp.isfinite(rows), -1)
        accepted = accepted.at[units.numbers].set(sound)
        if units.gathered:  # replicated
            old = [inverses[i] for i in units.statistics]
            new = unit_classes.replace_sound(owners, units, old, rows, sound)
            for i, inverse in zip(units.statistics, new, strict=True):
                inverses[i] = inverse
            continue
        for position, number in enumerate(units.numbers):
            numbers = owner_buffers.flat(units.factor.expand(rows[position]))
            # Row: the owner's buffer.  Column: the unit's place in it.
            at = (owners.owner[number], layout.offsets[number])
            before = jax.lax.dynamic_slice(kept, at, (1, numbers.size))
            after = jnp.where(sound[position], numbers[None].astype(kept.dtype), before)
            kept = jax.lax.dynamic_update_slice(kept, after, at)
    # None leaves the state's empty tuple in place.
    state = with_inverses(
        layers, state, inverses, None if isinstance(kept, tuple) else kept
    )
    return with_outcome(layers, owners, state, known, accepted, made)
