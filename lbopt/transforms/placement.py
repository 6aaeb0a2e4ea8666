"""Preconditioning on the devices that own the inverses, as in SP-NGD.

Gradients are reduce-scattered; the shares of each layer are sent to its owner, which
alone has its inverses; and the natural gradients return the same way to every device.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import collectives
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners
from lbopt.transforms import owner_buffers

Leaves = dict[str, Array]


def precondition_on_owners(
    layers: Mapping[str, Layer],
    owners: Owners,
    kept: Float[Array, " length"],
    gradients: Mapping[str, Leaves],
    axis: Axis,
) -> dict[str, Leaves]:
    """Returns the natural gradients of layers whose inverses stay with their owners.

    Args:
      layers: all preconditioned layers by path.
      owners: the owner of each unit.
      kept: this device's buffer of inverses.
      gradients: this device's gradients of those layers' arrays, copies first.
      axis: the devices.

    Returns:
      The natural gradients of the mean gradients, on every device.
    """
    paths, layout = list(gradients), owner_buffers.kept_layout(owners)
    rows = {p: _row(gradients[p]) for p in paths}  # [1, size] each
    shares = dict(
        zip(paths, collectives.scatter_mean(list(rows.values()), axis), strict=True)
    )
    owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
    # The longest first, so that a round exchanges layers of about equal size and pads
    # little.
    order = sorted(paths, key=lambda p: (-rows[p].size, p))
    queues = [[p for p in order if owner[p] == d] for d in range(owners.devices)]
    results: dict[str, Array] = {}
    for k in range(max(map(len, queues))):
        # The layer that each device preconditions in this round.
        at = [queue[k] if k < len(queue) else None for queue in queues]
        width = max(shares[p].shape[1] for p in at if p is not None)
        sent = jnp.stack(
            [_padded(shares[p][0] if p else None, width, rows) for p in at]
        )
        received = collectives.exchange(sent, axis)  # [devices, width]

        def work(path: str | None, received: Array) -> Array:
            if path is None:
                return jnp.zeros_like(received)
            share = axis.share(rows[path].size)
            flat = received[:, :share].reshape(-1)[: rows[path].size]
            leaves = _leaves(flat, gradients[path])
            natural = layers[path].block.precondition(
                inverses_in_buffer(layers[path], owners, layout, kept), leaves
            )
            ordered = {name: natural[name] for name in leaves}
            cut = collectives.cut(_row(ordered), axis)[0]
            return jnp.pad(cut, ((0, 0), (0, received.shape[1] - share)))

        # Layers differ in shape, so that each device needs a branch of its own.
        branches = [functools.partial(work, path) for path in at]
        back = collectives.exchange(
            jax.lax.switch(axis.position(), branches, received), axis
        )
        for device, path in enumerate(at):
            if path is not None:
                results[path] = back[device, : axis.share(rows[path].size)]
    # One all-gather for all layers, whatever the number of rounds.
    joined = jnp.concatenate([results[p] for p in paths])
    whole = collectives.gather(joined[None], axis)
    return _apart(whole, paths, rows, gradients, axis)


def inverses_in_buffer(
    layer: Layer,
    owners: Owners,
    layout: owner_buffers.Layout,
    kept: Float[Array, " length"],
) -> Any:
    """Returns a layer's inverses from the buffer of its owner."""
    rows: dict[int, list[Array]] = {}
    for unit, first in zip(owners.units, layout.offsets, strict=True):
        if unit.path == layer.path:
            numbers = kept[first : first + owner_buffers.kept_size(unit.factor)]
            rows.setdefault(unit.statistic, []).append(numbers)
    shapes = jax.eval_shape(lambda: layer.block.init(layer.tapped.copies)[1])
    found = []
    for statistic, kind, shape in zip(
        sorted(rows), layer.block.factors, shapes, strict=True
    ):
        stacked = owner_buffers.restored(kind, jnp.stack(rows[statistic]))
        found.append(jax.tree.map(lambda x, s: x.reshape(s.shape), stacked, shape))
    return type(shapes)(*found)


def _row(leaves: Leaves) -> Array:
    return jnp.concatenate([x.ravel() for x in leaves.values()])[None]


def _padded(share: Array | None, width: int, rows: Mapping[str, Array]) -> Array:
    if share is None:
        return jnp.zeros_like(next(iter(rows.values())), shape=width)
    return jnp.pad(share, (0, width - share.size))


def _leaves(flat: Array, like: Leaves) -> Leaves:
    """Splits a row into arrays of the shapes of a layer's."""
    leaves, first = {}, 0
    for name, x in like.items():
        leaves[name] = flat[first : first + x.size].reshape(x.shape)
        first += x.size
    return leaves


def _apart(
    whole: Array,
    paths: Sequence[str],
    rows: Mapping[str, Array],
    gradients: Mapping[str, Leaves],
    axis: Axis,
) -> dict[str, Leaves]:
    """Splits the gathered shares of all layers into each layer's arrays."""
    by_device = whole.reshape(axis.size, -1)  # each device's shares of all layers
    natural, first = {}, 0
    for path in paths:
        share = axis.share(rows[path].size)
        flat = by_device[:, first : first + share].reshape(-1)[: rows[path].size]
        natural[path] = _leaves(flat, gradients[path])
        first += share
    return natural
