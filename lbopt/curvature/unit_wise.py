r"""Unit-wise blocks: scale and bias of normalisation layers.

A normalisation layer multiplies the normalised input :math:`\hat x` by a scale γ and
adds a bias β, per channel.  The block keeps, for each channel, the 2×2 Fisher matrix of
its own pair and drops what couples channels:

.. math::
  F_c = \frac1n \sum_i
  \begin{pmatrix} \gamma_{i}'^2 & \gamma_i' \beta_i' \\
                  \gamma_i' \beta_i' & \beta_{i}'^2 \end{pmatrix}, \qquad
  \gamma_i' = \sum_s g_{i,s}\, \hat x_{i,s}, \quad \beta_i' = \sum_s g_{i,s}

and inverts it in closed form after λ is added to its diagonal.  Where a layer has only
one of the two, the block is 1×1.

Source: Osawa et al. 2022 (SP-NGD), §4.2, Eq. 14–17.  The paper leaves implicit that the
sums over locations come before the square; the authors' code does that.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt._typing import Array
from lbopt.curvature import block, factor


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

    def per_example(inputs: Array, mean: Array, rstd: Array, g: Array) -> list[Array]:
        """Each example's gradient of each parameter, ``[batch, c]``."""
        g = g.astype(dtype)
        normalised = (inputs.astype(dtype) - mean) * rstd
        terms = {"scale": g * normalised, "bias": g}
        features = [axis % g.ndim for axis in feature_axes]
        examples = [0] if batched and 0 not in features else []
        locations = tuple(
            i for i in range(g.ndim) if i not in features and i not in examples
        )
        return [jnp.sum(terms[name], locations).reshape(-1, channels) for name in names]

    def sums(*arrays: Array) -> Array:
        rows = per_example(*arrays)
        pairs = [(i, j) for i in range(k) for j in range(i, k)]
        return jnp.stack([jnp.sum(rows[i] * rows[j], 0) for i, j in pairs], -1)

    def gradient(residual: NormResidual, output_grads: Array) -> dict[str, Array]:
        rows = per_example(*residual, output_grads)
        return {
            name: jnp.sum(row, 0).reshape(shape)
            for name, row in zip(names, rows, strict=True)
        }

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
        gradient=gradient,
        mean=lambda sums, terms: UnitWiseSums(block.per_example(sums.f, terms)),
        statistics=lambda means: UnitWiseFactors(_unpack(means.f)),
        factors=UnitWiseFactors(
            factor.pairs(channels) if k == 2 else factor.diagonal((channels, 1))
        ),
        pack=lambda factors: UnitWiseFactors(_pack(factors.f)),
        dampings=lambda means, damping: UnitWiseFactors(
            jnp.broadcast_to(damping, means.f.shape)
        ),
        inverses=UnitWiseInverses,
        precondition=precondition,
    )


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
