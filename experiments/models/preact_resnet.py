"""Pre-activation residual networks of the CIFAR family.

One module, `PreactResNet`; those of a given depth are `partial`s of it. References:

    He et al., `Identity Mappings in Deep Residual Networks
        <https://arxiv.org/abs/1603.05027>`_, 2016: normalisation and ReLU before each
        convolution, nothing after the sum of a block.
    Adya et al., `Nonlinear Conjugate Gradients For Scaling Synchronous Distributed DNN
        Training <https://arxiv.org/abs/1812.02886>`_, 2018: the form built here, read
        in the authors' code: the first block of every stage, also of the first, has a
        projection shortcut.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models.resnet import Layer, conv_and_norm, rematerialised

_conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and a ReLU.

    Attributes:
        channels: Channels of the block's output.
        stride: Stride of the first convolution and of the shortcut.
        projection: Whether the shortcut is a 1x1 convolution of the normalised input;
            if not, it is the input itself.
        conv: Convolution without bias.
        norm: Normalisation.
    """

    channels: int
    stride: int
    projection: bool
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, h / stride, w / stride, channels]`."""
        y = nn.relu(self.norm()(x))
        if self.projection:
            project = self.conv(
                self.channels, (1, 1), strides=self.stride, name="conv_proj"
            )
            x = project(y)
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1)(y)
        y = nn.relu(self.norm()(y))
        return x + self.conv(self.channels, (3, 3), padding=1)(y)


class PreactResNet(nn.Module):
    """A pre-activation residual network for small images.

    Attributes:
        num_classes: Number of logits.
        stage_sizes: Blocks in each stage; from stage to stage the image is halved and
            the channels are doubled.
        width: Channels of the first convolution and of the first stage.
        norm_momentum: Decay of the running statistics that evaluation normalises by;
            a run of few steps needs a smaller one.
        axis_name: Mapped axis over which batch statistics are averaged.
        remat: Whether blocks are evaluated anew in the backward pass.
        dtype: Type of activations; parameters and logits are float32.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    width: int = 16
    norm_momentum: float = 0.99
    axis_name: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits of a batch of images.

        Args:
            x: Images `[n, h, w, c]`.
            train: Whether to normalise by the batch's statistics, and to update the
                running ones in the collection `batch_stats`.

        Returns:
            Logits, float32 `[n, num_classes]`.
        """
        conv, norm = conv_and_norm(
            _conv_init,
            train=train,
            norm_momentum=self.norm_momentum,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        block = rematerialised(PreactBlock) if self.remat else PreactBlock
        x = x.astype(self.dtype)
        x = conv(self.width, (3, 3), padding=1, name="conv_stem")(x)
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                x = block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    projection=index == 0,
                    conv=conv,
                    norm=norm,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
        x = nn.relu(norm(name="norm_final")(x))
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        # The dense layer of the authors' code starts as TensorFlow's default.
        init = nn.initializers.glorot_uniform()
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)


PreactResNet8 = functools.partial(PreactResNet, stage_sizes=(1, 1, 1))
PreactResNet32 = functools.partial(PreactResNet, stage_sizes=(5, 5, 5))
