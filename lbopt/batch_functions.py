"""Functions of one step's batch, over all its micro-batches and devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import collectives
from lbopt._typing import Array, Params
from lbopt.collectives import Axis
from lbopt.curvature.fisher_products import fisher_products


class StepBatch(NamedTuple):
    """What one device evaluates at a step.

    Attributes:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``.
      axis: the devices.
      accumulate: micro-batches that a device's examples are cut into.
      statistics_devices: how many devices have no share of the loss's batch.
      model_state: the model's other collections before the step.
      batch: this device's examples.
      rng: this device's key, from which the same numbers are drawn as in the step.
    """

    loss_fn: Callable[..., Any]
    axis: Axis
    accumulate: int
    statistics_devices: int
    model_state: Any
    batch: Any
    rng: Any


def mean_loss(own: StepBatch, params: Params) -> Float[Array, ""]:
    """The loss of a step's batch at any parameters.

    Args:
      own: the device's share of it.
      params: the parameters.

    Returns:
      The mean over all devices and micro-batches.

    Raises:
      ValueError: if some devices evaluate statistics alone.
    """
    _require_all_devices("value_fn", own)

    def one(model_state: Any, batch: Any, rng: Array) -> tuple[Any, Array]:
        loss_rng, _ = jax.random.split(rng)
        loss, (model_state, _) = own.loss_fn(params, model_state, batch, loss_rng)
        return model_state, loss

    return _mean_over_all(one, own)


def mean_products(
    own: StepBatch, params: Params, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    """What the exact Fisher matrix of a step's batch makes of pairs of vectors.

    Args:
      own: the device's share of the batch.
      params: the parameters before the step.
      vectors: k trees shaped like them.

    Returns:
      The mean over all devices and micro-batches; see ``fisher_products``.

    Raises:
      ValueError: if some devices evaluate statistics alone.
    """
    _require_all_devices("fisher_products", own)

    def one(model_state: Any, batch: Any, rng: Array) -> tuple[Any, Array]:
        loss_rng, _ = jax.random.split(rng)
        products = fisher_products(
            own.loss_fn, params, vectors, model_state, batch, loss_rng, has_aux=True
        )
        return model_state, products

    return _mean_over_all(one, own)


def accumulated(
    one: Callable[[Any, Any, Array], tuple[Any, Any]],
    accumulate: int,
    model_state: Any,
    batch: Any,
    rng: Array,
) -> tuple[Any, Any]:
    """The last model state and the mean results of ``one`` over the micro-batches."""
    if accumulate == 1:
        return one(model_state, batch, rng)
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    part = jax.tree.map(lambda x: x[0], parts)
    zeros = zeros_of(jax.eval_shape(one, model_state, part, rng)[1])

    def add(carry: Any, part: Any) -> Any:
        model_state, sums = carry
        model_state, new = one(model_state, *part)
        return (model_state, jax.tree.map(jnp.add, sums, new)), None

    rngs = jax.random.split(rng, accumulate)
    (model_state, sums), _ = jax.lax.scan(add, (model_state, zeros), (parts, rngs))
    return model_state, jax.tree.map(lambda x: x / accumulate, sums)


def zeros_of(shapes: Any) -> Any:
    """Zeros of the shapes that ``jax.eval_shape`` returns."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _mean_over_all(one: Callable[..., Any], own: StepBatch) -> Any:
    mine = accumulated(one, own.accumulate, own.model_state, own.batch, own.rng)[1]
    return collectives.mean(mine, own.axis)


def _require_all_devices(name: str, own: StepBatch) -> None:
    if own.statistics_devices:
        raise ValueError(
            f"{name} is refused with statistics_devices={own.statistics_devices}, "
            "which have no share of the loss's batch; use statistics_fraction or a "
            "statistics_batch instead"
        )
