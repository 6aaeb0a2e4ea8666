r"""The kinds of factors: how one packed matrix is measured, damped and inverted.

A curvature block is made of factors, and each copy of a factor (of a scanned layer, of
a convolution's groups, of the diagonal blocks that a large factor is cut into) is one
unit of inversion work.  What leaves a device is flat: the packed factor on its way to
the device that inverts it, and the inverse in a compact form on its way back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Scalar


class Factor(NamedTuple):
    """One kind of factor, as functions of a single copy.

    Factors with the same ``invert`` and sizes are inverted by one compiled program.

    Attributes:
      shape: shape of a packed copy.
      order: rows of the matrix; its trace over this is the mean eigenvalue.
      parts: diagonal blocks that the matrix is cut into; where there are several they
        are the last axis before ``shape``.
      work: multiplications of an inversion, up to a constant: order³, or the number of
        entries where the inverse is a formula.
      wire: how many numbers the inverse is on its way between devices.
      multiplicity: ``() -> [size]``, how often each packed number stands in the
        matrix: 1 for the diagonal, 2 for what a triangle stands for.
      invert: ``(packed [size], damping) -> [wire]``.
      expand: ``[*copies, wire] -> `` the inverse as it is kept, copies first.
      identity: ``dtype -> [wire]``, what leaves a gradient as it is.
    """

    shape: tuple[int, ...]
    order: int
    parts: int
    work: int
    wire: int
    multiplicity: Callable[[], Array]
    invert: Callable[[Array, Scalar], Array]
    expand: Callable[[Array], Any]
    identity: Callable[[Any], Array]

    @property
    def size(self) -> int:
        """How many numbers a packed copy has."""
        return math.prod(self.shape)


def symmetric(order: int, parts: int = 1) -> Factor:
    """A symmetric matrix, inverted by Cholesky; it travels as a triangle.

    Args:
      order: its rows.
      parts: equal diagonal blocks that it is cut into.

    Returns:
      The factor.
    """
    rows = -(-order // parts)
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
    """A symmetric matrix, cut into diagonal blocks if it is larger than ``block_size``.

    Args:
      order: its rows.
      block_size: the largest block; None for one.

    Returns:
      The factor.
    """
    return symmetric(order, 1 if block_size is None else -(-order // block_size))


def pack(kind: Factor, matrix: Float[Array, "*stack n n"]) -> Array:
    """The packed copies of a symmetric factor, ``[*stack, (parts,) size]``."""
    cut = linalg.diagonal_blocks(matrix, kind.parts) if kind.parts > 1 else matrix
    return linalg.pack(cut)


def times(kind: Factor, whole: Array, v: Float[Array, "*stack n m"]) -> Array:
    """The product of a symmetric factor's inverse, as it is kept, with ``v``."""
    return (linalg.block_matmul if kind.parts > 1 else linalg.matmul)(whole, v)


def diagonal(shape: tuple[int, ...]) -> Factor:
    """A diagonal, of any shape.

    Args:
      shape: its shape.

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
      channels: how many.

    Returns:
      The factor; its inverse in closed form.
    """
    return Factor(
        shape=(channels, 3),
        order=2 * channels,
        parts=1,
        work=channels,
        wire=3 * channels,
        multiplicity=lambda: jnp.tile(jnp.asarray([1.0, 2.0, 1.0]), channels),
        invert=_invert_pairs,
        expand=lambda wire: wire.reshape(*wire.shape[:-1], channels, 3),
        identity=lambda dtype: jnp.tile(jnp.asarray([1, 0, 1], dtype), channels),
    )


class Eigenbasis(NamedTuple):
    """A factor's eigendecomposition, with the damping that it is to be used with.

    Attributes:
      damping: λ, ``[*copies]``.
      values: eigenvalues, ``[*copies, order]``.
      vectors: eigenvectors as columns, ``[*copies, order, order]``; ``()`` for a
        diagonal.
    """

    damping: Any
    values: Any
    vectors: Any


def eigen(plain: Factor) -> Factor:
    """The eigendecomposition in the place of the inverse of a symmetric matrix.

    Args:
      plain: what ``symmetric`` returned.

    Returns:
      The factor; ``expand`` gives an ``Eigenbasis``.
    """
    n = linalg.matrix_size(plain.size)

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


def eigen_diagonal(plain: Factor) -> Factor:
    """The same for a diagonal, which is its own decomposition.

    Args:
      plain: what ``diagonal`` returned.

    Returns:
      The factor; ``expand`` gives an ``Eigenbasis``.
    """
    return plain._replace(
        wire=1 + plain.size,
        invert=_keep_diagonal,
        expand=lambda wire: Eigenbasis(wire[..., 0], wire[..., 1:], ()),
        identity=lambda dtype: jnp.ones(1 + plain.size, dtype).at[0].set(0),
    )


# Functions of the module, not closures: what is equal is compiled once.
def _invert_symmetric(packed: Float[Array, " size"], damping: Scalar) -> Array:
    return linalg.pack(linalg.damped_inverse(packed, jnp.asarray(damping)))


def _invert_diagonal(packed: Float[Array, " size"], damping: Scalar) -> Array:
    return 1 / (packed + damping)


def _invert_pairs(packed: Float[Array, " size"], damping: Scalar) -> Array:
    a, b, d = jnp.moveaxis(packed.reshape(-1, 3), -1, 0)
    # The matrix is positive semi-definite, but rounding can make the determinant of a
    # nearly singular one negative, and with it the direction of the step.
    determinant = jnp.maximum(a * d - b * b, 0) + damping * (a + d + damping)
    adjugate = jnp.stack([d + damping, -b, a + damping], -1)
    return (adjugate / determinant[:, None]).ravel()


def _decompose(packed: Float[Array, " size"], damping: Scalar) -> Array:
    values, vectors = linalg.eigendecompose(packed)
    damping = jnp.asarray(damping, values.dtype).reshape(1)
    return jnp.concatenate([damping, values, vectors.ravel()])


def _keep_diagonal(packed: Float[Array, " size"], damping: Scalar) -> Array:
    return jnp.concatenate([jnp.asarray(damping, packed.dtype).reshape(1), packed])
