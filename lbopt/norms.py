"""Inner products and norms of trees of arrays, in float32 or better.

In float16 the square of a norm above 256 overflows, and in bfloat16 a sum of squares
soon stops growing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lbopt import explicit_axes
from lbopt._typing import Array


def precise(tree: Any) -> Any:
    """Returns a tree in float32 or better, as sums and differences of it need."""
    return jax.tree.map(lambda x: x.astype(precise_dtype(x)), tree)


def precise_dtype(x: Any) -> Any:
    """Returns the dtype of an array, or float32 if that is narrower."""
    return jnp.promote_types(x.dtype, jnp.float32)


def inner(u: Any, v: Any) -> Array:
    r"""Returns the inner product :math:`u^\top v` of two trees.

    Args:
      u: a tree of arrays.
      v: a tree of the same structure and shapes.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt import norms
      >>> u = {"w": jnp.array([300.0, 400.0], jnp.float16)}
      >>> float(norms.inner(u, u))
      250000.0
    """
    product = explicit_axes.replicated(optax.tree.vdot, precise(u), precise(v))
    return jnp.asarray(product)


def squared_norm(tree: Any) -> Array:
    r"""Returns :math:`\lVert u \rVert^2` of a tree; see ``inner``."""
    return optax.tree.norm(precise(tree), squared=True)
