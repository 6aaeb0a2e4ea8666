"""Captures curvature statistics as the cotangents of taps.

An interceptor passes each recognised layer's output through a **tap**, an identity
whose backward rule returns the layer's sums (see ``curvature.block``) as the cotangent
of a **probe**, an array of zeros shaped like the sums.  A probe reaches its tap by one
of three routes:

* ``direct``: the interceptor holds it, and knows the layer by its arrays;
* ``root``: it is added beside the layer's arrays where a module is applied, so that
  Flax's lifted transforms carry it along;
* ``params``: it is added to the tree that the loss is called with, so that JAX's own
  transforms carry it along; the only one that a loss can notice.

One forward and one backward pass give loss, gradients and statistics.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lbopt import explicit_axes
from lbopt._typing import Array, Params
from lbopt.curvature import arrivals, flax_layers, locations, rows, tap_rules
from lbopt.curvature import block as blocks
from lbopt.curvature.locations import Location

# A jitted function inside the loss is cached by the structure of its arguments; names
# that no earlier trace used make it trace again, so that it cannot reuse old flags.
_trace_numbers = itertools.count()


Route: TypeAlias = Literal["direct", "root", "params"]
Accepted: TypeAlias = Mapping[int, Mapping[tuple[Any, ...], Location]]
"""The trees mapped from the parameters, by the order of the modules applied."""


class Tapped(NamedTuple):
    """A tapped layer.

    Attributes:
      location: the location of its arrays.
      block: its curvature block.
      copies: sizes of the lifted axes (``nn.scan``, ``nn.vmap``), in the order of
        ``axes``.
      axes: positions of the lifted axes in the layer's arrays and probes.
      rules: the user's own rules, among which the layer's may be.
      route: the way by which its probes reach it.
      batched: whether its input has an axis of examples; not under a ``vmap`` over
        examples.
    """

    location: Location
    block: blocks.CurvatureBlock
    copies: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    rules: tap_rules.Rules = MappingProxyType({})
    route: Route = "direct"
    batched: bool = True


ProbeArrays: TypeAlias = list[dict[str, Array]]
"""The probes of each layer by name, and the arrays that identify its copies."""


class Probes(NamedTuple):
    """The probes of one trace.

    Attributes:
      tapped: the layers; a layer's number in the probes' names is its index.
      trace: a number unique to this trace.
      due: for each layer, flags that say which of its statistics are due.
      given: for each layer, arrays that ``estimate`` takes beside the residual (the
        eigenbases), copies first.
      accepted: trees mapped from the parameters that count as the parameters.
      reached: the numbers of the layers that have run in this trace so far.
    """

    tapped: Sequence[Tapped]
    trace: int
    due: Sequence[Any]
    given: Sequence[tuple[Array, ...]]
    accepted: Accepted
    reached: set[int]

    def names(self, number: int) -> list[str]:
        """Returns the names of one layer's probes, one for each field of its sums."""
        fields = self.tapped[number].block.sums._fields
        return [f"{locations.PROBE}{self.trace}_{number}_{field}" for field in fields]

    def copy_name(self, number: int) -> str:
        """Returns the name of the array that identifies each copy of a layer."""
        return f"{locations.PROBE}{self.trace}_{number}_copy"

    def needs_number(self, number: int) -> bool:
        """Tests whether each copy of a layer is given arrays of its own."""
        return bool(self.given[number] and self.tapped[number].copies)

    def arrays(self, value: float = 0.0) -> ProbeArrays:
        """Makes all probes, filled with one value."""
        made = []
        for number, layer in enumerate(self.tapped):
            shapes = zip(self.names(number), layer.block.sums, strict=True)
            own = {name: _full(shape, layer, value) for name, shape in shapes}
            if self.needs_number(number):
                own[self.copy_name(number)] = _numbered_zeros(layer)
            made.append(own)
        return made

    def insert(self, params: Params, arrays: ProbeArrays) -> Params:
        """Adds the probes of the layers that JAX's own transforms reach."""
        additions = {
            layer.location.keys: own
            for layer, own in zip(self.tapped, arrays, strict=True)
            if layer.route == "params"
        }
        return locations.insert(params, additions) if additions else params

    def interceptor(self, params: Params, arrays: ProbeArrays) -> "Interceptor":
        """Returns the interceptor that taps the layers of one call of the loss.

        Args:
          params: the tree that the loss is called with, from ``insert``.
          arrays: the probes.

        Returns:
          A context for ``nn.intercept_methods``.
        """
        numbers = {t.location.keys: i for i, t in enumerate(self.tapped)}
        accepted = {
            order: {
                keys: numbers[location.keys]
                for keys, location in tree.items()
                if location.keys in numbers
            }
            for order, tree in self.accepted.items()
        }
        found = arrivals.Arrivals(
            params,
            {i: t.location for i, t in enumerate(self.tapped)},
            {i: own for i, own in enumerate(arrays) if self.tapped[i].route == "root"},
            accepted,
        )
        return Interceptor(self, arrays, found)

    def require_all_reached(self) -> None:
        """Raises ValueError if a layer did not run, naming it."""
        missing = [
            layer.location.path
            for number, layer in enumerate(self.tapped)
            if number not in self.reached
        ]
        if missing:
            raise ValueError(
                f"layers {missing} did not run in this loss, although they ran when "
                "trace_layers traced it; call trace_layers again with the loss, "
                "parameters and arguments of the training run, lifted alike (nn.remat, "
                "nn.scan, nn.vmap)"
            )

    def sums(self, taken: ProbeArrays) -> list[Any]:
        """Returns each layer's sums, copies first, from its probes' cotangents."""
        sums = []
        for number, layer in enumerate(self.tapped):
            own = taken[number]
            moved = [copies_first(own[x], layer.axes) for x in self.names(number)]
            sums.append(type(layer.block.sums)(*moved))
        return sums

    def given_to(self, number: int, variables: Mapping[str, Any]) -> list[Array]:
        """Returns the arrays given to the copy of a layer that has these variables."""
        layer, given = self.tapped[number], list(self.given[number])
        if not self.needs_number(number):
            return given
        copy = _number_in(variables[self.copy_name(number)])
        each = [x.reshape(-1, *x.shape[len(layer.copies) :]) for x in given]
        # A loss that maps over its parameters can lose the signs; NaN then makes the
        # optimizer reject the statistic, where another copy's basis would corrupt it.
        lost = len(each[0])
        copy = jnp.where(copy > 0, copy - 1, lost)
        return [x.at[copy].get(mode="fill", fill_value=jnp.nan) for x in each]


class Interceptor(NamedTuple):
    """Taps the layers of one call of a loss.

    Attributes:
      probes: the probes' description.
      arrays: the probes themselves.
      arrivals: the parameters as modules receive them.
      weights: the weights of the rows that a layer's input factor is a mean over.
    """

    probes: Probes
    arrays: ProbeArrays
    arrivals: arrivals.Arrivals
    weights: rows.RowWeights | None = None

    def find(self, context: Any) -> tuple[int, tap_rules.Rule, dict[str, Any]] | None:
        """Finds the number, rule and arrays of the layer that a method belongs to.

        Args:
          context: the interceptor's context.

        Returns:
          Number, rule and arrays, probes among them; None if the layer is not tapped.
        """
        if context.module.scope is None:
            return None
        self.arrivals.enter(context.module)
        variables = locations.own_params(context.module)
        number = marked_number(variables, f"{locations.PROBE}{self.probes.trace}_")
        if number is None:
            number, whole = self.arrivals.number_of(variables)
            if number is None or not whole:
                return None
            if self.probes.tapped[number].route != "direct":
                return None
            variables |= self.arrays[number]
        rules = self.probes.tapped[number].rules
        rule = flax_layers.find_rule(context.orig_method, rules)
        return None if rule is None else (number, rule, variables)

    def __call__(
        self, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Calls a layer and taps its output, for ``nn.intercept_methods``."""
        found = self.find(context)  # before the call, which may apply a root
        outputs = next_fun(*args, **kwargs)
        if found is None:
            return outputs
        number, rule, variables = found
        probes, layer = self.probes, self.probes.tapped[number]
        fields = layer.block.sums
        probes.reached.add(number)
        probe = type(fields)(*(variables[name] for name in probes.names(number)))
        _check_probe(layer, fields, probe)
        arguments = tap_rules.bind_arguments(context.orig_method, args, kwargs)
        params = {k: v for k, v in variables.items() if k in rule.names}
        residual = rule.residual(tap_rules.Seen(context.module, arguments, params))
        # Of a layer without statistics the weights may be what they like.
        wanted = any(flag is not False for flag in jax.tree.leaves(probes.due[number]))
        if self.weights is not None and layer.block.row_weighted and wanted:
            aligned = layer.batched and rule not in layer.rules.values()
            residual = self.weights.beside(layer.location.path, residual, aligned)
        if probes.given[number]:
            residual = (residual, *probes.given_to(number, variables))
        return tap(
            layer.block.estimate,
            # The rule's own operations (a cast, BatchNorm's moments) are no part of the
            # loss's derivative.
            jax.lax.stop_gradient(residual),
            outputs,
            vary_like(probe, outputs),
            probes.due[number],
        )


def make_probes(
    tapped: Sequence[Tapped],
    due: Sequence[Any],
    given: Sequence[tuple[Array, ...]] | None = None,
    accepted: Accepted = MappingProxyType({}),
) -> Probes:
    """Returns new probes for one trace of a loss.

    Args:
      tapped: the layers to tap.
      due: for each layer, flags that say which of its statistics are due.
      given: for each layer, the arrays that ``estimate`` takes beside the residual.
      accepted: trees mapped from the parameters that count as the parameters.

    Returns:
      The probes.
    """
    given = [() for _ in tapped] if given is None else given
    return Probes(tapped, next(_trace_numbers), due, given, accepted, set())


def tap(
    estimate: Callable[[Any, Array, Any], Any],
    residual: Any,
    outputs: Array,
    probe: Any,
    due: Any,
) -> Array:
    r"""Returns ``outputs``; the cotangent of ``probe`` is the layer's sums.

    .. math:: \bar{\text{outputs}} = \delta, \qquad
              \bar{\text{probe}} = \text{estimate}(\text{residual}, \delta, \text{due})

    Args:
      estimate: a block's ``estimate``.
      residual: arrays of the forward pass that ``estimate`` needs.
      outputs: the layer's output.
      probe: zeros shaped like the sums.
      due: flags that say which statistics are due, traced or Python bools.

    Returns:
      ``outputs``.
    """
    # Traced flags are arguments: a custom_vjp may not close over tracers.  Bools are
    # closed over, and what is not due is never compiled.
    flags, static = _split_flags(due)

    @jax.custom_vjp
    def identity(residual, outputs, probe, flags):
        del residual, probe, flags
        return outputs

    def forward(residual, outputs, probe, flags):
        del probe  # not a residual: it would be kept until the backward pass
        return outputs, (residual, flags)

    def backward(saved, output_grads):
        due = _join_flags(saved[1], static)
        sums = explicit_axes.replicated(estimate, saved[0], output_grads, due)
        return None, output_grads, sums, None

    identity.defvjp(forward, backward)
    return identity(residual, outputs, probe, flags)


def copies_first(x: Array, axes: tuple[int, ...]) -> Array:
    """Moves the lifted axes of an array to the front."""
    return jnp.moveaxis(x, axes, range(len(axes))) if axes else x


def copies_back(x: Array, axes: tuple[int, ...]) -> Array:
    """Inverts ``copies_first``."""
    return jnp.moveaxis(x, range(len(axes)), axes) if axes else x


def with_copies(
    shape: tuple[int, ...], copies: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...]:
    """Inserts lifted axes of sizes ``copies`` into the shape of one copy's array."""
    result = list(shape)
    # Ascending, so that each insertion leaves the later positions right.
    for axis, size in sorted(zip(axes, copies, strict=True)):
        result.insert(axis, size)
    return tuple(result)


def marked_number(names: Mapping[str, Any], prefix: str) -> int | None:
    """Reads a layer's number off the name of a probe or marker in its scope."""
    for name in names:
        if name.startswith(prefix):
            return int(name[len(prefix) :].split("_")[0])
    return None


def _full(shape: jax.ShapeDtypeStruct, layer: Tapped, value: float) -> Array:
    full = with_copies(shape.shape, layer.copies, layer.axes)
    return jnp.full(full, value, shape.dtype)


def _numbered_zeros(layer: Tapped) -> Array:
    """Returns zeros for each copy whose signs encode the copy's number, from 1."""
    # A loss may add up norms or penalties over everything in params; zeros of either
    # sign do not change them.
    count = math.prod(layer.copies)
    bits = np.arange(count.bit_length())
    signs = np.where((np.arange(1, count + 1)[:, None] >> bits) & 1, -0.0, 0.0)
    zeros = jnp.asarray(signs.reshape(*layer.copies, 1, len(bits)), jnp.float32)
    return copies_back(zeros, layer.axes)


def _number_in(zeros: Float[Array, "one bits"]) -> Array:
    """Decodes the number from the signs of one copy's zeros; 0 if they are lost."""
    bits = jnp.signbit(jax.lax.stop_gradient(zeros[0]))
    return jnp.sum(bits << jnp.arange(len(bits)))


def _check_probe(layer: Tapped, fields: Any, probe: Any) -> None:
    for field, expected, actual in zip(fields._fields, fields, probe, strict=True):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            raise ValueError(
                f"layer {layer.location.path!r}: the probe for {field!r} arrived as "
                f"{actual.dtype}{list(actual.shape)} instead of "
                f"{expected.dtype}{list(expected.shape)}, so something between params "
                "and the layer changes them (a cast of the whole tree, "
                "nn.map_variables); cast in the layers (dtype=) instead, or call "
                "trace_layers again if the model changed"
            )


def vary_like(probe: Any, array: Array) -> Any:
    """Makes the probe vary over the same mesh axes as another array."""
    # Under shard_map(check_vma=True) adding an array that varies casts the probe, and
    # the transpose of that cast sums over the devices.
    # −0, which leaves the signs of zeros as they are.
    return jax.tree.map(
        lambda p: p + jnp.full_like(array, -0.0, shape=p.shape, dtype=p.dtype), probe
    )


def _split_flags(due: Any) -> tuple[Any, Any]:
    """Splits flags into traced ones and Python bools."""
    leaves, tree = jax.tree.flatten(due)
    traced = [leaf for leaf in leaves if not isinstance(leaf, bool)]
    static = [leaf if isinstance(leaf, bool) else None for leaf in leaves]
    return traced, (static, tree)


def _join_flags(traced: Any, static: Any) -> Any:
    leaves, tree = static
    flags: Iterator[Any] = iter(traced)
    return jax.tree.unflatten(
        tree, [next(flags) if leaf is None else leaf for leaf in leaves]
    )
