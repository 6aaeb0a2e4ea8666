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

from lbopt._typing import Array, Due, Scalar

Sums: TypeAlias = Any
Factors: TypeAlias = Any
Inverses: TypeAlias = Any
Leaves: TypeAlias = Mapping[str, Array]
"""The arrays of one layer by their names in Flax: kernel and bias, scale and bias, …"""


class CurvatureBlock(NamedTuple):
    """The curvature of one layer, as functions of its arrays.

    All functions take any number of leading axes: the copies of a scanned or vmapped
    layer.

    Attributes:
      kind: the name of the approximation, for tables: ``kronecker``, ``unit_wise``,
        ``diagonal``.
      sums: shapes and dtypes of the sums of one copy of the layer.
      estimate: ``(residual, output_grads, due) -> sums``.  What the layer's backward
        pass adds: from what the tap saved in the forward pass and the gradients at the
        layer's outputs.  A sum that is not due is zero and costs nothing.
      gradient: ``(residual, output_grads) -> gradients`` of the layer's arrays: the
        sum of input ⊗ output gradient, which must equal what autodiff finds.
      mean: ``(sums, terms) -> means`` of a loss that averages ``terms`` terms: the sums
        divided, of the same type, shapes and dtypes.
      statistics: ``means -> statistics``, at no cost.
      pack: ``statistics -> factors``, symmetric matrices as triangles.
      init: ``leading axes -> (factors, inverses)`` before the first statistic:
        zero and the identity.
      invert: ``(factors, damping) -> inverses``.  Layers whose factors have equal
        shapes and whose blocks have the same function here are inverted together.
      precondition: ``(inverses, gradients) -> natural gradients`` of the layer's
        arrays, leading axes first.
      exact: the block with λI added to the curvature itself, where ``invert`` adds a
        part of it to each factor; None where there is no difference.
    """

    kind: str
    sums: Sums
    estimate: Callable[[Any, Array, Any], Sums]
    gradient: Callable[[Any, Array], dict[str, Array]]
    mean: Callable[[Sums, Scalar], Sums]
    statistics: Callable[[Sums], Factors]
    pack: Callable[[Factors], Factors]
    init: Callable[[tuple[int, ...]], tuple[Factors, Inverses]]
    invert: Callable[[Factors, Scalar], Inverses]
    precondition: Callable[[Inverses, Leaves], dict[str, Array]]
    exact: "CurvatureBlock | None" = None


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
