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
      sentinel: the value that marks padding; None if it holds the weights themselves.
      shift: positions along its last axis before the first that has a weight.
      missing: positions of the output along this axis, the last ones, without a weight.
      divides: whether the loss divides by the sum of the weights.
    """

    path: tuple[Any, ...]
    sentinel: int | None
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
        x = jnp.asarray(leaves[self.path])[..., self.shift :]
        x = x if self.sentinel is None else x != self.sentinel
        edges = [(0, 0)] * (x.ndim - 1) + [(0, self.missing)]
        return jnp.pad(x, edges) if self.missing else x


class Terms(NamedTuple):
    """The terms of a loss, along the axes of one of its outputs.

    Attributes:
      output: the name of the output; None if the terms are not found.
      axes: the axes that the loss averages over.
      offsets: for each of them, the number of positions that it leaves out.
      weights: the argument that holds the terms' weights, ``"likelihood"`` if a call of
        it states them, None if there are none.
      size: the number of terms of the batch that was traced; None if unknown.
      examples: the number of examples of that batch; None if unknown.
      text: what the table of layers says of them.
    """

    output: Name | None
    axes: tuple[int, ...]
    offsets: tuple[int, ...]
    weights: WeightsAt | Literal["likelihood"] | None
    size: int | None
    examples: int | None
    text: str

    def count(self, shape: tuple[int, ...]) -> int:
        """Returns the number of terms for the shape of the output."""
        pairs = zip(self.axes, self.offsets, strict=True)
        return math.prod(shape[axis] - offset for axis, offset in pairs)


UNKNOWN = Terms(None, (), (), None, None, None, "those of a mean over the batch")


def path_text(path: tuple[Any, ...]) -> str:
    """Names a leaf of the loss's arguments, such as ``argument 2['mask']``."""
    return f"argument {path[0].idx + 1}{jax.tree_util.keystr(path[1:])}"
