"""A loss's head, to be evaluated at sizes and values of choice."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbopt._typing import Array
from lbopt.curvature.loss_head import Head, Name, replaced

# The sizes of the axes in the experiments, and the class of every label: large enough
# for every special value of a label to differ from it.
SMALL, LABEL = 3, 2
TOLERANCE = 1e-3


class Unproved(Exception):  # noqa: N818  (no "Error": it is caught, or says its own)
    """The reason why the terms of a loss cannot be found."""


class Contradicted(Unproved):
    """The reason why a loss is no plain mean."""


class Coupled(Unproved):
    """The reason why a loss is no sum over the positions along some axes."""


class Experiment(NamedTuple):
    """A loss's head, to be evaluated at sizes and values of choice.

    Attributes:
      head: what an abstract trace saw.
      leaves: the leaves of the arguments.
      tree: their structure.
      output: the name of the output.
      compiled: ``(output, all outputs, array leaves) -> `` the gradient by the output.
      truth: the value that booleans are filled with.
      number: the value that arrays of floats are filled with.
      label: the value that arrays of integers are filled with.
    """

    head: Head
    leaves: list[Any]
    tree: Any
    output: Name
    compiled: Callable[..., Array]
    truth: bool = True
    number: float = 1.0
    label: int = LABEL

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.head.outputs[self.output].shape

    def gradient(
        self,
        sizes: tuple[int, ...],
        changes: Mapping[int, Any] | None = None,
        alike: float | None = None,
        scale: float = 1.0,
        raised: float = 0.0,
    ) -> np.ndarray:
        """Returns the gradient of the loss by its output.

        Args:
          sizes: the sizes of the output's axes.
          changes: leaves of the arguments by number.
          alike: the value of the outputs at all positions; None for irregular ones.
          scale: the size of irregular ones.
          raised: a number added to the first coordinate of the output.

        Returns:
          An array of these sizes.
        """
        outputs = {}
        # Of several outputs each has numbers of its own: a loss may compare them.
        for phase, (name, shape) in enumerate(self.head.outputs.items(), 1):
            own = self._resized(shape, sizes)
            values = scale * _values(own, phase)
            if alike is not None:
                values = np.full(own, alike)
            if name == self.output:
                values[..., 0] += raised
            outputs[name] = jnp.asarray(values.astype(shape.dtype))
        leaves = [
            self.filled(i, sizes) if changes is None or i not in changes else changes[i]
            for i in range(len(self.leaves))
        ]
        arrays = [x for x in leaves if hasattr(x, "shape")]
        found = self.compiled(outputs[self.output], outputs, arrays)
        return np.asarray(found, np.float64)

    def leaf(self, path: tuple[Any, ...]) -> Any:
        """Returns a leaf of the arguments by its path."""
        args = jax.tree.unflatten(self.tree, self.leaves)
        return dict(jax.tree_util.tree_leaves_with_path(args))[path]

    def path(self, number: int) -> tuple[Any, ...]:
        """Returns the path of a leaf of the arguments."""
        args = jax.tree.unflatten(self.tree, self.leaves)
        return jax.tree_util.tree_leaves_with_path(args)[number][0]

    def along(self, leaf: Any) -> int:
        """Returns the number of leading axes that a leaf shares with the output."""
        shape, own = self.shape, getattr(leaf, "shape", ())
        shared = 0
        while shared < min(len(shape), len(own)) and own[shared] == shape[shared]:
            shared += 1
        return shared

    def filled(self, number: int, sizes: tuple[int, ...]) -> Any:
        """Returns a leaf of the arguments at other sizes, of one value throughout."""
        leaf = self.leaves[number]
        shared = self.along(leaf)
        if not shared or not hasattr(leaf, "dtype"):
            return _concrete(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        whole = list(leaf.shape)
        whole[:shared] = sizes[:shared]
        # Tokens that are inputs and targets of the next position: one more of them.
        if self.shifted(leaf):
            whole[shared] = sizes[shared] + 1
        # Of two classes the second.
        two = len(self.shape) > 1 and self.shape[-1] == 2
        label = min(self.label, 1) if two else self.label
        value = label if jnp.issubdtype(leaf.dtype, jnp.integer) else self.number
        value = self.truth if leaf.dtype == jnp.bool_ else value
        return jnp.full(whole, value, jax.dtypes.canonicalize_dtype(leaf.dtype))

    def shifted(self, leaf: Any) -> bool:
        """Whether a leaf has one position more than the output along its last axis."""
        shared, own, shape = self.along(leaf), leaf.shape, self.shape
        inner = 0 < shared == len(own) - 1 < len(shape) - 1
        return inner and own[-1] == shape[shared] + 1

    def _resized(self, leaf: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
        shared = self.along(leaf)
        return (*sizes[:shared], *leaf.shape[shared:])


def make_experiment(
    loss: Callable[..., Array],
    head: Head,
    params: Any,
    leaves: list[Any],
    tree: Any,
    output: Name,
) -> Experiment:
    """Makes an experiment, whose head is compiled once for each size."""

    def by_output(x: Array, outputs: dict[Name, Array], arrays: list[Any]) -> Array:
        # Shapes become zeros here, where XLA drops them, and take no memory.
        whole = jax.tree.map(_concrete, params)
        given = iter(arrays)
        merged = [next(given) if hasattr(leaf, "shape") else leaf for leaf in leaves]
        args = jax.tree.unflatten(tree, merged)
        return replaced(head, outputs | {output: x}, loss)(whole, *args)

    compiled = jax.jit(jax.grad(by_output))
    return Experiment(head, leaves, tree, output, compiled)


def terms_in(gradient: np.ndarray, events: bool) -> np.ndarray:
    """Tells which positions have a gradient.

    Args:
      gradient: that by an output.
      events: whether the last axis of the output holds the coordinates of one event.

    Returns:
      Booleans, without an axis of coordinates.
    """
    return np.any(gradient != 0, -1) if events else gradient != 0


def is_shape(x: Any) -> bool:
    """Whether a leaf is a shape without values."""
    return isinstance(x, jax.ShapeDtypeStruct)


def _concrete(x: Any) -> Any:
    if not is_shape(x):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.ones(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _values(shape: tuple[int, ...], phase: int) -> np.ndarray:
    """Numbers of no regularity, such that a larger array continues a smaller one."""
    index = np.indices(shape, np.float64)
    steps = [np.sqrt(p) for p in (2.0, 3.0, 5.0, 7.0, 11.0, 13.0)]
    total = sum(step * i for step, i in zip(steps, index, strict=False))
    # The digits of a sine far behind the point: no sum over an axis repeats.
    far = 43758.5453 * np.sin(37 * np.asarray(total) + phase)
    return np.asarray(2 * (far - np.floor(far)) - 1, np.float32)
