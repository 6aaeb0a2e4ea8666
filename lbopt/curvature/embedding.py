"""The block of an embedding: looked up, attended, or both (tied weights)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from lbopt import patches
from lbopt._typing import Array, Scalar
from lbopt.curvature import block, kronecker


class EmbedSums(NamedTuple):
    """What a backward pass adds up for an embedding ``E [vocabulary, features]``.

    Looked up, the embedding is a dense layer on one-hot inputs; attended
    (``Embed.attend``, tied output weights) it is one the other way round.

    Attributes:
      a: how often each word was looked up; the diagonal of Σ e eᵀ, which is exact.
      g: Σ δ δᵀ of the looked-up vectors.
      rows: how many words were looked up, ``[1, 1]``.
      attended_a: Σ δ² for each word's logit; the diagonal of the full factor.
      attended_g: Σ q qᵀ of the queries.
      attended_rows: how many queries there were, ``[1, 1]``.
    """

    a: Any
    g: Any
    rows: Any
    attended_a: Any
    attended_g: Any
    attended_rows: Any


def embed_block(vocabulary: int, features: int, dtype: Any) -> block.CurvatureBlock:
    r"""The block of an embedding, looked up, attended or both (tied).

    With lookups :math:`A_1 \otimes G_1` and attention :math:`A_2 \otimes G_2`, one
    Kronecker product stands for their sum:

    .. math:: (A_1 + c A_2) \otimes (G_1 + G_2 / c), \qquad
       c^2 = \frac{\operatorname{tr} A_1 \operatorname{tr} G_2}
                  {\operatorname{tr} A_2 \operatorname{tr} G_1}

    where c makes the trace of what is added beyond the sum least.  The vocabulary side
    is kept as a diagonal.  No paper treats tied weights of opposite roles; both choices
    are ours.

    Args:
      vocabulary: rows of the embedding.
      features: columns.
      dtype: type of the statistics and inverses.

    Returns:
      The curvature block; ``a`` is ``[vocabulary]``, ``g`` ``[features, features]``.
    """
    diagonal = jax.ShapeDtypeStruct((vocabulary,), dtype)
    square = jax.ShapeDtypeStruct((features, features), dtype)
    one = jax.ShapeDtypeStruct((1, 1), dtype)
    shapes = EmbedSums(diagonal, square, one, diagonal, square, one)

    def lookups(words: Int[Array, "*batch"], g: Array) -> tuple[Array, Array]:
        ones = jnp.ones_like(g, shape=words.size, dtype=dtype)
        counts = jnp.zeros_like(g, shape=(vocabulary,), dtype=dtype)
        # An index out of range made NaN in the forward pass; it is no word.
        counts = counts.at[words.reshape(-1)].add(ones, mode="drop")
        return counts, block.count_rows(words.size, g)

    def outer(x: Array) -> Array:
        return patches.outer_sum(x, dtype)

    def queries(q: Array) -> tuple[Array, Array]:
        return outer(q), block.count_rows(math.prod(q.shape[:-1]), q)

    def squares(g: Array) -> Array:
        leading = tuple(range(g.ndim - 1))
        return jnp.sum(jnp.square(g.astype(dtype)), leading)

    def estimate(inputs: Array, output_grads: Array, due: Any) -> EmbedSums:
        zeros = [
            jnp.zeros_like(output_grads, shape=s.shape, dtype=s.dtype) for s in shapes
        ]
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            a, rows = block.when(
                due.a, lambda g, words: lookups(words, g), output_grads, inputs
            )
            return EmbedSums(
                a, block.when(due.g, outer, output_grads), rows, *zeros[3:]
            )
        g, rows = block.when(due.g, queries, inputs)
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

    def statistics(means: EmbedSums) -> kronecker.KroneckerFactors:
        a1, g1, _, a2, g2, _ = means
        trace = lambda g: jnp.trace(g, axis1=-2, axis2=-1)  # noqa: E731
        square = (jnp.sum(a1, -1) * trace(g2)) / (jnp.sum(a2, -1) * trace(g1))
        sound = jnp.isfinite(square) & (square > 0)
        c = jnp.sqrt(jnp.where(sound, square, 1))
        return kronecker.KroneckerFactors(
            a1 + c[..., None] * a2, g1 + g2 / c[..., None, None]
        )

    return kronecker.two_factor_block(
        sums=shapes,
        estimate=estimate,
        gradient=gradient,
        mean=mean,
        statistics=statistics,
        to_matrix=lambda leaves: leaves["embedding"],
        from_matrix=lambda matrix: {"embedding": matrix},
    )
