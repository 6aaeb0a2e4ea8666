"""Deep autoencoders of dense layers.

    Hinton & Salakhutdinov, `Reducing the Dimensionality of Data with Neural Networks
        <https://www.science.org/doi/10.1126/science.1127647>`_, 2006: the network.
    Martens & Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature <https://arxiv.org/abs/1503.05671>`_, 2015: the problem of K-FAC.

The papers' units are logistic; here they are tanh, as in tensorflow/kfac and kfac-jax.
K-FAC without damping takes the same steps with either (Theorem 1 there), and gradient
descent does better with tanh, whose values are centred. The papers start from sparse
weights, which suit logistic units; here weights start as Glorot's.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn


class Autoencoder(nn.Module):
    """An encoder of tanh units with a linear code, and its mirror image.

    Attributes:
        widths: Units of the encoder's layers; the last are the code.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Encodes and decodes a batch of flat images.

        Args:
            x: Images `[n, pixels]` in [0, 1].

        Returns:
            Logits of the pixels, `[n, pixels]`.
        """
        *encoder, code = self.widths
        pixels, init = x.shape[-1], nn.initializers.glorot_uniform()
        for layer, units in enumerate(encoder, start=1):
            x = nn.tanh(nn.Dense(units, kernel_init=init, name=f"encoder{layer}")(x))
        x = nn.Dense(code, kernel_init=init, name="code")(x)
        for layer, units in enumerate(reversed(encoder), start=1):
            x = nn.tanh(nn.Dense(units, kernel_init=init, name=f"decoder{layer}")(x))
        return nn.Dense(pixels, kernel_init=init, name="image")(x)
