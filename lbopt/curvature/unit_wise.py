r"""Blocks of normalisation layers: 2×2 per channel, or all channels together.

A normalisation layer multiplies the normalised input :math:`\hat x` by a scale γ and
adds a bias β, per channel.  The unit-wise block keeps the 2×2 Fisher matrix of each
channel's pair and drops the coupling between channels:

.. math::
  F_c = \frac1n \sum_i
  \begin{pmatrix} \gamma_{i}'^2 & \gamma_i' \beta_i' \\
                  \gamma_i' \beta_i' & \beta_{i}'^2 \end{pmatrix}, \qquad
  \gamma_i' = \sum_s g_{i,s}\, \hat x_{i,s}, \quad \beta_i' = \sum_s g_{i,s}

and inverts it in closed form after λ is added to its diagonal.  For a layer with only
one of the two parameters the block is 1×1.  The full block keeps the whole 2c×2c matrix
and serves as the reference for the unit-wise one.

Source: Osawa et al. 2022 (SP-NGD), §4.2, Eq. 14–17.  The paper leaves implicit that the
sum over locations comes before the square, as in the authors' code.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array
from lbopt.curvature import block, factor

NormBlocks = Literal["unit_wise", "full"]


class UnitWiseFactors(NamedTuple):
    """The Fisher matrix of each channel's own parameters.

    Attributes:
      f: ``[*stack, c, k, k]`` with k = 2 (scale, bias) or 1; in the state packed as
        ``[*stack, c, k (k + 1) / 2]``, (scale², scale·bias, bias²).
    """

    f: Any


class UnitWiseSums(NamedTuple):
    """Σ of squares and products of per-example backward signals, packed."""

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
    """Σ of outer products of per-example backward signals, ``[k c, k c]``."""

    f: Any


class FullInverses(NamedTuple):
    """The damped inverses, unpacked."""

    f_inv: Any


class NormResidual(NamedTuple):
    """The residual that a normalisation layer's tap saves.

    Attributes:
      inputs: the layer's input.
      mean: the mean subtracted from it, broadcastable against the input.
      rstd: the reciprocal standard deviation, broadcastable against the input.
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
    """Builds the unit-wise block of a normalisation layer.

    Args:
      channels: number of channels, c.
      names: the layer's parameters, a part of ``("scale", "bias")`` in this order.
      batched: whether the first input axis numbers examples.
      dtype: dtype of the statistics and inverses.
      feature_axes: the input axes that number channels, counted from the end.
      shape: the parameters' shape; ``(channels,)`` if None.

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
        # Packed at once: three sums of vectors, no [batch, c, 2, 2] in between.
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
        )  # [*copies, c, k]
        # Multiplied and added as vectors: 2×2 is too small for matrix products.
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
            # A 1×1 block per channel is a diagonal.
            factor.pairs(channels) if k == 2 else factor.diagonal((channels, 1))
        ),
        pack=lambda factors: UnitWiseFactors(_pack(factors.f)),
        dampings=block.whole_damping,  # scale and bias share λ: no π
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
    """Builds the full block of a normalisation layer, which couples its channels.

    Args:
      channels: number of channels, c.
      names: the layer's parameters, a part of ``("scale", "bias")`` in this order.
      batched: whether the first input axis numbers examples.
      dtype: dtype of the statistics and inverses.
      feature_axes: the input axes that number channels, counted from the end.
      shape: the parameters' shape; ``(channels,)`` if None.

    Returns:
      The curvature block.
    """
    order = len(names) * channels
    shape = (channels,) if shape is None else shape
    per_example = _signals(channels, names, batched, dtype, feature_axes)

    def sums(*arrays: Array) -> Array:
        rows = jnp.concatenate(per_example(*arrays), -1)  # [batch, k c]
        return linalg.matmul(rows.T, rows)

    def estimate(
        residual: NormResidual, output_grads: Array, due: FullFactors
    ) -> FullSums:
        return FullSums(block.when(due.f, sums, *residual, output_grads))

    def cut(block_size: int | None) -> block.CurvatureBlock:
        kind = factor.cut_symmetric(order, block_size)

        def precondition(
            inverses: FullInverses, leaves: block.Leaves
        ) -> dict[str, Array]:
            first = leaves[names[0]]
            leading = first.shape[: first.ndim - len(shape)]
            rows = [leaves[name].reshape(*leading, channels) for name in names]
            column = jnp.concatenate(rows, -1)[..., None]  # scales before biases
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
            dampings=block.whole_damping,
            inverses=FullInverses,
            precondition=precondition,
            cut=cut,
        )

    return cut(None)


BLOCKS: dict[str, Callable[..., block.CurvatureBlock]] = {
    "unit_wise": unit_wise_block,
    "full": full_block,
}
"""The builders of normalisation layers' blocks, by kind."""


def _signals(
    channels: int,
    names: tuple[str, ...],
    batched: bool,
    dtype: Any,
    feature_axes: tuple[int, ...],
) -> Callable[..., list[Array]]:
    """Returns ``(*residual, output_grads) -> [[batch, c], ...]``, a list by name."""

    def per_example(inputs: Array, mean: Array, rstd: Array, g: Array) -> list[Array]:
        g = g.astype(dtype)
        normalised = (inputs.astype(dtype) - mean.astype(dtype)) * rstd.astype(dtype)
        terms = {"scale": g * normalised, "bias": g}
        # The axes left over are locations; they are summed before squaring (Eq. 15).
        features = [axis % g.ndim for axis in feature_axes]
        # BatchNorm(axis=0) has channels first and then no axis of examples.
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


def _unpack(
    packed: Float[Array, "*stack c packed"],
) -> Float[Array, "*stack c k k"]:
    if packed.shape[-1] == 1:
        return packed[..., None]
    # (11, 12, 22) to the rows (11, 12) and (12, 22).
    return jnp.stack([packed[..., :2], packed[..., 1:]], -2)


def _pack(full: Float[Array, "*stack c k k"]) -> Float[Array, "*stack c packed"]:
    if full.shape[-1] == 1:
        return full[..., 0]
    return jnp.stack([full[..., 0, 0], full[..., 0, 1], full[..., 1, 1]], -1)
