r"""Blocks of normalisation layers: scale and bias, unit by unit or all together.

A normalisation layer multiplies the normalised input :math:`\hat x` by a scale γ and
adds a bias β, per channel.  The unit-wise block keeps, for each channel, the 2×2 Fisher
matrix of its own pair and drops what couples channels:

.. math::
  F_c = \frac1n \sum_i
  \begin{pmatrix} \gamma_{i}'^2 & \gamma_i' \beta_i' \\
                  \gamma_i' \beta_i' & \beta_{i}'^2 \end{pmatrix}, \qquad
  \gamma_i' = \sum_s g_{i,s}\, \hat x_{i,s}, \quad \beta_i' = \sum_s g_{i,s}

and inverts it in closed form after λ is added to its diagonal.  Where a layer has only
one of the two, the block is 1×1.  The full block keeps the whole 2c×2c matrix, what the
unit-wise one is measured against.

Source: Osawa et al. 2022 (SP-NGD), §4.2, Eq. 14–17.  The paper leaves implicit that the
sums over locations come before the square; the authors' code does that.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Scalar
from lbopt.curvature import block, factor

NormBlocks = Literal["unit_wise", "full"]


class UnitWiseFactors(NamedTuple):
    """The Fisher matrix of each channel's own parameters.

    Attributes:
      f: ``[*stack, c, k, k]`` with k = 2 (scale, bias) or 1; packed in the state
        ``[*stack, c, k (k + 1) / 2]`` as ``(scale², scale·bias, bias²)``.
    """

    f: Any


class UnitWiseSums(NamedTuple):
    """Σ of the squares and products of each example's backward signals, packed."""

    f: Any


class UnitWiseInverses(NamedTuple):
    """The damped inverses, packed like the factors."""

    f_inv: Any


class FullFactors(NamedTuple):
    """The Fisher matrix of a whole layer.

    Attributes:
      f: ``[*stack, k c, k c]``, the scales of all channels before their biases.
    """

    f: Any


class FullSums(NamedTuple):
    """Σ of products of each example's backward signals, ``[k c, k c]``."""

    f: Any


class FullInverses(NamedTuple):
    """The damped inverses, whole."""

    f_inv: Any


class NormResidual(NamedTuple):
    """What a normalisation layer's tap saves.

    Attributes:
      inputs: the layer's input.
      mean: what was subtracted, of a shape that broadcasts against the input.
      rstd: what it was multiplied by, likewise.
    """

    inputs: Array
    mean: Array
    rstd: Array


def unit_wise_block(
    channels: int,
    names: tuple[str, ...],
    batched: bool,
    dtype: Any,
    *,
    feature_axes: tuple[int, ...] = (-1,),
    shape: tuple[int, ...] | None = None,
) -> block.CurvatureBlock:
    """The block of a normalisation layer.

    Args:
      channels: number of channels, c.
      names: the parameters it has, of ``("scale", "bias")`` in this order.
      batched: whether the first input axis numbers examples.
      dtype: type of the statistics and inverses.
      feature_axes: the input axes that number channels, counted from the end.
      shape: the parameters' own shape, ``(channels,)`` if None.

    Returns:
      The curvature block.
    """
    k = len(names)
    packed = k * (k + 1) // 2
    shape = (channels,) if shape is None else shape
    per_example = _signals(channels, names, batched, dtype, feature_axes)

    def sums(*arrays: Array) -> Array:
        rows = per_example(*arrays)
        pairs = [(i, j) for i in range(k) for j in range(i, k)]
        return jnp.stack([jnp.sum(rows[i] * rows[j], 0) for i, j in pairs], -1)

    def estimate(
        residual: NormResidual, output_grads: Array, due: UnitWiseFactors
    ) -> UnitWiseSums:
        return UnitWiseSums(block.when(due.f, sums, *residual, output_grads))

    def precondition(
        inverses: UnitWiseInverses, leaves: block.Leaves
    ) -> dict[str, Array]:
        full = _unpack(inverses.f_inv)
        leading = full.shape[:-3]
        stacked = jnp.stack(
            [leaves[name].reshape(*leading, channels) for name in names], -1
        )
        natural = jnp.sum(full * stacked[..., None, :], -1)
        return {
            name: natural[..., i].reshape(*leading, *shape)
            for i, name in enumerate(names)
        }

    return block.CurvatureBlock(
        kind="unit_wise",
        sums=UnitWiseSums(jax.ShapeDtypeStruct((channels, packed), dtype)),
        estimate=estimate,
        gradient=_gradient(per_example, names, shape),
        mean=lambda sums, terms: UnitWiseSums(block.per_example(sums.f, terms)),
        statistics=lambda means: UnitWiseFactors(_unpack(means.f)),
        factors=UnitWiseFactors(
            factor.pairs(channels) if k == 2 else factor.diagonal((channels, 1))
        ),
        pack=lambda factors: UnitWiseFactors(_pack(factors.f)),
        dampings=_undivided,
        inverses=UnitWiseInverses,
        precondition=precondition,
    )


def full_block(
    channels: int,
    names: tuple[str, ...],
    batched: bool,
    dtype: Any,
    *,
    feature_axes: tuple[int, ...] = (-1,),
    shape: tuple[int, ...] | None = None,
) -> block.CurvatureBlock:
    """The block of a normalisation layer that couples its channels.

    Args:
      channels: as for ``unit_wise_block``, and so is the rest.
      names: the parameters it has.
      batched: whether the first input axis numbers examples.
      dtype: type of the statistics and inverses.
      feature_axes: the input axes that number channels.
      shape: the parameters' own shape.

    Returns:
      The curvature block.
    """
    order = len(names) * channels
    shape = (channels,) if shape is None else shape
    per_example = _signals(channels, names, batched, dtype, feature_axes)

    def sums(*arrays: Array) -> Array:
        rows = jnp.concatenate(per_example(*arrays), -1)
        return linalg.matmul(rows.T, rows)

    def estimate(
        residual: NormResidual, output_grads: Array, due: FullFactors
    ) -> FullSums:
        return FullSums(block.when(due.f, sums, *residual, output_grads))

    def variant(exact: bool, block_size: int | None) -> block.CurvatureBlock:
        del exact  # λ is added to the curvature itself in any case
        kind = factor.cut_symmetric(order, block_size)

        def precondition(
            inverses: FullInverses, leaves: block.Leaves
        ) -> dict[str, Array]:
            first = leaves[names[0]]
            leading = first.shape[: first.ndim - len(shape)]
            rows = [leaves[name].reshape(*leading, channels) for name in names]
            column = jnp.concatenate(rows, -1)[..., None]
            natural = factor.times(kind, inverses.f_inv, column)[..., 0]
            parts = jnp.split(natural, len(names), -1)
            return {
                name: part.reshape(*leading, *shape)
                for name, part in zip(names, parts, strict=True)
            }

        return block.CurvatureBlock(
            kind="full",
            sums=FullSums(jax.ShapeDtypeStruct((order, order), dtype)),
            estimate=estimate,
            gradient=_gradient(per_example, names, shape),
            mean=lambda sums, terms: FullSums(block.per_example(sums.f, terms)),
            statistics=lambda means: FullFactors(means.f),
            factors=FullFactors(kind),
            pack=lambda factors: FullFactors(factor.pack(kind, factors.f)),
            dampings=_undivided,
            inverses=FullInverses,
            precondition=precondition,
            variant=variant,
        )

    return variant(False, None)


BLOCKS: dict[str, Callable[..., block.CurvatureBlock]] = {
    "unit_wise": unit_wise_block,
    "full": full_block,
}
"""The blocks of normalisation layers by their kinds."""


def _signals(
    channels: int,
    names: tuple[str, ...],
    batched: bool,
    dtype: Any,
    feature_axes: tuple[int, ...],
) -> Callable[..., list[Array]]:
    """``(*residual, output_grads) -> `` each example's gradients, ``[batch, c]``."""

    def per_example(inputs: Array, mean: Array, rstd: Array, g: Array) -> list[Array]:
        g = g.astype(dtype)
        normalised = (inputs.astype(dtype) - mean.astype(dtype)) * rstd.astype(dtype)
        terms = {"scale": g * normalised, "bias": g}
        features = [axis % g.ndim for axis in feature_axes]
        examples = [0] if batched and 0 not in features else []
        locations = tuple(
            i for i in range(g.ndim) if i not in features and i not in examples
        )
        return [jnp.sum(terms[name], locations).reshape(-1, channels) for name in names]

    return per_example


def _gradient(
    per_example: Callable[..., list[Array]],
    names: tuple[str, ...],
    shape: tuple[int, ...],
) -> Callable[[NormResidual, Array], dict[str, Array]]:
    def gradient(residual: NormResidual, output_grads: Array) -> dict[str, Array]:
        rows = per_example(*residual, output_grads)
        return {
            name: jnp.sum(row, 0).reshape(shape)
            for name, row in zip(names, rows, strict=True)
        }

    return gradient


def _undivided(means: Any, damping: Scalar) -> Any:
    """The whole damping for the one factor."""
    return type(means)(jnp.broadcast_to(damping, means.f.shape))


def _unpack(
    packed: Float[Array, "*stack c packed"],
) -> Float[Array, "*stack c k k"]:
    if packed.shape[-1] == 1:
        return packed[..., None]
    return jnp.stack([packed[..., :2], packed[..., 1:]], -2)


def _pack(full: Float[Array, "*stack c k k"]) -> Float[Array, "*stack c packed"]:
    if full.shape[-1] == 1:
        return full[..., 0]
    return jnp.stack([full[..., 0, 0], full[..., 0, 1], full[..., 1, 1]], -1)
