"""Tells what in a loss depends on its batch: inputs of layers, gradients past them.

The gradient of the loss is traced once more, abstractly, under ``jax.vmap`` with every
array of the batch mapped: what is not mapped then does not depend on the batch.  A
layer's *input* that does not is the same for all examples, as positions are.  A
*gradient* that does, although the layers pass none to their own parameters, comes from
parameters that are used outside of their layer, as in an embedding tied by hand.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbopt._typing import Array, Params
from lbopt.curvature import capture, tap_rules
from lbopt.curvature import locations as places
from lbopt.curvature.loss import eval_shape
from lbopt.curvature.observation import Sighting
from lbopt.curvature.verification import Run


class Dependence(NamedTuple):
    """What the abstract trace found, by the paths of layers.

    Attributes:
      shared: layers whose input is the same for all examples and has no axis of them.
      outside: layers whose parameters get a gradient past the layer that depends on
        the batch; that of a penalty on the parameters does not.
    """

    shared: frozenset[str]
    outside: frozenset[str]


class _Notes(NamedTuple):
    """What one trace saw of each layer, by number.

    Attributes:
      shapes: the shapes and dtypes of its inputs, of all calls.
      mapped: for each call, whether any of the inputs is mapped with the batch.
      outside: the layers to whose parameters a mapped gradient flows past them.
    """

    shapes: dict[int, set[Any]]
    mapped: dict[int, set[bool]]
    outside: set[int]


class _Leaf(NamedTuple):
    """An array among the loss's arguments.

    Attributes:
      shape: its shape.
      varies: whether it is part of the batch, or a key that may differ by example.
      counts: whether its leading axis numbers the examples.
    """

    shape: tuple[int, ...]
    varies: bool
    counts: bool


def find_dependence(
    run: Run,
    tapped: Mapping[str, capture.Tapped],
    sighted: Mapping[str, Sighting],
    examples: int | None,
) -> Dependence:
    """Finds the layers whose inputs or parameters depend on the batch unusually.

    Args:
      run: the loss; arrays may be ``jax.ShapeDtypeStruct``.
      tapped: the layers with a tap, by path.
      sighted: the first call of each, by path.
      examples: the number of examples of the batch; None if it is not known.

    Returns:
      The layers; none if the loss cannot be traced under ``jax.vmap``.
    """
    leaves = _leaves(run, examples)
    if not tapped or not any(leaf.varies for leaf in leaves):
        return Dependence(frozenset(), frozenset())
    layers = list(tapped.values())
    if any(leaf.shape == (examples,) for leaf in leaves) and any(
        leaf.shape[:2] == (examples, examples) for leaf in leaves
    ):
        leaves = _without_positions(run, layers, leaves, examples)
    paths = list(tapped)
    # A rule of the user's may stand for a module that does more than a layer.
    known = [
        None if sighted[path].rule in layer.rules.values() else sighted[path]
        for path, layer in tapped.items()
    ]
    notes = _traced_lanes(run, layers, known, leaves)
    same = {i for i, values in notes.mapped.items() if values == {False}}
    if same:
        # An input made inside the loss, such as positions for each example, may have
        # the axis of examples although its values do not depend on them.
        more = _shapes_of_more(run, layers, leaves)
        same = {i for i in same if more is not None and more[i] == notes.shapes[i]}
    return Dependence(
        frozenset(paths[i] for i in same - notes.outside),
        frozenset(paths[i] for i in notes.outside),
    )


def _leaves(run: Run, examples: int | None) -> list[_Leaf | Any]:
    """Describes the leaves of the loss's arguments."""
    own = {
        (keys[-1:], tuple(x.shape))
        for keys, x in jax.tree_util.tree_leaves_with_path(run.params)
    }

    def describe(keys: tuple[Any, ...], x: Any) -> _Leaf:
        shape: tuple[int, ...] = tuple(getattr(x, "shape", ()))
        dtype = getattr(x, "dtype", None)
        # Other parameters (of a teacher, at the start of training, their Fisher
        # matrix) are no batch, nor is a number such as the weight of a penalty.
        batch = len(shape) > 0 and (keys[-1:], shape) not in own
        key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        # jax.random.PRNGKey returns a bare array, without a dtype of its own.
        raw_key = dtype == jnp.uint32 and shape == (2,)
        counts = batch and not raw_key and shape[:1] == (examples,)
        return _Leaf(shape, batch or key, counts)

    found = jax.tree_util.tree_leaves_with_path(list(run.args))
    return [describe(keys, x) for keys, x in found]


def _without_positions(
    run: Run,
    layers: Sequence[capture.Tapped],
    leaves: list[_Leaf],
    examples: int | None,
) -> list[_Leaf]:
    """Tells positions from examples where there are as many of both."""
    if _shapes_of_more(run, layers, leaves) is not None:
        return leaves
    # The loss cannot bear more of everything, but may bear more examples.
    others = [
        leaf._replace(varies=False, counts=False) if leaf.shape == (examples,) else leaf
        for leaf in leaves
    ]
    return leaves if _shapes_of_more(run, layers, others) is None else others


def _traced_lanes(
    run: Run,
    layers: Sequence[capture.Tapped],
    sighted: Sequence[Sighting | None],
    leaves: Sequence[_Leaf],
) -> _Notes:
    """Traces the gradient with the batch mapped; notes nothing if that fails."""
    # With the shapes of their outputs the layers need not run, which takes a quarter of
    # the time; but a layer that did not run may be missed by code of the loss.
    for known in (sighted, [None for _ in sighted]):
        notes = _Notes(defaultdict(set), defaultdict(set), set())
        # The user's code may hold what jax.vmap cannot map (a callback, a kernel
        # without a batching rule); nothing is known then, and nothing is marked.
        try:
            _trace_lanes(run, layers, known, leaves, notes)
        except Exception:  # of any kind: it is the user's code that fails
            continue
        return notes
    return _Notes({}, {}, set())


def _trace_lanes(
    run: Run,
    layers: Sequence[capture.Tapped],
    sighted: Sequence[Sighting | None],
    leaves: Sequence[_Leaf],
    notes: _Notes,
) -> None:
    """Traces the gradient with the batch mapped, and notes what is mapped then."""

    def gradient(args: Any, lane: Array, params: Params, arrays: Any) -> Array:
        def sever(number: int, inputs: list[Any], call: Callable[[], Array]) -> Array:
            notes.shapes[number].add(_shapes(inputs))
            shape = _known_outputs(sighted[number], inputs)
            outputs = call() if shape is None else jnp.zeros(shape.shape, shape.dtype)
            severed = note_mapped(
                jax.lax.stop_gradient(outputs),
                lane,
                [jax.lax.stop_gradient(x) for x in inputs],
                notes.mapped[number].add,
            )
            # No gradient reaches the layer's parameters through the layer; the layers
            # before it still get theirs, which depend on the batch if its input does.
            for x in inputs:
                if jnp.issubdtype(x.dtype, jnp.floating):
                    severed += (0 * jnp.sum(x * x)).astype(severed.dtype)
            return severed

        def note_past(number: int, mapped: bool) -> None:
            if mapped:
                notes.outside.add(number)

        def severed_loss(params: Params) -> Array:
            return _watched_loss(run, probes, sever, params, arrays, args)

        grads = jax.grad(severed_loss, allow_int=True)(params)
        for number, layer in enumerate(layers):
            own = places.lookup(grads, layer.location)
            found = [own[name] for name in layer.location.names]
            found = [x for x in found if x.dtype != jax.dtypes.float0]
            note_mapped(lane, lane, found, functools.partial(note_past, number))
        return lane

    def over_lanes(params: Params, arrays: Any, args: Any) -> Array:
        given, tree = jax.tree.flatten(args)
        pairs = list(zip(given, leaves, strict=True))

        def one(batch: list[Array], lane: Array) -> Array:
            rest = iter(batch)
            merged = [next(rest) if leaf.varies else x for x, leaf in pairs]
            return gradient(jax.tree.unflatten(tree, merged), lane, params, arrays)

        batch = [jnp.stack([x, x]) for x, leaf in pairs if leaf.varies]
        return jax.vmap(one)(batch, jnp.zeros(2))

    probes = run.probes(layers, [None for _ in layers])
    eval_shape(over_lanes, run.params, jax.eval_shape(probes.arrays), list(run.args))


def _known_outputs(sighting: Sighting | None, inputs: list[Any]) -> Any:
    """The shape of a layer's output, if a call with such inputs was seen."""
    if sighting is None:
        return None
    seen = _arrays_in(sighting.seen.arguments)
    return sighting.outputs if _shapes(seen) == _shapes(inputs) else None


def _shapes_of_more(
    run: Run, layers: Sequence[capture.Tapped], leaves: Sequence[_Leaf]
) -> dict[int, set[Any]] | None:
    """The shapes of layers' inputs with twice the examples; None if the loss fails."""
    if not any(leaf.counts for leaf in leaves):
        return None
    shapes: dict[int, set[Any]] = defaultdict(set)

    def note(number: int, inputs: list[Any], call: Callable[[], Array]) -> Array:
        shapes[number].add(_shapes(inputs))
        return call()

    given, tree = jax.tree.flatten(list(run.args))
    more = [
        jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)
        if leaf.counts
        else x
        for x, leaf in zip(given, leaves, strict=True)
    ]
    probes = run.probes(layers, [None for _ in layers])

    def loss(params: Params, arrays: Any, args: Any) -> Array:
        return _watched_loss(run, probes, note, params, arrays, args)

    # Code of the loss may hold the number of examples as a constant.
    try:
        arrays = jax.eval_shape(probes.arrays)
        eval_shape(loss, run.params, arrays, jax.tree.unflatten(tree, more))
    except Exception:  # of any kind: it is the user's code that fails
        return None
    return shapes


def _watched_loss(
    run: Run,
    probes: capture.Probes,
    watch: Callable[[int, list[Any], Callable[[], Array]], Array],
    params: Params,
    arrays: Any,
    args: Sequence[Any],
) -> Array:
    """Evaluates the loss with ``watch(number, inputs, call)`` in place of layers."""
    whole = probes.insert(params, arrays)
    taps = probes.interceptor(whole, arrays)

    def interceptor(next_fun, args, kwargs, context):
        found = taps.find(context)
        if found is None:
            return next_fun(*args, **kwargs)
        arguments = tap_rules.bind_arguments(context.orig_method, args, kwargs)
        call = functools.partial(next_fun, *args, **kwargs)
        return watch(found[0], _arrays_in(arguments), call)

    with nn.intercept_methods(interceptor):
        return run.loss(whole, *args)


def _arrays_in(arguments: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(arguments) if hasattr(x, "dtype")]


def _shapes(arrays: list[Any]) -> tuple[Any, ...]:
    return tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in arrays)


def note_mapped(
    x: Array, lane: Array, inputs: list[Array], note: Callable[[bool], None]
) -> Array:
    """Returns ``x``, mapped if any input is; calls ``note`` with whether one is.

    Args:
      x: an array.
      lane: an array that the ``vmap`` in question maps, and no other.
      inputs: the arrays in question.
      note: takes the answer, possibly several times.

    Returns:
      ``x``.
    """

    @jax.custom_batching.custom_vmap
    def mark(x: Array, lane: Array, inputs: list[Array]) -> Array:
        del lane, inputs
        return x

    @mark.def_vmap
    def rule(axis_size, in_batched, x, lane, inputs):
        x_mapped, lane_mapped, mapped = in_batched
        if lane_mapped:
            note(any(mapped))
            if any(mapped) and not x_mapped:
                return jnp.stack([x] * axis_size), True
            return x, x_mapped
        # A vmap of the loss's own, inside the one in question.
        outer = [y[0] if own else y for y, own in zip(inputs, mapped, strict=True)]
        return note_mapped(x, lane, outer, note), x_mapped

    return mark(x, lane, inputs)
