"""Notes the layers of a loss, in one abstract trace of it."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array, Params
from lbopt.curvature import arrivals, capture, derivatives, flax_layers, tap_rules
from lbopt.curvature import locations as places
from lbopt.curvature.lanes import note_lanes
from lbopt.curvature.locations import MARKER, Location
from lbopt.curvature.loss import eval_shape

_WRAPPERS = (nn.WeightNorm, nn.SpectralNorm)

# A jitted function inside the loss is cached by the structure of its arguments; names
# that no earlier trace used make it trace again, under this trace's interceptor.
trace_numbers = itertools.count()

Loss = Callable[..., Array]
Accepted = Mapping[int, Mapping[tuple[Any, ...], int]]
"""The numbers of the locations of mapped trees, by the order of the modules applied."""


class Sighting(NamedTuple):
    """A layer as the abstract trace saw it run.

    Attributes:
      rule: its tap rule.
      seen: the unbound module, and the shapes of its arguments and parameters.
      lanes: sizes of the ``vmap`` axes that map its inputs but not its parameters.
      map_channels: output channels of the previous layer with a kernel; None if that
        is not a convolution.
      outputs: the shape of its output.
    """

    rule: tap_rules.Rule
    seen: tap_rules.Seen
    lanes: list[int]
    map_channels: int | None
    outputs: Any


class Traced(NamedTuple):
    """The loss to trace, and what is known of it.

    Attributes:
      loss: the scalar loss.
      params: the parameters.
      args: the loss's other arguments.
      locations: the dictionaries of arrays in the parameters.
      rules: the user's rules, by unwrapped function.
    """

    loss: Loss
    params: Params
    args: Sequence[Any]
    locations: Sequence[Location]
    rules: tap_rules.Rules


class Call(NamedTuple):
    """A call of a layer with a rule whose arrays are not known to be the user's."""

    path: tuple[str, ...]
    names: frozenset[str]
    at_top: bool
    wrapped: bool
    differentiated: list[bool]


class Observer:
    """An interceptor that notes the layers of one trace.

    Attributes:
      arrivals: the parameters as modules receive them.
      sightings: the layers seen, by number.
      lifted: the numbers of those that were seen inside a lifted transform.
      refused: reasons by number.
      differentiated: the numbers of layers whose outputs the loss differentiates.
      derived: those through a derivative of which a gradient reaches the parameters.
      unknown: the calls of other layers.
    """

    def __init__(
        self, traced: Traced, prefix: str, found: arrivals.Arrivals, backward: bool
    ) -> None:
        self.arrivals = found
        self.sightings: dict[int, Sighting] = {}
        self.lifted: set[int] = set()
        self.refused: dict[int, str] = {}
        self.differentiated: set[int] = set()
        self.derived: set[int] = set()
        self.unknown: list[Call] = []
        self._traced, self._prefix, self._backward = traced, prefix, backward
        self._wrappers = 0
        self._map_channels: list[int | None] = [None]  # of each layer with a kernel

    def inner_calls(self) -> list[Call]:
        """The unknown calls that a marker may tell."""
        return [
            call
            for call in self.unknown
            if not (call.at_top or call.wrapped or any(call.differentiated))
        ]

    def __call__(
        self, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Calls a method and notes its layer, for ``nn.intercept_methods``."""
        module = context.module
        if module.scope is None:
            return next_fun(*args, **kwargs)
        self.arrivals.enter(module)
        self._wrappers += isinstance(module, _WRAPPERS)
        rule = flax_layers.find_rule(context.orig_method, self._traced.rules)
        if rule is not None and self._backward:
            args, kwargs = self._watched_inputs(module, args, kwargs)
        try:
            outputs = next_fun(*args, **kwargs)
        finally:
            self._wrappers -= isinstance(module, _WRAPPERS)
        if rule is None or module.scope is None:
            return outputs
        own = places.own_params(module)
        number, whole = self.arrivals.number_of(own)
        if not whole:
            marked = capture.marked_number(own, self._prefix)
            number = number if marked is None else marked
            at_top = self.arrivals.at_top()
            if number is None:
                return self._note_unknown(module, own, at_top, outputs)
            # Without a transform in between the arrays would be the user's.
            if at_top or self._wrappers:
                self.refused[number] = (
                    "its parameters change on the way to it (nn.WeightNorm, "
                    "nn.SpectralNorm, nn.map_variables, or code of the loss)"
                )
                return outputs
            self.lifted.add(number)
        assert number is not None
        _refuse_raw_transform(module)
        self._note_known(number, rule, context, own, args, kwargs, outputs)
        return self._watched(outputs, number)

    def _watched_inputs(self, module: Any, args: tuple, kwargs: dict) -> Any:
        """Watches the inputs of a layer, through which derivatives leave it."""
        own = places.own_params(module)
        number, whole = self.arrivals.number_of(own)
        marked = capture.marked_number(own, self._prefix)
        if not whole and marked is not None:
            number = marked
        names = frozenset(name for name in own if not name.startswith(MARKER))
        call = Call(module.scope.path, names, False, False, [])
        numbers = matching(self._traced, [call]) if number is None else {number}

        def note(order: int) -> None:
            if order:
                self.derived.update(numbers)

        def watched(x: Any) -> Any:
            floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
            return derivatives.on_cotangent(x, note) if floating else x

        return jax.tree.map(watched, (args, kwargs))

    def _note_unknown(
        self, module: Any, own: Mapping[str, Any], at_top: bool, outputs: Any
    ) -> Any:
        names = frozenset(name for name in own if not name.startswith(MARKER))
        # Which location it has is not known; the end of its path narrows it down.
        call = Call(module.scope.path, names, at_top, self._wrappers > 0, [])
        self.unknown.append(call)
        if call.wrapped:
            for number in matching(self._traced, [call]):
                self.refused[number] = "its parameters are normalised on the way to it"
        if self._backward:
            numbers = matching(self._traced, [call])

            def note(order: int) -> None:
                if order:
                    self.derived.update(numbers)

            return derivatives.on_cotangent(outputs, note)
        return derivatives.on_derivative(
            outputs, lambda: call.differentiated.append(True)
        )

    def _note_known(self, number, rule, context, own, args, kwargs, outputs) -> None:
        arguments = tap_rules.bind_arguments(context.orig_method, args, kwargs)
        params = {name: own[name] for name in rule.names if name in own}
        seen = tap_rules.Seen(
            context.module.clone(parent=None), _shapes(arguments), _shapes(params)
        )
        # Later calls of the same layer only add lanes.
        sighting = self.sightings.setdefault(
            number,
            Sighting(rule, seen, [], self._map_channels[-1], _shapes(outputs)),
        )
        if "kernel" in params:
            self._map_channels.append(_channels_made(context.module))
        note_lanes(outputs, next(iter(params.values())), sighting.lanes)

    def _watched(self, outputs: Any, number: int) -> Any:
        if not self._backward:
            return derivatives.on_derivative(
                outputs, lambda: self.differentiated.add(number)
            )

        def note(order: int) -> None:
            if order:
                self.derived.add(number)

        return derivatives.on_cotangent(outputs, note)


def observe(
    traced: Traced,
    at_root: Collection[int] = (),
    in_params: Collection[int] = (),
    accepted: Accepted | None = None,
    backward: bool = False,
) -> Observer:
    """Traces the loss, or its gradient if ``backward``, and notes its layers."""
    prefix = f"{MARKER}{next(trace_numbers)}_"
    # Of the highest rank among the arrays: a lifted transform's axis exists in it, too.
    markers = {
        number: max(
            (places.lookup(traced.params, location)[n] for n in location.names),
            key=lambda x: len(x.shape),
        )
        for number, location in enumerate(traced.locations)
        if number in at_root or number in in_params
    }
    observers: list[Observer] = []

    def marked(params: Params, args: Any, markers: Any) -> Array:
        named = {i: {f"{prefix}{i}": x} for i, x in markers.items()}
        keys = {i: traced.locations[i].keys for i in named}
        added = {keys[i]: named[i] for i in named if i in in_params}
        params = places.insert(params, added) if added else params
        riders = {i: own for i, own in named.items() if i in at_root}
        found = arrivals.Arrivals(
            params, dict(enumerate(traced.locations)), riders, accepted or {}
        )
        observer = Observer(traced, prefix, found, backward)
        observers.append(observer)
        with nn.intercept_methods(observer):
            return traced.loss(params, *args)

    function = jax.grad(marked, allow_int=True) if backward else marked
    eval_shape(function, traced.params, traced.args, markers)
    return observers[-1]


def matching(traced: Traced, calls: Sequence[Call]) -> set[int]:
    """The locations whose layers the calls may be, by the ends of their paths."""
    return {
        number
        for number, location in enumerate(traced.locations)
        for call in calls
        if location.keys[len(location.keys) - len(call.path) :] == call.path
        and call.names <= set(location.names)
    }


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


def _channels_made(module: Any) -> int | None:
    """Returns a convolution's output channels; None for other modules."""
    convolutional = isinstance(module, (nn.Conv, nn.ConvTranspose))
    return module.features if convolutional else None


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x,
        tree,
    )
