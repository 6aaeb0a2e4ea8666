"""Kinds of factors: how one packed matrix is measured, damped and inverted.

A curvature block consists of factors.  Each copy of a factor (of a scanned layer, a
convolution's group, a diagonal block of a factor that is cut) is inverted separately,
on one device.  Both messages between devices are flat vectors: the packed factor on its
way to the device that inverts it, and the packed inverse on its way back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Number

Damping: TypeAlias = Float[Array, "*stack"] | Number
"""The number added to the diagonal, of each matrix or of all."""


class Factor(NamedTuple):
    """One kind of factor, as functions of a single copy.

    Factors with equal ``invert`` and sizes are inverted by one compiled program.

    Attributes:
      shape: shape of a packed copy.
      order: rows of the whole matrix; trace / order is the mean eigenvalue.
      parts: number of diagonal blocks that the matrix is cut into; if above 1, they
        number the last axis before ``shape``.
      work: cost of an inversion, up to a constant: rows³, or the number of entries if
        the inverse has a closed form.
      wire: length of the packed inverse.
      multiplicity: ``() -> [size]``, how often each packed number occurs in the matrix:
        once on the diagonal, twice off it.
      invert: ``(packed [*stack, size], damping [*stack]) -> [*stack, wire]``.
      expand: ``[*copies, wire] -> `` the unpacked inverse, copies first.
      identity: ``dtype -> [wire]``, the packed inverse that leaves gradients unchanged.
    """

    shape: tuple[int, ...]
    order: int
    parts: int
    work: int
    wire: int
    multiplicity: Callable[[], Array]
    invert: Callable[[Array, Damping], Array]
    expand: Callable[[Array], Any]
    identity: Callable[[Any], Array]

    @property
    def size(self) -> int:
        """The length of a packed copy."""
        return math.prod(self.shape)


def symmetric(order: int, parts: int = 1) -> Factor:
    """A symmetric matrix, inverted by Cholesky and packed as a triangle.

    Args:
      order: rows of the matrix.
      parts: number of equal diagonal blocks that it is cut into.

    Returns:
      The factor.
    """
    rows = -(-order // parts)  # the last block is padded with zeros
    size = linalg.packed_size(rows)
    return Factor(
        shape=(size,),
        order=order,
        parts=parts,
        work=rows**3,
        wire=size,
        multiplicity=lambda: linalg.packed_multiplicity(rows),
        invert=_invert_symmetric,
        expand=linalg.unpack,
        identity=lambda dtype: linalg.pack(jnp.eye(rows, dtype=dtype)),
    )


def cut_symmetric(order: int, block_size: int | None) -> Factor:
    """A symmetric matrix, cut into diagonal blocks of at most ``block_size`` rows.

    Args:
      order: rows of the matrix.
      block_size: rows of the largest block allowed; None to leave the matrix whole.

    Returns:
      The factor.
    """
    # Of equal size: 4608 rows by 1024 take 16 % less work than four blocks and a rest.
    return symmetric(order, 1 if block_size is None else -(-order // block_size))


def pack(kind: Factor, matrix: Float[Array, "*stack n n"]) -> Array:
    """Packs the copies of a symmetric factor as ``[*stack, (parts,) size]``."""
    cut = linalg.diagonal_blocks(matrix, kind.parts) if kind.parts > 1 else matrix
    return linalg.pack(cut)


def times(kind: Factor, whole: Array, v: Float[Array, "*stack n m"]) -> Array:
    """Multiplies ``v`` by the unpacked inverse of a symmetric factor."""
    return (linalg.block_matmul if kind.parts > 1 else linalg.matmul)(whole, v)


def times_right(kind: Factor, v: Float[Array, "*stack m n"], whole: Array) -> Array:
    """Multiplies ``v`` from the right by an unpacked matrix of a symmetric factor."""
    if kind.parts == 1:
        return linalg.matmul(v, whole)
    # v M = (Mᵀ vᵀ)ᵀ; eigenvectors, unlike inverses, are not symmetric.
    product = linalg.block_matmul(jnp.swapaxes(whole, -1, -2), jnp.swapaxes(v, -1, -2))
    return jnp.swapaxes(product, -1, -2)


def diagonal(shape: tuple[int, ...]) -> Factor:
    """A diagonal matrix, stored in any shape.

    Args:
      shape: shape of the array of diagonal entries.

    Returns:
      The factor.
    """
    size = math.prod(shape)
    return Factor(
        shape=shape,
        order=size,
        parts=1,
        work=size,
        wire=size,
        multiplicity=lambda: jnp.ones(size),
        invert=_invert_diagonal,
        expand=lambda wire: wire.reshape(*wire.shape[:-1], *shape),
        identity=lambda dtype: jnp.ones(size, dtype),
    )


def pairs(channels: int) -> Factor:
    """A 2×2 matrix for each channel, packed ``[channels, 3]`` as (11, 12, 22).

    Args:
      channels: number of channels.

    Returns:
      The factor, inverted in closed form.
    """
    return Factor(
        shape=(channels, 3),
        order=2 * channels,
        parts=1,  # one program inverts all channels
        work=channels,
        wire=3 * channels,
        multiplicity=lambda: jnp.tile(jnp.asarray([1.0, 2.0, 1.0]), channels),
        invert=_invert_pairs,
        expand=lambda wire: wire.reshape(*wire.shape[:-1], channels, 3),
        identity=lambda dtype: jnp.tile(jnp.asarray([1, 0, 1], dtype), channels),
    )


class Eigenbasis(NamedTuple):
    """A factor's eigendecomposition, and the damping to use it with.

    Attributes:
      damping: λ, ``[*copies]``.
      values: eigenvalues, ``[*copies, order]``.
      vectors: eigenvectors as columns, ``[*copies, order, order]``.
    """

    damping: Any
    values: Any
    vectors: Any


def eigen(plain: Factor) -> Factor:
    """Replaces the inverse of a symmetric factor by its eigendecomposition.

    Args:
      plain: a factor made by ``symmetric``.

    Returns:
      The factor; its ``expand`` returns an ``Eigenbasis``.
    """
    n = linalg.matrix_size(plain.size)

    # On the wire: λ, n eigenvalues, n² entries of the eigenvectors.
    def expand(wire: Array) -> Eigenbasis:
        vectors = wire[..., 1 + n :].reshape(*wire.shape[:-1], n, n)
        return Eigenbasis(wire[..., 0], wire[..., 1 : 1 + n], vectors)

    return plain._replace(
        wire=1 + n + n * n,
        invert=_decompose,
        expand=expand,
        identity=lambda dtype: jnp.concatenate(
            [jnp.zeros(1, dtype), jnp.ones(n, dtype), jnp.eye(n, dtype=dtype).ravel()]
        ),
    )


# Module-level functions rather than closures: factors of one kind compare equal, and
# those of one size share a compiled program.
def _invert_symmetric(packed: Float[Array, "*stack size"], damping: Damping) -> Array:
    return linalg.pack(linalg.damped_inverse(packed, jnp.asarray(damping)))


def _invert_diagonal(packed: Float[Array, "*stack size"], damping: Damping) -> Array:
    return 1 / (packed + jnp.asarray(damping)[..., None])


def _invert_pairs(packed: Float[Array, "*stack size"], damping: Damping) -> Array:
    triples = packed.reshape(*packed.shape[:-1], -1, 3)
    a, b, d = jnp.moveaxis(triples, -1, 0)
    damping = jnp.asarray(damping)[..., None]
    # The matrix is positive semi-definite, but rounding can make the determinant of a
    # nearly singular one negative and reverse the step.
    determinant = jnp.maximum(a * d - b * b, 0) + damping * (a + d + damping)
    adjugate = jnp.stack([d + damping, -b, a + damping], -1)
    return (adjugate / determinant[..., None]).reshape(packed.shape)


def _decompose(packed: Float[Array, "*stack size"], damping: Damping) -> Array:
    values, vectors = linalg.eigendecompose(packed)
    stack = values.shape[:-1]
    damping = jnp.broadcast_to(jnp.asarray(damping, values.dtype), stack)
    flat = vectors.reshape(*stack, -1)
    return jnp.concatenate([damping[..., None], values, flat], -1)
