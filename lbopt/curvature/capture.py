"""Capture: curvature statistics as the cotangent of a tap.

An interceptor passes each recognised layer's output through a **tap**, an identity
whose backward rule returns the layer's sums (see ``curvature.block``) as the cotangent
of a **probe**.  A probe is zeros shaped like the sums.  Probes lie beside the layer's
parameters while the loss is differentiated, so every lifted transform of Flax carries
them, and are taken out of the gradient after; nobody else sees them.

One forward and one backward pass give loss, gradients and statistics.
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

from lbopt._typing import Array, Params
from lbopt.curvature import block as blocks
from lbopt.curvature import flax_layers, tap_rules

PREFIX = "probe"

# A jitted function inside the user's loss is cached by the structure of its arguments.
# A name that no earlier trace used makes it trace again, so that it can never hold the
# flags of another trace.
_trace_numbers = itertools.count()


class Location(NamedTuple):
    """Where a layer's arrays lie in the user's parameters.

    Attributes:
      keys: the keys that lead to the dictionary holding them.
      names: the names of its arrays in that dictionary.
    """

    keys: tuple[Any, ...]
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """The keys joined by slashes; the name of the layer everywhere."""
        return "/".join(map(str, self.keys))


class Tapped(NamedTuple):
    """A layer that is tapped.

    Attributes:
      location: where its arrays lie.
      block: its curvature block.
      copies: sizes of the lifted axes (``nn.scan``, ``nn.vmap``), in the order of
        ``axes``.
      axes: positions of the lifted axes in the layer's arrays and probes.
      rules: the user's own rules, of which one may be the layer's.
    """

    location: Location
    block: blocks.CurvatureBlock
    copies: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    rules: tap_rules.Rules = MappingProxyType({})


def find_locations(params: Params) -> list[Location]:
    """Every dictionary of the parameters that directly holds arrays."""
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
    """The dictionary at a location; ``optax.MaskedNode`` where all of it is masked."""
    for key in location.keys:
        if isinstance(tree, optax.MaskedNode):
            return tree
        tree = tree[key]
    return tree


def insert(
    params: Params, additions: Mapping[tuple[Any, ...], Mapping[str, Array]]
) -> Params:
    """The parameters with arrays added to some of their dictionaries.

    Args:
      params: nested mappings; their kind (``dict``, ``FrozenDict``) is kept at every
        level, because a loss may rely on it.
      additions: the arrays to add, by the keys of their dictionary.

    Returns:
      The enlarged tree; an array of the same name is replaced.
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
    """The inverse of ``insert``: the tree without some arrays, and those arrays."""
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
    if isinstance(node, flax.core.FrozenDict):
        return flax.core.FrozenDict(entries)
    return entries if type(node) is dict else type(node)(entries)  # pyright: ignore


class Probes(NamedTuple):
    """The probes of one trace.

    Attributes:
      tapped: the layers, in the order of the numbers in the probes' names.
      trace: a number that no other trace has.
      due: for each layer, which of its statistics are wanted.
      given: for each layer, arrays that its block estimates with beside the residual,
        copies first.
      reached: the numbers of the layers that have run in this trace so far.
    """

    tapped: Sequence[Tapped]
    trace: int
    due: Sequence[Any]
    given: Sequence[tuple[Array, ...]]
    reached: set[int]

    def names(self, number: int) -> list[str]:
        """The names of one layer's probes, one a field of its sums."""
        fields = self.tapped[number].block.sums._fields
        return [f"{PREFIX}{self.trace}_{number}_{field}" for field in fields]

    def copy_name(self, number: int) -> str:
        """The name under which each copy of a layer finds its own number."""
        return f"{PREFIX}{self.trace}_{number}_copy"

    def needs_number(self, number: int) -> bool:
        """Whether the copies of a layer are given different arrays."""
        return bool(self.given[number] and self.tapped[number].copies)

    def insert(self, params: Params, value: float = 0.0) -> Params:
        """The parameters with every layer's probes beside them, all of one value."""
        additions = {}
        for number, layer in enumerate(self.tapped):
            shapes = zip(self.names(number), layer.block.sums, strict=True)
            own = {name: _full(shape, layer, value) for name, shape in shapes}
            if self.needs_number(number):
                own[self.copy_name(number)] = _numbered_zeros(layer)
            additions[layer.location.keys] = own
        return insert(params, additions)

    def require_all_reached(self) -> None:
        """Refuses a trace in which a layer did not run.

        Raises:
          ValueError: naming the layers.
        """
        missing = [
            layer.location.path
            for number, layer in enumerate(self.tapped)
            if number not in self.reached
        ]
        if missing:
            raise ValueError(
                f"layers {missing} did not run in this loss, though they did when "
                "trace_layers saw it. Call trace_layers again with the loss, the "
                "parameters and the arguments that are trained with."
            )

    def remove(self, grads: Params) -> tuple[Params, list[Any]]:
        """The gradient without probes, and each layer's sums, copies first."""
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
        """The number, the rule and the arrays of the layer that an interceptor sees."""
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
        """What one copy of a layer is given; it has these variables."""
        layer, given = self.tapped[number], list(self.given[number])
        if not self.needs_number(number):
            return given
        copy = _number_in(variables[self.copy_name(number)])
        each = [x.reshape(-1, *x.shape[len(layer.copies) :]) for x in given]
        # Without its number a copy gets none of them, and its statistic is refused.
        lost = len(each[0])
        copy = jnp.where(copy > 0, copy - 1, lost)
        return [x.at[copy].get(mode="fill", fill_value=jnp.nan) for x in each]

    def interceptor(
        self, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Flax's hook: calls the layer and taps its output."""
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
    """Probes for one trace of a loss."""
    given = [() for _ in tapped] if given is None else given
    return Probes(tapped, next(_trace_numbers), due, given, set())


def tap(
    estimate: Callable[[Any, Array, Any], Any],
    residual: Any,
    outputs: Array,
    probe: Any,
    due: Any,
) -> Array:
    r"""The identity on ``outputs`` whose cotangent at ``probe`` are the layer's sums.

    .. math:: \bar{\text{outputs}} = \delta, \qquad
              \bar{\text{probe}} = \text{estimate}(\text{residual}, \delta, \text{due})

    Args:
      estimate: a block's ``estimate``.
      residual: what ``estimate`` needs of the forward pass.
      outputs: the layer's output.
      probe: zeros shaped like the sums.
      due: which statistics are wanted; traced flags or Python bools.

    Returns:
      ``outputs``.
    """
    flags, static = _split_flags(due)

    @jax.custom_vjp
    def identity(residual, outputs, probe, flags):
        del residual, probe, flags
        return outputs

    def forward(residual, outputs, probe, flags):
        del probe
        return outputs, (residual, flags)

    def backward(saved, output_grads):
        residual, flags = saved
        sums = estimate(residual, output_grads, _join_flags(flags, static))
        return None, output_grads, sums, None

    identity.defvjp(forward, backward)
    return identity(residual, outputs, probe, flags)


def own_params(module: Any) -> dict[str, Any]:
    """The arrays that lie directly in a bound module's scope."""
    params = module.variables.get("params", {})
    return {k: v for k, v in params.items() if not isinstance(v, Mapping)}


def copies_first(x: Array, axes: tuple[int, ...]) -> Array:
    """An array with its lifted axes moved to the front."""
    return jnp.moveaxis(x, axes, range(len(axes))) if axes else x


def copies_back(x: Array, axes: tuple[int, ...]) -> Array:
    """The inverse of ``copies_first``."""
    return jnp.moveaxis(x, range(len(axes)), axes) if axes else x


def with_copies(
    shape: tuple[int, ...], copies: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of one copy's array with the lifted axes put in their places."""
    result = list(shape)
    for axis, size in sorted(zip(axes, copies, strict=True)):
        result.insert(axis, size)
    return tuple(result)


def marked_number(names: Mapping[str, Any], prefix: str) -> int | None:
    """The layer number that a probe or marker in a scope carries in its name."""
    for name in names:
        if name.startswith(prefix):
            return int(name[len(prefix) :].split("_")[0])
    return None


def _full(shape: jax.ShapeDtypeStruct, layer: Tapped, value: float) -> Array:
    full = with_copies(shape.shape, layer.copies, layer.axes)
    return jnp.full(full, value, shape.dtype)


def _numbered_zeros(layer: Tapped) -> Array:
    """Zeros for each copy of a layer whose signs spell the copy's number, from 1."""
    # Arrays beside the parameters reach whatever a loss adds up over all of them, norms
    # and penalties; zeros change nothing there, of either sign.
    count = math.prod(layer.copies)
    bits = np.arange(count.bit_length())
    signs = np.where((np.arange(1, count + 1)[:, None] >> bits) & 1, -0.0, 0.0)
    zeros = jnp.asarray(signs.reshape(*layer.copies, 1, len(bits)), jnp.float32)
    return copies_back(zeros, layer.axes)


def _number_in(zeros: Float[Array, "one bits"]) -> Array:
    """The number that the signs of one copy's zeros spell; 0 if they were lost."""
    bits = jnp.signbit(jax.lax.stop_gradient(zeros[0]))
    return jnp.sum(bits << jnp.arange(len(bits)))


def _check_probe(layer: Tapped, fields: Any, probe: Any) -> None:
    for field, expected, actual in zip(fields._fields, fields, probe, strict=True):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            raise ValueError(
                f"layer {layer.location.path!r}: the probe for {field!r} arrived as "
                f"{actual.dtype}{list(actual.shape)} where "
                f"{expected.dtype}{list(expected.shape)} was put in. Something between "
                "the parameters and the layer changes them (a cast of the whole tree, "
                "nn.map_variables). Cast in the layers (dtype=) instead, or make the "
                "layers anew with trace_layers if the model changed."
            )


def _vary_like(probe: Any, outputs: Array) -> Any:
    """The probe, varying over the same mesh axes as the outputs.

    Args:
      probe: the layer's probes.
      outputs: the layer's outputs.

    Returns:
      The probes plus zeros: under ``shard_map(check_vma=True)`` the sum with an array
      that varies casts it, and the cast's transpose adds the devices' sums up.
    """
    return jax.tree.map(
        lambda p: p + jnp.zeros_like(outputs, shape=p.shape, dtype=p.dtype), probe
    )


def _split_flags(due: Any) -> tuple[Any, Any]:
    """Traced flags (arguments of the tap) and Python bools (fixed in its rule)."""
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
