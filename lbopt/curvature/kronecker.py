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
from lbopt.curvature import block, linear_maps

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
    """What the exactly damped inverse needs.

    Attributes:
      a_vectors: eigenvectors of ``A`` as columns; ``()`` where it is a diagonal.
      g_vectors: eigenvectors of ``G`` as columns.
      reciprocal: 1 / (αᵢ γⱼ + λ) of their eigenvalues, ``[*stack, in, out]``.
    """

    a_vectors: Any
    g_vectors: Any
    reciprocal: Any


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

    def gradient(inputs: Array, output_grads: Array) -> dict[str, Array]:
        a, g = linear.input_rows(inputs), linear.output_rows(output_grads)
        if linear.use_bias:
            a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
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
    )


def two_factor_block(
    sums: KroneckerSums,
    estimate: Callable[[Any, Array, Any], Any],
    gradient: Callable[[Any, Array], dict[str, Array]],
    mean: Callable[[Any, Scalar], Any],
    statistics: Callable[[Any], KroneckerFactors],
    to_matrix: Callable[[block.Leaves], Array],
    from_matrix: Callable[[Array], dict[str, Array]],
) -> block.CurvatureBlock:
    r"""The functions that every pair of factors shares.

    With factored damping the inverse is
    :math:`(A + \pi \sqrt\lambda I)^{-1} \otimes (G + \tfrac1\pi \sqrt\lambda I)^{-1}`;
    the block's ``exact`` variant inverts :math:`A \otimes G + \lambda I` itself, in the
    eigenbases of the factors.

    Args:
      sums: shapes of ``a`` and ``g``; a vector is a diagonal.
      estimate: as in ``CurvatureBlock``.
      gradient: likewise.
      mean: likewise.
      statistics: likewise.
      to_matrix: from the layer's arrays to ``[*stack, in, out]``.
      from_matrix: its inverse.

    Returns:
      The curvature block.
    """
    shapes = KroneckerFactors(sums.a, sums.g)
    diagonal = len(shapes.a.shape) == 1

    def pack(statistics: KroneckerFactors) -> KroneckerFactors:
        a, g = statistics
        return KroneckerFactors(a if diagonal else linalg.pack(a), linalg.pack(g))

    def zeros(leading: tuple[int, ...]) -> KroneckerFactors:
        packed = jax.eval_shape(pack, shapes)
        return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), packed)

    def init(leading: tuple[int, ...]) -> tuple[KroneckerFactors, KroneckerInverses]:
        a = jnp.ones(shapes.a.shape, shapes.a.dtype) if diagonal else _eye(shapes.a)
        inverses = KroneckerInverses(a, _eye(shapes.g))
        return zeros(leading), _copies(inverses, leading)

    def precondition(
        inverses: KroneckerInverses, leaves: block.Leaves
    ) -> dict[str, Array]:
        a_inv, g_inv = inverses
        v = linalg.matmul(to_matrix(leaves), g_inv)
        v = a_inv[..., None] * v if diagonal else linalg.matmul(a_inv, v)
        return from_matrix(v)

    def init_exact(leading: tuple[int, ...]) -> tuple[KroneckerFactors, KroneckerEigen]:
        shape = (*shapes.g.shape[:-2], shapes.a.shape[-1], shapes.g.shape[-1])
        a = () if diagonal else _eye(shapes.a)
        inverses = KroneckerEigen(a, _eye(shapes.g), jnp.ones(shape, shapes.a.dtype))
        return zeros(leading), _copies(inverses, leading)

    def precondition_exactly(
        inverses: KroneckerEigen, leaves: block.Leaves
    ) -> dict[str, Array]:
        q_a, q_g, reciprocal = inverses
        v = linalg.matmul(to_matrix(leaves), q_g)
        if not diagonal:
            v = linalg.matmul(jnp.swapaxes(q_a, -1, -2), v)
        v = linalg.matmul(reciprocal * v, jnp.swapaxes(q_g, -1, -2))
        return from_matrix(v if diagonal else linalg.matmul(q_a, v))

    # Functions of the module, not closures: layers of equal shapes whose blocks have
    # the same one are inverted together.
    invert, invert_exactly = (
        (_invert_diagonal_a, _invert_diagonal_a_exactly)
        if diagonal
        else (_invert, _invert_exactly)
    )
    factored = block.CurvatureBlock(
        kind="kronecker",
        sums=sums,
        estimate=estimate,
        gradient=gradient,
        mean=mean,
        statistics=statistics,
        pack=pack,
        init=init,
        invert=invert,
        precondition=precondition,
    )
    exact = factored._replace(
        init=init_exact, invert=invert_exactly, precondition=precondition_exactly
    )
    return factored._replace(exact=exact)


def _invert(factors: KroneckerFactors, damping: Scalar) -> KroneckerInverses:
    a, g = factors
    a_damping, g_damping = linalg.pi_damping(
        damping, _mean_eigenvalue(a), _mean_eigenvalue(g)
    )
    return KroneckerInverses(
        linalg.damped_inverse(a, a_damping), linalg.damped_inverse(g, g_damping)
    )


def _invert_diagonal_a(factors: KroneckerFactors, damping: Scalar) -> KroneckerInverses:
    a, g = factors
    a_damping, g_damping = linalg.pi_damping(
        damping, jnp.mean(a, -1), _mean_eigenvalue(g)
    )
    return KroneckerInverses(
        1 / (a + a_damping[..., None]), linalg.damped_inverse(g, g_damping)
    )


def _invert_exactly(factors: KroneckerFactors, damping: Scalar) -> KroneckerEigen:
    a_values, a_vectors = linalg.eigendecompose(factors.a)
    g_values, g_vectors = linalg.eigendecompose(factors.g)
    product = a_values[..., :, None] * g_values[..., None, :]
    return KroneckerEigen(a_vectors, g_vectors, 1 / (product + damping))


def _invert_diagonal_a_exactly(
    factors: KroneckerFactors, damping: Scalar
) -> KroneckerEigen:
    g_values, g_vectors = linalg.eigendecompose(factors.g)
    product = factors.a[..., :, None] * g_values[..., None, :]
    return KroneckerEigen((), g_vectors, 1 / (product + damping))


def _mean_eigenvalue(packed: Array) -> Array:
    return jnp.mean(linalg.packed_diagonal(packed), -1)


def _eye(s: jax.ShapeDtypeStruct) -> Array:
    return jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)


def _copies(tree: Any, leading: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*leading, *x.shape)), tree)
