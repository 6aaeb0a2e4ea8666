"""What a curvature block is, and the two scalings of its statistics.

A block is the approximation of the Fisher matrix for the parameters of one layer: a
``NamedTuple`` of pure functions.  Its data pass through four types:

1. *sums*, what one backward pass adds up over the rows it sees; raw, so that
   per-example ``vmap``, loops over micro-batches and several calls of a layer give the
   same numbers;
2. *statistics*, the sums divided by :func:`per_row` or :func:`per_example`, which
   *means* is the name of before they are put together;
3. *factors*, the running average of the statistics, symmetric matrices packed;
4. *inverses*, damped, whole.

Statistics and factors share a type (the same quantity at another time); sums and
inverses have their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Due, Scalar

Sums: TypeAlias = Any
Factors: TypeAlias = Any
Inverses: TypeAlias = Any
Leaves: TypeAlias = Mapping[str, Array]
"""The arrays of one layer by their names in Flax: kernel and bias, scale and bias, …"""


class EigenMoments(NamedTuple):
    """A block's curvature as a diagonal in its eigenbases (``eigen_moments``).

    Attributes:
      sum_squares: ``(output_grads, residual, *bases) -> `` squared gradients in the
        bases, summed over examples.
      precondition: ``(inverses, s, gradients) -> natural gradients`` with the
        eigenvalues s in the place of those of the inverses, which are eigenbases.
    """

    sum_squares: Callable[..., Array]
    precondition: Callable[[Inverses, Array, Leaves], dict[str, Array]]


class CurvatureBlock(NamedTuple):
    """The curvature of one layer, as functions of its arrays.

    All functions take any number of leading axes: the copies of a scanned or vmapped
    layer.  The fields of the factors' and the inverses' types correspond.

    Attributes:
      kind: the name of the approximation, for tables: ``kronecker``, ``unit_wise``,
        ``full``, ``doubly_factored``, ``diagonal``.
      sums: shapes and dtypes of the sums of one copy of the layer.
      estimate: ``(residual, output_grads, due) -> sums``.  What the layer's backward
        pass adds: from what the tap saved in the forward pass and the gradients at the
        layer's outputs.  A sum that is not due is zero and costs nothing.
      gradient: ``(residual, output_grads) -> gradients`` of the layer's arrays: the
        sum of input ⊗ output gradient, which must equal what autodiff finds.
      mean: ``(sums, terms) -> means`` of a loss that averages ``terms`` terms: the sums
        divided, of the same type, shapes and dtypes.
      statistics: ``means -> statistics``, at no cost.
      factors: the kind of each factor, in a tuple of the statistics' type.
      pack: ``statistics -> factors``, symmetric matrices as triangles.
      dampings: ``(mean eigenvalues, λ) -> `` what is added to the diagonal of each
        factor, both tuples like ``factors``.
      inverses: the type of the inverses, a tuple with a field for each factor.
      precondition: ``(inverses, gradients) -> natural gradients`` of the layer's
        arrays, leading axes first.
      variant: ``(exact, block_size) -> block``: with λI added to the curvature itself,
        where ``dampings`` adds a part of it to each factor; and with factors that are
        larger than ``block_size`` cut into diagonal blocks.  None where neither makes
        a difference.
      moments: the eigenvalue-corrected form of a product of two symmetric factors;
        None for all other blocks.
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
    variant: "Callable[[bool, int | None], CurvatureBlock] | None" = None
    moments: EigenMoments | None = None

    def factor_shapes(self, leading: tuple[int, ...]) -> Factors:
        """Shapes and dtypes of the factors, leading axes first."""
        packed = jax.eval_shape(lambda s: self.pack(self.statistics(s)), self.sums)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype), packed
        )

    def init(self, leading: tuple[int, ...]) -> tuple[Factors, Inverses]:
        """Factors and inverses before the first statistic: zero and the identity."""
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
        """The inverses of one layer's factors, damped; its copies in turn."""
        means, flat = [], []
        for leaf, f in zip(factors, self.factors, strict=True):
            copies = leaf.shape[: leaf.ndim - len(f.shape)]
            rows = leaf.reshape(*copies, f.size)
            trace = jnp.sum(jnp.where(f.multiplicity() == 1, rows, 0), -1)
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
            wire = linalg.one_by_one(lambda one, f=f: f.invert(*one), rows, amount)
            inverses.append(f.expand(wire))
        return self.inverses(*inverses)


def per_row(
    total: Float[Array, "..."], rows: Float[Array, "*stack one one"]
) -> Float[Array, "..."]:
    r"""A sum over rows (examples × locations × uses) as their mean.

    .. math:: A = \frac{1}{nS} \sum_{i,s} a_{i,s}\, a_{i,s}^\top

    Args:
      total: the sum, of any shape that starts with the copies of a lifted layer.
      rows: how many rows it sums.

    Returns:
      The mean; zero where no row was seen.
    """
    rows = rows.reshape(*rows.shape[:-2], *[1] * (total.ndim - rows.ndim + 2))
    return total / jnp.maximum(rows, 1)


def per_example(total: Float[Array, "..."], terms: Scalar) -> Float[Array, "..."]:
    r"""A sum of squared backward signals of a mean loss as a mean over its terms.

    The backward signal of a loss that averages n terms is :math:`\delta_i = g_i / n`,
    so

    .. math:: G = \frac{1}{n} \sum_i g_i\, g_i^\top = n \sum_i \delta_i\, \delta_i^\top

    Args:
      total: the sum over examples of products of two backward signals.
      terms: n.

    Returns:
      The mean over terms of products of two gradients.
    """
    return total * terms


def when(due: Due, make: Callable[..., Any], *operands: Array) -> Any:
    """``make(*operands)`` if it is due, else zeros of its shape; only one is computed.

    The zeros are made like the first operand, so that they vary over the same mesh
    axes under ``shard_map``.

    Args:
      due: a traced flag, which becomes a conditional, or a bool, which does not.
      make: makes an array or several.
      *operands: its arguments.

    Returns:
      What ``make`` returns, or zeros.
    """

    def zeros(first: Array, *_: Array):
        return jax.tree.map(
            lambda s: jnp.zeros_like(first, shape=s.shape, dtype=s.dtype),
            jax.eval_shape(make, first, *operands[1:]),
        )

    if isinstance(due, bool):
        return make(*operands) if due else zeros(*operands)
    return lax.cond(due, make, zeros, *operands)


def statistics_dtype(param_dtype: Any) -> jnp.dtype:
    """The type of sums, factors and inverses: that of the parameters, ≥ float32."""
    return jnp.promote_types(param_dtype, jnp.float32)


def count_rows(rows: int, like: Array) -> Array:
    """``rows`` as ``[1, 1]``, tied to data."""
    # A constant would not be summed over the lanes of an enclosing vmap, so the number
    # is made to depend on an array that is mapped whenever the layer is.
    first = like[(0,) * like.ndim]
    return jnp.where(jnp.isnan(first), rows, rows).astype(like.dtype).reshape(1, 1)
