"""What an abstract trace of the loss tells: which layers run where, and how.

Each dictionary of arrays in the parameters carries a *marker*, an array with a number
in its name.  A layer that runs finds the marker beside its own arrays, which tells
where in the user's tree they lie, whatever lifted transform, prefix or number of models
stands between.  Nothing is computed.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array, Params
from lbopt.curvature import capture, flax_layers, tap_rules

_MARKER = "marker"

# As for the probes: a name that no earlier trace used, so that a jitted function inside
# the loss traces again.
_trace_numbers = itertools.count()


class Sighting(NamedTuple):
    """A layer seen running.

    Attributes:
      rule: how it is tapped.
      seen: the module, unbound, and the shapes of its arguments and parameters.
      lanes: sizes of the ``vmap`` axes around it that do not map its parameters.
      map_channels: channels of the feature map that the last layer with a kernel before
        it made; None if that was no convolution.
    """

    rule: tap_rules.Rule
    seen: tap_rules.Seen
    lanes: list[int]
    map_channels: int | None


def infer_batch_size(args: Sequence[Any]) -> int | None:
    """The leading size that the arrays of the batch share.

    An argument is taken for the batch if it has arrays and all of them share their
    leading size.  PRNG keys and scalars do not count, and neither do mappings in
    mappings, which are a model's collections (``batch_stats``).

    Args:
      args: the loss's arguments after the parameters.

    Returns:
      The size, or None if no argument looks like a batch.

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
    raw_key = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return not raw_key and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def used_arrays(
    loss: Callable[..., Any], params: Params, args: Sequence[Any]
) -> set[tuple[Any, ...]]:
    """The key paths of the parameters that the loss depends on.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: its other arguments.

    Returns:
      The paths.  Every parameter passes through an identity whose backward rule notes
      that it ran; automatic differentiation runs it only where a gradient flows.
    """
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
    """The layers that run, by the number of the location of their arrays."""
    sightings: dict[int, Sighting] = {}
    map_channels: list[int | None] = [None]  # of every layer with a kernel, in order
    prefix = f"{_MARKER}{next(_trace_numbers)}_"
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
    """The feature maps that inputs of dense layers are flattened from.

    Args:
      doubly_factored: which layers are asked for, as for ``trace_layers``.
      locations: where arrays lie.
      sightings: the layers that run, by the number of the location.
      batch_size: examples in the batch.

    Returns:
      Locations and channels of the map by the layer's path, and for layers whose size
      asks for it, but whose input is no map that is known, the reason.

    Raises:
      ValueError: for a choice that cannot be met, naming the layer.
    """
    seen = {locations[number].path: s for number, s in sightings.items()}
    if doubly_factored is None:
        return {}, {}
    if isinstance(doubly_factored, Mapping):
        for path, sizes in doubly_factored.items():
            _check_feature_map(path, sizes, seen, batch_size)
        return dict(doubly_factored), {}
    # A bool is an int, but no number of rows.
    if type(doubly_factored) is not int or doubly_factored < 1:
        raise ValueError(
            f"doubly_factored={doubly_factored!r} must be None, a number of rows of at "
            "least 1, or {path: (locations, channels)}"
        )
    maps, unexplained = {}, {}
    for path, sighting in seen.items():
        if not _is_wide(sighting, doubly_factored):
            continue
        inputs, channels = _inputs_of(sighting)[-1], sighting.map_channels
        if _rows_an_example(sighting, batch_size) != 1:
            unexplained[path] = "wide, but it sees several rows an example"
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
    """Refuses a feature map that a layer does not have."""
    if path not in seen or not _is_dense(seen[path]):
        known = type(seen[path].seen.module).__name__ if path in seen else None
        raise ValueError(
            f"doubly_factored names {path!r}, which is {known or 'no layer that runs'};"
            f" it is for nn.Dense, here {[p for p, s in seen.items() if _is_dense(s)]}"
        )
    shape, given = _inputs_of(seen[path]), f"doubly_factored[{path!r}]={sizes!r}"
    pair = isinstance(sizes, Sequence) and [*map(type, sizes)] == [int, int]
    if not pair or min(sizes) < 1 or math.prod(sizes) != shape[-1]:
        raise ValueError(
            f"{given} must be (locations, channels) whose product is {shape[-1]}, the "
            "inputs of the layer"
        )
    if _rows_an_example(seen[path], batch_size) != 1:
        raise ValueError(
            f"{given} is for one flattened map an example, but the layer's input is "
            f"{list(shape)}, several rows an example; leave the layer out"
        )


def _is_dense(sighting: Sighting) -> bool:
    return isinstance(sighting.seen.module, nn.Dense)


def _is_wide(sighting: Sighting, rows: int) -> bool:
    """Whether a dense layer's input factor has more rows than that."""
    use_bias = "bias" in sighting.seen.params
    return _is_dense(sighting) and _inputs_of(sighting)[-1] + use_bias > rows


def _inputs_of(sighting: Sighting) -> tuple[int, ...]:
    """The shape of a dense layer's input."""
    return sighting.seen.arguments["inputs"].shape


def _rows_an_example(sighting: Sighting, batch_size: int | None) -> int:
    batched = batch_size not in sighting.lanes
    return math.prod(_inputs_of(sighting)[batched:-1])


def _channels_made(module: Any) -> int | None:
    """The channels of the map that a convolution makes; None for other modules."""
    convolutional = isinstance(module, (nn.Conv, nn.ConvTranspose))
    return module.features if convolutional else None


def lifted_axes(
    loss: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    location: capture.Location,
    sighting: Sighting,
) -> tuple[int, ...]:
    """Where ``nn.scan`` and ``nn.vmap`` put their axes in a layer's arrays.

    Args:
      loss: the scalar loss.
      params: the parameters.
      args: its other arguments.
      location: where the layer's arrays lie.
      sighting: the layer as it ran, with arrays of one copy.

    Returns:
      The positions, ascending; empty if the layer is not lifted.

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
    for axes in candidates:
        fits = len(candidates) == 1 or _marker_fits(loss, params, args, location, axes)
        if fits:
            return axes
    raise tap_rules.Refusal("its lifted axes could not be told from its own")


def _marker_fits(loss, params, args, location, axes) -> bool:
    """Whether a marker with unequal sizes arrives whole, its lifted axes removed."""
    whole = next(
        x for x in capture.lookup(params, location).values() if hasattr(x, "shape")
    )
    copies = tuple(whole.shape[a] for a in axes)
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
    """``jax.eval_shape`` that leaves what is not an array (flags, names) as it is."""
    leaves, tree = jax.tree.flatten(operands)
    traced = [hasattr(x, "shape") for x in leaves]

    def call(arrays: list[Any]) -> Any:
        found = iter(arrays)
        return function(
            *jax.tree.unflatten(
                tree,
                [
                    next(found) if is_traced else x
                    for x, is_traced in zip(leaves, traced, strict=True)
                ],
            )
        )

    jax.eval_shape(call, [x for x, t in zip(leaves, traced, strict=True) if t])


def _refuse_raw_transform(module: Any) -> None:
    """Refuses a layer that runs under a JAX transform its scope does not know of.

    Raises:
      ValueError: naming the module.
    """
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
    """Notes the ``vmap`` axes that map a layer's output but not its parameters."""

    @jax.custom_batching.custom_vmap
    def mark(x, parameter):
        del parameter
        return x

    @mark.def_vmap
    def rule(axis_size, in_batched, x, parameter):
        if not in_batched[1]:
            lanes.append(axis_size)
        _note_lanes(x[0] if in_batched[0] else x, parameter, lanes)
        return x, in_batched[0]

    mark(jax.lax.stop_gradient(outputs), jax.lax.stop_gradient(parameter))


def _differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def keys_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The bare keys of a path that JAX's tree functions give."""
    return tuple(getattr(entry, "key", getattr(entry, "idx", entry)) for entry in path)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x,
        tree,
    )


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i not in axes)
