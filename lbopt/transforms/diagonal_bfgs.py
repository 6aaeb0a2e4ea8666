"""A diagonal estimate of the Hessian from changes of the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbopt._typing import Array, Params, Updates
from lbopt.norms import inner, precise

EPS = 1e-8
"""ε of the released code."""


class DiagonalBfgsState(NamedTuple):
    """State of ``scale_by_diagonal_bfgs``.

    Attributes:
      count: gradients seen.
      h: the diagonal of the Hessian's estimate B.
    """

    count: Any
    h: Any


def scale_by_diagonal_bfgs() -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the diagonal of a BFGS estimate of the Hessian.

    .. math:: h \leftarrow \left| h - \frac{(h \circ t)^2 + \epsilon}
              {t^\top (h \circ t) + \epsilon} + \frac{y^2 + \epsilon}
              {y^\top t + \epsilon} \right|, \qquad P = \frac{1}{h + \epsilon}

    with the displacement t of the parameters and the change y of their gradient: the
    BFGS update of B, restricted to its diagonal and made positive.  If :math:`y^\top t`
    or :math:`t^\top (h \circ t)` is below ε = 1e-8, h stays unchanged, bit for bit, and
    so does any entry that would not be finite.  h starts at 1, and the first gradient
    passes unchanged.

    Returns:
      A transformation whose ``update`` takes ``displacement=`` and ``change=``, trees
      like the parameters.

    Raises:
      ValueError: at ``update``, if one of them is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt.transforms.diagonal_bfgs import scale_by_diagonal_bfgs
      >>> tx, w = scale_by_diagonal_bfgs(), jnp.array([1.0, 1.0])
      >>> t = jnp.array([0.5, 0.0])  # the curvature along it is 8
      >>> state = tx.init(w)
      >>> _, state = tx.update(w, state, displacement=0 * t, change=0 * t)
      >>> updates, state = tx.update(w, state, displacement=t, change=8.0 * t)
      >>> [round(float(x), 3) for x in updates]
      [0.125, 1.0]

    Source: Adya, Palakkode & Tuzel 2018, the authors' released code; the body of the
    paper was not available.
    """

    def init_fn(params: Params) -> DiagonalBfgsState:
        h = optax.tree.ones_like(params)
        return DiagonalBfgsState(jnp.zeros([], jnp.int32), precise(h))

    def update_fn(
        updates: Updates,
        state: Any,
        params: Params | None = None,
        *,
        displacement: Updates | None = None,
        change: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, DiagonalBfgsState]:
        del params, extra_args
        if displacement is None or change is None:
            raise ValueError(
                "scale_by_diagonal_bfgs.update needs displacement= and change=, of the "
                "parameters and of their gradient; scale_by_nlcg passes them"
            )
        t, y = precise(displacement), precise(change)
        ht = jax.tree.map(jnp.multiply, state.h, t)
        # Over all arrays together: h is the diagonal of one matrix.
        yt, tbt = inner(y, t), inner(t, ht)
        curved = (yt >= EPS) & (tbt >= EPS)

        def renewed(h: Array, ht: Array, y: Array) -> Array:
            # diag(B t tᵀ B) / tᵀBt and diag(y yᵀ) / yᵀt, with ε as in the code.
            lost = (jnp.square(ht) + EPS) / jnp.where(curved, tbt + EPS, 1)
            gained = (jnp.square(y) + EPS) / jnp.where(curved, yt + EPS, 1)
            new = jnp.abs(h - lost + gained)
            # Without curvature along t the update is not defined (or divides by ε).
            return jnp.where(curved & jnp.isfinite(new), new, h)

        h = jax.tree.map(renewed, state.h, ht, y)
        first = state.count == 0  # 1 / (h + ε) would be 1 only up to rounding
        updates = jax.tree.map(
            lambda g, h: (g * jnp.where(first, 1, 1 / (h + EPS))).astype(g.dtype),
            updates,
            h,
        )
        return updates, DiagonalBfgsState(optax.safe_increment(state.count), h)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
