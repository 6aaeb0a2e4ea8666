"""Finds the axes that lifted transforms added to a layer's arrays."""

import itertools
from typing import Any

import flax.linen as nn
import jax

from lbopt._typing import Array, Params
from lbopt.curvature import arrivals, capture, tap_rules
from lbopt.curvature import locations as places
from lbopt.curvature.locations import MARKER
from lbopt.curvature.loss import eval_shape
from lbopt.curvature.observation import (
    Sighting,
    Traced,
    trace_numbers,
)


def lifted_axes(
    traced: Traced, number: int, sighting: Sighting, route: capture.Route
) -> tuple[int, ...]:
    """Finds the axes that ``nn.scan`` and ``nn.vmap`` added to a layer's arrays.

    Args:
      traced: the loss.
      number: the index of the location of the layer's arrays.
      sighting: the layer as it ran, with arrays without lifted axes.
      route: the way by which a marker can reach the layer.

    Returns:
      The axes' positions, ascending; empty if the layer is not lifted.

    Raises:
      Refusal: if no set of positions explains the shapes.
    """
    whole = places.lookup(traced.params, traced.locations[number])
    pairs = [(whole[name].shape, x.shape) for name, x in sighting.seen.params.items()]
    extra = {len(w) - len(one) for w, one in pairs}
    if len(extra) != 1 or min(extra) < 0:
        raise tap_rules.Refusal("its parameters change shape on the way to it")
    rank = min(len(w) for w, _ in pairs)
    candidates = [
        axes
        for axes in itertools.combinations(range(rank), extra.pop())
        if all(_without(w, axes) == one for w, one in pairs)
    ]
    if not candidates:
        raise tap_rules.Refusal(
            "its lifted axis has no common position in its arrays; use axis 0 in "
            "variable_axes"
        )
    # Sizes alone do not tell a lifted axis from an equally long one of the layer's own.
    for axes in candidates:
        if len(candidates) == 1 or _marker_fits(traced, number, route, axes):
            return axes
    raise tap_rules.Refusal("its lifted axes could not be told from its own")


def _marker_fits(
    traced: Traced, number: int, route: capture.Route, axes: tuple[int, ...]
) -> bool:
    """Tests candidate axes with a marker whose own axes have unmistakable sizes."""
    location = traced.locations[number]
    whole = places.lookup(traced.params, location)[location.names[0]]
    copies = tuple(whole.shape[a] for a in axes)
    # Sizes that no lifted axis has; the marker is abstract and takes no memory.
    one = tuple(1009 + i for i in range(len(whole.shape) - len(axes)))
    shape = capture.with_copies(one, copies, axes)
    name = f"{MARKER}{next(trace_numbers)}_0"
    arrived: list[bool] = []

    def marked(params: Params, args: Any, marker: Array) -> Array:
        own = {name: marker}
        if route == "params":
            params = places.insert(params, {location.keys: own})
        found = arrivals.Arrivals(
            params, dict(enumerate(traced.locations)), {number: own}, {}
        )

        def interceptor(next_fun, args, kwargs, context):
            if context.module.scope is not None:
                found.enter(context.module)
                variables = places.own_params(context.module)
                if name in variables:
                    arrived.append(variables[name].shape == one)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            return traced.loss(params, *args)

    marker = jax.ShapeDtypeStruct(shape, whole.dtype)
    try:
        eval_shape(marked, traced.params, traced.args, marker)
    except (ValueError, TypeError):  # a lifted size stood in the wrong place
        return False
    return bool(arrived) and all(arrived)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i not in axes)
