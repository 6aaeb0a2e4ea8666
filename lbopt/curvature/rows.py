"""The weights of a batch's rows, as each layer sees them.

A loss may weight its terms: padding has weight 0, examples, classes or pixels have
weights of their own.  The input factor of a layer is then a weighted mean over its
rows, so that padding changes nothing.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from lbopt._typing import Array
from lbopt.curvature import arrivals, block


class RowWeights(NamedTuple):
    """The weights of a loss's terms.

    Attributes:
      weights: ``[batch]``, or ``[batch, ...]`` with the positions of tokens or pixels.
      arrivals: the parameters of this trace, which know where the loss's own code ends.
    """

    weights: Array
    arrivals: arrivals.Arrivals

    def beside(
        self, path: str, residual: Array, aligned: bool, shared: bool
    ) -> block.Weighted:
        """Adds to a layer's residual the weights of its rows.

        The weights belong to the leading axes of the layer's input: to all of theirs,
        to the axis of examples alone (an example then has its largest weight), or to
        both flattened into one axis.  A row that all examples share has the sum of
        their weights, as if there were a copy of it for each.

        Args:
          path: the layer's path, for the message.
          residual: the layer's input.
          aligned: whether the input's leading axes are known: False under a ``vmap``
            over examples, and for a rule of the user's.
          shared: whether the input is the same for all examples and has no axis of
            them.

        Returns:
          The input and its weights.

        Raises:
          ValueError: if the weights fit none of the input's axes.
        """
        w = self.weights
        shape = jnp.shape(residual)
        fit = None
        if aligned and shared:
            fit = self._summed(residual)
            # Rows or columns of pictures alone are not told apart; in a loop over time
            # not every step has all of the weights.
            some = set(_axes_of_rows(residual)) & set(w.shape[1:])
            if fit is None and (w.ndim == 1 or (self.arrivals.at_top() and not some)):
                fit = jnp.full(shape[:1], jnp.sum(w))
        elif aligned:
            fit = self._by_example(shape)
            # Positions may be an argument of the loss.
            if fit is None and w.ndim > 1 and self.arrivals.at_top():
                fit = self._summed(residual)
        if fit is not None:
            return block.Weighted(residual, fit)
        raise ValueError(
            f"layer {path!r}: the loss's weights {list(w.shape)} do not fit the axes "
            f"of its input {list(shape)}, so its padding cannot be told from its rows; "
            "apply the model to the whole batch (examples first, without a vmap or a "
            "scan over time around it, with a rule of lbopt's), or leave the layer to "
            "another optimizer by optax.partition"
        )

    def _by_example(self, shape: tuple[int, ...]) -> Array | None:
        """The weights along the axes of an input that starts with the examples."""
        w = self.weights
        # All leading axes, as of tokens in a layer on tokens.
        if shape[: w.ndim] == w.shape:
            return w
        # In a loop over time or over chunks, examples alone are not all there is.
        if shape and shape[0] == w.shape[0] and self.arrivals.at_top():
            return jnp.max(w.reshape(len(w), -1), axis=1)
        if shape and shape[0] == math.prod(w.shape):
            return w.reshape(-1)
        return None

    def _summed(self, residual: Array) -> Array | None:
        """The weights summed over examples, along an input's axes of positions."""
        total = jnp.sum(self.weights, axis=0)
        axes = _axes_of_rows(residual)
        for ones in range(len(axes)):
            if total.ndim and axes[ones : ones + total.ndim] == total.shape:
                return total.reshape(*[1] * ones, *total.shape)
            if axes[ones] != 1:
                break
        return None


def _axes_of_rows(residual: Array) -> tuple[int, ...]:
    # Words and positions have no axis of features.
    words = jnp.issubdtype(residual.dtype, jnp.integer)
    return residual.shape if words else residual.shape[:-1]
