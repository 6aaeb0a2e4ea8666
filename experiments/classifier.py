"""The program of an image classifier: data, model, loss, optimizer, compiled steps.

`experiments.loop` runs it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lbopt
from experiments import curvature_metrics, optimizers
from experiments.data import device_feed, pipeline, virtual_batch
from experiments.models.registry import MODELS, Model
from experiments.settings import Config
from lbopt import training
from lbopt.curvature import registry
from lbopt.parameter_paths import matching

AXIS = "data"
"""The mesh axis that examples lie along."""

# === Data =============================================================================


def open_data(config: Config) -> pipeline.Data:
    """Opens the training and test batches."""
    return pipeline.open_data(
        config.dataset,
        config.data_dir,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        seed=config.seed,
        augmented=config.augment,
        recipe=config.recipe,
        dtype=jnp.dtype(config.dtype),
        num_threads=config.num_threads,
        num_workers=config.num_workers,
        bad_images=config.bad_images,
    )


# === Model ============================================================================


def build_model(config: Config, data: pipeline.Data) -> Model:
    """Builds the network, without parameters.

    Returns:
      The model.

    Raises:
        ValueError: If the network does not support a setting.
    """
    make, options = MODELS[config.model], {}
    takes = inspect.signature(make).parameters
    lacking = {
        "zero_init_residual": "last normalisation in its blocks that could start at 0",
        "remat": "residual blocks to evaluate anew",
        "sync_norm": "BatchNorm that could see all devices' images",
    }
    asked = {
        "zero_init_residual": ("zero_init_residual", True),
        "remat": ("remat", True),
        "sync_norm": ("axis_name", AXIS),
    }
    for name, (argument, value) in asked.items():
        if not getattr(config, name):
            continue
        if argument not in takes:
            raise ValueError(
                f"{name}: {config.model} has no {lacking[name]}; leave it off, or "
                "choose a resnet"
            )
        options[argument] = value
    return make(
        num_classes=data.num_classes,
        norm_momentum=config.norm_momentum,
        dtype=jnp.dtype(config.dtype),
        **options,
    )


NORM = r"(^|/)(BatchNorm_\d+|norm_\w+)/"
"""Paths of the norm layers' parameters, which the L2 penalty leaves out."""

VIRTUAL_BATCH = "virtual_batch"
"""Key of the model state for mixup's last batch; no collection of the network."""


def make_loss(
    model: Model,
    label_smoothing: float,
    *,
    l2: float = 0.0,
    mixup_alpha: float = 0.0,
    mixup_form: virtual_batch.Form = "paper",
    random_erasing: float = 0.0,
) -> Callable:
    """Returns a loss function with the new model state and the accuracy.

    The loss is the mean cross entropy of the virtual batch and its soft labels, plus
    the penalty; the accuracy compares the same outputs with the real labels.
    """
    of_norm = matching("l2", NORM)

    def loss_fn(params, model_state, batch, rng):
        collections, carried = dict(model_state), {}
        images = batch["image"]
        labels = jax.nn.one_hot(batch["label"], model.num_classes)
        if mixup_alpha:
            key, previous = jax.random.fold_in(rng, 0), collections.pop(VIRTUAL_BATCH)
            virtual = virtual_batch.running_mixup(
                key, previous, images, labels, alpha=mixup_alpha, form=mixup_form
            )
            images, labels = virtual.images, virtual.labels
            carried = {VIRTUAL_BATCH: virtual}
        if random_erasing:  # of what the network sees, not of what mixup carries
            images = virtual_batch.random_erasing(
                jax.random.fold_in(rng, 1), images, probability=random_erasing
            )
        variables = {"params": params, **collections}
        logits, collections = model.apply(
            variables,
            images,
            train=True,
            mutable=list(collections),
            rngs={"dropout": jax.random.fold_in(rng, 2)},
        )
        logits = lbopt.likelihood(logits, "categorical")
        targets = optax.smooth_labels(labels, label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        if l2:
            kept = jax.tree_util.tree_map_with_path(
                lambda path, w: None if of_norm(path) else w, params
            )
            loss += l2 * optax.tree.norm(kept, squared=True) / 2
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return loss, ({**collections, **carried}, {"accuracy": accuracy})

    return loss_fn


# === Step =============================================================================


class Program(NamedTuple):
    """The functions of a run; nothing is compiled before they are called.

    Attributes:
        init: The state before the first step.
        train_step: `(state, batch) -> (state, metrics)`; donates the state.
        eval_step: `(state, batch) -> sums`.
        layers: The layers whose curvature the optimizer uses, if it uses any.
        mesh: The devices, if there are several.
        per_example: Collections of the model state whose arrays lie along the batch.
        state_shapes: The state's global shapes on other devices, or with another
            placement: `(devices, placement) -> state`.
    """

    init: Callable[[], training.TrainState]
    train_step: Callable
    eval_step: Callable
    layers: registry.Layers | None
    mesh: Mesh | None
    per_example: tuple[str, ...]
    state_shapes: Callable[[int, str], training.TrainState]


def make_mesh(config: Config) -> Mesh | None:
    """Returns the mesh of a run's devices; `None` for one device.

    Raises:
        ValueError: If there are fewer devices, or several processes would have to leave
            some out.
    """
    there = jax.device_count()
    devices = config.devices or there
    if devices > there:
        raise ValueError(
            f"devices={devices}, but there are {there}; start anew with that many, or "
            "ask for fewer (0: all)"
        )
    if jax.process_count() > 1 and devices < there:
        raise ValueError(
            f"devices={devices}, but the {jax.process_count()} processes have {there}; "
            "processes share all of them: pass --devices 0"
        )
    if devices == 1:
        return None
    return lbopt.sharding.make_mesh(jax.devices()[:devices], axis_name=AXIS)


def build_program(config: Config, data: pipeline.Data) -> Program:
    """Builds model, loss and optimizer from shapes alone.

    Returns:
      The program.

    Raises:
        ValueError: If settings do not suit the data, the model or the devices.
    """
    mesh = make_mesh(config)
    devices = 1 if mesh is None else mesh.size
    accumulate = config.accumulate(devices)
    if config.eval_batch_size % devices:
        raise ValueError(
            f"eval_batch_size must be a multiple of {devices} devices, got "
            f"{config.eval_batch_size}"
        )
    if config.sync_norm and mesh is None:
        raise ValueError("sync_norm needs several devices, got devices=1; leave it off")
    model = build_model(config, data)
    shapes = pipeline.batch_shapes(
        config.batch_size, data.image_shape, jnp.dtype(config.dtype)
    )
    model_key, run_key = jax.random.split(jax.random.key(config.seed))
    # Outside of the mesh there is no axis to normalise over, and shapes need none.
    alone = model.clone(axis_name=None) if config.sync_norm else model

    def init_model() -> tuple[Any, dict[str, Any]]:
        images = jnp.zeros((1, *data.image_shape))
        model_state = dict(alone.init(model_key, images, train=True))
        return model_state.pop("params"), model_state

    def carried() -> dict[str, Any]:
        if not config.mixup_alpha:
            return {}
        shape = shapes["image"].shape
        return {VIRTUAL_BATCH: virtual_batch.empty(shape, data.num_classes)}

    params, model_state = jax.eval_shape(init_model)
    model_state |= jax.eval_shape(carried)
    arguments = (params, model_state, shapes, run_key)

    def optimizer(devices: int, placement: Any) -> tuple[Any, registry.Layers | None]:
        there = dataclasses.replace(config, placement=placement)
        tx, layers = optimizers.build_optimizer(
            there, data, _loss_of(config, alone), arguments, devices
        )
        if config.weight_average:
            average = lbopt.average_params(config.weight_average, warm_up=True)
            tx = optax.chain(tx, average)
        return tx, layers

    def state_shapes(devices: int, placement: str) -> training.TrainState:
        tx, _ = optimizer(devices, placement)
        start = functools.partial(training.init_state, tx)
        return jax.eval_shape(start, params, model_state, run_key)

    tx, layers = optimizer(devices, config.placement)

    def init() -> training.TrainState:
        params, model_state = jax.jit(init_model)()
        state = training.init_state(tx, params, model_state, run_key, mesh)
        empty = jax.tree.map(lambda x: _zeros(x, mesh), jax.eval_shape(carried))
        return state._replace(model_state={**state.model_state, **empty})

    per_example = (VIRTUAL_BATCH,) if config.mixup_alpha else ()
    eval_step = training.make_eval_step(make_eval(alone))
    peak_value = getattr(config, config.optimizer).learning_rate
    rate = optimizers.build_schedule(config, data, peak_value)
    train_step = training.make_train_step(
        _loss_of(config, model),
        tx,
        layers,
        mesh,
        fisher=config.sp_ngd.fisher if config.optimizer == "sp_ngd" else config.fisher,
        accumulate=accumulate,
        parallel=config.parallel,
        per_example=per_example,
        statistics_fraction=config.statistics_fraction,
    )
    return Program(
        init=init,
        train_step=_reporting(train_step, rate),
        eval_step=_of_averages(eval_step) if config.weight_average else eval_step,
        layers=layers,
        mesh=mesh,
        per_example=per_example,
        state_shapes=state_shapes,
    )


def _loss_of(config: Config, model: Model) -> Callable:
    return make_loss(
        model,
        config.label_smoothing,
        l2=config.l2,
        mixup_alpha=config.mixup_alpha,
        mixup_form=config.mixup_form,
        random_erasing=config.random_erasing,
    )


def _zeros(shape: jax.ShapeDtypeStruct, mesh: Mesh | None) -> jax.Array:
    """Returns zeros sharded over the devices, none of which ever holds all."""
    spec = PartitionSpec(AXIS) if shape.shape else PartitionSpec()
    lies = None if mesh is None else NamedSharding(mesh, spec)
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=lies)()


def _reporting(train_step: Callable, rate: optax.Schedule) -> Callable:
    """Adds the learning rate to a step's metrics, and what was renewed and sent."""

    def reporting(state: training.TrainState, batch: Any) -> Any:
        # The optimizer does not count steps that were skipped.
        eta = rate(state.step - state.skipped)
        state, metrics = train_step(state, batch)
        of_curvature = curvature_metrics.of(state.opt_state)
        return state, {**metrics, "learning_rate": eta, **of_curvature}

    return jax.jit(reporting, donate_argnums=0)


# === Evaluation =======================================================================


def _of_averages(eval_step: Callable) -> Callable:
    """Returns the evaluation of the averaged weights."""

    def of_averages(state: training.TrainState, batch: Any) -> Any:
        averages = lbopt.averaged_params(state.opt_state)
        return eval_step(state._replace(params=averages), batch)

    return of_averages


def make_eval(model: Model) -> Callable:
    """Returns a function that sums losses and correct answers over the images."""

    def eval_fn(params, model_state, batch):
        variables = {"params": params, **model_state}
        variables.pop(VIRTUAL_BATCH, None)
        logits: Any = model.apply(variables, batch["image"], train=False)
        labels, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        return {
            "loss": jnp.sum(mask * losses),
            "accuracy": jnp.sum(mask * correct),
            "images": jnp.sum(mask),
        }

    return eval_fn


def evaluate(
    program: Program, state: training.TrainState, data: pipeline.Data
) -> dict[str, float]:
    """Returns the mean loss and accuracy over the test images.

    Raises:
        RuntimeError: If some image was not counted exactly once.
    """
    sums = [
        jax.device_get(program.eval_step(state, device_feed.place(batch, program.mesh)))
        for batch in data.test
    ]
    totals = {key: float(sum(s[key] for s in sums)) for key in sums[0]}
    images = totals.pop("images")
    if round(images) != data.test_images:
        raise RuntimeError(
            f"{images:.0f} images were evaluated, not {data.test_images}: processes "
            "disagree about the test split; prepare the data set anew"
        )
    return {key: total / images for key, total in totals.items()}
