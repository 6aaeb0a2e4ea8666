"""A small convolutional network without normalisation, after cuda-convnet's `quick`.

    Krizhevsky, `cuda-convnet <https://code.google.com/archive/p/cuda-convnet>`_, 2012:
        three 5x5 convolutions of 32, 32 and 64 channels and a softmax.
    Grosse & Martens, `A Kronecker-factored Approximate Fisher Matrix for Convolution
        Layers <https://arxiv.org/abs/1602.01407>`_, 2016: trained with K-FAC.

Half of those channels are the default here, for studies of many runs. Weights start as
He's instead of cuda-convnet's tuned deviations, and the windows of the pooling do not
overlap. `WideConvNet` has a dense layer on a larger map, as AlexNet's first, in small.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ConvNet(nn.Module):
    """Convolutions, a pooling after each, perhaps a hidden dense layer, and the logits.

    Attributes:
        num_classes: Number of logits.
        channels: Channels of the convolutions.
        hidden: Units of a dense layer, with ReLU, on the flattened map; none: no layer.
        norm_momentum: Unused; there is nothing to normalise.
        dtype: Type of activations; parameters and logits are float32.
    """

    num_classes: int
    channels: tuple[int, ...] = (16, 16, 32)
    hidden: int | None = None
    norm_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits of a batch of images.

        Args:
            x: Images `[n, h, w, c]`; each pooling halves height and width.
            train: Unused; training and evaluation are the same.

        Returns:
            Logits, float32 `[n, num_classes]`.
        """
        del train
        x = x.astype(self.dtype)
        for layer, channels in enumerate(self.channels, start=1):
            conv = nn.Conv(
                channels,
                (5, 5),
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"conv{layer}",
            )
            pool = nn.max_pool if layer == 1 else nn.avg_pool
            x = pool(nn.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        if self.hidden is not None:
            hidden = nn.Dense(
                self.hidden,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name="hidden",
            )
            x = nn.relu(hidden(x))
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


# Of 16×16 images the hidden layer sees 16 locations × 64 channels.
WideConvNet = functools.partial(ConvNet, channels=(16, 64), hidden=128)
