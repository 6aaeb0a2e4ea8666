"""The block of an embedding: looked up, attended, or both (tied weights).

Looked up, an embedding ``E [vocabulary, features]`` is a dense layer on one-hot inputs;
attended (``Embed.attend``, tied output weights), it is a dense layer with kernel Eᵀ.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from lbopt import patches
from lbopt._typing import Array, Scalar
from lbopt.curvature import block, kronecker


class EmbedSums(NamedTuple):
    """Sums over the lookups and queries of a backward pass.

    Attributes:
      a: number of lookups of each word, which is Σ e eᵀ of one-hot inputs, a diagonal.
      g: Σ δ δᵀ of the looked-up vectors.
      rows: number of lookups, ``[1, 1]``.
      attended_a: Σ δ² of each word's logit, the diagonal of the full factor.
      attended_g: Σ q qᵀ of the queries.
      attended_rows: number of queries, ``[1, 1]``.
    """

    a: Any
    g: Any
    rows: Any
    attended_a: Any
    attended_g: Any
    attended_rows: Any


def embed_block(vocabulary: int, features: int, dtype: Any) -> block.CurvatureBlock:
    r"""Builds the block of an embedding that is looked up, attended or both (tied).

    The sum of the curvatures of the lookups, :math:`A_1 \otimes G_1`, and of the
    queries, :math:`A_2 \otimes G_2`, is approximated by one Kronecker product:

    .. math:: (A_1 + c A_2) \otimes (G_1 + G_2 / c), \qquad
       c^2 = \frac{\operatorname{tr} A_1 \operatorname{tr} G_2}
                  {\operatorname{tr} A_2 \operatorname{tr} G_1}

    where c minimises the trace of the cross terms.  A is kept as a diagonal.

    Args:
      vocabulary: rows of the embedding.
      features: columns of the embedding.
      dtype: dtype of the statistics and inverses.

    Returns:
      The curvature block; ``a`` is ``[vocabulary]``, ``g`` ``[features, features]``.

    Source: both approximations are our choice; no paper treats tied weights, which have
    the word as input in one use and as output in the other.
    """
    diagonal = jax.ShapeDtypeStruct((vocabulary,), dtype)
    square = jax.ShapeDtypeStruct((features, features), dtype)
    one = jax.ShapeDtypeStruct((1, 1), dtype)
    shapes = EmbedSums(diagonal, square, one, diagonal, square, one)

    def lookups(
        g: Array, words: Int[Array, "*batch"], *weights: Array
    ) -> tuple[Array, Array]:
        each = jnp.ones_like(g, shape=words.shape, dtype=dtype)
        rows: Any = words.size
        if weights:
            each = block.spread(weights[0], words.ndim) * each
            rows = jnp.sum(each)
        counts = jnp.zeros_like(g, shape=(vocabulary,), dtype=dtype)
        # Flax returns NaN for an index out of range; no word's count may rise for it.
        counts = counts.at[words.reshape(-1)].add(each.reshape(-1), mode="drop")
        return counts, block.count_rows(rows, g, dtype)

    outer = functools.partial(patches.outer_sum, dtype=dtype)

    def queries(q: Array, *weights: Array) -> tuple[Array, Array]:
        rows: Any = math.prod(q.shape[:-1])
        if weights:
            each = jnp.broadcast_to(
                block.spread(weights[0], q.ndim), (*q.shape[:-1], 1)
            )
            rows = jnp.sum(each, dtype=dtype)
            q = jnp.where(each > 0, q.astype(dtype) * jnp.sqrt(each.astype(dtype)), 0)
        return outer(q), block.count_rows(rows, q, dtype)

    def squares(g: Array) -> Array:
        leading = tuple(range(g.ndim - 1))
        return jnp.sum(jnp.square(g.astype(dtype)), leading)

    def estimate(residual: Any, output_grads: Array, due: Any) -> EmbedSums:
        inputs, weights = block.unweighted(residual)
        given = () if weights is None else (weights,)
        zeros = [
            jnp.zeros_like(output_grads, shape=s.shape, dtype=s.dtype) for s in shapes
        ]
        # Lookups have integer inputs, queries have vectors.
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            a, rows = block.when(due.a, lookups, output_grads, inputs, *given)
            return EmbedSums(
                a, block.when(due.g, outer, output_grads), rows, *zeros[3:]
            )
        g, rows = block.when(due.g, queries, inputs, *given)
        a = block.when(due.a, squares, output_grads)
        return EmbedSums(zeros[0], zeros[1], zeros[2], a, g, rows)

    def gradient(inputs: Array, output_grads: Array) -> dict[str, Array]:
        g = output_grads.astype(dtype).reshape(-1, output_grads.shape[-1])
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            zeros = jnp.zeros_like(g, shape=(vocabulary, features))
            return {"embedding": zeros.at[inputs.reshape(-1)].add(g, mode="drop")}
        queries = inputs.astype(dtype).reshape(-1, features)
        return {"embedding": jnp.einsum("rv,rd->vd", g, queries)}

    def mean(sums: EmbedSums, terms: Scalar) -> EmbedSums:
        return sums._replace(
            a=block.per_row(sums.a, sums.rows),
            g=block.per_example(sums.g, terms),
            attended_a=block.per_example(sums.attended_a, terms),
            attended_g=block.per_row(sums.attended_g, sums.attended_rows),
        )

    return kronecker.two_factor_block(
        sums=shapes,
        estimate=estimate,
        gradient=gradient,
        mean=mean,
        statistics=_sum_of_roles,
        to_matrix=lambda leaves: leaves["embedding"],
        from_matrix=lambda matrix: {"embedding": matrix},
        linear=False,  # c depends on the traces of both roles
    )


def _sum_of_roles(means: EmbedSums) -> kronecker.KroneckerFactors:
    """Approximates the sum of two Kronecker products by one."""
    a1, g1, _, a2, g2, _ = means  # diagonals [*copies, vocabulary], matrices
    trace1, trace2 = (jnp.trace(g, axis1=-2, axis2=-1) for g in (g1, g2))
    above, below = jnp.sum(a1, -1) * trace2, jnp.sum(a2, -1) * trace1
    # Without one of the roles its traces are 0, and c² is not defined; the sum is then
    # the other role's product, whatever c is.
    sound = (above > 0) & (below > 0) & jnp.isfinite(above) & jnp.isfinite(below)
    square = jnp.where(sound, above, 1) / jnp.where(sound, below, 1)
    c = jnp.sqrt(jnp.where(jnp.isfinite(square) & (square > 0), square, 1))
    return kronecker.KroneckerFactors(
        a1 + c[..., None] * a2, g1 + g2 / c[..., None, None]
    )
