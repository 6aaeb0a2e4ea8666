"""AlexNet as Caffe builds it, and AlexNet-BN of the LARS experiments.

One module, `AlexNet`; `AlexNetBN` is a `partial` of it. References:

    Krizhevsky et al., `ImageNet Classification with Deep Convolutional Neural Networks
        <https://papers.nips.cc/paper/4824>`_, 2012: the network, and local response
        normalisation.
    BVLC, `bvlc_alexnet <https://github.com/BVLC/caffe>`_: without the paper's colour
        augmentation and with other initial biases; the network built here.
    You et al., `Large Batch Training of Convolutional Networks
        <https://arxiv.org/abs/1708.03888>`_, 2017: AlexNet-BN, here as in
        `train_val2_fp16.prototxt` of NVIDIA's Caffe, with which it was trained.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_BIASES = {"conv2": 0.1, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1}
"""Initial biases of AlexNet that are not 0."""

_BIASES_BN = {"fc6": 0.1, "fc7": 0.1}
"""Initial biases of AlexNet-BN that are not 0.01."""

MIN_SIZE = 39
"""Least height and width of an image; of a smaller one the last pooling leaves none."""


def local_response_norm(x: jax.Array) -> jax.Array:
    """Divides each channel by a power of the energy of the five channels around it.

    `x_c / (1 + 1e-4 / 5 * sum of x_j**2 over |j - c| <= 2)**0.75`, in float32. Caffe
    divides the 1e-4 by the 5 channels of the sum; Krizhevsky et al. do not, and have 2
    in the place of 1.

    Args:
        x: Activations `[..., channels]`; beyond the first and the last are zeros.

    Returns:
        Activations of the same shape and dtype.
    """
    wide, channels = x.astype(jnp.float32), x.shape[-1]
    squares = jnp.pad(jnp.square(wide), [(0, 0)] * (x.ndim - 1) + [(2, 2)])
    energy = sum(squares[..., i : i + channels] for i in range(5))
    return (wide * (1 + 1e-4 / 5 * energy) ** -0.75).astype(x.dtype)


class AlexNet(nn.Module):
    """Five convolutions, two of hidden dense layers, and the logits.

    Attributes:
        num_classes: Number of logits.
        batch_norm: Whether batch normalisation, without scale and offset, stands before
            the second to fifth convolution, after ReLU and pooling; if not, local
            response normalisation stands after the first two ReLUs, before pooling.
        norm_momentum: Decay of the running statistics that evaluation normalises by.
        dtype: Type of activations; parameters and logits are float32.
    """

    num_classes: int
    batch_norm: bool = False
    norm_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits of a batch of images.

        Args:
            x: Images `[n, h, w, c]` of at least 39x39 pixels; the published size is
                227x227.
            train: Whether to drop half of the hidden units, by the stream of random
                numbers `dropout`, to normalise by the batch's statistics, and to update
                the running ones in the collection `batch_stats`.

        Returns:
            Logits, float32 `[n, num_classes]`.

        Raises:
            ValueError: If the images are too small.
        """
        if min(x.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"x: AlexNet needs images of at least {MIN_SIZE}×{MIN_SIZE} pixels, "
                f"got {x.shape[1]}×{x.shape[2]}; resize them, as to 227×227"
            )
        drop = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        x = x.astype(self.dtype)
        x = self._pooled(self._conv("conv1", x, 96, 11, stride=4), train)
        x = self._pooled(self._conv("conv2", x, 256, 5, pad=2, groups=2), train)
        x = self._normed(self._conv("conv3", x, 384, 3, pad=1), train)
        x = self._normed(self._conv("conv4", x, 384, 3, pad=1, groups=2), train)
        x = max_pool(self._conv("conv5", x, 256, 3, pad=1, groups=2))
        x = x.reshape(x.shape[0], -1)
        x = drop()(nn.relu(self._dense("fc6", 4096, 0.005, self.dtype)(x)))
        x = drop()(nn.relu(self._dense("fc7", 4096, 0.005, self.dtype)(x)))
        return self._dense("head", self.num_classes, 0.01, jnp.float32)(x)

    def _conv(
        self,
        name: str,
        x: jax.Array,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        pad: int = 0,
        groups: int = 1,
    ) -> jax.Array:
        conv = nn.Conv(
            channels,
            (kernel, kernel),
            strides=stride,
            padding=pad,
            feature_group_count=groups,
            kernel_init=nn.initializers.normal(0.01),
            bias_init=self._bias_init(name),
            dtype=self.dtype,
            name=name,
        )
        return nn.relu(conv(x))

    def _pooled(self, x: jax.Array, train: bool) -> jax.Array:
        if self.batch_norm:
            return self._normed(max_pool(x), train)
        return max_pool(local_response_norm(x))

    def _normed(self, x: jax.Array, train: bool) -> jax.Array:
        if not self.batch_norm:
            return x
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=1e-4,
            use_scale=False,
            use_bias=False,
            dtype=self.dtype,
        )
        return norm(x)

    def _dense(self, name: str, features: int, std: float, dtype: Any) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=nn.initializers.normal(std),
            bias_init=self._bias_init(name),
            dtype=dtype,
            name=name,
        )

    def _bias_init(self, name: str) -> nn.initializers.Initializer:
        if self.batch_norm:
            return nn.initializers.constant(_BIASES_BN.get(name, 0.01))
        return nn.initializers.constant(_BIASES.get(name, 0.0))


def max_pool(x: jax.Array) -> jax.Array:
    """Caffe's pooling: windows of 3x3 at stride 2, also those partly over the edge.

    Args:
        x: Activations `[n, h, w, c]`.

    Returns:
        Activations `[n, ceil((h - 3) / 2) + 1, ceil((w - 3) / 2) + 1, c]`.
    """
    # An even side leaves one row or column over, which a last window takes in.
    height, width = ((0, 1 - side % 2) for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), height, width, (0, 0)), constant_values=-jnp.inf)
    return nn.max_pool(x, (3, 3), strides=(2, 2))


AlexNetBN = functools.partial(AlexNet, batch_norm=True)
