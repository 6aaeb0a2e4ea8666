"""Where each device has its own units: one row of numbers, whatever their kinds.

A device that owns few units of one size and many of another would waste memory on
arrays ``[slots, ...]`` of every size; on its *desk* they lie one after the other.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lbopt._typing import Array
from lbopt.curvature.factor import Factor
from lbopt.sharding import Owners


class Desk(NamedTuple):
    """The plan of all desks.

    Attributes:
      offsets: where each unit begins on its owner's desk, ``[units]``; 0 for what lies
        on none.
      length: numbers of the longest desk.
    """

    offsets: np.ndarray
    length: int


def lay_out(
    owners: Owners, numbers: Iterable[int], room: Callable[[Factor], int]
) -> Desk:
    """Puts units onto the desks of their owners.

    Args:
      owners: who owns what.
      numbers: the units, in the order in which they lie.
      room: how many numbers a unit of this kind needs.

    Returns:
      The plan.
    """
    offsets = np.zeros(len(owners.units), np.int64)
    ends = [0] * owners.devices
    for i in numbers:
        device = owners.owner[i]
        offsets[i] = ends[device]
        ends[device] += room(owners.units[i].factor)
    return Desk(offsets, max(ends))


def kept_desk(owners: Owners) -> Desk:
    """The plan of the inverses that stay with their owners, as they are kept."""
    staying = [i for i, gathered in enumerate(owners.gathered) if not gathered]
    return lay_out(owners, staying, kept_size)


def identities(owners: Owners, dtype: Any) -> Float[Array, "devices length"]:
    """The desks of kept inverses before the first statistic."""
    rows: list[list[Array]] = [[] for _ in range(owners.devices)]
    for unit, owner, gathered in zip(
        owners.units, owners.owner, owners.gathered, strict=True
    ):
        if not gathered:
            f = unit.factor
            rows[owner].append(flat(f.expand(f.identity(dtype))))
    return stacked(rows, dtype)


def stacked(
    rows: Sequence[Sequence[Float[Array, " _"]]], dtype: Any
) -> Float[Array, "devices length"]:
    """Desks with each device's units in order, padded to the longest."""
    nothing = jnp.zeros(0, dtype)
    joined = [jnp.concatenate([nothing, *row]) for row in rows]
    length = max(x.size for x in joined)
    return jnp.stack([jnp.pad(x, (0, length - x.size)) for x in joined])


def kept_size(factor: Factor) -> int:
    """How many numbers the inverse of a unit is, as it is kept."""
    return sum(x.size for x in jax.tree.leaves(_expanded(factor, ())))


def flat(inverse: Any) -> Float[Array, " numbers"]:
    """One unit's inverse as a row of numbers."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(inverse)])


def restored(factor: Factor, rows: Float[Array, "*copies numbers"]) -> Any:
    """Inverses out of rows of numbers, what ``flat`` made, copies first."""
    leaves, tree = jax.tree.flatten(_expanded(factor, rows.shape[:-1]))
    ends = np.cumsum([_numbers(x, rows) for x in leaves])
    parts = jnp.split(rows, ends[:-1], axis=-1)
    shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def _numbers(leaf: Any, rows: Array) -> int:
    return leaf.size // max(int(np.prod(rows.shape[:-1])), 1)


def _expanded(factor: Factor, copies: tuple[int, ...]) -> Any:
    wire = jax.ShapeDtypeStruct((*copies, factor.wire), jnp.float32)
    return jax.eval_shape(factor.expand, wire)
