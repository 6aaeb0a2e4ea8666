"""Products of vectors with the exact Fisher matrix, without the matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import collectives, linalg
from lbopt._typing import Array, Params
from lbopt.collectives import Axis
from lbopt.curvature import registry
from lbopt.curvature.likelihood import (
    Outputs,
    count_terms,
    listen,
    single_outputs,
)


def fisher_products(
    loss_fn: Callable[..., Any],
    params: Params,
    vectors: Sequence[Params],
    *args: Any,
    has_aux: bool = False,
    batch_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "k k"]:
    r"""What the exact Fisher matrix of a batch makes of every pair of vectors.

    .. math:: C_{ij} = v_i^\top F v_j
              = \frac1n \sum_{x} (J v_i)^\top F_R\, (J v_j), \qquad
              F = \frac1n \sum_{x} J^\top F_R J

    with the Jacobian J of the outputs at an example x and the Fisher matrix of the
    distribution there: :math:`F_R = \mathrm{diag}(p) - p p^\top` for a categorical,
    :math:`\mathrm{diag}(p (1 - p))` for a Bernoulli, the identity for a normal.  One
    forward pass carries the parameters and all k vectors; there is no backward pass,
    and no labels are drawn.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``, which calls
        ``lbopt.likelihood`` once; as for ``value_grad_and_curvature``.
      params: where F is taken.
      vectors: k trees shaped like the parameters.
      *args: the loss's other arguments.  A part of the batch makes F cheaper.
      has_aux: whether the loss returns ``(loss, aux)``.
      batch_size: the number n of terms that the loss averages, where it is neither the
        leading size of the batch nor stated through ``likelihood``.
      axis_name: the mesh axis over whose devices examples are spread; F is then that of
        all of them.

    Returns:
      The symmetric matrix C, in float32 or better.

    Raises:
      ValueError: for no vectors, a vector that is not shaped like the parameters, and a
        loss that does not call ``likelihood`` once outside of all transforms.

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

    Source: Martens & Grosse 2015, appendix C, which takes a quarter of the batch for
    them.  Where examples share statistics (batch normalisation) J is that of the whole
    batch.  Each vector is rounded to the type of the parameters, as derivatives are.
    """
    loss_fn = registry.unjitted(loss_fn)
    found: list[Outputs] = []

    def outputs_of(p: Params) -> Array:
        with nn.intercept_methods(listen(found)):
            result = loss_fn(p, *args)
        registry.split_aux(result, has_aux, loss_fn)
        return single_outputs(found, registry.name_of(loss_fn), "fisher_products").value

    def pushed(vector: Params) -> tuple[Array, Array]:
        return jax.jvp(outputs_of, (params,), (vector,))

    side_by_side = _side_by_side(vectors, params)
    outputs, tangents = jax.vmap(pushed, out_axes=(None, 0))(side_by_side)
    roots = _roots(outputs[None], tangents, found[0].distribution)
    products = linalg.matmul(roots, roots.T) / count_terms(found, batch_size, args)
    return collectives.mean(products, Axis(axis_name, 1))


def _side_by_side(vectors: Sequence[Params], params: Params) -> Params:
    """The vectors along a first axis, in the types of the parameters."""
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
    return jax.tree.map(lambda p, *v: jnp.stack(v).astype(p.dtype), params, *vectors)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}


def _roots(
    outputs: Float[Array, "1 *batch"],
    tangents: Float[Array, "k *batch"],
    distribution: str,
) -> Float[Array, "k size"]:
    """Rows whose inner products are those of the tangents in the outputs' Fisher."""
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    f, t = outputs.astype(dtype), tangents.astype(dtype)
    if distribution == "categorical":
        p = jax.nn.softmax(f)
        t = jnp.sqrt(p) * (t - jnp.sum(p * t, axis=-1, keepdims=True))
    elif distribution == "bernoulli":
        t = jnp.sqrt(jax.nn.sigmoid(f) * jax.nn.sigmoid(-f)) * t
    return t.reshape(len(t), -1)
