"""Symmetric matrices: packed storage, damping, and damped inverses.

A symmetric ``n × n`` matrix is stored as ``n (n + 1) / 2`` numbers in LAPACK's
rectangular full packed order: with ``M = [[M₁₁, M₂₁ᵀ], [M₂₁, M₂₂]]`` split in halves,
the triangles of ``M₁₁`` and ``M₂₂`` fit together into one rectangle and ``M₂₁`` is the
rest of it.  Packing and unpacking are slices, transposes and masks, never index arrays.

Every function takes any number of leading axes (stacked matrices) and computes at the
highest matrix-product precision, because reduced precision makes inverses useless.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from lbopt._typing import Array, Scalar

_HIGHEST = lax.Precision.HIGHEST

# Up to this size the backend's own Cholesky is as fast as a loop over blocks.
_PLAIN = 256

# Rows of a pivot block, about: with fewer, most of the time goes into reading and
# writing the whole matrix for each block; with more, into the blocks' own inverses,
# which run on one thread of a CPU and whose code grows with the block on a TPU.
_BLOCK = 128


def packed_size(n: int) -> int:
    """Size of a packed symmetric ``n × n`` matrix: ``n (n + 1) / 2``."""
    return n * (n + 1) // 2


def matrix_size(packed: int) -> int:
    """Number of rows of a matrix whose packed size is given.

    Args:
      packed: the packed size, ``n (n + 1) / 2``.

    Returns:
      n.

    Raises:
      ValueError: if no ``n`` has that packed size.
    """
    # n < √(2 packed) < n + 1, so that truncation needs no exact root.
    n = int((2 * packed) ** 0.5)
    if packed_size(n) != packed:
        raise ValueError(
            f"packed={packed} must be n (n + 1) / 2 for some n; pass the last axis of "
            "an array made by lbopt.linalg.pack"
        )
    return n


def pack(matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack packed"]:
    """Packs symmetric matrices in rectangular full packed order.

    Args:
      matrix: symmetric matrices; the upper triangles of the two diagonal blocks are
        not read.

    Returns:
      ``[*stack, n (n + 1) / 2]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt import linalg
      >>> m = jnp.array([[2.0, 1.0, 0.0], [1.0, 3.0, 5.0], [0.0, 5.0, 4.0]])
      >>> linalg.pack(m).shape, bool((linalg.unpack(linalg.pack(m)) == m).all())
      ((6,), True)
    """
    n = matrix.shape[-1]
    half, even = (n + 1) // 2, 1 - n % 2
    lower = matrix[..., :half, :half]  # M₁₁
    upper = jnp.swapaxes(matrix[..., half:, half:], -1, -2)  # M₂₂ᵀ
    edges = [(0, 0)] * (matrix.ndim - 2)
    # Even n: the first triangle moves one row down; odd n: the second one column right.
    lower = jnp.pad(lower, [*edges, (even, 0), (0, 0)])
    upper = jnp.pad(upper, [*edges, (0, 1), (1 - even, 0)])
    top = jnp.where(_rows(lower) - even >= _columns(lower), lower, upper)
    rectangle = jnp.concatenate([top, matrix[..., half:, :half]], axis=-2)
    return rectangle.reshape(*matrix.shape[:-2], packed_size(n))


def _blocks(
    packed: Float[Array, "*stack packed"],
) -> tuple[
    Float[Array, "*stack half half"],
    Float[Array, "*stack rest half"],
    Float[Array, "*stack rest rest"],
]:
    """The full blocks ``M₁₁``, ``M₂₁`` and ``M₂₂`` of a packed matrix."""
    n = matrix_size(packed.shape[-1])
    half, rest, even = (n + 1) // 2, n // 2, 1 - n % 2
    rectangle = packed.reshape(*packed.shape[:-1], n + even, half)  # as in ``pack``
    top, m21 = rectangle[..., : half + even, :], rectangle[..., half + even :, :]
    lower = top[..., even:, :]
    upper = jnp.swapaxes(top[..., :rest, 1 - even :], -1, -2)
    return _from_lower(lower), m21, _from_lower(upper)


def unpack(packed: Float[Array, "*stack packed"]) -> Float[Array, "*stack n n"]:
    """Restores the full symmetric matrices from their packed form.

    Args:
      packed: packed symmetric matrices.

    Returns:
      ``[*stack, n, n]``.

    Raises:
      ValueError: if the last axis is not ``n (n + 1) / 2`` for any ``n``.
    """
    m11, m21, m22 = _blocks(packed)
    return _join(m11, m21, m22)


def packed_multiplicity(n: int) -> Float[Array, " packed"]:
    """How often each packed number occurs in the ``n × n`` matrix.

    1 on the diagonal and 2 elsewhere: the squared Frobenius norm of the matrix is
    ``Σ multiplicity · packed²``.

    Args:
      n: rows of the matrix.

    Returns:
      ``[n (n + 1) / 2]``.

    Examples:
      >>> from lbopt import linalg
      >>> linalg.packed_multiplicity(2).tolist()
      [1.0, 1.0, 2.0]
    """
    half, even = (n + 1) // 2, 1 - n % 2
    rectangle = jnp.zeros((n + even, half))
    row, column = _rows(rectangle), _columns(rectangle)
    lower = column == row - even
    upper = (column == row + 1 - even) & (row < n // 2)
    return jnp.where(lower | upper, 1.0, 2.0).ravel()


def diagonal_blocks(
    matrix: Float[Array, "*stack n n"], parts: int
) -> Float[Array, "*stack parts block block"]:
    """The diagonal blocks of square matrices, all of the same size.

    Args:
      matrix: any square matrices.
      parts: number of blocks; if they do not divide n, the matrix is padded with zeros.

    Returns:
      The blocks, of ``block = ⌈n / parts⌉`` rows.
    """
    n = matrix.shape[-1]
    size = -(-n // parts)
    edges = [(0, 0)] * (matrix.ndim - 2) + [(0, parts * size - n)] * 2
    padded = jnp.pad(matrix, edges)
    cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return jnp.stack([padded[..., cut, cut] for cut in cuts], -3)


def block_matmul(
    blocks: Float[Array, "*stack parts block block"], x: Float[Array, "*stack n m"]
) -> Float[Array, "*stack n m"]:
    """Multiplies the block-diagonal matrix of ``diagonal_blocks`` with ``x``."""
    parts, size = blocks.shape[-3:-1]
    *stack, n, m = x.shape
    padded = jnp.pad(x, [*[(0, 0)] * len(stack), (0, parts * size - n), (0, 0)])
    product = matmul(blocks, padded.reshape(*stack, parts, size, m))
    return product.reshape(*stack, parts * size, m)[..., :n, :]


def pi_damping(
    damping: Scalar, *mean_eigenvalues: Float[Array, "*stack"]
) -> tuple[Float[Array, "*stack"], ...]:
    r"""Splits the damping between Kronecker factors.

    .. math::
      \lambda_i = \pi_i\, \lambda^{1/n}, \qquad
      \pi_i = \frac{\nu_i}{(\prod_j \nu_j)^{1/n}}, \qquad
      \nu_i = \operatorname{tr} M_i / \dim M_i

    For two factors this is :math:`\pi\sqrt\lambda` and :math:`\sqrt\lambda / \pi` with
    :math:`\pi^2 = \nu_A / \nu_G`.  If some :math:`\nu_i` is not positive and finite,
    every :math:`\pi_i` is 1.

    Args:
      damping: λ, in units of the curvature.
      *mean_eigenvalues: ν of each factor.

    Returns:
      The amounts λᵢ to add to the diagonals, in the order of the factors.

    Source: Martens & Grosse 2015 §6.3 with the trace norm of Grosse & Martens 2016;
    n factors as in Ba, Grosse & Martens 2017.  The guard follows the authors' code.
    """
    n = len(mean_eigenvalues)
    sound = jnp.asarray(True)
    for nu in mean_eigenvalues:
        sound &= jnp.isfinite(nu) & (nu > 0)
    # In logarithms: products of traces overflow float32 long before their ratios do.
    logs = [jnp.log(jnp.where(sound, nu, 1.0)) for nu in mean_eigenvalues]
    mean = sum(logs) / n
    root = jnp.asarray(damping) ** (1 / n)
    return tuple(jnp.exp(log - mean) * root for log in logs)


def damped_inverse(
    packed: Float[Array, "*stack packed"], damping: Float[Array, "*stack"]
) -> Float[Array, "*stack n n"]:
    """The full inverses ``(M + λI)⁻¹`` of packed matrices.

    On a CPU stacked matrices are inverted one after another by ``recursive_inverse``,
    whose products are the fastest there; on accelerators they are inverted together by
    ``swept_inverse``, whose program is short.  A matrix that is not positive definite,
    or holds NaN, gives NaN.

    Args:
      packed: packed symmetric matrices.
      damping: λ, one for each matrix.

    Returns:
      The inverses; not packed, because they are read at every step.

    Raises:
      ValueError: if the last axis is not ``n (n + 1) / 2`` for any ``n``.
    """

    def damped(one: tuple[Array, ...]) -> Array:
        matrix, amount = unpack(one[0]), one[1]
        return matrix + amount * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def in_turn(*arrays: Array) -> Array:
        return one_by_one(lambda one: recursive_inverse(damped(one)), *arrays)

    def together(packed: Array, damping: Array) -> Array:
        flat = packed.reshape(-1, packed.shape[-1]), damping.reshape(-1)
        inverses = jax.vmap(lambda *one: swept_inverse(damped(one)))(*flat)
        return inverses.reshape(*damping.shape, *inverses.shape[1:])

    return lax.platform_dependent(packed, damping, cpu=in_turn, default=together)


def one_by_one(function: Callable[[Any], Any], *arrays: Array) -> Any:
    """Applies a function of one matrix to stacked matrices, one after another.

    Args:
      function: takes a tuple of one entry of each array; returns a tree of arrays.
      *arrays: arrays that share their leading axes; the last one has no other axes.

    Returns:
      The results, stacked along the leading axes.
    """
    # Not batched: jaxlib's batched LAPACK kernels wait for the very threads that run
    # them, and two at once deadlock on a CPU with few cores.
    leading = arrays[-1].shape
    if not leading:
        return function(arrays)
    flat = tuple(x.reshape(-1, *x.shape[len(leading) :]) for x in arrays)
    results = lax.map(function, flat)
    return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), results)


def recursive_inverse(m: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""The inverse of a positive definite matrix, by a Cholesky in halves.

    With ``M = [[M₁₁, ·], [M₂₁, M₂₂]]`` and the inverse factor ``A = L₁₁⁻¹``,

    .. math::
      L_{21} = M_{21} A^\top, \qquad
      C = \operatorname{chol}(M_{22} - L_{21} L_{21}^\top)^{-1}, \qquad
      B = -C L_{21} A

    give :math:`L^{-1} = [[A, 0], [B, C]]` and the inverse
    :math:`L^{-\top} L^{-1}` block by block, so that nearly all the work is matrix
    products.

    Args:
      m: the matrix; only its lower triangle is read.

    Returns:
      The inverse, exactly symmetric.
    """
    return _inverse_factor(m)[1]


def _inverse_factor(
    m: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """The inverse Cholesky factor ``L⁻¹`` and the inverse ``L⁻ᵀ L⁻¹``."""
    n = m.shape[-1]
    if n <= _PLAIN:
        a = _plain_factor(m)
        return a, _gram(a)
    k = n // 2
    m11, m21, m22 = m[..., :k, :k], m[..., k:, :k], m[..., k:, k:]
    a, inverse11 = _inverse_factor(m11)
    l21 = matmul(m21, jnp.swapaxes(a, -1, -2))
    c, inverse22 = _inverse_factor(m22 - matmul(l21, jnp.swapaxes(l21, -1, -2)))
    b = -matmul(c, matmul(l21, a))
    inverse21 = matmul(jnp.swapaxes(c, -1, -2), b)
    zeros = jnp.zeros_like(jnp.swapaxes(b, -1, -2))
    factor = jnp.concatenate(
        [jnp.concatenate([a, zeros], -1), jnp.concatenate([b, c], -1)], -2
    )
    return factor, _join(inverse11 + _gram(b), inverse21, inverse22)


def swept_inverse(m: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""The inverse of a positive definite matrix, by a blocked symmetric sweep.

    The sweep takes the diagonal blocks :math:`D = L L^\top` in turn as pivots.  With
    the other rows of the pivot's columns in :math:`C` and the rest of the matrix in
    :math:`Z`,

    .. math::
      \begin{pmatrix} D & C^\top \\ C & Z \end{pmatrix} \to
      \begin{pmatrix} 0 & 0 \\ 0 & Z \end{pmatrix} - Y^\top Y, \qquad
      Y = L^{-1} \begin{pmatrix} -I & C^\top \end{pmatrix},

    and after the last pivot the matrix is :math:`-M^{-1}`.  The pivots are one loop
    with one body, so that the compiled program does not grow with n.

    Args:
      m: the symmetric matrix.

    Returns:
      The inverse, exactly symmetric.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt import linalg
      >>> m = jnp.array([[3.0, 1.0], [1.0, 4.0]])
      >>> print((linalg.swept_inverse(m) * 11).round(5))
      [[ 4. -1.]
       [-1.  3.]]

    Source: Goodnight, A Tutorial on the SWEEP Operator, 1979, with blocks as pivots.
    ``Y`` in place of :math:`D^{-1} C^\top` keeps the error that of a Cholesky.
    """
    n = m.shape[-1]
    if n <= _PLAIN:
        return _gram(_plain_factor(m))
    blocks = round(n / _BLOCK)
    block = -(-n // blocks)
    size = blocks * block
    # Padded with the identity, which the inverse keeps apart.
    m = jnp.pad(m, (0, size - n))
    m = m + jnp.diag(jnp.where(jnp.arange(size) < n, 0, 1).astype(m.dtype))
    eye = jnp.eye(block, dtype=m.dtype)

    def sweep(i: Array, a: Array) -> Array:
        start = i * block
        rows = lax.dynamic_slice_in_dim(a, start, block, 0)
        pivot = lax.dynamic_slice_in_dim(rows, start, block, 1)
        rows = lax.dynamic_update_slice_in_dim(rows, -eye, start, 1)
        y = matmul(_plain_factor(pivot), rows)
        in_pivot = jnp.arange(size) // block == i
        kept = ~(in_pivot[:, None] | in_pivot[None, :])
        return jnp.where(kept, a, 0) - _gram(y)

    return _from_lower(-lax.fori_loop(0, blocks, sweep, m)[:n, :n])


def _plain_factor(m: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse Cholesky factor ``L⁻¹`` by the backend's own routines."""
    # Reads the lower triangle only; symmetrizing would be another pass over m.
    factor = lax.linalg.cholesky(m, symmetrize_input=False)
    eye = jnp.eye(m.shape[-1], dtype=m.dtype)
    return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


def eigendecompose(
    packed: Float[Array, "*stack packed"],
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n n"]]:
    """Eigenvalues, clipped at 0 and ascending, and eigenvectors as columns.

    Args:
      packed: packed positive semi-definite matrices.

    Returns:
      Eigenvalues ``[*stack, n]`` and eigenvectors ``[*stack, n, n]``.

    Raises:
      ValueError: if the last axis is not ``n (n + 1) / 2`` for any ``n``.
    """

    def decompose(one: tuple[Array, ...]) -> tuple[Array, Array]:
        vectors, values = lax.linalg.eigh(unpack(one[0]))
        # Rounding makes the zero eigenvalues of a low-rank factor slightly negative.
        return jnp.maximum(values, 0), vectors

    return one_by_one(decompose, packed, jnp.zeros(packed.shape[:-1]))


def all_finite(*arrays: Array) -> Array:
    """Whether all numbers of all arrays are finite."""
    flags = [jnp.all(jnp.isfinite(x)) for x in arrays]
    return jnp.all(jnp.stack(flags))


def matmul(x: Array, y: Array) -> Array:
    """The matrix product at the highest precision, broadcast over leading axes."""
    return jnp.matmul(x, y, precision=_HIGHEST)


def _gram(x: Array) -> Array:
    return matmul(jnp.swapaxes(x, -1, -2), x)


def _rows(x: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)


def _columns(x: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _from_lower(x: Array) -> Array:
    """The symmetric matrix with the lower triangle of ``x``."""
    lower = jnp.where(_rows(x) >= _columns(x), x, 0)
    below = jnp.where(_rows(x) > _columns(x), x, 0)
    # A sum, not a selection between x and its transpose: XLA:CPU of jaxlib 0.10
    # compiles such a selection for minutes at some sizes (512 and 1,000 among them).
    return lower + jnp.swapaxes(below, -1, -2)


def _join(m11: Array, m21: Array, m22: Array) -> Array:
    """Joins three blocks into a symmetric matrix."""
    m12 = jnp.swapaxes(m21, -1, -2)
    return jnp.concatenate(
        [jnp.concatenate([m11, m12], -1), jnp.concatenate([m21, m22], -1)], -2
    )
