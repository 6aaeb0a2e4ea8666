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
from lbopt.curvature import eigen_moments, evaluation
from lbopt.curvature.evaluation import Curvature, Fisher, Totals
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
      batch_size: the number of terms that the loss averages, of the micro-batches of
        all devices together; None if it is found.

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
    passes = _Passes(
        loss_fn,
        _evaluator(loss_fn, layers, fisher, batch_size, axis.size * accumulate),
        axis,
        accumulate,
        per_example,
    )
    shortened = functools.partial(_shortened, fraction, per_example)

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
            return passes.gradients(params, model_state, batch, rng, due)
        if due is None:
            return passes.gradients(params, model_state, batch, rng)

        def gradients() -> Evaluated:
            return passes.gradients(params, model_state, batch, rng)

        def statistics() -> Totals:
            own = batch if statistics_batch is None else statistics_batch
            return passes.statistics(shortened, params, model_state, own, rng, due)

        if devices:
            found, totals = _apart(gradients, statistics, model_state, axis, devices)
        else:
            found, totals = gradients(), statistics()
        curvature = passes.finish(totals, due, devices)
        return found._replace(curvature=curvature)

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


def _evaluator(
    loss_fn: Callable[..., Any],
    layers: Layers | None,
    fisher: Fisher,
    batch_size: int | None,
    parts: int,
) -> evaluation.Evaluator | None:
    """What evaluates one part of the batch with taps; None without layers."""
    if layers is None:
        return None
    if batch_size is not None:
        checks.whole("batch_size", batch_size, "None: trace_layers finds it")
        if batch_size % parts:
            raise ValueError(
                f"batch_size={batch_size!r} must be a multiple of {parts}, the number "
                "of micro-batches on all devices together"
            )
        batch_size //= parts
    if parts > 1:
        evaluation.require_one_share(layers)
    return evaluation.make_evaluator(
        loss_fn, layers, has_aux=True, fisher=fisher, batch_size=batch_size
    )


class _Passes(NamedTuple):
    """The passes over a device's examples.

    Attributes:
      loss_fn: as for ``make_evaluate``.
      evaluator: evaluates it with taps; None without layers.
      axis: the devices.
      accumulate: number of micro-batches.
      per_example: as for ``make_evaluate``.
    """

    loss_fn: Callable[..., Any]
    evaluator: evaluation.Evaluator | None
    axis: Axis
    accumulate: int
    per_example: Sequence[str]

    def gradients(
        self,
        params: Params,
        model_state: Any,
        batch: Any,
        rng: Array,
        due: Any = None,
    ) -> Evaluated:
        """Loss and gradients, with the statistics of the same pass if any are due."""
        evaluator = self.evaluator
        if evaluator is None or (due is None and not evaluator.weighted):
            return self._plain(params, model_state, batch, rng)

        def one(model_state: Any, batch: Any, rng: Array) -> Any:
            # Two keys, so that sampled labels are independent of dropout.
            loss_rng, label_rng = jax.random.split(rng)
            totals = evaluation.evaluate(
                evaluator,
                params,
                (model_state, batch, loss_rng),
                {},
                rng=label_rng,
                due={} if due is None else due,
                gradient=True,
                additive=True,
            )
            model_state, metrics = totals.aux
            metrics = evaluation.times_share(evaluator, metrics, totals.share)
            return model_state, totals._replace(aux=metrics)

        model_state, totals = self._over_parts(one, model_state, batch, rng)
        whole = evaluation.divided(evaluator, totals, self.axis)
        curvature = {} if due is None else self.finish(totals, due, 0)
        return Evaluated(model_state, whole.value, whole.aux, whole.grads, curvature)

    def _plain(
        self, params: Params, model_state: Any, batch: Any, rng: Array
    ) -> Evaluated:
        """Loss and gradients of terms without weights."""

        def one(model_state: Any, batch: Any, rng: Array) -> Any:
            loss_rng, _ = jax.random.split(rng)
            (loss, (model_state, metrics)), grads = jax.value_and_grad(
                self.loss_fn, has_aux=True
            )(params, model_state, batch, loss_rng)
            return model_state, (loss, metrics, grads)

        model_state, means = self._over_parts(one, model_state, batch, rng)
        loss, metrics, grads = means
        return Evaluated(model_state, loss, metrics, grads, {})

    def statistics(
        self,
        shortened: Callable[[Any, Any], tuple[Any, Any]],
        params: Params,
        model_state: Any,
        batch: Any,
        rng: Array,
        due: Any,
    ) -> Totals:
        """The sums of a separate pass, or zeros without a pass if none is due."""
        evaluator = self.evaluator
        assert evaluator is not None

        def one(model_state: Any, batch: Any, rng: Array) -> Any:
            # The first of the two is the key of the loss in the gradient's pass.
            _, own_rng = jax.random.split(rng)
            loss_rng, label_rng = jax.random.split(own_rng)
            few = shortened(model_state, batch)
            totals = evaluation.evaluate(
                evaluator,
                params,
                (*few, loss_rng),
                {},
                rng=label_rng,
                due=due,
                gradient=False,
                additive=True,
            )
            return model_state, totals._replace(value=(), aux=())

        def run() -> Totals:
            return self._over_parts(one, model_state, batch, rng)[1]

        # The mask is the same on all devices, so that the model's own collectives may
        # stand inside the conditional.
        flags = eigen_moments.flags(due)
        if all(isinstance(flag, bool) for flag in flags) and any(flags):
            return run()
        some = jnp.any(jnp.asarray(flags))
        return jax.lax.cond(some, run, lambda: zeros_of(jax.eval_shape(run)))

    def finish(self, totals: Totals, due: Any, devices: int) -> Curvature:
        """Divides the sums; only ``devices`` of them have any, unless it is 0."""
        assert self.evaluator is not None
        return evaluation.finish(
            self.evaluator,
            totals,
            due,
            parts=self.accumulate,
            axis=self.axis,
            devices=devices,
        )

    def _over_parts(self, one: Callable[..., Any], *own: Any) -> tuple[Any, Any]:
        return accumulated(one, self.accumulate, *own, per_example=self.per_example)


def _apart(
    gradients: Callable[[], Evaluated],
    statistics: Callable[[], Totals],
    model_state: Any,
    axis: Axis,
    devices: int,
) -> tuple[Evaluated, Totals]:
    """Evaluates statistics on the last devices and gradients on the others."""
    others = axis.size - devices
    is_other = axis.position() < others

    # Both branches of the conditional return the same shapes: zeros for what is not
    # evaluated, so that sums over devices are those of the devices that evaluate it.
    def only_gradients() -> tuple[Evaluated, Totals]:
        return gradients(), zeros_of(jax.eval_shape(statistics))

    def only_statistics() -> tuple[Evaluated, Totals]:
        nothing = jax.eval_shape(gradients)._replace(model_state=None)
        return zeros_of(nothing)._replace(model_state=model_state), statistics()

    # The mean over all devices divides by axis.size instead of ``others``.
    def scaled(tree: Any) -> Any:
        return jax.tree.map(lambda x: x * (axis.size / others), tree)

    def state_of_others(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):  # a running average
            return scaled(jnp.where(is_other, x, 0))
        return _first_of_devices(x, axis)

    found, totals = jax.lax.cond(is_other, only_gradients, only_statistics)
    whole = Evaluated(
        model_state=jax.tree.map(state_of_others, found.model_state),
        loss=scaled(found.loss),
        metrics=scaled(found.metrics),
        grads=scaled(found.grads),
        curvature={},
    )
    return whole, totals


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
