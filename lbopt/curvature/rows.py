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

    def beside(self, path: str, residual: Array, aligned: bool) -> block.Weighted:
        """Adds to a layer's residual the weights of its rows.

        The weights belong to the leading axes of the layer's input: to all of theirs,
        to the axis of examples alone (an example then has its largest weight), or to
        both flattened into one axis.

        Args:
          path: the layer's path, for the message.
          residual: the layer's input.
          aligned: whether the input's leading axes are known: False under a ``vmap``
            over examples, and for a rule of the user's.

        Returns:
          The input and its weights.

        Raises:
          ValueError: if the weights fit none of the input's axes.
        """
        w = self.weights
        shape = jnp.shape(residual)
        if aligned:
            # All leading axes, as of tokens in a layer on tokens.
            if shape[: w.ndim] == w.shape:
                return block.Weighted(residual, w)
            # In a loop over time or over chunks, examples alone are not all there is.
            if shape and shape[0] == w.shape[0] and self.arrivals.at_top():
                return block.Weighted(residual, jnp.max(w.reshape(len(w), -1), axis=1))
            if shape and shape[0] == math.prod(w.shape):
                return block.Weighted(residual, w.reshape(-1))
        raise ValueError(
            f"layer {path!r}: the loss's weights {list(w.shape)} do not fit the axes "
            f"of its input {list(shape)}, so its padding cannot be told from its rows; "
            "apply the model to the whole batch (examples first, without a vmap or a "
            "scan over time around it, with a rule of lbopt's), or leave the layer to "
            "another optimizer by optax.partition"
        )
