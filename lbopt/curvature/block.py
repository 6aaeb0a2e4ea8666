"""Curvature blocks, and the two scalings of their statistics.

A block approximates the Fisher matrix of one layer's parameters.  It is a
``NamedTuple`` of pure functions, which pass data through four types:

1. *sums*: accumulated over the rows that one backward pass sees, and not yet divided,
   so that a per-example ``vmap``, a loop over micro-batches and several calls of a
   layer all give the same numbers;
2. *statistics*: the sums divided by :func:`per_row` or :func:`per_example` (the
   *means*), assembled into matrices;
3. *factors*: running averages of the statistics, symmetric matrices packed;
4. *inverses*: damped and unpacked.

Statistics and factors share a type, because they are the same quantity averaged over
one batch or many; sums and inverses have types of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from lbopt._typing import Array, Flag, Scalar

Sums: TypeAlias = Any
Factors: TypeAlias = Any
Inverses: TypeAlias = Any
Leaves: TypeAlias = Mapping[str, Array]
"""The arrays of one layer by their names in Flax: kernel and bias, scale and bias, …"""


class Weighted(NamedTuple):
    """The residual of a layer in a batch whose rows have weights.

    Attributes:
      inputs: the layer's input.
      weights: the weights of the positions along its leading axes, ``[batch]`` or
        ``[batch, ...]``.
    """

    inputs: Any
    weights: Array


def spread(weights: Array, ndim: int) -> Array:
    """Returns weights of leading axes with axes of size 1 for the others."""
    return jnp.expand_dims(weights, range(weights.ndim, ndim))


def unweighted(residual: Any) -> tuple[Any, Array | None]:
    """Splits a residual into the layer's input and the weights of its rows, if any."""
    return residual if isinstance(residual, Weighted) else (residual, None)


class EigenMoments(NamedTuple):
    """The functions of a block whose eigenvalues can be corrected (EKFAC).

    Attributes:
      sum_squares: ``(output_grads, residual, *bases) -> `` squared per-example
        gradients in the eigenbases, summed over examples.
      precondition: ``(bases, s, gradients) -> natural gradients`` with the corrected
        eigenvalues s.
    """

    sum_squares: Callable[..., Array]
    precondition: Callable[[Inverses, Array, Leaves], dict[str, Array]]


class CurvatureBlock(NamedTuple):
    """The curvature of one layer, as functions of its arrays.

    Every function accepts any number of leading axes: the copies of a scanned or
    vmapped layer.  Factors and inverses have one field for each factor, in one order.

    Attributes:
      kind: the approximation's name in tables: ``kronecker``, ``unit_wise``, ``full``,
        ``doubly_factored``, ``diagonal``.
      sums: shapes and dtypes of the sums of one copy of the layer.
      estimate: ``(residual, output_grads, due) -> sums``, evaluated in the backward
        pass from the residual that the tap saved and the gradients at the layer's
        outputs.  A sum that is not due is zero and costs nothing.
      gradient: ``(residual, output_grads) -> gradients`` of the layer's arrays, Σ input
        ⊗ output gradient; ``verify`` compares it with autodiff.
      mean: ``(sums, terms) -> means`` for a loss that averages ``terms`` terms; same
        type, shapes and dtypes as the sums.
      statistics: ``means -> statistics``; no arithmetic of any cost.
      factors: one ``Factor`` per statistic, in a tuple of the statistics' type.
      pack: ``statistics -> factors``, symmetric matrices as triangles.
      dampings: ``(mean eigenvalues, λ) -> `` the damping added to the diagonal of each
        factor; argument and result are tuples like ``factors``.
      inverses: the inverses' type, with one field for each factor.
      precondition: ``(inverses, gradients) -> natural gradients`` of the layer's
        arrays, leading axes first.
      cut: ``block_size -> `` the block with every factor larger than ``block_size`` cut
        into diagonal blocks; None if no factor can be cut.
      moments: the functions of the EKFAC form; None unless the block has exactly two
        factors, both symmetric.
      linear: whether ``statistics`` is linear in the means; if not, it is given means
        over all devices.
      row_weighted: whether ``estimate`` averages rows of the input, and takes a
        ``Weighted`` residual for a batch whose rows have weights.
    """

    kind: str
    sums: Sums
    estimate: Callable[[Any, Array, Any], Sums]
    gradient: Callable[[Any, Array], dict[str, Array]]
    mean: Callable[[Sums, Scalar], Sums]
    statistics: Callable[[Sums], Factors]
    factors: Any
    pack: Callable[[Factors], Factors]
    dampings: Callable[[Any, Scalar], Any]
    inverses: Callable[..., Inverses]
    precondition: Callable[[Inverses, Leaves], dict[str, Array]]
    cut: "Callable[[int | None], CurvatureBlock] | None" = None
    moments: EigenMoments | None = None
    linear: bool = True
    row_weighted: bool = False

    def factor_shapes(self, leading: tuple[int, ...]) -> Factors:
        """Returns the shapes and dtypes of the packed factors, leading axes first."""
        packed = jax.eval_shape(lambda s: self.pack(self.statistics(s)), self.sums)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), packed
        )

    def init(self, leading: tuple[int, ...]) -> tuple[Factors, Inverses]:
        """Returns zero factors and identity inverses, the state before any update."""
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), self.factor_shapes(leading)
        )
        eyes = []
        for leaf, f in zip(zeros, self.factors, strict=True):
            copies = leaf.shape[: leaf.ndim - len(f.shape)]
            eye = jnp.broadcast_to(f.identity(leaf.dtype), (*copies, f.wire))
            eyes.append(f.expand(eye))
        return zeros, self.inverses(*eyes)

    def invert(self, factors: Factors, damping: Scalar) -> Inverses:
        """Inverts the damped factors of every copy of the layer, one after another."""
        means, flat = [], []
        for leaf, f in zip(factors, self.factors, strict=True):
            copies = leaf.shape[: leaf.ndim - len(f.shape)]
            rows = leaf.reshape(*copies, f.size)
            # Multiplicity 1 marks the diagonal, whose sum is the trace.
            trace = jnp.sum(jnp.where(f.multiplicity() == 1, rows, 0), -1)
            # π compares whole factors, so the diagonal blocks of one share its trace.
            if f.parts > 1:
                trace = jnp.sum(trace, -1)
            means.append(trace / f.order)
            flat.append(rows)
        amounts = self.dampings(type(self.factors)(*means), damping)
        inverses = []
        for rows, amount, f in zip(flat, amounts, self.factors, strict=True):
            if f.parts > 1:
                amount = amount[..., None]
            amount = jnp.broadcast_to(amount, rows.shape[:-1]).astype(rows.dtype)
            inverses.append(f.expand(f.invert(rows, amount)))
        return self.inverses(*inverses)


def per_row(
    total: Float[Array, "..."], rows: Float[Array, "*stack one one"]
) -> Float[Array, "..."]:
    r"""Divides a sum over rows (examples × locations × uses) by their number.

    .. math:: A = \frac{1}{nS} \sum_{i,s} a_{i,s}\, a_{i,s}^\top

    Args:
      total: the sum; its leading axes are the copies of a lifted layer.
      rows: the number of rows summed, for each copy.

    Returns:
      The mean; zero if no row was seen.
    """
    rows = rows.reshape(*rows.shape[:-2], *[1] * (total.ndim - rows.ndim + 2))
    # A statistic that is not due has summed no rows; 0 / 0 would make it NaN.
    return total / jnp.where(rows > 0, rows, 1)


def per_example(total: Float[Array, "..."], terms: Scalar) -> Float[Array, "..."]:
    r"""Turns a sum of products of backward signals into a mean over terms.

    The backward signal of a loss that averages n terms is :math:`\delta_i = g_i / n`,
    so

    .. math:: G = \frac{1}{n} \sum_i g_i\, g_i^\top = n \sum_i \delta_i\, \delta_i^\top

    Args:
      total: the sum over examples of products of two backward signals.
      terms: n, the number of terms that the loss averages.

    Returns:
      The mean over terms of products of two gradients.
    """
    return total * terms


def when(due: Flag, make: Callable[..., Any], *operands: Array) -> Any:
    """Computes ``make(*operands)`` if due, else returns zeros of the same shapes.

    Args:
      due: a traced flag, compiled to a conditional, or a bool, resolved at trace time.
      make: a function that returns an array or a tuple of arrays.
      *operands: its arguments.

    Returns:
      The result of ``make``, or zeros.
    """

    # Like the first operand, so that under shard_map both branches of the conditional
    # vary over the same mesh axes.
    def zeros(first: Array, *_: Array):
        return jax.tree.map(
            lambda s: jnp.zeros_like(first, shape=s.shape, dtype=s.dtype),
            jax.eval_shape(make, first, *operands[1:]),
        )

    if isinstance(due, bool):
        return make(*operands) if due else zeros(*operands)
    return lax.cond(due, make, zeros, *operands)


def statistics_dtype(param_dtype: Any) -> jnp.dtype:
    """Returns the dtype of sums, factors and inverses: the parameters', ≥ float32."""
    return jnp.promote_types(param_dtype, jnp.float32)


def count_rows(rows: Scalar, like: Array, dtype: Any) -> Float[Array, "one one"]:
    """Returns a number of rows, or their total weight, as an array that is mapped.

    Args:
      rows: the number.
      like: an array of the rows, of any type; a narrow one may have no such number.
      dtype: dtype of the result, at least float32.

    Returns:
      The number, ``[1, 1]``.
    """
    # The cotangent of a vmapped tap is summed over the lanes only if it is mapped; a
    # constant is not, so the count is computed from an array that is.
    first = like[(0,) * like.ndim]
    return jnp.where(jnp.isnan(first), rows, rows).astype(dtype).reshape(1, 1)


def whole_damping(means: Factors, damping: Scalar) -> Factors:
    """Returns λ itself for every factor, as ``dampings`` of a block of one factor."""
    return type(means)(*(jnp.broadcast_to(damping, x.shape) for x in means))
