"""Recognises the user's parameters where Flax modules receive them.

A loss gets the user's own tree of parameters, and may do with it what it likes.  When
it applies a module, the arrays that arrive at the module's root scope are compared with
the user's, by identity.  Arrays that ride through Flax's lifted transforms (probes and
markers) are added to the root scope, so that the loss never sees them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend.core import get_opaque_trace_state

from lbopt._typing import Array, Params
from lbopt.curvature import locations as places
from lbopt.curvature.locations import Location


class Mapped(NamedTuple):
    """A tree that a module was applied to, shaped like a part of the user's parameters.

    Attributes:
      order: the number of root scopes that the loss made before.
      numbers: for each location in the tree, the number of the user's location.
      tree: the tree.
    """

    order: int
    numbers: Mapping[tuple[Any, ...], int]
    tree: Any


class Arrivals:
    """The arrivals of one trace of a loss.

    Attributes:
      mapped: trees that are not the user's, but could be mapped from them.
    """

    def __init__(
        self,
        params: Params,
        locations: Mapping[int, Location],
        riders: Mapping[int, Mapping[str, Array]],
        accepted: Mapping[int, Mapping[tuple[Any, ...], int]],
    ) -> None:
        """Prepares a trace.

        Args:
          params: the tree that the loss is called with.
          locations: the dictionaries of arrays in it, by number.
          riders: arrays to add beside those of a location, by its number.
          accepted: the trees mapped from the user's that count as the user's: the
            numbers of their locations, by the order of the root scopes.
        """
        self._locations, self._riders, self._accepted = locations, riders, accepted
        self._trace = get_opaque_trace_state(convention="flax")
        # Roots and arrays are kept, because an identity may be reused after deletion.
        self._roots: dict[int, Any] = {}
        self._arrays: dict[int, tuple[int, str, Any]] = {}
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        for number, location in locations.items():
            arrays = places.lookup(params, location)
            self._add(number, {name: arrays[name] for name in location.names})
            self._shapes[number] = {n: arrays[n].shape for n in location.names}
        self.mapped: list[Mapped] = []

    def _add(self, number: int, arrays: Mapping[str, Any]) -> None:
        for name, x in arrays.items():
            self._arrays[id(x)] = (number, name, x)

    def at_top(self) -> bool:
        """Whether no transform lies between the loss and the code that runs now."""
        return get_opaque_trace_state(convention="flax") == self._trace

    def enter(self, module: Any) -> None:
        """Looks at the root scope of a module whose method is called.

        Args:
          module: the bound module.

        Raises:
          ValueError: if the module may change its parameters.
        """
        root = module.scope.root
        # A module's methods share the scope that it was applied with.
        if id(root) in self._roots:
            return
        order = len(self._roots)
        self._roots[id(root)] = root
        variables = root.variables()
        tree = variables.get("params", {})
        plain = places.without_boxes(tree)
        found = places.find_locations(plain)
        numbers: dict[tuple[Any, ...], int] = {}
        for at in found:
            number = self._number_at(plain, at)
            if number is not None:
                numbers[at.keys] = number
        # Lifted transforms make root scopes of their own, with a path or a trace.
        if not numbers and found and not root.path and self.at_top():
            numbers = dict(self._accepted.get(order, {}))
            for keys, number in numbers.items():
                own = self._locations[number].names
                arrays = places.lookup(plain, Location(keys, own))
                self._add(number, {name: arrays[name] for name in own})
            if not numbers and (like := self._alike(plain, found)):
                self.mapped.append(Mapped(order, like, plain))
        riders = {
            keys: self._riders[number]
            for keys, number in numbers.items()
            if self._riders.get(number)
        }
        if riders:
            if root.is_mutable_collection("params"):
                raise ValueError(
                    f"module {type(module).__name__} is applied with mutable params, "
                    "but a layer inside a lifted transform (nn.scan, nn.remat, ...) "
                    "needs them unchanged; leave 'params' out of mutable="
                )
            variables["params"] = places.insert(tree, riders)

    def _number_at(self, tree: Any, at: Location) -> int | None:
        arrays = places.lookup(tree, at)
        for name in at.names:
            if self._knows(arrays[name]):
                return self._arrays[id(arrays[name])][0]
        return None

    def _alike(self, tree: Any, found: list[Location]) -> dict[tuple[Any, ...], int]:
        """Finds the part of the user's parameters that a tree is shaped like."""
        first = found[0].keys
        candidates = []
        for location in self._locations.values():
            end = len(location.keys) - len(first)
            if end < 0 or location.keys[end:] != first:
                continue
            prefix = location.keys[:end]
            numbers = {
                at.keys: number
                for at in found
                for number, whole in self._locations.items()
                if whole.keys == (*prefix, *at.keys)
                and self._shapes[number]
                == {n: places.lookup(tree, at)[n].shape for n in at.names}
            }
            if len(numbers) == len(found):
                candidates.append(numbers)
        return candidates[0] if len(candidates) == 1 else {}

    def number_of(self, arrays: Mapping[str, Any]) -> tuple[int | None, bool]:
        """Returns the number of the location that a layer's own arrays are.

        Args:
          arrays: the layer's arrays by name.

        Returns:
          The number, None if no array is the user's; and whether all of them are.
        """
        found = [self._arrays[id(x)][0] for x in arrays.values() if self._knows(x)]
        if not found:
            return None, False
        number = found[0]
        own = {
            name: self._arrays[id(arrays[name])][:2]
            for name in self._locations[number].names
            if name in arrays and self._knows(arrays[name])
        }
        names = self._locations[number].names
        return number, own == {name: (number, name) for name in names}

    def _knows(self, x: Any) -> bool:
        return id(x) in self._arrays
