r"""Second moments of gradients in the eigenbases of a layer's two factors (EKFAC).

With eigenvectors ``U_A`` and ``U_G`` of the factors as columns and :math:`\nabla W_n`
the gradient of one example's term, the curvature is taken for a diagonal in the basis
:math:`U_A \otimes U_G`,

.. math:: F \approx (U_A \otimes U_G)\, \mathrm{diag}(s)\, (U_A \otimes U_G)^\top,
          \qquad s = \mathbb{E}_n\bigl[(U_A^\top\, \nabla W_n\, U_G)^2\bigr]

entry by entry of the kernel matrix.  Of all diagonals in this basis, the Kronecker
product's own :math:`d_A d_G^\top` among them, it is the nearest to F in the Frobenius
norm, and it can be renewed between one basis and the next.

A factor that is cut into diagonal blocks has a basis that is cut likewise, and s has
rows or columns for the padding of its last block.

Source: George et al. 2018, §3 and Algorithm 1.  The paper has dense layers and
convolutions under ``expand``; with ``reduce`` an example's gradient is taken for
:math:`\bar a \bar g^\top`, as the factors take it.  A layer that is called several
times counts as so many examples, as for its factors.  On a change of the basis the
paper computes s anew; here it is carried over (``carried``).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Scalar
from lbopt.curvature import block as blocks


class CorrectedDue(NamedTuple):
    """What an optimizer wants of a layer: flags, and the bases that it has.

    Attributes:
      a: whether the second moment of the inputs is due.
      g: whether that of the output gradients is.
      s: whether that of the gradients in the bases is.
      a_basis: ``U_A``, ``[*copies, *stack, in, in]``, or cut ``[..., parts, rows,
        rows]``.
      g_basis: ``U_G``, likewise.
    """

    a: Any
    g: Any
    s: Any
    a_basis: Any
    g_basis: Any


class CorrectedStatistics(NamedTuple):
    """The statistics of a layer, or which of them are due.

    Attributes:
      a: second moment of the inputs.
      g: second moment of the output gradients.
      s: second moments of the gradients in the eigenbases, ``[*stack, in, out]``.
    """

    a: Any
    g: Any
    s: Any


class CorrectedSums(NamedTuple):
    """What a backward pass adds up.

    Attributes:
      a: Σ a aᵀ.
      g: Σ δ δᵀ of the backward signals.
      rows: how many rows ``a`` sums, ``[1, 1]``.
      s: Σ of the squared backward signals of the kernel matrix, in the bases.
    """

    a: Any
    g: Any
    rows: Any
    s: Any


def apart(due: Any) -> tuple[Any, tuple[Array, ...]]:
    """A layer's flags, and the bases that its mask brings, if any."""
    if not isinstance(due, CorrectedDue):
        return due, ()
    return CorrectedStatistics(due.a, due.g, due.s), (due.a_basis, due.g_basis)


def flags(due: Any) -> list[Any]:
    """All flags of a mask, without the bases that it brings."""
    is_mask = lambda node: isinstance(node, CorrectedDue)  # noqa: E731
    masks = jax.tree.leaves(due, is_leaf=is_mask)
    return jax.tree.leaves([apart(mask)[0] for mask in masks])


def with_moments(
    block: blocks.CurvatureBlock, copies: int, a_basis: Array, g_basis: Array
) -> blocks.CurvatureBlock:
    """The block whose statistics have the second moments among them.

    Args:
      block: a block of two symmetric factors.
      copies: how many leading axes of the bases number copies of the layer.
      a_basis: ``U_A``; its shape alone is used.
      g_basis: ``U_G``, likewise.

    Returns:
      The block; its ``estimate`` takes ``(residual, U_A, U_G)`` of one copy in the
      place of the residual.
    """
    moments, whole = block.moments, block.sums
    assert moments is not None
    stack = whole.a.shape[:-2]
    shape = tuple(
        math.prod(x.shape[copies + len(stack) : -1]) for x in (a_basis, g_basis)
    )

    def estimate(residual: Any, output_grads: Array, due: Any) -> CorrectedSums:
        inputs, *bases = residual
        a, g, rows = block.estimate(inputs, output_grads, due)
        s = blocks.when(due.s, moments.sum_squares, output_grads, inputs, *bases)
        return CorrectedSums(a, g, rows, s)

    def mean(sums: CorrectedSums, terms: Scalar) -> CorrectedSums:
        a, g, rows = block.mean(type(whole)(*sums[:-1]), terms)
        return CorrectedSums(a, g, rows, blocks.per_example(sums.s, terms))

    def statistics(means: CorrectedSums) -> CorrectedStatistics:
        a, g = block.statistics(type(whole)(*means[:-1]))
        return CorrectedStatistics(a, g, means.s)

    return block._replace(
        sums=CorrectedSums(
            *whole, s=jax.ShapeDtypeStruct((*stack, *shape), whole.a.dtype)
        ),
        estimate=estimate,
        gradient=lambda residual, g: block.gradient(residual[0], g),
        mean=mean,
        statistics=statistics,
    )


def sum_squares(
    inputs: Float[Array, "*stack batch shared in"],
    output_grads: Float[Array, "*stack batch shared out"],
    a_basis: Array,
    g_basis: Array,
) -> Float[Array, "*stack rows columns"]:
    r"""The squared gradients of the examples in the bases, summed over examples.

    .. math:: \sum_i \Bigl(U_A^\top \bigl(\sum_s a_{i,s}\, \delta_{i,s}^\top\bigr)
              U_G\Bigr)^2

    No more of the examples' gradients exist at once than have room where the rows lie.

    Args:
      inputs: rows a, the homogeneous coordinate among their features.
      output_grads: backward signals δ.
      a_basis: ``U_A``, ``[*stack, (parts,) rows, rows]``.
      g_basis: ``U_G``, likewise.

    Returns:
      The sum, in the type of the bases.
    """
    a, g = inputs.astype(a_basis.dtype), output_grads.astype(g_basis.dtype)
    *stack, batch, shared, d_in = a.shape
    d_out = g.shape[-1]
    if shared == 1:
        a, g = _turned(a[..., 0, :], a_basis), _turned(g[..., 0, :], g_basis)
        return linalg.matmul(jnp.swapaxes(a * a, -1, -2), g * g)
    # Few rows are turned themselves, of many the sum of their products is.
    few = shared * (d_in**2 + d_out**2) < d_in * d_out * (d_in + d_out)

    def in_bases(a: Array, g: Array) -> Array:
        if few:
            a, g = _each_turned(a, a_basis), _each_turned(g, g_basis)
            return linalg.matmul(jnp.swapaxes(a, -1, -2), g)
        gradients = _each_turned(linalg.matmul(jnp.swapaxes(a, -1, -2), g), g_basis)
        return _transposed(_each_turned(_transposed(gradients), a_basis))

    def add(total: Array, rows: tuple[Array, Array]) -> tuple[Array, None]:
        gradients = in_bases(*rows)
        return total + jnp.sum(gradients * gradients, axis=-3), None

    size = _chunk(batch, shared * (d_in + d_out) * batch // (d_in * d_out))

    def chunks(x: Array) -> Array:
        cut = x.reshape(*stack, batch // size, size, *x.shape[-2:])
        return jnp.moveaxis(cut, len(stack), 0)

    shape = jax.eval_shape(in_bases, a, g).shape
    zeros = jnp.zeros_like(g, shape=(*stack, *shape[-2:]))
    return jax.lax.scan(add, zeros, (chunks(a), chunks(g)))[0]


def kronecker_eigenvalues(
    kinds: Any, bases: Any
) -> Float[Array, "*copies rows columns"]:
    r"""The eigenvalues :math:`d_A d_G^\top` of the Kronecker product itself.

    Args:
      kinds: the factors' kinds, a pair.
      bases: an ``Eigenbasis`` for each.

    Returns:
      The products, those of the padding of cut factors among them.
    """
    a, g = (
        # The values of all parts in a row.
        x.values if kind.parts == 1 else x.values.reshape(*x.values.shape[:-2], -1)
        for kind, x in zip(kinds, bases, strict=True)
    )
    return a[..., :, None] * g[..., None, :]


def carried(
    s: Float[Array, "*copies rows columns"], before: Any, after: Any
) -> Float[Array, "*copies rows columns"]:
    r"""Second moments as they are best known in other bases.

    .. math:: s' = (R_A \circ R_A)^\top s\, (R_G \circ R_G), \qquad
              R_A = U_A^\top U_A'

    and :math:`R_G` likewise: the diagonal, in the new bases, of the curvature that is
    diagonal in the old.

    Args:
      s: the second moments in the old bases.
      before: the old bases, an ``Eigenbasis`` for each factor.
      after: the new ones.

    Returns:
      s′; the sum of its entries is that of s.
    """
    a, g = (
        linalg.matmul(_transposed(old.vectors), new.vectors)
        for old, new in zip(before, after, strict=True)
    )
    s = _turned(s, g * g)
    return _transposed(_turned(_transposed(s), a * a))


def _turned(
    rows: Float[Array, "*stack m d"], basis: Array
) -> Float[Array, "*stack m all"]:
    """Rows in a basis; of one that is cut, with the coordinates of its padding."""
    if basis.ndim == rows.ndim:
        return linalg.matmul(rows, basis)
    parts, size = basis.shape[-3:-1]
    edges = [(0, 0)] * (rows.ndim - 1) + [(0, parts * size - rows.shape[-1])]
    cut = jnp.pad(rows, edges).reshape(*rows.shape[:-1], parts, size)
    turned = linalg.matmul(jnp.swapaxes(cut, -2, -3), basis)
    return jnp.swapaxes(turned, -2, -3).reshape(*rows.shape[:-1], -1)


def _each_turned(
    rows: Float[Array, "*stack n m d"], basis: Array
) -> Float[Array, "*stack n m all"]:
    *stack, n, m, d = rows.shape
    turned = _turned(rows.reshape(*stack, n * m, d), basis)
    return turned.reshape(*stack, n, m, -1)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _chunk(batch: int, most: int) -> int:
    """The largest divisor of the batch that is not above ``most``, or 1."""
    return max(d for d in range(1, batch + 1) if batch % d == 0 and d <= max(most, 1))
