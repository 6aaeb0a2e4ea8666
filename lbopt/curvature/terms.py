r"""The terms that a loss averages, and their weights.

For a loss :math:`L = \frac1n \sum_i w_i \ell_i` with gradients g of :math:`\ell`, the
Fisher matrix is :math:`F = \frac1n \sum_i w_i\, g_i g_i^\top`.  A loss divides by the
number of its terms, n, or by the sum of their weights.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lbopt._typing import Array
from lbopt.curvature.loss_head import Name


class WeightsAt(NamedTuple):
    """The argument of a loss that holds the weights of its terms.

    Attributes:
      path: the keys that lead to it among the arguments.
      padding: the value that marks padding; None if it holds the weights themselves.
      below: whether smaller values mark padding, too.
      shift: positions along its last axis before the first that has a weight.
      missing: positions of the output along this axis, the last ones, without a weight.
      divides: whether the loss divides by the sum of the weights.
    """

    path: tuple[Any, ...]
    padding: int | float | None
    below: bool
    shift: int
    missing: int
    divides: bool

    def read(self, args: Sequence[Any]) -> Array:
        """Returns the weights, or the mask, held by the arguments of a loss.

        Args:
          args: the arguments after the parameters.

        Returns:
          An array along the leading axes of the output.

        Raises:
          ValueError: if the arguments do not have it.
        """
        leaves = dict(jax.tree_util.tree_leaves_with_path(tuple(args)))
        if self.path not in leaves:
            raise ValueError(
                f"the loss's terms are weighted by {path_text(self.path)}, which these "
                "arguments do not have; call trace_layers again with the arguments of "
                "the training run"
            )
        x = jnp.asarray(leaves[self.path])
        x = x.reshape(without_ones(x.shape))[..., self.shift :]
        if self.padding is not None and math.isnan(self.padding):
            x = ~jnp.isnan(x)
        elif self.padding is not None:
            x = x > self.padding if self.below else x != self.padding
        edges = [(0, 0)] * (x.ndim - 1) + [(0, self.missing)]
        return jnp.pad(x, edges) if self.missing else x


class Terms(NamedTuple):
    """The terms of a loss, along the axes of its outputs.

    Attributes:
      outputs: the names of the outputs; ``()`` if the terms are not found.
      axes: the axes that the loss averages over.
      offsets: for each of them, the number of positions that it leaves out.
      weights: the argument that holds the terms' weights, ``"likelihood"`` if a call of
        it states them, None if there are none.
      size: the number of terms of the batch that was traced; None if unknown.
      examples: the number of examples of that batch; None if unknown.
      text: what the table of layers says of them.
      others: whether outputs without the stated weights reach the loss, too.
    """

    outputs: tuple[Name, ...]
    axes: tuple[int, ...]
    offsets: tuple[int, ...]
    weights: WeightsAt | Literal["likelihood"] | None
    size: int | None
    examples: int | None
    text: str
    others: bool = False

    def count(self, shape: tuple[int, ...], start: int = 0) -> int:
        """Returns the number of terms along the axes of the first output.

        Args:
          shape: the output's shape.
          start: the first axis that counts; the terms at each position before it, if
            not 0.
        """
        pairs = zip(self.axes, self.offsets, strict=True)
        return math.prod(shape[a] - offset for a, offset in pairs if a >= start)

    def divisor(self, shape: tuple[int, ...], weights: Array | None) -> Any:
        """Returns what the loss divides by.

        Args:
          shape: the shape of the first output.
          weights: the weights of the terms, if they have any.
        """
        if weights is None:
            return self.count(shape)
        if not isinstance(self.weights, WeightsAt):
            return jnp.sum(weights)
        if not self.weights.divides:
            return self.count(shape)
        # Each weight may be that of several terms.
        return jnp.sum(weights) * self.count(shape, weights.ndim)


UNKNOWN = Terms((), (), (), None, None, None, "those of a mean over the batch")


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape without its last axes of size 1, but with its first axis."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def path_text(path: tuple[Any, ...]) -> str:
    """Names a leaf of the loss's arguments, such as ``argument 2['mask']``."""
    return f"argument {path[0].idx + 1}{jax.tree_util.keystr(path[1:])}"
