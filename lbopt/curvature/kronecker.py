r"""Kronecker-factored blocks: dense layers, convolutions and embeddings.

The layer's parameters are a matrix ``W [in, out]``: the kernel, with the bias as its
last row where there is one (the homogeneous coordinate: inputs get a 1).  With inputs
``a`` and gradients ``g`` at the outputs,

.. math:: F \approx A \otimes G, \qquad U = (A + \lambda_A I)^{-1}\, \nabla W\,
          (G + \lambda_G I)^{-1}

where ``F`` acts on ``W`` in row-major order.  Inputs and output gradients arrive in the
weight-sharing format ``[*stack, batch, shared, features]``.  Two ways to treat the
shared axis (Eschenhagen et al. 2023):

* ``expand``: every location is a row, :math:`A = \frac{1}{nS}\sum_{i,s} a a^\top`,
  :math:`G = \frac1n \sum_{i,s} g g^\top`.  For convolutions this is KFC (Grosse &
  Martens 2016), whose Ω is ``S A`` and whose Γ is ``G / S``.
* ``reduce``: :math:`A = \frac1n \sum_i \bar a \bar a^\top` with the mean over
  locations, :math:`G = \frac1n \sum_i \bar g \bar g^\top` with the sum (Ba et al. 2017,
  appendix).

Source: Martens & Grosse 2015; damping §6.3 there, see ``linalg.pi_damping``.
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
    """The two factors, as statistics ``[*stack, d, d]`` or packed in the state.

    Attributes:
      a: second moment of the inputs, ``A``; a diagonal ``[vocabulary]`` for embeddings.
      g: second moment of the output gradients, ``G``.
    """

    a: Any
    g: Any


class KroneckerSums(NamedTuple):
    """What a backward pass adds up.

    Attributes:
      a: Σ a aᵀ.
      g: Σ δ δᵀ of the backward signals.
      rows: how many rows ``a`` sums, ``[1, 1]``.
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


class KroneckerEigen(NamedTuple):
    """What the exactly damped inverse needs, each a ``factor.Eigenbasis``."""

    a: Any
    g: Any


def kronecker_block(
    linear: linear_maps.SharedLinear, sharing: WeightSharing, dtype: Any
) -> block.CurvatureBlock:
    """The block of a layer that is a shared linear map.

    Args:
      linear: the layer as a matrix.
      sharing: how shared locations are treated.
      dtype: type of the statistics and inverses.

    Returns:
      The curvature block.
    """
    stack = linear.stack
    d_in, d_out = linear.in_features + linear.use_bias, linear.out_features

    def sum_inputs(inputs: Array) -> tuple[Array, Array]:
        if sharing == "expand":
            total, rows = linear.input_moment(inputs, linear.use_bias, dtype)
        else:
            mean = linear.input_mean(inputs, dtype)
            rows = mean.shape[-2]
            total = linear_maps.moment_of(mean[..., None, :], linear.use_bias, dtype)
        return total, block.count_rows(rows, total)

    def sum_output_grads(output_grads: Array) -> Array:
        g = linear.output_rows(output_grads)
        if sharing == "reduce":
            g = jnp.sum(g, axis=-2, keepdims=True, dtype=dtype)
        return patches.outer_sum(g, dtype, stack=len(stack))

    def estimate(inputs: Array, output_grads: Array, due: Any) -> KroneckerSums:
        a, rows = block.when(due.a, sum_inputs, inputs)
        return KroneckerSums(a, block.when(due.g, sum_output_grads, output_grads), rows)

    def sum_squares(
        output_grads: Array, inputs: Array, a_basis: Array, g_basis: Array
    ) -> Array:
        g = linear.output_rows(output_grads)
        if sharing == "expand":
            a = linear.input_rows(inputs)
        else:
            a = linear.input_mean(inputs, dtype)[..., None, :]
            g = jnp.sum(g, axis=-2, keepdims=True, dtype=dtype)
        return eigen_moments.sum_squares(homogeneous(a), g, a_basis, g_basis)

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
            jax.ShapeDtypeStruct((1, 1), dtype),
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
) -> block.CurvatureBlock:
    r"""The functions that every pair of factors shares.

    With factored damping the inverse is
    :math:`(A + \pi \sqrt\lambda I)^{-1} \otimes (G + \tfrac1\pi \sqrt\lambda I)^{-1}`;
    the ``exact`` variant inverts :math:`A \otimes G + \lambda I` itself, in the
    eigenbases of the factors.

    Args:
      sums: as in ``CurvatureBlock``.  An A that is a vector is a diagonal.
      estimate: likewise.
      gradient: likewise.
      mean: likewise.
      statistics: likewise.
      to_matrix: from the layer's arrays to ``[*stack, in, out]``.
      from_matrix: its inverse.
      sum_squares: as in ``EigenMoments``; None where A is a diagonal.

    Returns:
      The curvature block.
    """
    shapes = jax.eval_shape(statistics, sums)
    diagonal = len(shapes.a.shape) == 1

    def variant(exact: bool, block_size: int | None) -> block.CurvatureBlock:
        a, g = (_kind(shape, block_size) for shape in shapes)

        def pack(statistics: KroneckerFactors) -> KroneckerFactors:
            packed_a = statistics.a if diagonal else factor.pack(a, statistics.a)
            return KroneckerFactors(packed_a, factor.pack(g, statistics.g))

        def precondition(
            inverses: KroneckerInverses, leaves: block.Leaves
        ) -> dict[str, Array]:
            a_inv, g_inv = inverses
            v = _right(to_matrix(leaves), g_inv, g)
            v = a_inv[..., None] * v if diagonal else factor.times(a, a_inv, v)
            return from_matrix(v)

        def precondition_exactly(
            inverses: KroneckerEigen, leaves: block.Leaves
        ) -> dict[str, Array]:
            product = eigen_moments.kronecker_eigenvalues((a, g), inverses)
            return precondition_in_bases(inverses, product, leaves)

        def precondition_in_bases(
            inverses: KroneckerEigen, eigenvalues: Array, leaves: block.Leaves
        ) -> dict[str, Array]:
            (damping, _, q_a), (_, _, q_g) = inverses
            matrix = to_matrix(leaves)
            rows, columns = matrix.shape[-2:]
            # The padding of factors that are cut has eigenvectors of its own, in any
            # place.
            all_rows, all_columns = eigenvalues.shape[-2:]
            edges = [(0, all_rows - rows), (0, all_columns - columns)]
            v = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + edges)
            v = _right(v, q_g, g)
            v = v if diagonal else factor.times(a, jnp.swapaxes(q_a, -1, -2), v)
            damping = damping[..., 0] if a.parts > 1 else damping
            v = v / (eigenvalues + damping[..., None, None])
            v = _right(v, jnp.swapaxes(q_g, -1, -2), g)
            v = v if diagonal else factor.times(a, q_a, v)
            return from_matrix(v[..., :rows, :columns])

        a_exact = factor.eigen_diagonal if diagonal else factor.eigen
        return block.CurvatureBlock(
            kind="kronecker",
            sums=sums,
            estimate=estimate,
            gradient=gradient,
            mean=mean,
            statistics=statistics,
            factors=KroneckerFactors(a_exact(a), factor.eigen(g))
            if exact
            else KroneckerFactors(a, g),
            pack=pack,
            dampings=_undivided if exact else _divided,
            inverses=KroneckerEigen if exact else KroneckerInverses,
            precondition=precondition_exactly if exact else precondition,
            variant=variant,
            moments=None
            if sum_squares is None
            else block.EigenMoments(sum_squares, precondition_in_bases),
        )

    return variant(False, None)


def _kind(shape: jax.ShapeDtypeStruct, block_size: int | None) -> factor.Factor:
    """The factor of a statistic, cut if it is larger than ``block_size``."""
    order = shape.shape[-1]
    if len(shape.shape) == 1:
        return factor.diagonal((order,))
    return factor.cut_symmetric(order, block_size)


def _right(v: Array, blocks: Array, kind: factor.Factor) -> Array:
    """``v`` times a factor's matrix."""
    if kind.parts == 1:
        return linalg.matmul(v, blocks)
    turned = linalg.block_matmul(jnp.swapaxes(blocks, -1, -2), jnp.swapaxes(v, -1, -2))
    return jnp.swapaxes(turned, -1, -2)


def _divided(means: KroneckerFactors, damping: Scalar) -> KroneckerFactors:
    return KroneckerFactors(*linalg.pi_damping(damping, means.a, means.g))


def _undivided(means: KroneckerFactors, damping: Scalar) -> KroneckerFactors:
    return KroneckerFactors(*(jnp.broadcast_to(damping, x.shape) for x in means))
