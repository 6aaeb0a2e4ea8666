"""Small networks of five families, each with kernels that start at zero.

They train in seconds on a CPU. A head, and the last kernel of a residual branch, start
at zero as in many recipes of the field, so that a network starts as a constant or as
the identity:

    Zhang et al., `Fixup <https://arxiv.org/abs/1901.09321>`_, 2019.
    Peebles & Xie, `DiT (adaLN-Zero) <https://arxiv.org/abs/2212.09748>`_, 2022.

The fifth family, residual networks with BatchNorm, is in `models/resnet.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_zeros = nn.initializers.zeros


class Mlp(nn.Module):
    """Dense layers with ReLU, and a head that starts at zero.

    Attributes:
        num_classes: Number of logits.
        widths: Units of the hidden layers.
    """

    num_classes: int
    widths: Sequence[int] = (64, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, num_classes]`."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes, kernel_init=_zeros, name="head")(x)


class TransformerBlock(nn.Module):
    """Attention and two dense layers, each a residual branch that starts at zero.

    Attributes:
        heads: Attention heads.
        causal: Whether a token sees only those before it.
        dtype: Type of activations; parameters are float32.
    """

    heads: int
    causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Maps tokens `[n, t, features]` to the same shape, with nothing beside it."""
        features = x.shape[-1]
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:-1])) if self.causal else None
        attention = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, out_kernel_init=_zeros
        )
        x = x + attention(nn.LayerNorm(dtype=self.dtype)(x), mask=mask)
        y = nn.Dense(4 * features, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        y = nn.Dense(features, dtype=self.dtype, kernel_init=_zeros)(nn.gelu(y))
        return x + y, None


class VisionTransformer(nn.Module):
    """A vision transformer whose head starts at zero.

    Attributes:
        num_classes: Number of logits.
        features: Width of a token.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Side of a patch in pixels.
    """

    num_classes: int
    features: int = 32
    depth: int = 2
    heads: int = 2
    patch: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, num_classes]`."""
        side = (self.patch, self.patch)
        x = nn.Conv(self.features, side, strides=side, name="patches")(x)
        x = x.reshape(len(x), -1, self.features)
        shape = (1, *x.shape[1:])
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        for _ in range(self.depth):
            x, _ = TransformerBlock(self.heads)(x)
        x = jnp.mean(nn.LayerNorm()(x), axis=1)
        return nn.Dense(self.num_classes, kernel_init=_zeros, name="head")(x)


class CausalTransformer(nn.Module):
    """A language model: scanned, rematerialised, with a tied embedding.

    Attributes:
        vocabulary: Number of tokens.
        features: Width of a token.
        depth: Number of blocks, which share one traced program (`nn.scan`).
        heads: Attention heads.
        dtype: Type of activations; parameters and logits are float32.
    """

    vocabulary: int
    features: int = 32
    depth: int = 2
    heads: int = 2
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[n, t]` to float32 logits of the next, `[n, t, vocabulary]`."""
        dtype = self.dtype
        embed = nn.Embed(self.vocabulary, self.features, dtype=dtype, name="embed")
        x = embed(tokens)
        shape = (1, tokens.shape[1], self.features)
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = x + positions.astype(dtype)
        blocks = nn.scan(
            nn.remat(TransformerBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = blocks(self.heads, causal=True, dtype=dtype, name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(dtype=dtype)(x)).astype(jnp.float32)


class UNet(nn.Module):
    """An encoder and a decoder with GroupNorm, joined at each scale.

    Attributes:
        num_classes: Number of logits of a pixel; their convolution starts at zero.
        widths: Channels at each scale, of half the side of the one before.
        groups: Groups of the normalisation.
    """

    num_classes: int
    widths: Sequence[int] = (8, 16)
    groups: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, h, w, num_classes]`."""

        def convolved(x: jax.Array, width: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            return nn.relu(nn.GroupNorm(self.groups)(x))

        scales = []
        for width in self.widths[:-1]:
            x = convolved(x, width)
            scales.append(x)
            x = convolved(x, width, stride=2)
        x = convolved(x, self.widths[-1])
        for width, skipped in zip(
            reversed(self.widths[:-1]), reversed(scales), strict=True
        ):
            shape = (*skipped.shape[:-1], x.shape[-1])
            x = jax.image.resize(x, shape, "nearest")
            x = convolved(jnp.concatenate([x, skipped], axis=-1), width)
        head = nn.Conv(self.num_classes, (1, 1), kernel_init=_zeros, name="head")
        return head(x)
