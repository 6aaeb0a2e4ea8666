r"""Second moments of gradients in the eigenbases of a layer's two factors (EKFAC).

With the factors' eigenvectors as columns of ``U_A`` and ``U_G``, and with
:math:`\nabla W_n` the gradient of one example's loss, the curvature is approximated by
a diagonal in the basis :math:`U_A \otimes U_G`,

.. math:: F \approx (U_A \otimes U_G)\, \mathrm{diag}(s)\, (U_A \otimes U_G)^\top,
          \qquad s = \mathbb{E}_n\bigl[(U_A^\top\, \nabla W_n\, U_G)^2\bigr]

where the square is entrywise.  Of all diagonals in this basis, including the Kronecker
product's eigenvalues :math:`d_A d_G^\top`, s is the closest to F in the Frobenius norm.
It can be updated more often than the basis.

A factor cut into diagonal blocks has a block-diagonal basis, and s has extra rows or
columns for the padding of the last block.

Eigenvectors of one eigenvalue are an arbitrary basis of their space: the null space of
a factor, where inputs outnumber examples, is the case that matters.  There s would
depend on rounding, and so on the number of devices; it is averaged over such spaces
(``pooled``), which makes the curvature the same in every basis of them.

Source: George et al. 2018, §3 and Algorithm 1.  The paper treats dense layers, and
convolutions under ``expand``; with ``reduce`` an example's gradient is approximated by
:math:`\bar a \bar g^\top`, as in the factors.  Each call of a layer that is called
several times counts as an example, as in the factors.  The paper recomputes s when the
basis changes; here s is carried over (``carried``).  It leaves equal eigenvalues open.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Scalar
from lbopt.curvature import block as blocks
from lbopt.curvature import factor


class CorrectedDue(NamedTuple):
    """A layer's mask: which statistics are due, and the bases to evaluate s in.

    Attributes:
      a: whether the second moment of the inputs is due.
      g: whether the second moment of the output gradients is due.
      s: whether the second moment of the gradients in the bases is due.
      a_basis: ``U_A``, ``[*copies, *stack, in, in]``, or ``[..., parts, rows, rows]``
        for a cut factor.
      g_basis: ``U_G``, of the same form.
    """

    a: Any
    g: Any
    s: Any
    a_basis: Any
    g_basis: Any


class CorrectedStatistics(NamedTuple):
    """The statistics of a layer, or flags that say which of them are due.

    Attributes:
      a: second moment of the inputs.
      g: second moment of the output gradients.
      s: second moments of the gradients in the eigenbases, ``[*stack, in, out]``.
    """

    a: Any
    g: Any
    s: Any


class CorrectedSums(NamedTuple):
    """Sums over the rows of a backward pass.

    Attributes:
      a: Σ a aᵀ.
      g: Σ δ δᵀ of the backward signals.
      rows: number of rows in ``a``, ``[1, 1]``.
      s: Σ of the squared per-example gradients of the kernel matrix, in the bases.
    """

    a: Any
    g: Any
    rows: Any
    s: Any


class Eigenbases(NamedTuple):
    """The eigenbases of the two factors, kept instead of their inverses.

    Attributes:
      a: eigendecomposition of A, a ``factor.Eigenbasis``.
      g: eigendecomposition of G.
    """

    a: Any
    g: Any


def in_eigenbases(block: blocks.CurvatureBlock) -> blocks.CurvatureBlock:
    """Returns the block with its factors decomposed instead of inverted.

    Args:
      block: a block with ``moments``, which then precondition in its place.

    Returns:
      The block; its ``invert`` returns ``Eigenbases``.
    """
    return block._replace(
        factors=type(block.factors)(*map(factor.eigen, block.factors)),
        # λ is added to s itself, which is the curvature's own scale: no π.
        dampings=blocks.whole_damping,
        inverses=Eigenbases,
    )


def apart(due: Any) -> tuple[Any, tuple[Array, ...]]:
    """Splits a layer's mask into flags and the bases to evaluate s in, if any."""
    if not isinstance(due, CorrectedDue):
        return due, ()
    return CorrectedStatistics(due.a, due.g, due.s), (due.a_basis, due.g_basis)


def flags(due: Any) -> list[Any]:
    """Returns all flags of a mask, without its bases."""
    masks = jax.tree.leaves(due, is_leaf=lambda node: isinstance(node, CorrectedDue))
    return jax.tree.leaves([apart(mask)[0] for mask in masks])


def with_moments(
    block: blocks.CurvatureBlock, copies: int, a_basis: Array, g_basis: Array
) -> blocks.CurvatureBlock:
    """Adds the second moments s to a block's statistics.

    Args:
      block: a block of two symmetric factors.
      copies: number of leading axes of the bases that number copies of the layer.
      a_basis: ``U_A``; only its shape is used.
      g_basis: ``U_G``; only its shape is used.

    Returns:
      The block; its ``estimate`` takes ``(residual, U_A, U_G)`` of one copy where the
      original takes the residual.
    """
    moments, whole = block.moments, block.sums
    assert moments is not None
    stack = whole.a.shape[:-2]  # convolution groups
    # Rows and columns of s: all parts of a cut basis in a row, padding included.
    shape = tuple(
        math.prod(x.shape[copies + len(stack) : -1]) for x in (a_basis, g_basis)
    )

    def estimate(residual: Any, output_grads: Array, due: Any) -> CorrectedSums:
        inputs, *bases = residual  # the interceptor puts the bases beside the residual
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
    r"""Sums the squared per-example gradients in the bases.

    .. math:: \sum_i \Bigl(U_A^\top \bigl(\sum_s a_{i,s}\, \delta_{i,s}^\top\bigr)
              U_G\Bigr)^2

    Per-example gradients are formed in chunks that take no more memory than the rows.

    Args:
      inputs: rows a, including the homogeneous coordinate.
      output_grads: backward signals δ.
      a_basis: ``U_A``, ``[*stack, (parts,) rows, rows]``.
      g_basis: ``U_G``, ``[*stack, (parts,) rows, rows]``.

    Returns:
      The sum, in the dtype of the bases.
    """
    a, g = inputs.astype(a_basis.dtype), output_grads.astype(g_basis.dtype)
    *stack, batch, shared, d_in = a.shape
    d_out = g.shape[-1]
    if shared == 1:
        # (u_i · a δᵀ · v_j)² = (u_i · a)² (v_j · δ)², one product of squares.
        a, g = _turned(a[..., 0, :], a_basis), _turned(g[..., 0, :], g_basis)
        return linalg.matmul(jnp.swapaxes(a * a, -1, -2), g * g)
    # Few rows are cheaper to rotate before they are multiplied, many rows after.
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
    r"""Returns the eigenvalues :math:`d_A d_G^\top` of the Kronecker product.

    Args:
      kinds: the kinds of the two factors.
      bases: an ``Eigenbasis`` for each.

    Returns:
      The products, including the padding of cut factors.
    """
    a, g = (
        # The values of all diagonal blocks in a row.
        x.values if kind.parts == 1 else x.values.reshape(*x.values.shape[:-2], -1)
        for kind, x in zip(kinds, bases, strict=True)
    )
    return a[..., :, None] * g[..., None, :]


def pooled(
    kinds: Any, bases: Any, s: Float[Array, "*copies rows columns"]
) -> Float[Array, "*copies rows columns"]:
    r"""Averages second moments over eigenvectors that only rounding tells apart.

    .. math:: \bar s_{ij} = \operatorname{mean}_{k \sim i,\; l \sim j} s_{kl}, \qquad
              k \sim i \iff |d_k - d_i| \leq 4 \sqrt n\, \epsilon\, d_{\max}

    with the eigenvalues d of a factor (or of one diagonal block of it, of n rows) and
    the rounding ε of their dtype.  Eigenvalues of a null space are nonzero by about
    :math:`\epsilon\, d_{\max}`, so that all of it has one mean second moment.

    Args:
      kinds: the kinds of the two factors.
      bases: an ``Eigenbasis`` for each.
      s: second moments in the bases.

    Returns:
      The averages; s itself, bit for bit, where all eigenvalues are apart.
    """
    (a, g), (of_a, of_g) = kinds, bases
    s = _pooled(g, of_g.values, s)
    return _transposed(_pooled(a, of_a.values, _transposed(s)))


def _pooled(
    kind: factor.Factor, values: Array, s: Float[Array, "*copies m all"]
) -> Float[Array, "*copies m all"]:
    """Averages over the columns, which the factor's eigenvalues number."""
    values = values if kind.parts > 1 else values[..., None, :]  # [..., parts, n]
    parts, n = values.shape[-2:]
    reach = (
        4 * n**0.5 * jnp.finfo(values.dtype).eps * jnp.max(values, -1, keepdims=True)
    )
    near = jnp.abs(values[..., :, None] - values[..., None, :]) <= reach[..., None]
    near = near.astype(s.dtype)
    # Padding adds eigenvectors to the null space of the last block, and no gradients.
    padding = jnp.zeros(parts, s.dtype).at[-1].set(parts * n - kind.order)
    count = jnp.sum(near, -1) - jnp.where(values <= reach, padding[:, None], 0)
    cut = jnp.moveaxis(s.reshape(*s.shape[:-1], parts, n), -3, -2)
    # near is symmetric: column j of the product is the sum over all that are near j.
    mean = linalg.matmul(cut, near) / jnp.maximum(count, 1)[..., None, :]
    return jnp.moveaxis(mean, -2, -3).reshape(s.shape)


def precondition(
    kinds: Any,
    bases: Eigenbases,
    s: Float[Array, "*copies rows columns"],
    matrix: Float[Array, "*copies in out"],
) -> Float[Array, "*copies in out"]:
    r"""Preconditions a gradient by the corrected eigenvalues.

    .. math:: U = U_A \left[(U_A^\top\, \nabla W\, U_G) / (s + \lambda)\right] U_G^\top

    Args:
      kinds: the kinds of the two factors.
      bases: their eigenbases, and λ.
      s: second moments of the gradients in the bases.
      matrix: the gradient ∇W as a kernel matrix.

    Returns:
      The natural gradient U.
    """
    (a, g), ((damping, _, q_a), (_, _, q_g)) = kinds, bases
    rows, columns = matrix.shape[-2:]
    # The last block of a cut factor is padded, and eigh may put the padding's
    # eigenvectors anywhere among its columns.
    edges = [(0, s.shape[-2] - rows), (0, s.shape[-1] - columns)]
    v = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + edges)
    v = factor.times_right(g, v, q_g)
    v = factor.times(a, _transposed(q_a), v)
    # One λ per copy, repeated for the diagonal blocks of a cut factor.
    damping = damping[..., 0] if a.parts > 1 else damping
    v = v / (s + damping[..., None, None])
    v = factor.times_right(g, v, _transposed(q_g))
    return factor.times(a, q_a, v)[..., :rows, :columns]


def carried(
    s: Float[Array, "*copies rows columns"], before: Any, after: Any
) -> Float[Array, "*copies rows columns"]:
    r"""Carries second moments over to new bases.

    .. math:: s' = (R_A \circ R_A)^\top s\, (R_G \circ R_G), \qquad
              R_A = U_A^\top U_A'

    and :math:`R_G = U_G^\top U_G'`: the diagonal, in the new bases, of the curvature
    that is diagonal in the old bases.

    Args:
      s: second moments in the old bases.
      before: the old bases, an ``Eigenbasis`` for each factor.
      after: the new bases.

    Returns:
      s′, with the same sum as s, the trace of the curvature.
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
    """Rotates rows into a basis, with extra coordinates for a cut basis's padding."""
    if basis.ndim == rows.ndim:  # [*stack, d, d]; a cut basis has one axis more
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
    # The examples share one basis: one product of n·m rows.
    turned = _turned(rows.reshape(*stack, n * m, d), basis)
    return turned.reshape(*stack, n, m, -1)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _chunk(batch: int, most: int) -> int:
    """Returns the largest divisor of the batch that is at most ``most``, or 1."""
    return max(d for d in range(1, batch + 1) if batch % d == 0 and d <= max(most, 1))
