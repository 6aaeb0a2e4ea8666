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
      rng: the keys of this device's micro-batches, from which the same numbers are
        drawn as in the step.
      per_example: collections of the model state whose arrays lie along the batch.
    """

    loss_fn: Callable[..., Any]
    axis: Axis
    accumulate: int
    statistics_devices: int
    model_state: Any
    batch: Any
    rng: Any
    per_example: Sequence[str] = ()


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


def keys_of_parts(rng: Array, axis: Axis, accumulate: int) -> Array:
    """The keys of a device's micro-batches: those of their numbers in the whole batch.

    However many devices share the micro-batches of a batch, each has the same key.

    Args:
      rng: the step's key.
      axis: the devices.
      accumulate: micro-batches of each.

    Returns:
      Keys ``[accumulate]``; for one micro-batch, its key; for the only one, ``rng``.
    """
    if accumulate > 1:
        numbers = axis.position() * accumulate + jnp.arange(accumulate)
        return jax.vmap(lambda number: jax.random.fold_in(rng, number))(numbers)
    return rng if axis.name is None else jax.random.fold_in(rng, axis.position())


def accumulated(
    one: Callable[[Any, Any, Array], tuple[Any, Any]],
    accumulate: int,
    model_state: Any,
    batch: Any,
    rng: Array,
    per_example: Sequence[str] = (),
) -> tuple[Any, Any]:
    """The model state after, and the mean results of ``one`` over the micro-batches.

    Each micro-batch begins with the model state before the step, as it would on a
    device of its own, and running averages are the means of what each makes of them.

    Args:
      one: ``(model_state, batch, rng) -> (model_state, results)``.
      accumulate: how many micro-batches.
      model_state: the model's other collections before the step.
      batch: this device's examples.
      rng: what ``keys_of_parts`` returned.
      per_example: collections whose arrays lie along the batch; each micro-batch has
        its part of them.

    Returns:
      The model state; numbers that are no floating point ones are those of the last
      micro-batch.  The mean results.
    """
    if accumulate == 1:
        return one(model_state, batch, rng)
    lies_along = _lies_along(model_state, per_example)
    treedef = jax.tree.structure(model_state)
    leaves = jax.tree.leaves(model_state)
    along = [x for x, own in zip(leaves, lies_along, strict=True) if own]

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), tree)

    def evaluate(own: Any, batch: Any, rng: Array) -> Any:
        rest = iter(own)
        state = [
            next(rest) if o else x for x, o in zip(leaves, lies_along, strict=True)
        ]
        state, results = one(jax.tree.unflatten(treedef, state), batch, rng)
        new = jax.tree.leaves(state)
        kept = [x for x, o in zip(new, lies_along, strict=True) if o]
        shared = [x for x, o in zip(new, lies_along, strict=True) if not o]
        return kept, shared, results

    parts = (cut(along), cut(batch), rng)
    shapes = jax.eval_shape(evaluate, *jax.tree.map(lambda x: x[0], parts))[1:]

    def add(sums: Any, part: Any) -> Any:
        kept, shared, results = evaluate(*part)
        shared = [_added(*pair) for pair in zip(sums[0], shared, strict=True)]
        return (shared, jax.tree.map(jnp.add, sums[1], results)), kept

    (shared, results), kept = jax.lax.scan(add, zeros_of(shapes), parts)
    shared = [x / accumulate if _has_mean(x) else x for x in shared]
    results = jax.tree.map(lambda x: x / accumulate, results)
    whole = iter([x.reshape(-1, *x.shape[2:]) for x in kept])
    rest = iter(shared)
    state = [next(whole) if own else next(rest) for own in lies_along]
    return jax.tree.unflatten(treedef, state), results


def _lies_along(model_state: Any, per_example: Sequence[str]) -> list[bool]:
    """Of each array of the model state, whether it lies along the batch."""
    return [
        bool(path) and getattr(path[0], "key", None) in per_example and x.ndim > 0
        for path, x in jax.tree_util.tree_leaves_with_path(model_state)
    ]


def _has_mean(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _added(total: Array, new: Array) -> Array:
    """A sum; of numbers that have no mean, the last."""
    return total + new if _has_mean(new) else new


def zeros_of(shapes: Any) -> Any:
    """Zeros of the shapes that ``jax.eval_shape`` returns."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _mean_over_all(one: Callable[..., Any], own: StepBatch) -> Any:
    mine = accumulated(
        one, own.accumulate, own.model_state, own.batch, own.rng, own.per_example
    )[1]
    return collectives.mean(mine, own.axis)


def _require_all_devices(name: str, own: StepBatch) -> None:
    if own.statistics_devices:
        raise ValueError(
            f"{name} is refused with statistics_devices={own.statistics_devices}, "
            "which have no share of the loss's batch; use statistics_fraction or a "
            "statistics_batch instead"
        )
