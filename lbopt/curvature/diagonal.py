r"""Diagonal blocks: any parameter that no recognised layer owns.

.. math:: f = n\, \bar g \odot \bar g, \qquad u = g / (f + \lambda)

with :math:`\bar g` the gradient of the loss's mean over n terms.  With sampled labels
its expectation is the diagonal of the Fisher matrix, because the per-example gradients
then have mean zero; with the training labels it also holds the squared mean gradient.

Source: the Gauss–Newton–Bartlett estimator of Liu et al. 2023 (Sophia); kfac-jax calls
the same quantity the naive diagonal.
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
    """The square of the mean loss's gradient."""

    f: Any


class DiagonalInverses(NamedTuple):
    """1 / (f + λ)."""

    f_inv: Any


def diagonal_block(
    name: str, shape: tuple[int, ...], dtype: Any
) -> block.CurvatureBlock:
    """The block of one parameter array.

    It needs no tap: what it sums is made from the parameter's own gradient, which is
    passed as ``output_grads``.

    Args:
      name: the parameter's name in its module.
      shape: its shape.
      dtype: type of the statistics and inverses.

    Returns:
      The curvature block.
    """

    def square(g: Array) -> Array:
        return jnp.square(g.astype(dtype))

    def estimate(
        residual: None, output_grads: Array, due: DiagonalFactors
    ) -> DiagonalSums:
        del residual
        return DiagonalSums(block.when(due.f, square, output_grads))

    return block.CurvatureBlock(
        kind="diagonal",
        sums=DiagonalSums(jax.ShapeDtypeStruct(shape, dtype)),
        estimate=estimate,
        gradient=lambda residual, output_grads: {name: output_grads},
        mean=lambda sums, terms: DiagonalSums(block.per_example(sums.f, terms)),
        statistics=lambda means: DiagonalFactors(means.f),
        factors=DiagonalFactors(factor.diagonal(shape)),
        pack=lambda factors: factors,
        dampings=lambda means, damping: DiagonalFactors(
            jnp.broadcast_to(damping, means.f.shape)
        ),
        inverses=DiagonalInverses,
        precondition=lambda inverses, leaves: {name: inverses.f_inv * leaves[name]},
    )
