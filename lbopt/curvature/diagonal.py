r"""Diagonal blocks, for parameters that belong to no recognised layer.

.. math:: f = n\, \bar g \odot \bar g, \qquad u = g / (f + \lambda)

with :math:`\bar g` the gradient of a loss that averages n terms, those of the whole
batch: gradients of micro-batches and devices are added up before they are squared.
With sampled labels,
E[f] is the diagonal of the Fisher matrix, because per-example gradients then have mean
zero; with the training labels, f also contains the squared mean gradient.

Source: the Gauss–Newton–Bartlett estimator of Liu et al. 2023 (Sophia); kfac-jax calls
it the naive diagonal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbopt._typing import Array
from lbopt.curvature import block, factor


class DiagonalFactors(NamedTuple):
    """The diagonal of the Fisher matrix, in the parameter's own shape."""

    f: Any


class DiagonalSums(NamedTuple):
    """The squared gradient of the mean loss."""

    f: Any


class DiagonalInverses(NamedTuple):
    """The damped inverse 1 / (f + λ)."""

    f_inv: Any


def diagonal_block(
    name: str, shape: tuple[int, ...], dtype: Any
) -> block.CurvatureBlock:
    """Builds the block of one parameter array.

    It needs no tap: its sum is computed from the parameter's own gradient, passed as
    ``output_grads``.

    Args:
      name: the parameter's name in its module.
      shape: the parameter's shape.
      dtype: dtype of the statistics and inverses.

    Returns:
      The curvature block.
    """

    def square(g: Array) -> Array:
        return jnp.square(g.astype(dtype))  # in float16 small squares vanish

    def estimate(
        residual: None, output_grads: Array, due: DiagonalFactors
    ) -> DiagonalSums:
        del residual
        return DiagonalSums(block.when(due.f, square, output_grads))

    return block.CurvatureBlock(
        kind="diagonal",
        sums=DiagonalSums(jax.ShapeDtypeStruct(shape, dtype)),
        estimate=estimate,
        gradient=lambda _residual, output_grads: {name: output_grads},
        mean=lambda sums, terms: DiagonalSums(block.per_example(sums.f, terms)),
        statistics=lambda means: DiagonalFactors(means.f),
        factors=DiagonalFactors(factor.diagonal(shape)),
        pack=lambda factors: factors,  # one number an entry: nothing to pack
        dampings=block.whole_damping,
        inverses=DiagonalInverses,
        precondition=lambda inverses, leaves: {name: inverses.f_inv * leaves[name]},
    )
