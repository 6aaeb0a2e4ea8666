"""Residual networks: ResNet v1.5 for photographs and the CIFAR family for small images.

One module, `ResNet`; the networks of the literature are `partial`s of it. References:

    He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2015:
        the networks; here with projection shortcuts (option B) where the shape changes.
    v1.5: a bottleneck strides in its 3x3 convolution and not in its first 1x1.
    Goyal et al., `Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_, 2017:
        the last normalisation of a block may start at scale 0 (`zero_init_residual`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Layer = Callable[..., nn.Module]

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


CPU_KEEPS_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Compiler options without which `remat` saves no memory on a CPU.

There XLA drops the barriers that JAX sets before a second evaluation, and then merges
it with the first.
"""


def rematerialised(block: type[nn.Module]) -> Callable[..., Any]:
    """Returns the constructor of a block that keeps only its input for backward.

    The backward pass evaluates the block again, and holds the activations of one block
    at a time. Names, parameters, numbers and curvature statistics stay the same. Batch
    statistics over a mapped axis are exchanged once more.
    """
    return nn.remat(block)


def conv_and_norm(
    kernel_init: nn.initializers.Initializer,
    *,
    train: bool,
    norm_momentum: float,
    dtype: Any,
    axis_name: str | None = None,
) -> tuple[Layer, Layer]:
    """Returns a convolution without bias, and a batch normalisation.

    Batch statistics are averaged over the mapped axis `axis_name`.
    """
    conv = functools.partial(
        nn.Conv,
        strides=1,
        padding=0,
        use_bias=False,
        kernel_init=kernel_init,
        dtype=dtype,
    )
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=norm_momentum,
        epsilon=1e-5,
        axis_name=axis_name,
        dtype=dtype,
    )
    return conv, norm


class Block(nn.Module):
    """Convolutions beside a shortcut.

    Attributes:
        channels: Channels of the 3x3 convolutions.
        stride: Stride of the first 3x3 convolution and of the shortcut.
        conv: Convolution without bias.
        norm: Normalisation.
        residual_scale_init: Initial scale of the last normalisation.
    """

    channels: int
    stride: int
    conv: Layer
    norm: Layer
    residual_scale_init: nn.initializers.Initializer

    def shortcut(self, x: jax.Array, channels: int) -> jax.Array:
        """Returns the block's input, or a 1x1 projection if the shape changes."""
        if x.shape[-1] == channels and self.stride == 1:
            return x
        x = self.conv(channels, (1, 1), strides=self.stride, name="conv_proj")(x)
        return self.norm(name="norm_proj")(x)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, h / stride, w / stride, channels]`."""
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.channels, (3, 3), padding=1)(y)
        y = self.norm(scale_init=self.residual_scale_init)(y)
        return nn.relu(y + self.shortcut(x, self.channels))


class BottleneckBlock(Block):
    """A 3x3 convolution between two of 1x1; the output has four times its channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, h / stride, w / stride, 4 * channels]`."""
        y = nn.relu(self.norm()(self.conv(self.channels, (1, 1))(x)))
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1)(y)
        y = nn.relu(self.norm()(y))
        y = self.conv(4 * self.channels, (1, 1))(y)
        y = self.norm(scale_init=self.residual_scale_init)(y)
        return nn.relu(y + self.shortcut(x, 4 * self.channels))


class ResNet(nn.Module):
    """A residual network.

    Attributes:
        num_classes: Number of logits.
        stage_sizes: Blocks in each stage; from stage to stage the image is halved and
            the channels are doubled.
        block: `BasicBlock` or `BottleneckBlock`.
        width: Channels of the stem and of the first stage.
        stem_reduction: What the stem divides height and width by: 4 is a 7x7
            convolution and pooling (photographs), 1 or 2 is one 3x3 convolution of
            that stride.
        zero_init_residual: Whether the last normalisation of each block starts at
            scale 0, so that each block starts as the identity.
        norm_momentum: Decay of the running statistics that evaluation normalises by;
            a run of few steps needs a smaller one.
        axis_name: Mapped axis over which batch statistics are averaged (`shard_map`,
            `pmap`). Under `jit` the batch is whole and this stays `None`.
        remat: Whether blocks are evaluated anew in the backward pass, see
            `rematerialised`.
        dtype: Type of activations; parameters and logits are float32.
    """

    num_classes: int
    stage_sizes: Sequence[int]
    block: type[BasicBlock] | type[BottleneckBlock]
    width: int = 64
    stem_reduction: Literal[1, 2, 4] = 4
    zero_init_residual: bool = False
    norm_momentum: float = 0.9
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
            _he_normal,
            train=train,
            norm_momentum=self.norm_momentum,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        x = self._stem(x.astype(self.dtype), conv, norm)
        block = rematerialised(self.block) if self.remat else self.block
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                x = block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    conv=conv,
                    norm=norm,
                    residual_scale_init=zeros if self.zero_init_residual else ones,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, name="head")(x)

    def _stem(self, x: jax.Array, conv: Layer, norm: Layer) -> jax.Array:
        if self.stem_reduction < 4:
            stride = self.stem_reduction
            x = conv(self.width, (3, 3), strides=stride, padding=1, name="conv_stem")(x)
            return nn.relu(norm(name="norm_stem")(x))
        x = conv(self.width, (7, 7), strides=2, padding=3, name="conv_stem")(x)
        x = nn.relu(norm(name="norm_stem")(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
ResNet101 = functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock)

_CifarResNet = functools.partial(ResNet, block=BasicBlock, width=16, stem_reduction=1)
ResNet8 = functools.partial(_CifarResNet, stage_sizes=(1, 1, 1), stem_reduction=2)
ResNet20 = functools.partial(_CifarResNet, stage_sizes=(3, 3, 3))
ResNet32 = functools.partial(_CifarResNet, stage_sizes=(5, 5, 5))
ResNet44 = functools.partial(_CifarResNet, stage_sizes=(7, 7, 7))
ResNet56 = functools.partial(_CifarResNet, stage_sizes=(9, 9, 9))
