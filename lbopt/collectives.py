"""Equal shares of arrays over the devices of one mesh axis, and their collectives.

A row of numbers (a packed factor, an inverse, a gradient) is cut into as many *shares*
as there are devices, padded with zeros to a multiple.  The optimizers need three
collectives:

* ``scatter_mean``: every device has its own rows; each receives its share of the mean;
* ``exchange``: each device owns one row and receives all shares of it; or, the other
  way round, sends the shares of a row that it has whole;
* ``gather``: each device receives the other devices' shares of all rows.

``scatter_mean`` sends each number once over each link, whatever the sizes of the rows;
``exchange`` sends at most one row per device, and ``gather`` one row for each device.

On a TPU, reductions and gathers run in two stages, along the columns and along the rows
of a grid of devices.  XLA:TPU replaces a reduce-scatter over more than one axis of its
torus by an all-reduce, and an all-gather over 64 devices or more likewise, which send
twice as much; over one axis of the torus it keeps both.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Float

from lbopt._typing import Array, AxisName

# XLA:TPU pads a piece that is not an even number of tiles, of 8 rows of 128 numbers,
# and corrects the result with one more collective.
_LANES, _ROWS = 128, 16


class Axis(NamedTuple):
    """The mesh axis over which an optimizer distributes its work.

    Attributes:
      name: its name under ``shard_map`` or ``pmap``, or several names of axes that
        count as one; None for one device (or for ``jit`` alone, where the compiler
        places the work).
      size: its number of devices.
    """

    name: AxisName | None
    size: int

    def share(self, size: int) -> int:
        """How many numbers of a row of ``size`` each device holds."""
        return -(-size // self.size)  # rounded up: collectives need equal shares

    def position(self) -> Array | int:
        """This device's index along the axis."""
        return 0 if self.name is None else lax.axis_index(self.name)

    def require(self) -> None:
        """Raises ValueError unless an axis of this name and size is mapped here.

        Raises:
          ValueError: also for ``shard_map(check_vma=True)``.
        """
        if self.name is None:
            return
        try:
            found = lax.axis_size(self.name)
        except NameError as error:
            raise ValueError(
                f"axis_name={self.name!r} is not a mapped axis here; call the update "
                "inside jax.shard_map or jax.pmap over it (training.make_train_step "
                "does), or leave placement= out"
            ) from error
        if found != self.size:
            raise ValueError(
                f"axis_size={self.size}, but the axis {self.name!r} has {found} "
                f"devices; pass lbopt.Placement({self.name!r}, {found})"
            )
        # Only there has an array that differs between devices a type of its own.
        here = lax.axis_index(self.name)
        if jax.typeof(here) != jax.typeof(jnp.zeros(here.shape, here.dtype)):
            raise ValueError(
                f"placement= over axis {self.name!r} inside jax.shard_map needs "
                "check_vma=False: by default jax.grad adds gradients of replicated "
                "parameters up over the devices, and here each device's own are wanted"
            )


def axis_of(mesh: Mesh, axis_name: AxisName) -> Axis:
    """One or several axes of a mesh.

    Args:
      mesh: the devices.
      axis_name: the axis, or several that count as one, the first the slowest.

    Returns:
      The axis.

    Raises:
      ValueError: for a mesh without one of them.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not names or len(set(names)) < len(names) or set(names) - set(mesh.shape):
        raise ValueError(
            f"axis_name={axis_name!r} must be an axis of the mesh {dict(mesh.shape)}, "
            "or a tuple of different ones; make a mesh with "
            "lbopt.sharding.make_mesh(axis_name=...)"
        )
    size = math.prod(mesh.shape[name] for name in names)
    return Axis(names[0] if len(names) == 1 else names, size)


def cut(rows: Float[Array, "m size"], axis: Axis) -> Float[Array, "m devices share"]:
    """Cuts rows into their shares."""
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
      arrays: rows ``[m, size]``, any number and size of them in each array.
      axis: the devices.

    Returns:
      ``[m, share]`` of each.
    """
    if axis.name is None:
        return list(arrays)
    pieces = [jnp.moveaxis(cut(x, axis), 1, 0) for x in arrays]  # [devices, m, share]
    # Joined, so that all arrays travel in one collective and pay its latency once.
    joined = jnp.concatenate([x.reshape(axis.size, -1) for x in pieces], 1)
    total = lax.platform_dependent(
        joined,
        tpu=lambda x: scatter_in_two_stages(x, axis),
        default=lambda x: lax.psum_scatter(x, axis.name, scatter_dimension=0),
    )
    mean = total / axis.size
    ends = np.cumsum([x.shape[1] * x.shape[2] for x in pieces])
    parts = jnp.split(mean, ends[:-1])
    return [p.reshape(x.shape[1:]) for p, x in zip(parts, pieces, strict=True)]


def exchange(
    shares: Float[Array, "devices share"], axis: Axis
) -> Float[Array, "devices share"]:
    """Sends row i to device i and receives this device's row (one all-to-all).

    Args:
      shares: this device's share of each owner's row; or all shares of its own row.
      axis: the devices.

    Returns:
      All shares of this device's own row; or its share of each owner's.
    """
    if axis.name is None:
        return shares
    # A transposition of devices and rows, and so its own inverse.
    return lax.all_to_all(shares, axis.name, 0, 0, tiled=True)


def gather(shares: Float[Array, "m share"], axis: Axis) -> Float[Array, "m padded"]:
    """Whole rows from this device's shares of them (one all-gather)."""
    if axis.name is None:
        return shares
    return lax.platform_dependent(
        shares,
        tpu=lambda x: gather_in_two_stages(x, axis),
        default=lambda x: lax.all_gather(x, axis.name, axis=1, tiled=True),
    )


def by_place(devices: Sequence[Any]) -> Sequence[Any]:
    """Devices of a TPU by their places in the torus, x fastest; others as they are.

    In this order the rows and columns of ``grid`` are those of the torus.

    Args:
      devices: the devices.

    Returns:
      The same devices.
    """
    if not all(hasattr(device, "coords") for device in devices):
        return devices
    return sorted(devices, key=lambda d: (*reversed(d.coords), d.core_on_chip))


def grid(devices: int) -> np.ndarray:
    """The most nearly square grid of so many devices, at least as high as wide.

    Slices of a TPU whose torus has two dimensions have this shape.

    Args:
      devices: number of devices.

    Returns:
      Their indices along the mesh axis, ``[height, width]``.
    """
    width = max(w for w in range(1, math.isqrt(devices) + 1) if devices % w == 0)
    return np.arange(devices).reshape(-1, width)


def scatter_in_two_stages(
    rows: Float[Array, "devices size"], axis: Axis
) -> Float[Array, " size"]:
    """This device's row of the sum over devices, by a reduce-scatter along each axis.

    Device (i, j) of the grid receives the sums over its column of the rows for all
    devices of line i, and then the sum over that line of the row for itself:

        Σ_j' Σ_i' rows_i'j'[i, j].

    Args:
      rows: a row for each device.
      axis: the devices.

    Returns:
      The sum of this device's row.
    """
    devices, size = rows.shape
    places = grid(devices)
    height = _ROWS * -(-size // (_ROWS * _LANES))
    # XLA:TPU has no reduce-scatter over an odd number of devices. The all-reduce that
    # it makes of the plain one sends twice the numbers; padding of short rows, more.
    odd = any(side > 1 and side % 2 for side in places.shape)
    if odd or height * _LANES > 2 * size:
        return lax.psum_scatter(rows, axis.name, scatter_dimension=0)
    padded = jnp.pad(rows, ((0, 0), (0, height * _LANES - size)))
    pieces = padded.reshape(*places.shape, height, _LANES)
    # Columns first: each stage then cuts the array's first axis, which needs no copy.
    for groups in (places.T, places):
        pieces = lax.psum_scatter(
            pieces,
            axis.name,
            scatter_dimension=0,
            axis_index_groups=groups.tolist(),
        )
    return pieces.reshape(-1)[:size]


def gather_in_two_stages(
    shares: Float[Array, "m share"], axis: Axis
) -> Float[Array, "m padded"]:
    """Whole rows from this device's shares of them, by an all-gather along each axis.

    Args:
      shares: this device's shares.
      axis: the devices.

    Returns:
      The whole rows.
    """
    m, share = shares.shape
    height = -(-shares.size // _LANES)
    padded = jnp.pad(shares.reshape(-1), (0, height * _LANES - shares.size))
    places = grid(axis.size)
    whole = padded.reshape(height, _LANES)
    for groups in (places, places.T):
        whole = lax.all_gather(whole, axis.name, axis_index_groups=groups.tolist())
    whole = whole.reshape(axis.size, height * _LANES)[:, : shares.size]
    return jnp.moveaxis(whole.reshape(axis.size, m, share), 0, 1).reshape(
        m, axis.size * share
    )


def mapped_axis(name: str) -> Axis:
    """The axis of a name that is mapped here, by ``shard_map`` or ``pmap``."""
    try:
        return Axis(name, lax.axis_size(name))
    except NameError as error:
        raise ValueError(
            f"axis_name={name!r} is not a mapped axis here; call the function inside "
            "jax.shard_map or jax.pmap over it, or leave axis_name out"
        ) from error


def total(tree: Any, axis: Axis) -> Any:
    """The sum over devices of every array of a tree (all-reduce)."""
    return tree if axis.name is None else lax.psum(tree, axis.name)


def shared(tree: Any, axis: Axis) -> Any:
    """Marks arrays that all devices share, so that their derivatives are averaged.

    The derivative of a mean over devices is the mean of their derivatives; the
    transpose of ``mean`` by itself leaves each device its own.

    Args:
      tree: arrays that are the same on all devices.
      axis: the devices.

    Returns:
      The same arrays.
    """
    if axis.name is None:
        return tree
    # Linear, so that both forward and reverse mode pass.
    return jax.custom_derivatives.linear_call(
        lambda _, x: x, lambda _, cotangent: mean(cotangent, axis), (), tree
    )


def mean(tree: Any, axis: Axis) -> Any:
    """The mean over devices of every array of a tree (all-reduce)."""
    return tree if axis.name is None else lax.pmean(tree, axis.name)
