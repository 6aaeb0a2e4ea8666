"""Addresses in the user's tree of parameters: the dictionaries that hold arrays."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.core
import jax
import optax

from lbopt._typing import Array, Params

PROBE, MARKER = "probe", "marker"
"""The beginnings of the names of arrays that are added to parameters."""

_ADDED = re.compile(rf"({PROBE}|{MARKER})\d+_\d+")


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


def _like(node: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    # A loss may rely on the type of its parameters (dict, FrozenDict).
    if isinstance(node, flax.core.FrozenDict):
        return flax.core.FrozenDict(entries)
    if type(node) is dict:
        return entries
    make: Any = type(node)  # a mapping's constructor has no common signature
    return make(entries)


def own_params(module: Any) -> dict[str, Any]:
    """Returns the arrays that lie directly in a bound module's scope."""
    params = module.variables.get("params", {})
    return {k: _array(v) for k, v in params.items() if not isinstance(v, Mapping)}


def without_boxes(tree: Any) -> Any:
    """Returns a tree whose arrays Flax may have boxed with their axis names."""
    return jax.tree.map(_array, tree, is_leaf=_is_box)


def _array(x: Any) -> Any:
    # Its own unbox() may constrain the array's sharding, which makes a new array.
    return getattr(x, "value", x) if _is_box(x) else x


def _is_box(x: Any) -> bool:
    return isinstance(x, flax.core.meta.AxisMetadata)


def plain(params: Params) -> Params:
    """Returns the user's own parameters, without the arrays that lbopt adds to them.

    A loss is called with its own tree of parameters, unless a transform of JAX's own
    (``jax.jit``, ``jax.checkpoint``, ``jax.vmap`` or ``jax.lax.scan`` with parameters
    as an argument) lies between the loss and a layer: such a layer's statistics travel
    in arrays beside its own.  Where the loss maps its parameters beside another tree,
    takes their norm, or counts them, it does so with ``plain(params)``.

    Args:
      params: the tree that the loss is called with.

    Returns:
      The tree without these arrays; it may be differentiated by.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> lbopt.plain({"kernel": jnp.ones(2), "probe7_0_a": jnp.zeros(2)}).keys()
      dict_keys(['kernel'])
    """

    def walk(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        own = {k: walk(v) for k, v in node.items() if not _ADDED.match(str(k))}
        return _like(node, own)

    return walk(params)
