"""Products of vectors with the exact Fisher matrix, without the matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import linalg
from lbopt._typing import Array, Params
from lbopt.curvature import block, loss
from lbopt.curvature.likelihood import Outputs, listen, single_outputs
from lbopt.curvature.terms import Terms, WeightsAt


def fisher_products(
    loss_fn: Callable[..., Any],
    params: Params,
    vectors: Sequence[Params],
    *args: Any,
    has_aux: bool = False,
    terms: Terms | None = None,
) -> Float[Array, "k k"]:
    r"""Computes the exact Fisher matrix's bilinear form for all pairs of vectors.

    .. math:: C_{ij} = v_i^\top F v_j
              = \frac1n \sum_{x} (J v_i)^\top F_R\, (J v_j), \qquad
              F = \frac1n \sum_{x} J^\top F_R J

    with J the Jacobian of the outputs at an example x, and :math:`F_R` the Fisher
    matrix of the distribution at those outputs: :math:`\mathrm{diag}(p) - p p^\top` for
    a categorical, :math:`\mathrm{diag}(p (1 - p))` for a Bernoulli, the identity for a
    normal.  One forward pass carries the parameters and all k tangents; there is no
    backward pass, and no labels are sampled.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``; calls
        ``lbopt.likelihood`` once.
      params: the parameters at which F is evaluated.
      vectors: k trees shaped like the parameters.
      *args: the loss's other arguments; part of the batch makes the products cheaper.
        On several devices the mean of their products belongs to the whole batch.
      has_aux: whether the loss returns ``(loss, aux)``.
      terms: the terms that the loss averages, ``layers.terms`` of ``trace_layers``;
        needed for outputs of more axes than ``[batch, features]`` unless the call of
        ``likelihood`` states them.

    Returns:
      The symmetric matrix C, in at least float32.

    Raises:
      ValueError: if there are no vectors, a vector is not shaped like the parameters,
        or the loss does not call ``likelihood`` exactly once, outside all transforms;
        if the number of its terms is not known.

    Examples:
      >>> import jax.numpy as jnp, lbopt
      >>> from lbopt.curvature.fisher_products import fisher_products
      >>> def loss_fn(w, x, y):
      ...     f = lbopt.likelihood(x @ w, "normal")
      ...     return jnp.mean(jnp.sum((f - y) ** 2, -1)) / 2
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.zeros((2, 1))
      >>> w, u, v = (jnp.array([[a], [b]]) for a, b in ((0.0, 0.0), (1.0, 0), (0, 1.0)))
      >>> fisher_products(loss_fn, w, [u, v], x, y).tolist()  # xᵀx / 2
      [[1.0, 1.0], [1.0, 2.0]]

    Source: Martens & Grosse 2015, appendix C, with a quarter of the batch.  If examples
    are coupled (batch normalisation), J is the Jacobian of the whole batch.  Vectors
    are cast to the parameters' dtypes.
    """
    loss_fn = loss.unjitted(loss_fn)
    found: list[Outputs] = []

    def outputs_of(p: Params) -> tuple[Array, Any]:
        with nn.intercept_methods(listen(found)):
            result = loss_fn(p, *args)
        loss.split_aux(result, has_aux, loss_fn)
        one = single_outputs(found, loss.name_of(loss_fn), "fisher_products")
        given = [x for x in (one.terms, one.weights) if x is not None]
        return one.value, [jnp.asarray(x) for x in given]

    # Under vmap the primal is computed once, not k times: out_axes=None proves it.
    def pushed(vector: Params) -> tuple[Array, Array, Any]:
        return jax.jvp(outputs_of, (params,), (vector,), has_aux=True)

    side_by_side = _side_by_side(vectors, params)
    outputs, tangents, given = jax.vmap(pushed, out_axes=(None, 0, None))(side_by_side)
    roots = _roots(outputs[None], tangents, found[0].distribution)
    own = iter(given)
    stated = found[0]._replace(
        terms=None if found[0].terms is None else next(own),
        weights=None if found[0].weights is None else next(own),
    )
    weights, n = _terms_of(stated, outputs, terms, args)
    if weights is not None:
        spread = block.spread(jnp.sqrt(weights), outputs.ndim)
        whole = jnp.broadcast_to(spread, outputs.shape).reshape(1, -1)
        roots = roots * whole.astype(roots.dtype)
    return linalg.matmul(roots, roots.T) / n


def _terms_of(
    stated: Outputs, outputs: Array, terms: Terms | None, args: Sequence[Any]
) -> tuple[Array | None, Any]:
    """The weights of the loss's terms, if they have any, and its divisor."""
    weights = stated.weights
    if weights is None and terms is not None and isinstance(terms.weights, WeightsAt):
        weights = terms.weights.read(args)
    if weights is not None:
        weights = jnp.asarray(weights, jnp.promote_types(weights.dtype, jnp.float32))
    if stated.terms is not None:
        return weights, stated.terms
    if terms is not None and terms.outputs:
        return weights, terms.divisor(outputs.shape, weights)
    if weights is not None:
        return weights, jnp.sum(weights)
    if outputs.ndim > 2:
        raise ValueError(
            f"the outputs {list(outputs.shape)} have more axes than one example's; "
            "state the number of terms by lbopt.likelihood(..., terms=), or pass "
            "terms=layers.terms"
        )
    return None, len(outputs)


def _side_by_side(vectors: Sequence[Params], params: Params) -> Params:
    """Stacks the vectors along a leading axis, in the parameters' dtypes."""
    if not vectors:
        raise ValueError("vectors is empty; pass at least one tree shaped like params")
    expected = _shapes(params)
    for number, vector in enumerate(vectors):
        found = _shapes(vector)
        for path in expected | found:
            if found.get(path) != expected.get(path):
                raise ValueError(
                    f"vectors[{number}]{path} has shape {found.get(path)}, but "
                    f"params{path} has {expected.get(path)}; pass trees shaped like "
                    "params, such as gradients or updates"
                )
    # jax.jvp accepts tangents of the primals' dtypes only.
    return jax.tree.map(lambda p, *v: jnp.stack(v).astype(p.dtype), params, *vectors)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}


def _roots(
    outputs: Float[Array, "1 *batch"],
    tangents: Float[Array, "k *batch"],
    distribution: str,
) -> Float[Array, "k size"]:
    """Multiplies tangents by a root of F_R: inner products of rows are tᵢᵀ F_R tⱼ."""
    # Sums over a batch lose too much in half precision.
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    f, t = outputs.astype(dtype), tangents.astype(dtype)
    if distribution == "categorical":
        p = jax.nn.softmax(f)
        # (diag(p) − p pᵀ) = Rᵀ R with R = diag(√p) (I − 1 pᵀ).
        # A product and not a sum: XLA (jaxlib 0.10.2, CPU, 32,768 numbers or more) gets
        # a sum over the last axis wrong in which t and p differ in their first.
        means = jnp.einsum("...c,k...c->k...", p[0], t)
        t = jnp.sqrt(p) * (t - means[..., None])
    elif distribution == "bernoulli":
        # σ(−f), because 1 − σ(f) cancels for large f.
        t = jnp.sqrt(jax.nn.sigmoid(f) * jax.nn.sigmoid(-f)) * t
    return t.reshape(len(t), -1)
