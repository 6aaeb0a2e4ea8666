"""Flat buffers, one for each device, that hold the units it owns back to back.

An array ``[slots, ...]`` for each size of unit would waste memory wherever devices own
unequal numbers of that size; a buffer only pads to the longest of the devices.
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


class Layout(NamedTuple):
    """The offsets of units in their owners' buffers.

    Attributes:
      offsets: the index of each unit's first number in its owner's buffer,
        ``[units]``; 0 for units that have no place in any.
      length: the size of the longest buffer.
    """

    offsets: np.ndarray
    length: int


def layout_of(
    owners: Owners, numbers: Iterable[int], room: Callable[[Factor], int]
) -> Layout:
    """Assigns units to consecutive places in the buffers of their owners.

    Args:
      owners: the owner of each unit.
      numbers: the units by number, in the order in which each buffer holds them.
      room: the size of a unit's place, given its kind.

    Returns:
      The layout.
    """
    offsets = np.zeros(len(owners.units), np.int64)
    ends = [0] * owners.devices  # of what is placed so far
    for i in numbers:
        device = owners.owner[i]
        offsets[i] = ends[device]
        ends[device] += room(owners.units[i].factor)
    return Layout(offsets, max(ends))


def kept_layout(owners: Owners) -> Layout:
    """Returns the layout of the inverses that stay on the device that computed them."""
    staying = [i for i, gathered in enumerate(owners.gathered) if not gathered]
    return layout_of(owners, staying, kept_size)


def identities(owners: Owners, dtype: Any) -> Float[Array, "devices length"]:
    """Returns buffers of identities: owner-kept inverses before the first statistic."""
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
    """Concatenates each device's rows to one buffer, padded to the longest."""
    nothing = jnp.zeros(0, dtype)  # for a device that owns no unit
    joined = [jnp.concatenate([nothing, *row]) for row in rows]
    length = max(x.size for x in joined)
    return jnp.stack([jnp.pad(x, (0, length - x.size)) for x in joined])


def kept_size(factor: Factor) -> int:
    """Returns the size of a unit's inverse in its owner's buffer."""
    # Unpacked: preconditioning reads it at every step, and unpacking is not free.
    return sum(x.size for x in jax.tree.leaves(_expanded(factor, ())))


def flat(inverse: Any) -> Float[Array, " numbers"]:
    """Concatenates the arrays of one unit's inverse."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(inverse)])


def restored(factor: Factor, rows: Float[Array, "*copies numbers"]) -> Any:
    """Splits rows made by ``flat`` into the arrays of inverses, copies first."""
    leaves, tree = jax.tree.flatten(_expanded(factor, rows.shape[:-1]))
    ends = np.cumsum([_numbers(x, rows) for x in leaves])
    parts = jnp.split(rows, ends[:-1], axis=-1)
    shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def _numbers(leaf: Any, rows: Array) -> int:
    return leaf.size // max(int(np.prod(rows.shape[:-1])), 1)


def _expanded(factor: Factor, copies: tuple[int, ...]) -> Any:
    # The dtype is arbitrary: only shapes are read.
    wire = jax.ShapeDtypeStruct((*copies, factor.wire), jnp.float32)
    return jax.eval_shape(factor.expand, wire)
