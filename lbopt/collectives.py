"""Arrays cut into equal shares over the devices of one mesh axis, and what moves them.

A row of numbers (a packed factor, an inverse, a gradient) is cut into as many *shares*
as there are devices, padded with zeros to a multiple.  Three moves are all that the
optimizers need:

* ``scatter_mean``: every device has its own rows; each receives its share of the mean;
* ``exchange``: each device, the owner of one row, receives all shares of it; and, the
  other way round, hands out the shares of a row that it has whole;
* ``gather``: each device receives the other shares of all rows.

The first moves each number once over each link, whatever the sizes of the rows, and the
second no more than one row a device.  The last moves one row for each device, with or
without an owner's row in it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from lbopt._typing import Array


class Axis(NamedTuple):
    """The mesh axis that an optimizer works along.

    Attributes:
      name: its name under ``shard_map`` or ``pmap``; None for one device (or for
        ``jit`` alone, where the compiler places the work).
      size: its devices.
    """

    name: str | None
    size: int

    def share(self, size: int) -> int:
        """The numbers of a row of ``size`` that a device holds."""
        return -(-size // self.size)

    def position(self) -> Array | int:
        """This device's number along the axis."""
        return 0 if self.name is None else lax.axis_index(self.name)

    def require(self) -> None:
        """Raises ValueError unless this axis of this size is mapped over here."""
        if self.name is None:
            return
        try:
            found = lax.axis_size(self.name)
        except NameError as error:
            raise ValueError(
                f"axis_name={self.name!r} is no mapped axis here; call the update "
                "inside jax.shard_map or jax.pmap over it (training.make_train_step "
                "does), or leave placement= out"
            ) from error
        if found != self.size:
            raise ValueError(
                f"axis_size={self.size}, but the axis {self.name!r} has {found} "
                "devices; pass Placement(axis_name, mesh.shape[axis_name])"
            )


def cut(rows: Float[Array, "m size"], axis: Axis) -> Float[Array, "m devices share"]:
    """Rows as their shares."""
    m, size = rows.shape
    share = axis.share(size)
    padded = jnp.pad(rows, ((0, 0), (0, axis.size * share - size)))
    return padded.reshape(m, axis.size, share)


def own_share(rows: Float[Array, "m size"], axis: Axis) -> Float[Array, "m share"]:
    """This device's shares of rows that every device has."""
    if axis.name is None:
        return rows
    return lax.dynamic_index_in_dim(cut(rows, axis), axis.position(), 1, keepdims=False)


def scatter_mean(arrays: Sequence[Array], axis: Axis) -> list[Array]:
    """This device's shares of the mean over devices (one reduce-scatter).

    Args:
      arrays: rows ``[m, size]``, of any number and size each.
      axis: the devices.

    Returns:
      ``[m, share]`` of each.
    """
    if axis.name is None:
        return list(arrays)
    pieces = [jnp.moveaxis(cut(x, axis), 1, 0) for x in arrays]
    joined = jnp.concatenate([x.reshape(axis.size, -1) for x in pieces], 1)
    mean = lax.psum_scatter(joined, axis.name, scatter_dimension=0) / axis.size
    ends = np.cumsum([x.shape[1] * x.shape[2] for x in pieces])
    parts = jnp.split(mean, ends[:-1])
    return [p.reshape(x.shape[1:]) for p, x in zip(parts, pieces, strict=True)]


def exchange(
    shares: Float[Array, "devices share"], axis: Axis
) -> Float[Array, "devices share"]:
    """Row i goes to device i, whose result has this device's row (one all-to-all).

    Args:
      shares: this device's share of each owner's row; or all shares of its own row.
      axis: the devices.

    Returns:
      All shares of this device's own row; or its share of each owner's.
    """
    if axis.name is None:
        return shares
    return lax.all_to_all(shares, axis.name, 0, 0, tiled=True)


def gather(shares: Float[Array, "m share"], axis: Axis) -> Float[Array, "m padded"]:
    """Whole rows from this device's shares of them (one all-gather)."""
    if axis.name is None:
        return shares
    return lax.all_gather(shares, axis.name, axis=1, tiled=True)


def total(tree: Any, axis: Axis) -> Any:
    """The sum over devices of every array of a tree (all-reduce)."""
    return tree if axis.name is None else lax.psum(tree, axis.name)


def mean(tree: Any, axis: Axis) -> Any:
    """The mean over devices of every array of a tree (all-reduce)."""
    return tree if axis.name is None else lax.pmean(tree, axis.name)
