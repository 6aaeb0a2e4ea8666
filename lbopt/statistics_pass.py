"""The evaluation of one step on one device, and the examples its statistics are of.

By default the statistics come from the gradient's own pass.  They have a separate pass,
which is skipped at steps at which none is due, if they are of

* the first part of each device's examples,
* another batch,
* the examples of some devices, while the others evaluate gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lbopt import checks
from lbopt._typing import Array, Params
from lbopt.batch_functions import accumulated, zeros_of
from lbopt.collectives import Axis
from lbopt.curvature import eigen_moments
from lbopt.curvature.fisher import (
    Curvature,
    Fisher,
    curvature_only,
    value_grad_and_curvature,
)
from lbopt.curvature.registry import Layers


class Evaluated(NamedTuple):
    """The results of a device: means over its micro-batches.

    Attributes:
      model_state: the model's other collections after the step.
      loss: the loss.
      metrics: the loss function's metrics.
      grads: the gradient, shaped like the parameters.
      curvature: the statistics of each layer by its path; empty without layers.
    """

    model_state: Any
    loss: Any
    metrics: Any
    grads: Any
    curvature: Any


def make_evaluate(
    loss_fn: Callable[..., Any],
    layers: Layers | None,
    axis: Axis,
    *,
    fisher: Fisher,
    accumulate: int,
    fraction: float,
    devices: int,
    per_example: Sequence[str],
    batch_size: int | None = None,
) -> Callable[..., Evaluated]:
    """Makes the function that evaluates one step on one device.

    Args:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``.
      layers: from ``trace_layers``; None for no curvature.
      axis: the devices.
      fisher: the Fisher matrix that the statistics are of.
      accumulate: number of micro-batches on each device.
      fraction: the fraction of each micro-batch, its first examples and at least one,
        that the statistics are of.
      devices: number of devices, the last ones, that evaluate nothing but statistics.
      per_example: collections of the model state whose arrays lie along the batch.
      batch_size: the number of terms that the loss of one micro-batch averages; None to
        read it off the batch.

    Returns:
      ``evaluate(params, model_state, batch, statistics_batch, rng, due)``, which takes
      the device's examples, the keys of its micro-batches (see ``keys_of_parts``) and
      the mask from ``refresh``.  If only some devices evaluate a result, it is scaled
      so that the mean over all devices is the mean over these.

    Raises:
      ValueError: for settings out of range or in conflict with each other; at a call,
        for a ``statistics_batch`` that they leave unused.
    """
    _check_settings(layers, axis, fraction, devices, per_example)
    # Without layers all three are the plain gradient: nothing is due then.
    alone = together = plain = _without_curvature(loss_fn)
    if layers is not None:
        kind: Any = {"has_aux": True, "fisher": fisher, "batch_size": batch_size}
        together = value_grad_and_curvature(loss_fn, layers, **kind)
        alone = curvature_only(loss_fn, layers, **kind)
    shortened = functools.partial(_shortened, fraction, per_example)

    def over_parts(one: Callable[..., Any], *own: Any) -> tuple[Any, Any]:
        return accumulated(one, accumulate, *own, per_example=per_example)

    def evaluate(
        params: Params,
        model_state: Any,
        batch: Any,
        statistics_batch: Any,
        rng: Array,
        due: Any,
    ) -> Evaluated:
        if statistics_batch is not None:
            _check_use(layers, fraction, devices, per_example)
        elif fraction == 1 and not devices:
            # One pass for both: the statistics cost no forward pass of their own.
            return _gradients(
                together, over_parts, params, model_state, batch, rng, due
            )

        def gradients() -> Evaluated:
            return _gradients(plain, over_parts, params, model_state, batch, rng)

        def statistics() -> Curvature:
            own = batch if statistics_batch is None else statistics_batch
            return _statistics(
                alone, over_parts, shortened, params, model_state, own, rng, due
            )

        if devices:
            return _apart(gradients, statistics, model_state, axis, devices)
        return gradients()._replace(curvature=statistics())

    return evaluate


def require_no_collectives(
    loss_fn: Callable[..., Any],
    params: Params,
    model_state: Any,
    batch: Any,
    rng: Array,
    *,
    parts: int,
    devices: int,
) -> None:
    """Raises ValueError if a loss would wait for devices that do not evaluate it.

    To be called outside ``shard_map`` and ``pmap``, where its collectives have no axis.

    Args:
      loss_fn: as for ``make_evaluate``.
      params: the parameters.
      model_state: the model's other collections.
      batch: the examples of all devices.
      rng: a key.
      parts: number of micro-batches on all devices together.
      devices: number of devices that evaluate statistics alone, for the message.

    Raises:
      ValueError: if the loss uses a mesh axis.
      NameError: if it has an undefined name of its own.
    """
    # Shapes of one micro-batch are enough: tracing finds the collectives.
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(x) // parts, *x.shape[1:]), x.dtype), batch
    )
    try:
        jax.eval_shape(loss_fn, params, model_state, part, rng)
    except NameError as error:
        if "unbound axis name" not in str(error):  # jax's words; it has no own type
            raise
        raise ValueError(
            f"statistics_devices={devices}, but the loss itself combines numbers over "
            f"devices ({str(error).split('.')[0]}) and would wait for those that do "
            "not evaluate it. Make its layers without axis_name (BatchNorm then sees "
            "a device's own examples), or use statistics_fraction or a "
            "statistics_batch instead"
        ) from error


def _without_curvature(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.value_and_grad`` with the signature of ``value_grad_and_curvature``."""
    with_gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def evaluate(*args: Any, rng: Any, due: Any) -> tuple[Any, Params, Any]:
        del rng, due
        return (*with_gradient(*args), {})

    return evaluate


def _gradients(
    evaluate: Callable[..., Any],
    over_parts: Callable[..., tuple[Any, Any]],
    params: Params,
    model_state: Any,
    batch: Any,
    rng: Array,
    due: Any = None,
) -> Evaluated:
    """Loss and gradients, with the statistics of the same pass if it has any."""

    def one(model_state: Any, batch: Any, rng: Array) -> Any:
        # Two keys, so that sampled labels are independent of dropout.
        loss_rng, label_rng = jax.random.split(rng)
        (loss, (model_state, metrics)), grads, curvature = evaluate(
            params, model_state, batch, loss_rng, rng=label_rng, due=due
        )
        return model_state, (loss, metrics, grads, curvature)

    model_state, means = over_parts(one, model_state, batch, rng)
    return Evaluated(model_state, *means)


def _statistics(
    evaluate: Callable[..., Curvature],
    over_parts: Callable[..., tuple[Any, Any]],
    shortened: Callable[[Any, Any], tuple[Any, Any]],
    params: Params,
    model_state: Any,
    batch: Any,
    rng: Array,
    due: Any,
) -> Curvature:
    """The statistics of a separate pass, or zeros without a pass if none is due."""

    def one(model_state: Any, batch: Any, rng: Array) -> Any:
        # The first of the two is the key of the loss in the gradient's pass.
        _, own_rng = jax.random.split(rng)
        loss_rng, label_rng = jax.random.split(own_rng)
        few = shortened(model_state, batch)
        curvature = evaluate(params, *few, loss_rng, rng=label_rng, due=due)
        return model_state, curvature

    def run() -> Curvature:
        return over_parts(one, model_state, batch, rng)[1]

    # The mask is the same on all devices, so that the model's own collectives may stand
    # inside the conditional.
    some = jnp.any(jnp.asarray(eigen_moments.flags(due)))
    return jax.lax.cond(some, run, lambda: zeros_of(jax.eval_shape(run)))


def _apart(
    gradients: Callable[[], Evaluated],
    statistics: Callable[[], Curvature],
    model_state: Any,
    axis: Axis,
    devices: int,
) -> Evaluated:
    """Evaluates statistics on the last devices and gradients on the others."""
    others = axis.size - devices
    is_other = axis.position() < others

    # Both branches of the conditional return the same shapes: zeros for what is not
    # evaluated, so that sums over devices are those of the devices that evaluate it.
    def only_gradients() -> Evaluated:
        return gradients()._replace(curvature=zeros_of(jax.eval_shape(statistics)))

    def only_statistics() -> Evaluated:
        nothing = jax.eval_shape(gradients)._replace(model_state=None)
        return zeros_of(nothing)._replace(
            model_state=model_state, curvature=statistics()
        )

    # The mean over all devices divides by axis.size instead of ``evaluating``.
    def scaled(tree: Any, evaluating: int) -> Any:
        return jax.tree.map(lambda x: x * (axis.size / evaluating), tree)

    def state_of_others(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):  # a running average
            return scaled(jnp.where(is_other, x, 0), others)
        return _first_of_devices(x, axis)

    found = jax.lax.cond(is_other, only_gradients, only_statistics)
    return Evaluated(
        model_state=jax.tree.map(state_of_others, found.model_state),
        loss=scaled(found.loss, others),
        metrics=scaled(found.metrics, others),
        grads=scaled(found.grads, others),
        curvature=scaled(found.curvature, devices),
    )


def _first_of_devices(x: Array, axis: Axis) -> Array:
    """The first device's array, on all devices."""
    # Keys cannot be gathered, only their data.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _first_of_devices(jax.random.key_data(x), axis)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.lax.all_gather(x, axis.name)[0]


def _shortened(
    fraction: float, per_example: Sequence[str], model_state: Any, batch: Any
) -> tuple[Any, Any]:
    """Model state and batch of the first examples."""

    def first(tree: Any) -> Any:
        # At least one example: a mean over none is NaN.
        return jax.tree.map(
            lambda x: x[: max(1, round(fraction * len(x)))] if x.ndim else x, tree
        )

    if per_example:
        model_state = {
            key: first(value) if key in per_example else value
            for key, value in model_state.items()
        }
    return model_state, first(batch)


def _check_settings(
    layers: Layers | None,
    axis: Axis,
    fraction: float,
    devices: int,
    per_example: Sequence[str],
) -> None:
    way_out = "1 takes the statistics from all examples"
    checks.share("statistics_fraction", fraction, way_out)
    way_out = "0 evaluates statistics and gradients on all devices"
    checks.whole("statistics_devices", devices, way_out, least=0)
    if layers is None and (fraction < 1 or devices):
        raise ValueError(
            f"statistics_fraction={fraction!r} and statistics_devices={devices!r} need "
            "layers; pass what lbopt.trace_layers returns, or leave them out"
        )
    if devices and axis.name is None:
        raise ValueError(f"statistics_devices={devices!r} needs a mesh; pass mesh=")
    if devices >= axis.size:
        raise ValueError(
            f"statistics_devices={devices!r} must be below {axis.size}, the size of "
            f"axis {axis.name!r}; the other devices evaluate the gradient"
        )
    if devices and (fraction < 1 or per_example):
        raise ValueError(
            f"statistics_devices={devices} excludes statistics_fraction={fraction!r} "
            "(these devices use all their examples) and per_example="
            f"{tuple(per_example)!r} (such collections would not be updated there); "
            "leave out one or the other"
        )


def _check_use(
    layers: Layers | None, fraction: float, devices: int, per_example: Sequence[str]
) -> None:
    if layers is None:
        raise ValueError("statistics_batch is given, but layers=None; pass layers")
    if fraction < 1 or devices:
        raise ValueError(
            f"statistics_batch is given, but statistics_fraction={fraction!r} and "
            f"statistics_devices={devices} take the statistics from the batch; leave "
            "out one or the other"
        )
    if per_example:
        raise ValueError(
            f"statistics_batch is given, but per_example={tuple(per_example)!r} "
            "collections lie along the batch; use statistics_fraction instead"
        )
