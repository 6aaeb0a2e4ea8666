"""Captures curvature statistics as the cotangents of taps.

An interceptor passes each recognised layer's output through a **tap**, an identity
whose backward rule returns the layer's sums (see ``curvature.block``) as the cotangent
of a **probe**, an array of zeros shaped like the sums.  While the loss is
differentiated, probes lie beside the layer's parameters, so that every lifted transform
of Flax carries them; afterwards they are removed from the gradient.  The user and the
optimizer never see them.  One forward and one backward pass give loss, gradients and
statistics.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from lbopt import explicit_axes
from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import flax_layers, tap_rules

PREFIX = "probe"

# A jitted function inside the loss is cached by the structure of its arguments; names
# that no earlier trace used make it trace again, so that it cannot reuse old flags.
_trace_numbers = itertools.count()


class Location(NamedTuple):
    """The location of a layer's arrays in the user's parameters.

    Attributes:
      keys: the keys that lead to the dictionary holding the arrays.
      names: the names of the layer's arrays in that dictionary.
    """

    keys: tuple[Any, ...]
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """The keys joined by slashes, by which tables and messages name the layer."""
        return "/".join(map(str, self.keys))


class Tapped(NamedTuple):
    """A tapped layer.

    Attributes:
      location: the location of its arrays.
      block: its curvature block.
      copies: sizes of the lifted axes (``nn.scan``, ``nn.vmap``), in the order of
        ``axes``.
      axes: positions of the lifted axes in the layer's arrays and probes.
      rules: the user's own rules, among which the layer's may be.
    """

    location: Location
    block: blocks.CurvatureBlock
    copies: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    rules: tap_rules.Rules = MappingProxyType({})


def find_locations(params: Params) -> list[Location]:
    """Finds every dictionary of the parameters that directly holds arrays."""
    found: list[Location] = []

    def walk(node: Any, keys: tuple[Any, ...]) -> None:
        if not isinstance(node, Mapping):
            return
        names = tuple(
            str(name) for name, child in node.items() if hasattr(child, "shape")
        )
        if names:
            found.append(Location(keys, names))
        for name, child in node.items():
            walk(child, (*keys, name))

    walk(params, ())
    return found


def lookup(tree: Any, location: Location) -> Any:
    """Returns the dictionary at a location, or ``optax.MaskedNode`` if masked."""
    for key in location.keys:
        # optax.masked replaces the largest masked subtree, at any depth.
        if isinstance(tree, optax.MaskedNode):
            return tree
        tree = tree[key]
    return tree


def insert(
    params: Params, additions: Mapping[tuple[Any, ...], Mapping[str, Array]]
) -> Params:
    """Adds arrays to dictionaries of the parameters.

    Args:
      params: nested mappings.
      additions: the arrays to add, keyed by the keys of their dictionary.

    Returns:
      The tree with the arrays, replacing those of the same names; mappings keep their
      types.
    """

    def walk(node: Any, keys: tuple[Any, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        entries = {name: walk(child, (*keys, name)) for name, child in node.items()}
        entries.update(additions.get(keys, {}))
        return _like(node, entries)

    return walk(params, ())


def remove(
    tree: Params, names: Mapping[tuple[Any, ...], Sequence[str]]
) -> tuple[Params, dict[tuple[Any, ...], dict[str, Array]]]:
    """Inverts ``insert``: returns the tree without some arrays, and the arrays."""
    taken: dict[tuple[Any, ...], dict[str, Array]] = {}

    def walk(node: Any, keys: tuple[Any, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        own = names.get(keys, ())
        if own:
            taken[keys] = {name: node[name] for name in own}
        return _like(
            node,
            {
                name: walk(child, (*keys, name))
                for name, child in node.items()
                if name not in own
            },
        )

    return walk(tree, ()), taken


def _like(node: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    # A loss may rely on the type of its parameters (dict, FrozenDict).
    if isinstance(node, flax.core.FrozenDict):
        return flax.core.FrozenDict(entries)
    if type(node) is dict:
        return entries
    make: Any = type(node)  # a mapping's constructor has no common signature
    return make(entries)


class Probes(NamedTuple):
    """The probes of one trace.

    Attributes:
      tapped: the layers; a layer's number in the probes' names is its index.
      trace: a number unique to this trace.
      due: for each layer, flags that say which of its statistics are due.
      given: for each layer, arrays that ``estimate`` takes beside the residual (the
        eigenbases), copies first.
      reached: the numbers of the layers that have run in this trace so far.
    """

    tapped: Sequence[Tapped]
    trace: int
    due: Sequence[Any]
    given: Sequence[tuple[Array, ...]]
    reached: set[int]

    def names(self, number: int) -> list[str]:
        """Returns the names of one layer's probes, one for each field of its sums."""
        fields = self.tapped[number].block.sums._fields
        return [f"{PREFIX}{self.trace}_{number}_{field}" for field in fields]

    def copy_name(self, number: int) -> str:
        """Returns the name of the array that identifies each copy of a layer."""
        return f"{PREFIX}{self.trace}_{number}_copy"

    def needs_number(self, number: int) -> bool:
        """Tests whether each copy of a layer is given arrays of its own."""
        return bool(self.given[number] and self.tapped[number].copies)

    def insert(self, params: Params, value: float = 0.0) -> Params:
        """Adds all probes to the parameters, filled with one value."""
        additions = {}
        for number, layer in enumerate(self.tapped):
            shapes = zip(self.names(number), layer.block.sums, strict=True)
            own = {name: _full(shape, layer, value) for name, shape in shapes}
            if self.needs_number(number):
                own[self.copy_name(number)] = _numbered_zeros(layer)
            additions[layer.location.keys] = own
        return insert(params, additions)

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
                "parameters and arguments of the training run"
            )

    def remove(self, grads: Params) -> tuple[Params, list[Any]]:
        """Returns the gradient without probes, and each layer's sums, copies first."""
        names = {
            layer.location.keys: [
                *self.names(number),
                *[self.copy_name(number)] * self.needs_number(number),
            ]
            for number, layer in enumerate(self.tapped)
        }
        grads, taken = remove(grads, names)
        sums = []
        for number, layer in enumerate(self.tapped):
            arrays = taken[layer.location.keys]
            moved = [copies_first(arrays[x], layer.axes) for x in self.names(number)]
            sums.append(type(layer.block.sums)(*moved))
        return grads, sums

    def find(self, context: Any) -> tuple[int, tap_rules.Rule, dict[str, Any]] | None:
        """Finds the number, rule and arrays of the layer that a method belongs to.

        Args:
          context: the interceptor's context.

        Returns:
          Number, rule and arrays; None if the layer is not tapped.
        """
        if context.module.scope is None:
            return None
        variables = own_params(context.module)
        number = marked_number(variables, f"{PREFIX}{self.trace}_")
        if number is None:
            return None
        rules = self.tapped[number].rules
        rule = flax_layers.find_rule(context.orig_method, rules)
        return None if rule is None else (number, rule, variables)

    def given_to(self, number: int, variables: dict[str, Any]) -> list[Array]:
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

    def interceptor(
        self, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Calls a layer and taps its output, for ``nn.intercept_methods``."""
        outputs = next_fun(*args, **kwargs)
        found = self.find(context)
        if found is None:
            return outputs
        number, rule, variables = found
        fields = self.tapped[number].block.sums
        self.reached.add(number)
        names = self.names(number)
        probe = type(fields)(*(variables[name] for name in names))
        _check_probe(self.tapped[number], fields, probe)
        arguments = tap_rules.bind_arguments(context.orig_method, args, kwargs)
        params = {k: v for k, v in variables.items() if k in rule.names}
        residual = rule.residual(tap_rules.Seen(context.module, arguments, params))
        if self.given[number]:
            residual = (residual, *self.given_to(number, variables))
        return tap(
            self.tapped[number].block.estimate,
            # The rule's own operations (a cast, BatchNorm's moments) are no part of the
            # loss's derivative.
            jax.lax.stop_gradient(residual),
            outputs,
            _vary_like(probe, outputs),
            self.due[number],
        )


def make_probes(
    tapped: Sequence[Tapped],
    due: Sequence[Any],
    given: Sequence[tuple[Array, ...]] | None = None,
) -> Probes:
    """Returns new probes for one trace of a loss.

    Args:
      tapped: the layers to tap.
      due: for each layer, flags that say which of its statistics are due.
      given: for each layer, the arrays that ``estimate`` takes beside the residual.

    Returns:
      The probes.
    """
    given = [() for _ in tapped] if given is None else given
    return Probes(tapped, next(_trace_numbers), due, given, set())


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


def own_params(module: Any) -> dict[str, Any]:
    """Returns the arrays that lie directly in a bound module's scope."""
    params = module.variables.get("params", {})
    return {k: v for k, v in params.items() if not isinstance(v, Mapping)}


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


def _vary_like(probe: Any, outputs: Array) -> Any:
    """Makes the probe vary over the same mesh axes as the outputs."""
    # Under shard_map(check_vma=True) adding an array that varies casts the probe, and
    # the transpose of that cast sums over the devices.
    return jax.tree.map(
        lambda p: p + jnp.zeros_like(outputs, shape=p.shape, dtype=p.dtype), probe
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
