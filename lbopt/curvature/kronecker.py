r"""Kronecker-factored blocks: dense layers, convolutions and embeddings.

The layer's parameters are a matrix ``W [in, out]``: the kernel, with any bias as its
last row (the homogeneous coordinate: a 1 is appended to the inputs).  With inputs a and
gradients g at the outputs,

.. math:: F \approx A \otimes G, \qquad U = (A + \lambda_A I)^{-1}\, \nabla W\,
          (G + \lambda_G I)^{-1}

where F acts on W in row-major order.  Inputs and output gradients arrive in the
weight-sharing format ``[*stack, batch, shared, features]``.  The shared axis is treated
in one of two ways (Eschenhagen et al. 2023):

* ``expand``: every location is a row, :math:`A = \frac{1}{nS}\sum_{i,s} a a^\top`,
  :math:`G = \frac1n \sum_{i,s} g g^\top`.  For convolutions this is KFC (Grosse &
  Martens 2016), whose Ω is S A and whose Γ is G / S.
* ``reduce``: :math:`A = \frac1n \sum_i \bar a \bar a^\top` with the mean over
  locations, :math:`G = \frac1n \sum_i \bar g \bar g^\top` with the sum (Ba et al. 2017,
  appendix).

Source: Martens & Grosse 2015; factored damping as in §6.3, see ``linalg.pi_damping``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lbopt import linalg, patches
from lbopt._typing import Array, Scalar
from lbopt.curvature import block, eigen_moments, factor, linear_maps

WeightSharing = Literal["expand", "reduce"]


class KroneckerFactors(NamedTuple):
    """The two factors: whole as statistics ``[*stack, d, d]``, packed in the state.

    Attributes:
      a: A, the second moment of the inputs; a diagonal ``[vocabulary]`` for embeddings.
      g: G, the second moment of the output gradients.
    """

    a: Any
    g: Any


class KroneckerSums(NamedTuple):
    """Sums over the rows of a backward pass.

    Attributes:
      a: Σ a aᵀ.
      g: Σ δ δᵀ of the backward signals.
      rows: number of rows in ``a``, ``[1, 1]``.
    """

    a: Any
    g: Any
    rows: Any


class KroneckerInverses(NamedTuple):
    """The damped inverses of the two factors.

    Attributes:
      a_inv: ``(A + λ_A I)⁻¹``, ``[*stack, in, in]``; a diagonal for embeddings.
      g_inv: ``(G + λ_G I)⁻¹``, ``[*stack, out, out]``.
    """

    a_inv: Any
    g_inv: Any


def kronecker_block(
    linear: linear_maps.SharedLinear, sharing: WeightSharing, dtype: Any
) -> block.CurvatureBlock:
    """Builds the block of a layer that is a shared linear map.

    Args:
      linear: the layer as a matrix applied to rows.
      sharing: how locations that share the kernel are treated.
      dtype: dtype of the statistics and inverses.

    Returns:
      The curvature block.
    """
    stack = linear.stack
    d_in, d_out = linear.in_features + linear.use_bias, linear.out_features

    def sum_inputs(inputs: Array, *weights: Array) -> tuple[Array, Array]:
        if weights:
            each = linear.row_weights(inputs, weights[0])
            rows_of = linear.input_rows(inputs)
            if sharing == "reduce":
                rows_of, each = linear_maps.weighted_mean(rows_of, each, dtype)
            total, rows = linear_maps.weighted_moment(
                rows_of, each, linear.use_bias, dtype
            )
        elif sharing == "expand":
            # Not from rows: a convolution's moment needs no im2col buffer.
            total, rows = linear.input_moment(inputs, linear.use_bias, dtype)
        else:
            mean = linear.input_mean(inputs, dtype)
            rows = mean.shape[-2]
            total = linear_maps.moment_of(mean[..., None, :], linear.use_bias, dtype)
        return total, block.count_rows(rows, total, dtype)

    def sum_output_grads(output_grads: Array) -> Array:
        g = linear.output_rows(output_grads)
        if sharing == "reduce":
            # Σ_s a_s δ_sᵀ ≈ ā (Σ_s δ_s)ᵀ: a mean of inputs goes with a sum of signals.
            g = jnp.sum(g, axis=-2, keepdims=True, dtype=dtype)
        return patches.outer_sum(g, dtype, stack=len(stack))

    def estimate(residual: Any, output_grads: Array, due: Any) -> KroneckerSums:
        inputs, weights = block.unweighted(residual)
        operands = (inputs,) if weights is None else (inputs, weights)
        # The count belongs to A alone: G is divided by the number of terms.
        a, rows = block.when(due.a, sum_inputs, *operands)
        return KroneckerSums(a, block.when(due.g, sum_output_grads, output_grads), rows)

    def sum_squares(
        output_grads: Array, residual: Any, a_basis: Array, g_basis: Array
    ) -> Array:
        # The signals hold the weights already.
        inputs, weights = block.unweighted(residual)
        g = linear.output_rows(output_grads)
        if sharing == "expand":
            a = linear.input_rows(inputs)
        elif weights is not None:
            each = linear.row_weights(inputs, weights)
            a, _ = linear_maps.weighted_mean(linear.input_rows(inputs), each, dtype)
            g = jnp.sum(g, axis=-2, keepdims=True, dtype=dtype)
        else:
            a = linear.input_mean(inputs, dtype)[..., None, :]
            g = jnp.sum(g, axis=-2, keepdims=True, dtype=dtype)
        return eigen_moments.sum_squares(homogeneous(a), g, a_basis, g_basis)

    # Only for per-example gradients: moments append the 1 to their sums instead.
    def homogeneous(rows: Array) -> Array:
        if not linear.use_bias:
            return rows
        return jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)

    def gradient(inputs: Array, output_grads: Array) -> dict[str, Array]:
        a = homogeneous(linear.input_rows(inputs))
        g = linear.output_rows(output_grads)
        matrix = jnp.einsum("...nsi,...nso->...io", a.astype(dtype), g.astype(dtype))
        return linear_maps.split_bias(matrix, linear)

    return two_factor_block(
        sums=KroneckerSums(
            jax.ShapeDtypeStruct((*stack, d_in, d_in), dtype),
            jax.ShapeDtypeStruct((*stack, d_out, d_out), dtype),
            jax.ShapeDtypeStruct((1, 1), dtype),  # rows ride along as one more sum
        ),
        estimate=estimate,
        gradient=gradient,
        mean=lambda sums, terms: KroneckerSums(
            block.per_row(sums.a, sums.rows),
            block.per_example(sums.g, terms),
            sums.rows,
        ),
        statistics=lambda means: KroneckerFactors(means.a, means.g),
        to_matrix=lambda leaves: linear_maps.join_bias(leaves, linear),
        from_matrix=lambda matrix: linear_maps.split_bias(matrix, linear),
        sum_squares=sum_squares,
    )


def two_factor_block(
    sums: Any,
    estimate: Callable[[Any, Array, Any], Any],
    gradient: Callable[[Any, Array], dict[str, Array]],
    mean: Callable[[Any, Scalar], Any],
    statistics: Callable[[Any], KroneckerFactors],
    to_matrix: Callable[[block.Leaves], Array],
    from_matrix: Callable[[Array], dict[str, Array]],
    sum_squares: Callable[..., Array] | None = None,
    linear: bool = True,
) -> block.CurvatureBlock:
    r"""Completes a block of two factors: packing, damping and preconditioning.

    .. math:: U = (A + \pi \sqrt\lambda I)^{-1}\, \nabla W\,
              (G + \tfrac1\pi \sqrt\lambda I)^{-1}

    Args:
      sums: as in ``CurvatureBlock``; an A of one axis is a diagonal.
      estimate: as in ``CurvatureBlock``.
      gradient: as in ``CurvatureBlock``.
      mean: as in ``CurvatureBlock``.
      statistics: as in ``CurvatureBlock``.
      to_matrix: ``leaves -> [*stack, in, out]``.
      from_matrix: the inverse of ``to_matrix``.
      sum_squares: as in ``EigenMoments``; None if A is a diagonal.
      linear: as in ``CurvatureBlock``.

    Returns:
      The curvature block.
    """
    shapes = jax.eval_shape(statistics, sums)
    diagonal = len(shapes.a.shape) == 1  # an embedding's A

    def cut(block_size: int | None) -> block.CurvatureBlock:
        a, g = (_kind(shape, block_size) for shape in shapes)

        def pack(statistics: KroneckerFactors) -> KroneckerFactors:
            # A diagonal is its own packed form.
            packed_a = statistics.a if diagonal else factor.pack(a, statistics.a)
            return KroneckerFactors(packed_a, factor.pack(g, statistics.g))

        def precondition(
            inverses: KroneckerInverses, leaves: block.Leaves
        ) -> dict[str, Array]:
            a_inv, g_inv = inverses
            v = to_matrix(leaves)  # [*copies, *stack, in, out]
            v = factor.times_right(g, v, g_inv)
            v = a_inv[..., None] * v if diagonal else factor.times(a, a_inv, v)
            return from_matrix(v)

        def precondition_in_bases(
            bases: eigen_moments.Eigenbases, s: Array, leaves: block.Leaves
        ) -> dict[str, Array]:
            matrix = to_matrix(leaves)
            return from_matrix(eigen_moments.precondition((a, g), bases, s, matrix))

        return block.CurvatureBlock(
            kind="kronecker",
            sums=sums,
            estimate=estimate,
            gradient=gradient,
            mean=mean,
            statistics=statistics,
            factors=KroneckerFactors(a, g),
            pack=pack,
            dampings=_factored_damping,
            inverses=KroneckerInverses,
            precondition=precondition,
            cut=cut,
            linear=linear,
            row_weighted=True,
            moments=None
            if sum_squares is None
            else block.EigenMoments(sum_squares, precondition_in_bases),
        )

    return cut(None)


def _kind(shape: jax.ShapeDtypeStruct, block_size: int | None) -> factor.Factor:
    """Returns the kind of a factor, cut if it is larger than ``block_size``."""
    order = shape.shape[-1]
    if len(shape.shape) == 1:
        return factor.diagonal((order,))  # nothing in it to cut
    return factor.cut_symmetric(order, block_size)


def _factored_damping(means: KroneckerFactors, damping: Scalar) -> KroneckerFactors:
    return KroneckerFactors(*linalg.pi_damping(damping, means.a, means.g))
