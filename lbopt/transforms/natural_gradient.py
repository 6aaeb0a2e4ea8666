"""From inverses to natural gradients, wherever the inverses are."""

from collections.abc import Mapping

from lbopt import sharding
from lbopt._typing import Array, Updates
from lbopt.collectives import Axis
from lbopt.curvature import capture
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners
from lbopt.transforms import kfac_state
from lbopt.transforms.kfac_state import KfacState
from lbopt.transforms.placement import precondition_on_owners


def precondition(
    own: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    updates: Updates,
    axis: Axis,
) -> tuple[Updates, dict[str, dict[str, Array]]]:
    """The mean gradients of what has no curvature here, and the natural gradients."""
    kept = {path: layer for path, layer in own.items() if path not in state.inverses}
    gradients = {path: _gradients(layer, updates) for path, layer in kept.items()}
    updates = sharding.mean_of_others(updates, kept.values(), axis)
    natural = {
        path: _natural(path, layer, state, _gradients(layer, updates))
        for path, layer in own.items()
        if path in state.inverses
    }
    if kept:
        natural |= precondition_on_owners(
            own, owners, kfac_state.local(state.kept), gradients, axis
        )
    return updates, {
        path: _as_they_lie(layer, natural[path], updates) for path, layer in own.items()
    }


def _natural(
    path: str, layer: Layer, state: KfacState, gradients: dict[str, Array]
) -> dict[str, Array]:
    inverses = state.inverses[path]
    if path not in state.moments:
        return layer.block.precondition(inverses, gradients)
    moments = layer.block.moments
    assert moments is not None
    return moments.precondition(inverses, state.moments[path].s, gradients)


def _gradients(layer: Layer, updates: Updates) -> dict[str, Array]:
    """One layer's gradients, copies first, in the type of its curvature."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = capture.lookup(updates, location)
    dtype = layer.block.sums[0].dtype
    return {
        name: capture.copies_first(arrays[name], axes).astype(dtype)
        for name in location.names
    }


def _as_they_lie(
    layer: Layer, natural: Mapping[str, Array], updates: Updates
) -> dict[str, Array]:
    """One layer's arrays as they lie in the parameters."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = capture.lookup(updates, location)
    return {
        name: capture.copies_back(natural[name], axes).astype(arrays[name].dtype)
        for name in location.names
    }


def put(
    own: Mapping[str, Layer], updates: Updates, natural: Mapping[str, dict[str, Array]]
) -> Updates:
    """The updates with each layer's arrays replaced by its natural gradient."""
    replaced: dict[tuple, dict[str, Array]] = {}
    for path, layer in own.items():
        replaced.setdefault(layer.tapped.location.keys, {}).update(natural[path])
    return capture.insert(updates, replaced)
