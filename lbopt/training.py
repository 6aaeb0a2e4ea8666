"""The one place that compiles: training state and the steps over it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from lbopt import batch_functions, collectives, sharding, statistics_pass
from lbopt._typing import Array, OptState, Params
from lbopt.collectives import Axis
from lbopt.curvature.fisher import Fisher
from lbopt.curvature.refresh import refresh
from lbopt.curvature.registry import Layers
from lbopt.in_place import update_if

Batch: TypeAlias = Any
"""Any tree of arrays whose leading axis numbers the examples."""
LossFn = Callable[[Params, Any, Batch, Array], tuple[Array, tuple[Any, Mapping]]]
"""``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``."""
Parallel: TypeAlias = Literal["shard_map", "pmap"]
Step: TypeAlias = Callable[..., tuple["TrainState", dict[str, Array]]]
"""``(state, batch, statistics_batch=None) -> (state, metrics)``."""


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      step: steps taken.
      params: the parameters.
      model_state: the model's other collections, such as ``batch_stats``.
      opt_state: the optimizer's state.
      rng: the key that each step's keys are folded from.
      skipped: steps that changed nothing because a number was not finite.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any
    skipped: Any


def init_state(
    tx: optax.GradientTransformation,
    params: Params,
    model_state: Any,
    rng: Array,
    mesh: Mesh | None = None,
    *,
    axis_name: str = "data",
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      params: the parameters.
      model_state: the model's other collections; ``{}`` if there are none.
      rng: a key.
      mesh: the devices that the state is put on, as ``sharding.specs`` says; None for
        the default device.
      axis_name: the mesh axis over which examples are spread.

    Returns:
      The state; no two of its arrays share a buffer, so that steps may donate it.
    """
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        rng=rng,
        skipped=jnp.zeros([], jnp.int32),
    )
    state = jax.tree.map(jnp.copy, state)
    return state if mesh is None else sharding.place(state, mesh, axis_name)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    layers: Layers | None = None,
    mesh: Mesh | None = None,
    *,
    fisher: Fisher = "empirical",
    axis_name: str = "data",
    accumulate: int = 1,
    parallel: Parallel = "shard_map",
    per_example: Sequence[str] = (),
    statistics_fraction: float = 1.0,
    statistics_devices: int = 0,
) -> Step:
    """Compiles one training step.

    A step in which the loss or the norm of the gradient is not finite changes nothing
    but the counters ``step`` and ``skipped``.

    On a mesh each device evaluates the loss on its share of the batch, and each
    micro-batch with a key of its own.  An optimizer made with ``axis_name`` combines
    the gradients and statistics of its layers itself (what stands before it in a chain
    sees each device's own); all others are averaged before the update.  Normalisation
    layers see a micro-batch alone, or, if they were made with ``axis_name``, those that
    all devices evaluate at a time; their running averages are averaged over devices.

    The statistics come out of the gradient's own pass, unless they are to be those of a
    part of the batch, of a batch of their own, or of devices of their own.  A pass of
    their own has keys of its own, changes no model state, and is left out at steps
    where no statistic is due.

    The optimizer is passed ``value``, the loss, and two functions of this batch on all
    devices, which cost nothing unless they are called: ``value_fn``, the loss at other
    parameters, and ``fisher_products``, products of vectors with the exact Fisher
    matrix at these.

    Args:
      loss_fn: ``(params, model_state, batch, rng) -> (loss, (model_state, metrics))``;
        the loss is a mean over the batch, and so are the metrics.
      tx: the optimizer.
      layers: what ``trace_layers`` found; None for an optimizer without curvature.
      mesh: the devices; None for one, or where ``jit`` alone places the work.
      fisher: which Fisher matrix the statistics are of.
      axis_name: the mesh axis over which examples are spread.
      accumulate: micro-batches that a device's share of the batch is cut into, for
        batches beyond memory; loss, gradients, statistics and the model's running
        averages are the means over all of them, so that only the number of all
        micro-batches counts, not how many devices share them.
      parallel: ``"shard_map"``, or ``"pmap"`` for a mesh of one axis.
      per_example: collections of the model state whose arrays lie along the batch.
      statistics_fraction: the share of the examples that the statistics are of, in
        (0, 1]: the first of each device's (of each micro-batch), at least one.  It is a
        random part if the data are shuffled.
      statistics_devices: how many devices of the axis, the last ones, evaluate
        statistics on their own examples, while the others evaluate loss and gradients:
        of N · b examples m · b are for the m of them.  What stands before an optimizer
        with ``axis_name`` sees gradients times N / (N − m), and zeros on the m.

    Returns:
      ``train_step(state, batch, statistics_batch=None) -> (state, metrics)``, jitted;
      it donates ``state`` (under ``"pmap"`` it does not).  The statistics are those of
      ``statistics_batch`` where it is given, of any size that can be cut evenly.  The
      metrics are those of the loss function, ``loss``, and ``skipped``.

    Raises:
      ValueError: for a mesh without the axis, for settings that exclude each other,
        and, at the first call, for a batch that cannot be cut evenly.

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
      (1, ['loss', 'skipped'])

    Source: a part of the batch for the statistics, Martens & Grosse 2015; workers that
    evaluate statistics on independent examples, Ba, Grosse & Martens 2017, §3.  There
    they push statistics whenever they are ready; here all devices keep step, and the
    gradients' devices wait for the statistics' if these take longer.
    """
    if mesh is not None and axis_name not in mesh.shape:
        raise ValueError(
            f"axis_name={axis_name!r} is no axis of the mesh {dict(mesh.shape)}; make "
            "it with lbopt.sharding.make_mesh(axis_name=...) or name one of its axes"
        )
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r} must be a number of parts, ≥ 1")
    if parallel not in ("shard_map", "pmap"):
        raise ValueError(f"parallel={parallel!r} must be 'shard_map' or 'pmap'")
    axis = Axis(None, 1) if mesh is None else Axis(axis_name, mesh.shape[axis_name])
    tx = optax.with_extra_args_support(tx)
    evaluate = statistics_pass.make_evaluate(
        loss_fn,
        layers,
        axis,
        fisher=fisher,
        accumulate=accumulate,
        fraction=statistics_fraction,
        devices=statistics_devices,
        per_example=per_example,
    )

    def train_step(
        state: TrainState, batch: Batch, statistics_batch: Batch | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        rng = batch_functions.keys_of_parts(rng, axis, accumulate)
        if mesh is None:
            _check_batch("statistics_batch", statistics_batch, axis, accumulate)
        due = None if layers is None else refresh(state.opt_state)
        new_model_state, loss, metrics, grads, curvature = evaluate(
            state.params, state.model_state, batch, statistics_batch, rng, due
        )
        loss, metrics = collectives.mean((loss, metrics), axis)
        new_model_state = _combined(new_model_state, per_example, axis)
        split = sharding.split_layers(state.opt_state)
        known = [layers[path] for path in split] if layers is not None else []
        grads = sharding.mean_of_others(grads, known, axis)
        curvature = {
            path: statistics if path in split else collectives.mean(statistics, axis)
            for path, statistics in curvature.items()
        }
        extra: dict[str, Any] = {} if layers is None else {"curvature": curvature}
        own = batch_functions.StepBatch(
            loss_fn,
            axis,
            accumulate,
            statistics_devices,
            state.model_state,
            batch,
            rng,
            per_example,
        )
        extra |= {
            "value": loss,
            "value_fn": functools.partial(batch_functions.mean_loss, own),
            "fisher_products": functools.partial(
                batch_functions.mean_products, own, state.params
            ),
        }

        def update(old: Any) -> Any:
            params, opt_state, _ = old
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state, new_model_state

        # The norm, not each entry: a gradient whose square overflows is no use either.
        square = collectives.total(optax.tree.norm(grads, squared=True), axis)
        sound = jnp.isfinite(loss) & jnp.isfinite(square)
        params, opt_state, model_state = update_if(
            sound, update, (state.params, state.opt_state, state.model_state)
        )
        skipped = state.skipped + ~sound
        state = TrainState(
            state.step + 1, params, model_state, opt_state, state.rng, skipped
        )
        return state, {**metrics, "loss": loss, "skipped": skipped}

    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)

    def check_loss(state: TrainState, batch: Batch) -> None:
        if statistics_devices:
            statistics_pass.require_no_collectives(
                loss_fn,
                state.params,
                state.model_state,
                batch,
                state.rng,
                parts=axis.size * accumulate,
                devices=statistics_devices,
            )

    if parallel == "pmap":
        return _by_pmap(train_step, check_loss, mesh, axis, accumulate, per_example)

    def sharded_step(
        state: TrainState, batch: Batch, statistics_batch: Batch | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_batch("batch", batch, axis, accumulate)
        _check_batch("statistics_batch", statistics_batch, axis, accumulate)
        check_loss(state, batch)
        state_specs = _specs(state, axis_name, per_example)
        along = PartitionSpec(axis_name)
        return jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(state_specs, along, along),
            out_specs=(state_specs, PartitionSpec()),
            # Collectives are placed by hand; jax would add its own for what it takes
            # to vary over devices.
            check_vma=False,
        )(state, batch, statistics_batch)

    return jax.jit(sharded_step, donate_argnums=0)


def _combined(model_state: Any, per_example: Sequence[str], axis: Axis) -> Any:
    """The model state after a step: running averages as means over devices."""

    def mean(path: Any, x: Array) -> Array:
        own = path and getattr(path[0], "key", None) in per_example
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return collectives.mean(x, axis) if floating and not own else x

    return jax.tree_util.tree_map_with_path(mean, model_state)


def _specs(state: TrainState, axis_name: str, per_example: Sequence[str]) -> TrainState:
    """How a training state lies on the mesh."""
    along = PartitionSpec(axis_name)
    specs = sharding.specs(state, axis_name)
    if per_example:
        marked = {
            key: jax.tree.map(lambda x: along if x.ndim else PartitionSpec(), value)
            if key in per_example
            else specs.model_state[key]
            for key, value in state.model_state.items()
        }
        specs = specs._replace(model_state=marked)
    return specs


def _by_pmap(
    train_step: Step,
    check_loss: Callable[[TrainState, Batch], None],
    mesh: Mesh,
    axis: Axis,
    accumulate: int,
    per_example: Sequence[str],
) -> Step:
    """The step under ``jax.pmap``, with the same states and batches outside."""
    if len(mesh.shape) > 1 or per_example:
        raise ValueError(
            f"parallel='pmap' needs a mesh of one axis, not {dict(mesh.shape)}, and no "
            "per_example collections; use parallel='shard_map'"
        )
    compiled: dict[Any, Any] = {}

    def shares(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(axis.size, -1, *x.shape[1:]), batch)

    def pmapped_step(
        state: TrainState, batch: Batch, statistics_batch: Batch | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        _check_batch("batch", batch, axis, accumulate)
        _check_batch("statistics_batch", statistics_batch, axis, accumulate)
        tree = jax.tree.structure(state)
        if tree not in compiled:
            check_loss(state, batch)
            axes = jax.tree.map(
                lambda spec: 0 if spec else None,
                sharding.specs(state, str(axis.name)),
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
            compiled[tree] = jax.pmap(
                train_step,
                str(axis.name),
                in_axes=(axes, 0, 0),
                out_axes=(axes, None),
                devices=list(mesh.devices.ravel()),
            )
        return compiled[tree](state, shares(batch), shares(statistics_batch))

    return pmapped_step


def _check_batch(name: str, batch: Batch, axis: Axis, accumulate: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if not x.ndim or x.shape[0] % (axis.size * accumulate):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {list(x.shape)}; its "
                f"leading size must be a multiple of {axis.size} devices × "
                f"accumulate={accumulate}"
            )


def make_eval_step(
    eval_fn: Callable[[Params, Any, Batch], Mapping[str, Array]],
) -> Callable[[TrainState, Batch], Mapping[str, Array]]:
    """Compiles one evaluation step.

    Args:
      eval_fn: ``(params, model_state, batch) -> sums`` over the batch, so that batches
        of any size add up.

    Returns:
      ``eval_step(state, batch) -> sums``, jitted.
    """

    def eval_step(state: TrainState, batch: Batch) -> Mapping[str, Array]:
        return eval_fn(state.params, state.model_state, batch)

    return jax.jit(eval_step)


def opt_state_bytes(opt_state: OptState) -> int:
    """Bytes of an optimizer's state."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state))
