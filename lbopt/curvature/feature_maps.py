"""Finds the feature maps that the inputs of dense layers are flattened from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from lbopt import checks
from lbopt.curvature.locations import Location
from lbopt.curvature.observation import Sighting


def find_feature_maps(
    doubly_factored: Any,
    locations: Sequence[Location],
    sightings: Mapping[int, Sighting],
    batch_size: int | None,
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Finds the feature maps that inputs of dense layers are flattened from.

    Args:
      doubly_factored: the user's choice, as for ``trace_layers``.
      locations: the dictionaries of arrays in the parameters.
      sightings: the layers that run, keyed by the index of their location.
      batch_size: number of examples in the batch.

    Returns:
      The maps' (locations, channels) by the layer's path; and by path the reason why a
      layer that is wide enough has no known map.

    Raises:
      ValueError: for an invalid choice, naming the layer.
    """
    seen = {locations[number].path: s for number, s in sightings.items()}
    if doubly_factored is None:
        return {}, {}
    if isinstance(doubly_factored, Mapping):
        for path, sizes in doubly_factored.items():
            _check_feature_map(path, sizes, seen, batch_size)
        return dict(doubly_factored), {}
    way_out = "pass a number of rows, {path: (locations, channels)} or None"
    checks.whole("doubly_factored", doubly_factored, way_out)
    maps, unexplained = {}, {}
    for path, sighting in seen.items():
        if not _is_wide(sighting, doubly_factored):
            continue
        inputs, channels = _inputs_of(sighting)[-1], sighting.map_channels
        if _rows_per_example(sighting, batch_size) != 1:
            unexplained[path] = "wide, but it has several rows per example"
        # inputs == channels: one location, from a global pool; nothing to factor.
        elif channels is None or inputs == channels or inputs % channels:
            unexplained[path] = (
                f"wide, but no convolution before it explains {inputs} inputs; pass "
                f"doubly_factored={{{path!r}: (locations, channels)}}"
            )
        else:
            maps[path] = (inputs // channels, channels)
    return maps, unexplained


def _check_feature_map(
    path: str, sizes: Any, seen: Mapping[str, Sighting], batch_size: int | None
) -> None:
    """Raises ValueError for a feature map that a layer's input cannot have."""
    if path not in seen or not _is_dense(seen[path]):
        known = type(seen[path].seen.module).__name__ if path in seen else None
        raise ValueError(
            f"doubly_factored names {path!r}, which is {known or 'no layer that runs'};"
            f" choose among the nn.Dense {[p for p, s in seen.items() if _is_dense(s)]}"
        )
    shape, given = _inputs_of(seen[path]), f"doubly_factored[{path!r}]={sizes!r}"
    # Exact types: True and 6.0 are no sizes.
    pair = isinstance(sizes, Sequence) and [*map(type, sizes)] == [int, int]
    if not pair or min(sizes) < 1 or math.prod(sizes) != shape[-1]:
        raise ValueError(
            f"{given} must be (locations, channels) whose product is {shape[-1]}, the "
            "inputs of the layer"
        )
    if _rows_per_example(seen[path], batch_size) != 1:
        raise ValueError(
            f"{given} needs one flattened map per example, but the layer's input "
            f"{list(shape)} has several rows per example; leave the layer out"
        )


def _is_dense(sighting: Sighting) -> bool:
    return isinstance(sighting.seen.module, nn.Dense)


def _is_wide(sighting: Sighting, rows: int) -> bool:
    """Tests whether a dense layer's input factor would exceed ``rows`` rows."""
    use_bias = "bias" in sighting.seen.params
    return _is_dense(sighting) and _inputs_of(sighting)[-1] + use_bias > rows


def _inputs_of(sighting: Sighting) -> tuple[int, ...]:
    return sighting.seen.arguments["inputs"].shape


def _rows_per_example(sighting: Sighting, batch_size: int | None) -> int:
    # Under a per-example vmap the layer's input has no axis of examples.
    batched = batch_size not in sighting.lanes
    return math.prod(_inputs_of(sighting)[batched:-1])
