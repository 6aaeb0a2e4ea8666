"""Functions of one step's whole batch: all its micro-batches on all devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lbopt import collectives
from lbopt._typing import Array, Params
from lbopt.collectives import Axis
from lbopt.curvature import tapped_pass
from lbopt.curvature.fisher_products import fisher_products
from lbopt.curvature.layer_table import Layers


class StepBatch(NamedTuple):
    """What a device needs to evaluate its part of a step's batch again.

    Attributes:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``.
      axis: the devices.
      accumulate: number of micro-batches on each device.
      statistics_devices: number of devices that evaluate no part of the loss.
      model_state: the model's other collections before the step.
      batch: this device's examples.
      rng: the keys of this device's micro-batches; the same keys as in the step, so
        that dropout and the like draw the same numbers.
      per_example: collections of the model state whose arrays lie along the batch.
      layers: the layers of the loss, which know its terms; None for plain means.
    """

    loss_fn: Callable[..., Any]
    axis: Axis
    accumulate: int
    statistics_devices: int
    model_state: Any
    batch: Any
    rng: Any
    per_example: Sequence[str] = ()
    layers: Layers | None = None


def mean_loss(step: StepBatch, params: Params) -> Float[Array, ""]:
    """The loss of a step's batch at any parameters.

    Args:
      step: this device's part of the batch.
      params: the parameters.

    Returns:
      The mean over all devices and micro-batches.

    Raises:
      ValueError: if some devices evaluate statistics alone.
    """
    _require_all_devices("value_fn", step)

    def one(model_state: Any, batch: Any, rng: Array) -> tuple[Any, Any]:
        # Split as in the gradient pass: the loss sees the key that it saw there.
        loss_rng, _ = jax.random.split(rng)
        args = (model_state, batch, loss_rng)
        loss, (model_state, _) = step.loss_fn(params, *args)
        return model_state, _shared(step, params, args, loss)

    return _mean_over_all(one, step)


def mean_products(
    step: StepBatch, params: Params, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    r"""Products :math:`v_i^\top F v_j` with the exact Fisher matrix of a step's batch.

    Args:
      step: this device's part of the batch.
      params: the parameters before the step.
      vectors: k trees shaped like them.

    Returns:
      The mean over all devices and micro-batches; see ``fisher_products``.

    Raises:
      ValueError: if some devices evaluate statistics alone.
    """
    _require_all_devices("fisher_products", step)

    def one(model_state: Any, batch: Any, rng: Array) -> tuple[Any, Any]:
        loss_rng, _ = jax.random.split(rng)
        args = (model_state, batch, loss_rng)
        terms = None if step.layers is None else step.layers.terms
        products = fisher_products(
            step.loss_fn, params, vectors, *args, has_aux=True, terms=terms
        )
        return model_state, _shared(step, params, args, products)

    return _mean_over_all(one, step)


def keys_of_parts(rng: Array, axis: Axis, accumulate: int) -> Array:
    """The keys of this device's micro-batches.

    Args:
      rng: the step's key.
      axis: the devices.
      accumulate: number of micro-batches on each device.

    Returns:
      Keys ``[accumulate]``, or a single key for one micro-batch; ``rng`` itself if the
      whole batch is one micro-batch.
    """
    # Numbered through over all devices: a micro-batch has the same key however many
    # devices share the batch.
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
    """Evaluates micro-batches one after another and averages their results.

    Each starts from the model state before the step, as if it were on a device of its
    own; running averages are averaged over the micro-batches afterwards.

    Args:
      one: ``(model_state, batch, rng) -> (model_state, results)``.
      accumulate: number of micro-batches.
      model_state: the model's other collections before the step.
      batch: this device's examples.
      rng: what ``keys_of_parts`` returned.
      per_example: collections whose arrays lie along the batch; they are cut like it.

    Returns:
      The model state after the step, in which arrays of integers, booleans and keys are
      the last micro-batch's; and the mean results.
    """
    if accumulate == 1:
        return one(model_state, batch, rng)
    is_cut = [
        in_collections(path, per_example) and x.ndim > 0
        for path, x in jax.tree_util.tree_leaves_with_path(model_state)
    ]
    leaves, treedef = jax.tree.flatten(model_state)

    def parts_of(tree: Any) -> Any:
        # [batch, ...] to [accumulate, batch / accumulate, ...]
        return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), tree)

    def evaluate(part: Any, batch: Any, rng: Array) -> Any:
        state = _merged(is_cut, part, _where(is_cut, leaves, False))
        state, results = one(jax.tree.unflatten(treedef, state), batch, rng)
        new = jax.tree.leaves(state)
        return _where(is_cut, new, True), _where(is_cut, new, False), results

    parts = (parts_of(_where(is_cut, leaves, True)), parts_of(batch), rng)
    shapes = jax.eval_shape(evaluate, *jax.tree.map(lambda x: x[0], parts))[1:]

    def add(sums: Any, part: Any) -> Any:
        cut, whole, results = evaluate(*part)
        whole = [
            total + x if _has_mean(x) else x
            for total, x in zip(sums[0], whole, strict=True)
        ]
        return (whole, jax.tree.map(jnp.add, sums[1], results)), cut

    # Sums are carried instead of a list of results: one micro-batch's memory.
    (whole, results), cut = jax.lax.scan(add, zeros_of(shapes), parts)
    whole = [x / accumulate if _has_mean(x) else x for x in whole]
    results = jax.tree.map(lambda x: x / accumulate, results)
    state = _merged(is_cut, [x.reshape(-1, *x.shape[2:]) for x in cut], whole)
    return jax.tree.unflatten(treedef, state), results


def in_collections(path: Any, names: Sequence[str]) -> bool:
    """Whether a path of the model state leads into one of the named collections."""
    # A model state that is a single array has an empty path.
    return bool(path) and getattr(path[0], "key", None) in names


def zeros_of(shapes: Any) -> Any:
    """Zeros of the shapes that ``jax.eval_shape`` returns."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _where(flags: Sequence[bool], values: Sequence[Any], wanted: bool) -> list[Any]:
    """The values whose flags are as wanted."""
    return [x for x, flag in zip(values, flags, strict=True) if flag == wanted]


def _merged(flags: Sequence[bool], true: Sequence[Any], false: Sequence[Any]) -> list:
    """Undoes ``_where``: takes each value from one of two sequences, by its flag."""
    values = {True: iter(true), False: iter(false)}
    return [next(values[flag]) for flag in flags]


def _has_mean(x: Array) -> bool:
    # Counters, flags and random keys have no mean.
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _shared(step: StepBatch, params: Params, args: tuple[Any, ...], x: Array) -> Any:
    """A mean over a micro-batch, times its share of all terms; and the share."""
    if step.layers is None or step.layers.terms.weights is None:
        return x, jnp.ones([], x.dtype)
    evaluator = tapped_pass.make_evaluator(
        step.loss_fn, step.layers, has_aux=True, fisher="empirical"
    )
    share = tapped_pass.share(evaluator, params, args).astype(x.dtype)
    return jnp.where(share > 0, x * share, 0), share


def _mean_over_all(one: Callable[..., Any], step: StepBatch) -> Any:
    _, results = accumulated(
        one, step.accumulate, step.model_state, step.batch, step.rng, step.per_example
    )
    total, share = collectives.mean(results, step.axis)
    return total / share


def _require_all_devices(name: str, step: StepBatch) -> None:
    if step.statistics_devices:
        raise ValueError(
            f"{name} cannot be evaluated with statistics_devices="
            f"{step.statistics_devices}, because these devices evaluate no part of the "
            "loss; use statistics_fraction or a statistics_batch instead"
        )
