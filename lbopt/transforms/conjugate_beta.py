r"""Rules for β, the share of the last direction in a conjugate direction.

.. math:: d_k = -P_k g_k + \beta_k d_{k-1}

with the gradient g, the preconditioner P, and the change of the gradient
:math:`y = g_k - g_{k-1}`.  On a quadratic with exact line searches and a fixed P all
rules agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lbopt._typing import Array

EPS = 1e-8
"""Added to denominators to keep quotients finite, as in the released code."""


class Products(NamedTuple):
    """The inner products of a step; ``()`` for those that a rule does not need.

    Attributes:
      gz: δ = gᵀPg of this step.
      gz_before: gᵀPg of the step before.
      gz_cross: the gradient times the preconditioned gradient of the step before.
      yz: yᵀPg.
      dy: the last direction times y.
      dg: the last direction times the gradient.
      yy: y times the change of the preconditioned gradient, yᵀPy for a fixed P.
    """

    gz: Any
    gz_before: Any
    gz_cross: Any = ()
    yz: Any = ()
    dy: Any = ()
    dg: Any = ()
    yy: Any = ()


def fletcher_reeves(p: Products) -> Array:
    r""":math:`g_k^\top P_k g_k / g_{k-1}^\top P_{k-1} g_{k-1}` (1964)."""
    return p.gz / (p.gz_before + EPS)


def polak_ribiere(p: Products) -> Array:
    r""":math:`(g_k^\top P_k g_k - g_k^\top P_{k-1} g_{k-1}) / \delta_{k-1}` (1969)."""
    return (p.gz - p.gz_cross) / (p.gz_before + EPS)


def hestenes_stiefel(p: Products) -> Array:
    r""":math:`y^\top P g_k / d_{k-1}^\top y` (1952)."""
    return _over_curvature(p.yz, p)


def dai_yuan(p: Products) -> Array:
    r""":math:`g_k^\top P g_k / d_{k-1}^\top y` (1999)."""
    return _over_curvature(p.gz, p)


def hybrid(p: Products) -> Array:
    """max(0, min(Hestenes-Stiefel, Dai-Yuan)) (Dai & Yuan 2001)."""
    return jnp.maximum(0, jnp.minimum(hestenes_stiefel(p), dai_yuan(p)))


def hager_zhang(p: Products) -> Array:
    r""":math:`(y - 2 d\, \frac{y^\top P y}{d^\top y})^\top P g_k / d^\top y` (2005)."""
    twice = 2 * p.dg * _over_curvature(p.yy, p)
    return _over_curvature(p.yz - twice, p)


def _over_curvature(x: Array, p: Products) -> Array:
    """Returns the quotient by dᵀy; 0, a restart, if that is not positive."""
    curved = p.dy > 0  # always so after an exact line search on a convex function
    return jnp.where(curved, x / jnp.where(curved, p.dy, 1), 0)


class Rule(NamedTuple):
    """A rule, and which vectors it needs of the step before.

    Attributes:
      beta: the rule.
      keeps_residual: whether it needs the last preconditioned gradient.
      keeps_gradient: whether it needs the last gradient.
    """

    beta: Callable[[Products], Array]
    keeps_residual: bool = False
    keeps_gradient: bool = False


RULES = {
    "fletcher_reeves": Rule(fletcher_reeves),
    "polak_ribiere": Rule(polak_ribiere, keeps_residual=True),
    "hestenes_stiefel": Rule(hestenes_stiefel, keeps_gradient=True),
    "dai_yuan": Rule(dai_yuan, keeps_gradient=True),
    "hybrid": Rule(hybrid, keeps_gradient=True),
    "hager_zhang": Rule(hager_zhang, keeps_residual=True, keeps_gradient=True),
}
"""The rules by name."""
