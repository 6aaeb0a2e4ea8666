r"""Loss, gradient and curvature statistics from one evaluation of the loss.

Three Fisher matrices differ in the signal that is backpropagated:

* ``empirical``: the loss's own.  One forward and one backward pass.
* ``sampled``: from labels sampled from the model's predictive distribution, one per
  example.  The same forward pass and a second backward pass, of which only the
  statistics are computed, not the parameter gradient.
* ``exact``: the expectation over the predictive distribution, one backward pass per
  output coordinate.  For small models, tests and notebooks.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lbopt import collectives
from lbopt._typing import Params
from lbopt.collectives import Axis
from lbopt.curvature import evaluation, loss
from lbopt.curvature.evaluation import Curvature, Fisher
from lbopt.curvature.layer_table import Layers

__all__ = ["Curvature", "Fisher", "curvature_only", "value_grad_and_curvature"]


def value_grad_and_curvature(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    fisher: Fisher = "empirical",
    batch_size: Any = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, Params, Curvature]]:
    r"""Extends ``jax.value_and_grad`` by the layers' curvature statistics.

    For a layer with inputs a and backward signals δ of a mean over n terms,

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: the layers that ``trace_layers`` found in ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      fisher: the Fisher matrix: ``"empirical"``, ``"sampled"`` or ``"exact"``.
      batch_size: n, the number of terms that the loss averages, if it is not that which
        ``layers.terms`` gives; of a loss whose terms have weights it may be traced.
      axis_name: the axis of ``shard_map`` or ``pmap`` over which the examples are
        divided.  Loss, gradient and statistics are then such that their means over
        the axis are those of all examples, however many real rows a device has.

    Returns:
      ``f(params, *args, rng=None, due=None, loss_scale=None, **kwargs) -> (value,
      grads, curvature)``.  ``value`` is the loss or ``(loss, aux)``; ``curvature`` maps
      each layer's path to its statistics.  ``rng`` is the key from which the sampled
      Fisher draws labels.  ``due`` is a mask from ``refresh``: statistics that are not
      due, and those of layers missing from the mask, are zero and cost nothing.
      ``loss_scale`` multiplies signals in the backward pass, against underflow in half
      precision; gradients and statistics are divided by it.  A key of the loss's own,
      such as that of dropout, is one of its positional arguments.

    Raises:
      ValueError: for an unknown ``fisher``; at the call for one of these three keywords
        if the loss has an argument of that name and did not get it by position.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> f = lbopt.value_grad_and_curvature(loss_fn, layers)
      >>> loss, grads, curvature = f(params, x)
      >>> curvature["layers_0"].a.shape  # 5 inputs and the bias
      (6, 6)
    """
    evaluator = evaluation.make_evaluator(
        loss_fn, layers, has_aux=has_aux, fisher=fisher, batch_size=batch_size
    )
    if axis_name is not None:
        evaluation.require_one_share(layers)

    def evaluate(
        params: Params,
        *args: Any,
        rng: Any = None,
        due: Any = None,
        loss_scale: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Params, Curvature]:
        totals, curvature = _whole(
            evaluator, axis_name, params, args, kwargs, rng, due, loss_scale
        )
        value = (totals.value, totals.aux) if has_aux else totals.value
        return value, totals.grads, curvature

    return evaluate


def curvature_only(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    fisher: Fisher = "sampled",
    batch_size: Any = None,
    axis_name: str | None = None,
) -> Callable[..., Curvature]:
    r"""Computes the layers' curvature statistics without the gradient.

    .. math:: A = \frac{1}{nS} \sum a a^\top, \qquad G = n \sum \delta \delta^\top

    The batch need not be the gradient's.  One forward and one backward pass (one per
    output coordinate for ``"exact"``); under ``jit`` the only parameter gradients
    computed are those that diagonal blocks need.

    Args:
      loss_fn: ``loss_fn(params, *args) -> loss`` or ``(loss, aux)``.
      layers: the layers that ``trace_layers`` found in ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      fisher: the Fisher matrix: ``"empirical"``, ``"sampled"`` or ``"exact"``.
      batch_size: as for ``value_grad_and_curvature``.
      axis_name: as for ``value_grad_and_curvature``.

    Returns:
      ``f(params, *args, rng=None, due=None, loss_scale=None, **kwargs) -> curvature``,
      with arguments and result as for ``value_grad_and_curvature``.

    Raises:
      ValueError: for an unknown ``fisher``.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     f = lbopt.likelihood(model.apply({"params": params}, x), "normal")
      ...     return jnp.sum(f**2) / (2 * len(x))
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> f = lbopt.curvature_only(loss_fn, layers)
      >>> f(params, x[:1], rng=jax.random.key(1))["layers_0"].g.shape  # 1/8 of x
      (3, 3)

    Source: Martens & Grosse 2015 sample labels for a random eighth of the minibatch;
    Ba, Grosse & Martens 2017, §3, for independent minibatches on other machines.
    """
    evaluator = evaluation.make_evaluator(
        loss_fn, layers, has_aux=has_aux, fisher=fisher, batch_size=batch_size
    )
    if axis_name is not None:
        evaluation.require_one_share(layers)

    def evaluate(
        params: Params,
        *args: Any,
        rng: Any = None,
        due: Any = None,
        loss_scale: Any = None,
        **kwargs: Any,
    ) -> Curvature:
        return _whole(evaluator, axis_name, params, args, kwargs, rng, due, loss_scale)[
            1
        ]

    return evaluate


def _whole(
    evaluator: evaluation.Evaluator,
    axis_name: str | None,
    params: Params,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rng: Any,
    due: Any,
    loss_scale: Any,
) -> tuple[evaluation.Totals, Curvature]:
    """Evaluates a batch in one part, or a device's part of it."""
    kept = dict(zip(loss.CALL_KEYWORDS, (rng, due, loss_scale), strict=True))
    idle = () if evaluator.fisher == "sampled" else ("rng",)
    loss.refuse_shared_keywords(evaluator.loss_fn, args, kept, idle=idle)
    axis = Axis(None, 1)
    if axis_name is not None:
        axis = collectives.mapped_axis(axis_name)
    totals = evaluation.evaluate(
        evaluator,
        params,
        args,
        kwargs,
        rng=rng,
        due=due,
        gradient=True,
        additive=axis.name is not None,
        loss_scale=loss_scale,
    )
    curvature = evaluation.finish(evaluator, totals, due, axis=axis)
    if axis.name is None:
        return totals, curvature
    # What the loss returns beside itself is a device's own.
    whole = evaluation.divided(evaluator, totals._replace(aux=()), axis)
    return whole._replace(aux=totals.aux), curvature
