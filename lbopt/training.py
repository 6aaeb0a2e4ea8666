"""Training state, and compiled training and evaluation steps.

**Bad numbers.** A step in which the loss or the norm of the gradient is not finite
changes nothing but the counters ``step`` and ``skipped``.

**Devices.** On a mesh each device evaluates the loss on its share of the batch, and
each micro-batch with a key of its own.  An optimizer made with ``placement`` combines
the gradients and statistics of its layers itself; transformations before it in a chain
see each device's own.  All others are averaged before the update.  Normalisation layers
see one micro-batch, or, if they were made with ``axis_name``, the micro-batches that
all devices evaluate at the same time; their running averages are averaged over devices.

**Statistics** come from the gradient's own pass, unless they are of a part of the batch
(``statistics_fraction``), of another batch (``statistics_batch``), or evaluated by
other devices (``statistics_devices``).  They then have a separate pass with its own
keys, which changes no model state and is skipped at steps at which no statistic is due.

With ``statistics_devices=m`` of N devices, m / N of the examples are for statistics
alone.  Transformations before an optimizer with ``placement`` then see gradients times
N / (N − m), and zeros on the m devices.

**Optimizers** get ``value``, the loss, ``grad``, the mean gradient, and two functions
that cost nothing unless called: ``value_fn``, the loss of this batch at other
parameters, and ``fisher_products``, products with its exact Fisher matrix.  Sources:
Martens & Grosse 2015 (a part of the batch); Ba, Grosse & Martens 2017, §3 (separate
devices).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lbopt import batch_functions, checks, collectives, health, mesh_step, sharding
from lbopt._typing import Array, AxisName, OptState, Params
from lbopt.collectives import Axis
from lbopt.curvature.fisher import Fisher
from lbopt.curvature.refresh import Due, refresh
from lbopt.curvature.registry import Layers
from lbopt.in_place import update_if
from lbopt.mesh_step import Step
from lbopt.norms import squared_norm
from lbopt.scheduled_step import ScheduledStep
from lbopt.statistics_pass import make_evaluate, require_no_collectives
from lbopt.transforms import average, kfac_state, validation

__all__ = [
    "TrainState",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "opt_state_bytes",
]

Batch: TypeAlias = Any
"""Any tree of arrays whose leading axis is over examples."""
LossFn = Callable[[Params, Any, Batch, Array], tuple[Array, tuple[Any, Mapping]]]
"""``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``."""
T = TypeVar("T")
Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps
Parallel: TypeAlias = Literal["shard_map", "pmap"]


class TrainState(NamedTuple):
    """Everything that a run carries from step to step.

    Attributes:
      step: number of steps taken.
      params: the parameters.
      model_state: the model's other collections, such as ``batch_stats``.
      opt_state: the optimizer's state.
      rng: the key from which each step's keys are derived.
      skipped: number of steps skipped because the loss or gradient was not finite.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any
    skipped: Any


def init_state(
    tx: Optimizer,
    params: Params,
    model_state: Any,
    rng: Array,
    mesh: Mesh | None = None,
    *,
    axis_name: AxisName = "data",
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      params: the parameters.
      model_state: the model's other collections; ``{}`` if there are none.
      rng: a key.
      mesh: the devices on which ``sharding.place`` puts the state; None for the default
        device.
      axis_name: the mesh axis over which the batch is distributed, or a tuple of axes.

    Returns:
      The state; no two of its arrays share a buffer, so that steps may donate it.

    Raises:
      ValueError: for ``optax.MultiSteps`` around an optimizer with curvature, and for
        ``average_params`` that is not the last of its chain.
    """
    opt_state = tx.init(params)
    _require_no_multi_steps(opt_state)
    average.require_last(opt_state)
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        rng=rng,
        skipped=jnp.zeros([], jnp.int32),
    )
    # Optimizers may keep the parameters themselves, and a buffer is donated only once.
    state = jax.tree.map(jnp.copy, state)
    return state if mesh is None else sharding.place(state, mesh, axis_name)


def make_train_step(
    loss_fn: LossFn,
    tx: Optimizer,
    layers: Layers | None = None,
    mesh: Mesh | None = None,
    *,
    fisher: Fisher = "empirical",
    axis_name: AxisName = "data",
    accumulate: int = 1,
    parallel: Parallel = "shard_map",
    per_example: Sequence[str] = (),
    statistics_fraction: float = 1.0,
    statistics_devices: int = 0,
    batch_size: int | None = None,
) -> Step:
    """Compiles one training step; see ``lbopt.training`` for all that it does.

    Args:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``;
        loss and metrics are means over the batch.
      tx: the optimizer.
      layers: from ``trace_layers``; None for an optimizer without curvature.
      mesh: the devices; None for one, or where ``jit`` alone places the work.
      fisher: the Fisher matrix that the statistics are of.
      axis_name: the mesh axis over which the batch is distributed, or a tuple of axes.
      accumulate: number of micro-batches on each device, for batches beyond memory;
        results are means over all micro-batches, however many devices share them.
      parallel: ``"shard_map"``, or ``"pmap"`` for a mesh of one axis.
      per_example: collections of the model state whose arrays lie along the batch.
      statistics_fraction: the fraction of each micro-batch, its first examples and at
        least one, that the statistics are of, in (0, 1]; shuffle the data.
      statistics_devices: number of devices, the last ones of the axis, that evaluate
        statistics on their examples, while the others evaluate loss and gradients.
      batch_size: the number of terms that the loss of the whole batch averages, that of
        all devices and micro-batches, if it is neither the leading size of the batch
        nor declared by ``likelihood``.

    Returns:
      ``train_step(state, batch, statistics_batch=None) -> (state, metrics)``, compiled
      at its first calls; it donates ``state``, except under ``"pmap"``.  Where an
      optimizer renews curvature at fixed periods there is a program for each kind of
      step, chosen by ``state.step`` (``lbopt.scheduled_step``).  ``statistics_batch``
      is of any size that can be divided evenly.  ``metrics`` are those of the loss
      function, ``loss``, ``skipped``, the number of steps so far that changed nothing,
      and those of ``health.metrics``.

    Raises:
      ValueError: for a mesh without the axis, for settings that exclude each other,
        and, at the first call, for a batch that cannot be divided evenly.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> from lbopt import training
      >>> model, batch = nn.Sequential([nn.Dense(3)]), {"x": jnp.ones((8, 5))}
      >>> params = model.init(jax.random.key(0), batch["x"])["params"]
      >>> def loss_fn(params, model_state, batch, rng):
      ...     outputs = model.apply({"params": params}, batch["x"])
      ...     return jnp.mean(outputs**2), (model_state, {})
      >>> rng = jax.random.key(1)
      >>> layers = lbopt.trace_layers(loss_fn, params, {}, batch, rng, has_aux=True)
      >>> mesh = lbopt.sharding.make_mesh(jax.devices()[:2])
      >>> tx = lbopt.kfac(0.1, layers, placement=lbopt.Placement("data", 2))
      >>> state = training.init_state(tx, params, {}, rng, mesh)
      >>> train_step = training.make_train_step(loss_fn, tx, layers, mesh)
      >>> state, metrics = train_step(state, batch)
      >>> int(state.step), sorted(metrics)
      (1, ['device_grad_norm', 'first_not_finite', 'kl_scale', 'loss', 'skipped'])
    """
    axis = Axis(None, 1) if mesh is None else collectives.axis_of(mesh, axis_name)
    checks.whole("accumulate", accumulate, "1 evaluates a device's batch at once")
    checks.one_of("parallel", parallel, get_args(Parallel))
    subset = statistics_fraction, statistics_devices, batch_size
    job = _Job(loss_fn, tx, layers, axis, fisher, accumulate, per_example, *subset)
    check = _checks_of(job)
    if mesh is not None and parallel == "pmap" and (len(mesh.shape) > 1 or per_example):
        raise ValueError(
            f"parallel='pmap' needs a mesh of one axis, not {dict(mesh.shape)}, and no "
            "per_example collections; use parallel='shard_map'"
        )

    def program(due: Due) -> Step:
        step = _step_on_device(job, due)
        if mesh is None:
            return mesh_step.without_mesh(step)
        if parallel == "shard_map":
            return mesh_step.by_shard_map(step, mesh, axis, per_example, check)
        return mesh_step.by_pmap(step, mesh, axis, check)

    # Devices that evaluate statistics alone have nothing else to do.
    scheduled = layers is not None and not statistics_devices
    return ScheduledStep(program, tx.init if scheduled else None)


class _Job(NamedTuple):
    """The arguments of ``make_train_step``."""

    loss_fn: LossFn
    tx: Optimizer
    layers: Layers | None
    axis: Axis
    fisher: Fisher
    accumulate: int
    per_example: Sequence[str]
    fraction: float
    devices: int
    batch_size: int | None

    @property
    def parts(self) -> int:
        """The number of micro-batches on all devices together."""
        return self.axis.size * self.accumulate


def _step_on_device(job: _Job, kind: Due) -> Step:
    """The step of one device, not yet compiled, for what it renews."""
    layers, axis, accumulate = job.layers, job.axis, job.accumulate
    tx = job.tx
    if isinstance(tx, optax.MultiSteps):  # it has the methods, and is none
        tx = tx.gradient_transformation()
    tx = optax.with_extra_args_support(tx)
    evaluate = make_evaluate(
        job.loss_fn,
        layers,
        axis,
        fisher=job.fisher,
        accumulate=accumulate,
        fraction=job.fraction,
        devices=job.devices,
        per_example=job.per_example,
        batch_size=job.batch_size,
    )

    def train_step(
        state: TrainState, batch: Batch, statistics_batch: Batch | None, flags: Due
    ) -> tuple[TrainState, dict[str, Array]]:
        due = kind if kind.is_static else flags
        _require_no_multi_steps(state.opt_state)
        # By number, so that a run that is resumed draws the same keys.
        rng = jax.random.fold_in(state.rng, state.step)
        rng = batch_functions.keys_of_parts(rng, axis, accumulate)
        if axis.name is None:  # on a mesh it is checked before it is cut
            _check_batch("statistics_batch", statistics_batch, job)
        mask = None
        if layers is not None and due.statistics is not False:
            mask = refresh(state.opt_state, due)
        found = evaluate(
            state.params, state.model_state, batch, statistics_batch, rng, mask
        )
        loss, metrics = collectives.mean((found.loss, found.metrics), axis)
        new_model_state = _combined(found.model_state, job)
        # The optimizer itself combines what belongs to these layers.
        split = mesh_step.split_layers(state.opt_state)
        known = [layers[path] for path in split] if layers is not None else []
        grads = sharding.mean_of_others(found.grads, known, axis)
        extra = _functions_of(job, state, batch, rng) | {"value": loss}
        extra["grad"] = collectives.mean(found.grads, axis)
        if layers is not None:
            extra["curvature"] = {
                path: own if path in split else collectives.mean(own, axis)
                for path, own in found.curvature.items()
            }
            extra["due"] = due

        def update(old: Any) -> Any:
            params, opt_state, _ = old
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state, new_model_state

        # The norm: a square that overflows is no use either; summed, to decide alike.
        square = collectives.total(squared_norm(grads), axis)
        sound = jnp.isfinite(loss) & jnp.isfinite(square)
        old = state.params, state.opt_state, state.model_state
        if layers is None or due.is_static:
            params, opt_state, model_state = _chosen(sound, update(old), old)
        else:
            params, opt_state, model_state = update_if(sound, update, old)
        skipped = state.skipped + ~sound
        seen = health.Found(grads, found.curvature, square, sound)
        watched = health.metrics(layers, seen, state.opt_state, opt_state, axis)
        # The step counts skipped batches too, so that the next one has another key.
        state = TrainState(
            state.step + 1, params, model_state, opt_state, state.rng, skipped
        )
        # A metric of the user's own goes before ours of the same name.
        return state, {**watched, **metrics, "loss": loss, "skipped": skipped}

    return train_step


def _chosen(flag: Array, new: T, old: T) -> T:
    """Returns the new arrays if the flag is set, else the old ones."""

    def one(new: Array, old: Array) -> Array:
        # An array that a step passes on needs no choice.
        return new if new is old else jnp.where(flag, new, old)

    return jax.tree.map(one, new, old)


def _functions_of(
    job: _Job, state: TrainState, batch: Batch, rng: Array
) -> dict[str, Any]:
    """The functions of the step's batch that the optimizer may call."""
    of_job = job.loss_fn, job.axis, job.accumulate, job.devices
    step = batch_functions.StepBatch(
        *of_job, state.model_state, batch, rng, job.per_example, job.layers
    )
    products = functools.partial(batch_functions.mean_products, step, state.params)

    def value_fn(
        params: Params,
        *,
        curvature: Any = None,
        due: Any = None,
        fisher_products: Any = None,
    ) -> Array:
        # Named, because a line search gives it all extra arguments or refuses them.
        del curvature, due, fisher_products
        # A line search differentiates it by parameters that all devices share.
        return batch_functions.mean_loss(step, collectives.shared(params, job.axis))

    return {
        "value_fn": value_fn,
        "fisher_products": products,
    }


def _combined(model_state: Any, job: _Job) -> Any:
    """The model state after a step, with running averages averaged over devices."""

    def mean(path: Any, x: Array) -> Array:
        # Examples are each device's own; counters and keys are the same on all.
        own = batch_functions.in_collections(path, job.per_example)
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return collectives.mean(x, job.axis) if floating and not own else x

    return jax.tree_util.tree_map_with_path(mean, model_state)


def _checks_of(job: _Job) -> mesh_step.Check:
    """The checks of a step's arguments, before they are cut over devices."""

    def check(state: TrainState, batch: Batch, statistics_batch: Batch | None) -> None:
        sharding.require_rows(state.opt_state, job.axis)
        _check_batch("batch", batch, job)
        _check_batch("statistics_batch", statistics_batch, job)
        if job.devices:  # statistics-only devices must not block the others
            require_no_collectives(
                job.loss_fn,
                state.params,
                state.model_state,
                batch,
                state.rng,
                parts=job.parts,
                devices=job.devices,
            )

    return check


def _check_batch(name: str, batch: Batch, job: _Job) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        # Uneven parts would need weights in every mean over them.
        if not x.ndim or x.shape[0] % job.parts:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {list(x.shape)}; its "
                f"leading size must be a multiple of {job.axis.size} devices × "
                f"accumulate={job.accumulate}"
            )


def _require_no_multi_steps(opt_state: OptState) -> None:
    """Raises ValueError for ``optax.MultiSteps`` around a curvature transform."""

    def is_multi(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    for node in jax.tree.leaves(opt_state, is_leaf=is_multi):
        if is_multi(node) and kfac_state.curvature_states(node.inner_opt_state):
            raise ValueError(validation.MULTI_STEPS)


def make_eval_step(
    eval_fn: Callable[[Params, Any, Batch], Mapping[str, Array]],
) -> Callable[[TrainState, Batch], Mapping[str, Array]]:
    """Compiles one evaluation step.

    Args:
      eval_fn: ``(params, model_state, batch) -> sums`` over the batch; sums, because
        they add up over batches of different sizes.

    Returns:
      ``eval_step(state, batch) -> sums``, jitted.
    """

    def eval_step(state: TrainState, batch: Batch) -> Mapping[str, Array]:
        return eval_fn(state.params, state.model_state, batch)

    return jax.jit(eval_step)  # donates nothing: training goes on with the state


def opt_state_bytes(opt_state: OptState) -> int:
    """Bytes of an optimizer's state."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state))
