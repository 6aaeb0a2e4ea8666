"""Finds the layers that a loss runs, by an abstract trace.

Each dictionary of arrays in the parameters gets a *marker*, an array with a number in
its name.  A layer that runs finds a marker beside its own arrays, and the number gives
their location in the user's tree, through any lifted transform, prefix or number of
models.  Nothing is computed.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from lbopt import checks
from lbopt._typing import Array, Params
from lbopt.curvature import capture, flax_layers, tap_rules

_MARKER = "marker"

# A jitted function inside the loss is cached by the structure of its arguments; names
# that no earlier trace used make it trace again, under this trace's interceptor.
_trace_numbers = itertools.count()


class Sighting(NamedTuple):
    """A layer as the abstract trace saw it run.

    Attributes:
      rule: its tap rule.
      seen: the unbound module, and the shapes of its arguments and parameters.
      lanes: sizes of the ``vmap`` axes that map its inputs but not its parameters.
      map_channels: output channels of the previous layer with a kernel; None if that
        is not a convolution.
    """

    rule: tap_rules.Rule
    seen: tap_rules.Seen
    lanes: list[int]
    map_channels: int | None


def infer_batch_size(args: Sequence[Any]) -> int | None:
    """Infers the batch size from the loss's arguments.

    An argument counts as a batch if it contains arrays and all of them have the same
    leading size.  PRNG keys, scalars and nested mappings (a model's collections, such
    as ``batch_stats``) do not count.

    Args:
      args: the loss's arguments after the parameters.

    Returns:
      The leading size, or None if no argument looks like a batch.

    Raises:
      ValueError: if two arguments look like batches of different sizes.
    """
    sizes: dict[int, int] = {}
    for position, arg in enumerate(args):
        leading = {
            leaf.shape[0] for leaf in jax.tree.leaves(arg) if _is_batch_array(leaf)
        }
        if len(leading) == 1 and not _is_collection(arg):
            sizes[position] = leading.pop()
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"argument {i + 1}: {n}" for i, n in sizes.items())
        raise ValueError(
            f"cannot tell the batch among the loss's arguments (leading sizes {listed})"
            "; pass batch_size="
        )
    return next(iter(sizes.values()), None)


def _is_collection(arg: Any) -> bool:
    return isinstance(arg, Mapping) and any(
        isinstance(child, Mapping) for child in arg.values()
    )


def _is_batch_array(leaf: Any) -> bool:
    if not getattr(leaf, "shape", ()):
        return False
    # jax.random.PRNGKey returns a bare array, without a dtype of its own.
    raw_key = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return not raw_key and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def used_arrays(
    loss: Callable[..., Any], params: Params, args: Sequence[Any]
) -> set[tuple[Any, ...]]:
    """Finds the parameters that the loss depends on.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: the loss's other arguments.

    Returns:
      The key paths of the parameters that a gradient flows to.
    """
    # Each parameter passes through an identity whose backward rule records its path;
    # autodiff calls the rule only if a gradient reaches it.
    used: set[tuple[Any, ...]] = set()

    def note(path: tuple[Any, ...], x: Array) -> Array:
        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, g):
            used.add(path)
            return (g,)

        identity.defvjp(lambda x: (x, None), backward)
        return identity(x)

    def noted(params, args):
        return loss(
            jax.tree_util.tree_map_with_path(
                lambda path, x: note(keys_of(path), x) if _differentiable(x) else x,
                params,
            ),
            *args,
        )

    _eval_shape(jax.grad(noted, allow_int=True), params, args)
    return used


def find_sightings(
    loss: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    locations: Sequence[capture.Location],
    rules: tap_rules.Rules,
) -> dict[int, Sighting]:
    """Finds the layers with a rule that the loss runs.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: the loss's other arguments.
      locations: the dictionaries of arrays in the parameters.
      rules: the user's rules, by unwrapped function.

    Returns:
      The layers, keyed by the index of their location.

    Raises:
      ValueError: if a layer runs under a raw JAX transform.
    """
    sightings: dict[int, Sighting] = {}
    map_channels: list[int | None] = [None]  # of every layer with a kernel, in order
    prefix = f"{_MARKER}{next(_trace_numbers)}_"
    # Of the highest rank among the arrays: a lifted transform's axis exists in it, too.
    markers = {
        location.keys: {
            f"{prefix}{i}": max(
                (capture.lookup(params, location)[n] for n in location.names),
                key=lambda x: len(x.shape),
            )
        }
        for i, location in enumerate(locations)
    }

    def interceptor(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        rule = flax_layers.find_rule(context.orig_method, rules)
        if rule is None or context.module.scope is None:
            return outputs
        own = capture.own_params(context.module)
        number = capture.marked_number(own, prefix)
        if number is None:
            return outputs
        _refuse_raw_transform(context.module)
        arguments = tap_rules.bind_arguments(context.orig_method, args, kwargs)
        params = {name: own[name] for name in rule.names if name in own}
        seen = tap_rules.Seen(
            context.module.clone(parent=None), _shapes(arguments), _shapes(params)
        )
        # Later calls of the same layer only add lanes.
        sighting = sightings.setdefault(
            number, Sighting(rule, seen, [], map_channels[-1])
        )
        if "kernel" in params:
            map_channels.append(_channels_made(context.module))
        _note_lanes(outputs, own[f"{prefix}{number}"], sighting.lanes)
        return outputs

    _trace(loss, params, args, markers, interceptor)
    return sightings


def find_feature_maps(
    doubly_factored: Any,
    locations: Sequence[capture.Location],
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


def _channels_made(module: Any) -> int | None:
    """Returns a convolution's output channels; None for other modules."""
    convolutional = isinstance(module, (nn.Conv, nn.ConvTranspose))
    return module.features if convolutional else None


def lifted_axes(
    loss: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    location: capture.Location,
    sighting: Sighting,
) -> tuple[int, ...]:
    """Finds the axes that ``nn.scan`` and ``nn.vmap`` added to a layer's arrays.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: the loss's other arguments.
      location: the location of the layer's arrays.
      sighting: the layer as it ran, with arrays without lifted axes.

    Returns:
      The axes' positions, ascending; empty if the layer is not lifted.

    Raises:
      Refusal: if no set of positions explains the shapes.
    """
    whole = capture.lookup(params, location)
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
        if len(candidates) == 1 or _marker_fits(loss, params, args, location, axes):
            return axes
    raise tap_rules.Refusal("its lifted axes could not be told from its own")


def _marker_fits(loss, params, args, location, axes) -> bool:
    """Tests candidate axes with a marker whose own axes have unmistakable sizes."""
    whole = next(
        x for x in capture.lookup(params, location).values() if hasattr(x, "shape")
    )
    copies = tuple(whole.shape[a] for a in axes)
    # Sizes that no lifted axis has; the marker is abstract and takes no memory.
    one = tuple(1009 + i for i in range(len(whole.shape) - len(axes)))
    shape = capture.with_copies(one, copies, axes)
    marker = f"{_MARKER}{next(_trace_numbers)}_0"
    markers = {location.keys: {marker: jax.ShapeDtypeStruct(shape, whole.dtype)}}
    arrived: list[bool] = []

    def interceptor(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if context.module.scope is not None:
            own = capture.own_params(context.module)
            if marker in own:
                arrived.append(own[marker].shape == one)
        return outputs

    try:
        _trace(loss, params, args, markers, interceptor)
    except (ValueError, TypeError):  # a lifted size stood in the wrong place
        return False
    return bool(arrived) and all(arrived)


def _trace(loss, params, args, markers, interceptor) -> None:
    def marked(params, args, markers):
        with nn.intercept_methods(interceptor):
            return loss(capture.insert(params, markers), *args)

    _eval_shape(marked, params, args, markers)


def _eval_shape(function: Callable[..., Any], *operands: Any) -> None:
    """Calls ``jax.eval_shape``, passing arguments that are not arrays unchanged."""
    leaves, tree = jax.tree.flatten(operands)

    def call(arrays: list[Any]) -> Any:
        found = iter(arrays)
        merged = [next(found) if hasattr(x, "shape") else x for x in leaves]
        return function(*jax.tree.unflatten(tree, merged))

    jax.eval_shape(call, [x for x in leaves if hasattr(x, "shape")])


def _refuse_raw_transform(module: Any) -> None:
    """Raises ValueError for a layer under a JAX transform unknown to its scope."""
    # Flax's lifted transforms give the inner scope the inner trace; raw ones do not.
    now = get_opaque_trace_state(convention="flax")
    scope = module.scope
    while scope is not None:
        if scope.trace_level != now:
            raise ValueError(
                f"module {'/'.join(module.path)!r} ({type(module).__name__}) runs "
                "under a raw JAX transform (jax.vmap, jax.checkpoint, jax.grad, "
                "jax.lax.scan, ...) applied around a bound Flax module, so its "
                "gradient and its curvature cannot be told apart. Use the lifted "
                "transform (nn.vmap, nn.remat, nn.scan, ...) or transform a function "
                "that calls model.apply."
            )
        scope = scope.parent


def _note_lanes(outputs: Array, parameter: Array, lanes: list[int]) -> None:
    """Records the sizes of ``vmap`` axes that map the output but not the parameters."""

    # Only a batching rule sees the size of an axis that is mapped over.
    @jax.custom_batching.custom_vmap
    def mark(x, parameter):
        del parameter
        return x

    @mark.def_vmap
    def rule(axis_size, in_batched, x, parameter):
        if not in_batched[1]:
            lanes.append(axis_size)
        # The rule is traced inside the next vmap out, if there is one.
        _note_lanes(x[0] if in_batched[0] else x, parameter, lanes)
        return x, in_batched[0]

    mark(jax.lax.stop_gradient(outputs), jax.lax.stop_gradient(parameter))


def _differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Converts a key path of JAX's tree functions to bare keys."""
    return tuple(getattr(entry, "key", getattr(entry, "idx", entry)) for entry in path)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x,
        tree,
    )


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i not in axes)
