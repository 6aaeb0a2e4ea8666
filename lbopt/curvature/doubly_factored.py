r"""The doubly factored block: a wide dense layer on a flattened feature map.

The kernel of a dense layer that reads T locations of C channels is ``W [T, C, D]``, and
the factor of its T·C inputs may be too large to invert.  Each example's input is a map
``A [T, C]``, which is replaced by its best rank-one approximation,

.. math::
  A \approx \kappa\, \psi^\top, \qquad
  \kappa = \sqrt{\sigma_1}\, u_1, \quad \psi = \sqrt{\sigma_1}\, v_1

where :math:`(\sigma_1, u_1, v_1)` is the leading singular triple.  If κ, ψ and the
gradients g at the outputs are independent,

.. math::
  F \approx K \otimes \Psi \otimes G, \qquad
  K = \mathbb E[\kappa \kappa^\top], \quad
  \Psi = \mathbb E[\psi \psi^\top], \quad G = \mathbb E[g g^\top]

where F acts on W in row-major order.  The bias has a block of its own, G.

Source: Ba, Grosse & Martens 2017, on large fully connected layers.  The equal split of
:math:`\sigma_1` and the separate bias follow the authors' code.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg, patches
from lbopt._typing import Array, Scalar
from lbopt.curvature import block, factor

# Negligible beside the products around them.  On rectified maps of 36 locations × 256
# channels the relative error of σ₁ is below 1e-10 if σ₂ / σ₁ is 0.86 and below 2e-5 if
# it is 0.94; the closer the two, the less it matters which one is kept.
_ITERATIONS = 32


class DoublyFactors(NamedTuple):
    """The three factors: whole as statistics ``[*stack, d, d]``, packed in the state.

    Attributes:
      k: K, the second moment of the location vectors κ.
      c: Ψ, the second moment of the channel vectors ψ.
      g: G, the second moment of the output gradients.
    """

    k: Any
    c: Any
    g: Any


class BiasedDoublyFactors(NamedTuple):
    """The factors of a layer with a bias.

    Attributes:
      k: K.
      c: Ψ.
      g: G.
      bias: G again, the Fisher matrix of the bias, which takes another damping.
    """

    k: Any
    c: Any
    g: Any
    bias: Any


class DoublySums(NamedTuple):
    """Sums over the examples of a backward pass.

    Attributes:
      k: Σ κ κᵀ.
      c: Σ ψ ψᵀ.
      g: Σ δ δᵀ of the backward signals, shared by kernel and bias.
      rows: number of maps in ``k`` and ``c``, ``[1, 1]``.
    """

    k: Any
    c: Any
    g: Any
    rows: Any


class DoublyInverses(NamedTuple):
    """The damped inverses of the three factors.

    Attributes:
      k: ``(K + λ_K I)⁻¹``, ``[*stack, T, T]``.
      c: ``(Ψ + λ_Ψ I)⁻¹``, ``[*stack, C, C]``.
      g: ``(G + λ_G I)⁻¹``, ``[*stack, D, D]``.
    """

    k: Any
    c: Any
    g: Any


class BiasedDoublyInverses(NamedTuple):
    """The damped inverses of a layer with a bias.

    Attributes:
      k: ``(K + λ_K I)⁻¹``.
      c: ``(Ψ + λ_Ψ I)⁻¹``.
      g: ``(G + λ_G I)⁻¹``.
      bias: ``(G + λ I)⁻¹``.
    """

    k: Any
    c: Any
    g: Any
    bias: Any


def doubly_factored_block(
    locations: int, channels: int, out_features: int, use_bias: bool, dtype: Any
) -> block.CurvatureBlock:
    r"""Builds the block of a dense layer on a flattened feature map.

    .. math::
      U = (K + \lambda_K I)^{-1} \otimes (\Psi + \lambda_\Psi I)^{-1} \otimes
          (G + \lambda_G I)^{-1}\, \nabla W, \quad u = (G + \lambda I)^{-1}\, \nabla b

    with :math:`\lambda_K \lambda_\Psi \lambda_G = \lambda`, see ``linalg.pi_damping``.

    Args:
      locations: T.
      channels: C; the kernel is ``[T·C, D]``, channels varying fastest.
      out_features: D.
      use_bias: whether the layer has a bias.
      dtype: dtype of the statistics and inverses.

    Returns:
      The curvature block.

    Examples:
      >>> from lbopt.curvature import doubly_factored
      >>> block = doubly_factored.doubly_factored_block(36, 256, 10, True, "float32")
      >>> [f.order for f in block.factors]  # in place of 9,217 and 10
      [36, 256, 10, 10]

    Source: Ba, Grosse & Martens 2017, three factors with generalised factored damping.
    The paper leaves open a layer that is used several times: each use is a map of its
    own, and G sums over uses.
    """
    factors = BiasedDoublyFactors if use_bias else DoublyFactors
    orders = (locations, channels, out_features)
    sums = DoublySums(
        *[jax.ShapeDtypeStruct((order, order), dtype) for order in orders],
        rows=jax.ShapeDtypeStruct((1, 1), dtype),
    )
    moment = functools.partial(patches.outer_sum, dtype=dtype)

    def rank_one_rows(inputs: Array, *weights: Array) -> tuple[Array, Array, Array]:
        maps = inputs.reshape(-1, locations, channels).astype(dtype)
        rows = len(maps)
        if weights:
            each = weights[0].reshape(len(maps), -1)[:, :1].astype(dtype)
            # Vectors of weighted maps are scaled by the root of the weight.
            maps = jnp.where(each[..., None] > 0, maps * each[..., None], 0)
            rows = jnp.sum(each)
        kappa, psi = rank_one(maps)
        return kappa, psi, block.count_rows(rows, kappa, dtype)

    def estimate(residual: Any, output_grads: Array, due: Any) -> DoublySums:
        inputs, weights = block.unweighted(residual)
        operands = (inputs,) if weights is None else (inputs, weights)
        # One decomposition serves both; K and Ψ are nearly always due together.
        kappa, psi, rows = block.when(due.k | due.c, rank_one_rows, *operands)
        due_g = due.g | due.bias if use_bias else due.g
        return DoublySums(
            block.when(due.k, moment, kappa),
            block.when(due.c, moment, psi),
            block.when(due_g, moment, output_grads.reshape(-1, out_features)),
            rows,
        )

    def gradient(inputs: Array, output_grads: Array) -> dict[str, Array]:
        a = inputs.reshape(-1, locations * channels).astype(dtype)
        g = output_grads.reshape(-1, out_features).astype(dtype)
        kernel = jnp.einsum("ni,no->io", a, g)
        return {"kernel": kernel} | ({"bias": jnp.sum(g, 0)} if use_bias else {})

    def cut(block_size: int | None) -> block.CurvatureBlock:
        k, c, g = (factor.cut_symmetric(order, block_size) for order in orders)
        kinds = factors(k, c, g, *[g] * use_bias)

        def precondition(inverses: Any, leaves: block.Leaves) -> dict[str, Array]:
            kernel = leaves["kernel"]
            v = kernel.reshape(*kernel.shape[:-2], *orders)  # [*copies, T, C, D]
            v = _solve((k, c, g), inverses[:3], v)
            natural = {"kernel": v.reshape(kernel.shape)}
            if use_bias:
                column = leaves["bias"][..., None]
                natural["bias"] = factor.times(g, inverses.bias, column)[..., 0]
            return natural

        return block.CurvatureBlock(
            kind="doubly_factored",
            sums=sums,
            estimate=estimate,
            gradient=gradient,
            mean=_mean,
            statistics=lambda means: factors(*means[:3], *[means.g] * use_bias),
            factors=kinds,
            pack=lambda statistics: factors._make(map(factor.pack, kinds, statistics)),
            dampings=_factored_damping,
            inverses=BiasedDoublyInverses if use_bias else DoublyInverses,
            precondition=precondition,
            cut=cut,
            row_weighted=True,
        )

    return cut(None)


def rank_one(
    maps: Float[Array, "batch t c"],
) -> tuple[Float[Array, "batch t"], Float[Array, "batch c"]]:
    r"""Approximates each map by an outer product of two vectors of equal norm.

    .. math::
      A \approx \kappa\, \psi^\top, \qquad
      |\kappa|^2 = |\psi|^2 = \sigma_1, \qquad
      u \leftarrow A A^\top u \,/\, |A A^\top u|

    by a fixed number of power iterations on the shorter side.

    Args:
      maps: A of each example.

    Returns:
      κ and ψ, zero for a map of zeros; the pair's sign is arbitrary.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lbopt.curvature import doubly_factored
      >>> kappa, psi = doubly_factored.rank_one(jnp.array([[[3.0, 0.0], [4.0, 0.0]]]))
      >>> [round(float(x), 3) for x in (*kappa[0], *psi[0])]  # σ₁ = 5
      [1.342, 1.789, 2.236, 0.0]

    Source: Ba, Grosse & Martens 2017 use the singular vectors; the algorithm is our
    choice.
    """
    if maps.shape[-1] < maps.shape[-2]:
        psi, kappa = rank_one(jnp.swapaxes(maps, -1, -2))
        return kappa, psi
    largest = jnp.max(jnp.abs(maps), axis=(-2, -1), keepdims=True)
    # Maps of largest entry 1: their squares neither overflow nor vanish.
    scale = jnp.where(largest > 0, largest, 1)
    a = maps / scale
    across = jnp.swapaxes(a, -1, -2)
    gram = linalg.matmul(a, across)  # [batch, t, t]
    # The mean of the rows of a map that is not negative is never orthogonal to u₁; with
    # the longest row added, the start is zero for no map but zero.
    longest = jnp.argmax(jnp.diagonal(gram, axis1=-2, axis2=-1), -1)[:, None, None]
    start = jnp.mean(gram, -1, keepdims=True) + jnp.take_along_axis(gram, longest, -1)
    u = jax.lax.fori_loop(
        0, _ITERATIONS, lambda _, u: _unit(linalg.matmul(gram, u)), _unit(start)
    )
    v = linalg.matmul(across, u)
    root = jnp.sqrt(scale * jnp.linalg.norm(v, axis=-2, keepdims=True))
    return (root * u)[..., 0], (root * _unit(v))[..., 0]


def _unit(columns: Float[Array, "batch n one"]) -> Float[Array, "batch n one"]:
    norm = jnp.linalg.norm(columns, axis=-2, keepdims=True)
    return columns / jnp.where(norm > 0, norm, 1)


def _mean(sums: DoublySums, terms: Scalar) -> DoublySums:
    return DoublySums(
        block.per_row(sums.k, sums.rows),
        block.per_row(sums.c, sums.rows),
        block.per_example(sums.g, terms),
        sums.rows,
    )


def _factored_damping(means: Any, damping: Scalar) -> Any:
    """Splits λ among the kernel's three factors and gives the bias all of it."""
    k, c, g = linalg.pi_damping(damping, means.k, means.c, means.g)
    return block.whole_damping(means, damping)._replace(k=k, c=c, g=g)


def _solve(
    kinds: Sequence[factor.Factor],
    inverses: Sequence[Array],
    v: Float[Array, "*stack t c out"],
) -> Float[Array, "*stack t c out"]:
    """Multiplies each of the last three axes by its factor's matrix."""
    for i, (kind, inverse) in enumerate(zip(kinds, inverses, strict=True)):
        turned = jnp.moveaxis(v, i - 3, -3)
        rows = turned.reshape(*turned.shape[:-2], -1)
        product = factor.times(kind, inverse, rows).reshape(turned.shape)
        v = jnp.moveaxis(product, -3, i - 3)
    return v
