"""From inverses to natural gradients, with replicated and owner-kept inverses."""

from collections.abc import Mapping

from lbopt import sharding
from lbopt._typing import Array, Updates
from lbopt.collectives import Axis
from lbopt.curvature import capture, locations
from lbopt.curvature.registry import Layer
from lbopt.sharding import Owners
from lbopt.transforms import kfac_state
from lbopt.transforms.kfac_state import KfacState
from lbopt.transforms.placement import precondition_on_owners


def precondition(
    layers: Mapping[str, Layer],
    owners: Owners,
    state: KfacState,
    updates: Updates,
    axis: Axis,
) -> tuple[Updates, dict[str, dict[str, Array]]]:
    """Preconditions the gradients of all layers.

    Args:
      layers: the preconditioned layers by path.
      owners: the owner of each unit.
      state: the state with the inverses.
      updates: this device's gradients.
      axis: the devices.

    Returns:
      The updates, averaged over the devices except for layers with owner-kept inverses,
      and each layer's natural gradient by path.
    """
    kept = {path: layer for path, layer in layers.items() if path not in state.inverses}
    # Before averaging: the owners' pipeline reduce-scatters these gradients itself.
    gradients = {path: _gradients(layer, updates) for path, layer in kept.items()}
    updates = sharding.mean_of_others(updates, kept.values(), axis)
    natural = {
        path: _natural(path, layer, state, _gradients(layer, updates))
        for path, layer in layers.items()
        if path in state.inverses
    }
    if kept:
        natural |= precondition_on_owners(
            layers, owners, kfac_state.local(state.kept), gradients, axis
        )
    return updates, {
        path: _as_parameters(layer, natural[path], updates)
        for path, layer in layers.items()
    }


def _natural(
    path: str, layer: Layer, state: KfacState, gradients: dict[str, Array]
) -> dict[str, Array]:
    inverses = state.inverses[path]
    if path not in state.moments:
        return layer.block.precondition(inverses, gradients)
    moments = layer.block.moments
    assert moments is not None  # as state.moments has the layer
    return moments.precondition(inverses, state.moments[path].s, gradients)


def _gradients(layer: Layer, updates: Updates) -> dict[str, Array]:
    """Returns one layer's gradients, copies first, in the dtype of its curvature."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = locations.lookup(updates, location)
    dtype = layer.block.sums[0].dtype
    return {
        name: capture.copies_first(arrays[name], axes).astype(dtype)
        for name in location.names
    }


def _as_parameters(
    layer: Layer, natural: Mapping[str, Array], updates: Updates
) -> dict[str, Array]:
    """Returns one layer's arrays with the axes and dtypes of its gradients."""
    location, axes = layer.tapped.location, layer.tapped.axes
    arrays = locations.lookup(updates, location)
    return {
        name: capture.copies_back(natural[name], axes).astype(arrays[name].dtype)
        for name in location.names
    }


def insert(
    layers: Mapping[str, Layer],
    updates: Updates,
    natural: Mapping[str, dict[str, Array]],
) -> Updates:
    """Returns the updates with each layer's arrays replaced by its natural gradient."""
    # Layers may share a module, each with arrays of its own.
    replaced: dict[tuple, dict[str, Array]] = {}
    for path, layer in layers.items():
        replaced.setdefault(layer.tapped.location.keys, {}).update(natural[path])
    return locations.insert(updates, replaced)
