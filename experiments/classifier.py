"""One run of an image classifier, from data to picture, as every experiment does it.

An experiment is a set of settings and a command line around `prepare`, `train` and
`draw`.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lbopt
from experiments import checkpoints, figures, metrics, runs
from experiments.data import pipeline, virtual_batch
from experiments.models.registry import MODELS, Model
from experiments.settings import Config
from lbopt import training
from lbopt.curvature import registry
from lbopt.parameter_paths import matching

# === Data =============================================================================


def open_data(config: Config) -> pipeline.Data:
    """Training and test batches."""
    return pipeline.open_data(
        config.dataset,
        config.data_dir,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        seed=config.seed,
        augmented=config.augment,
        recipe=config.recipe,
    )


# === Model ============================================================================


def build_model(config: Config, data: pipeline.Data) -> Model:
    """The network, without parameters."""
    make, options = MODELS[config.model], {}
    if config.zero_init_residual:
        if "zero_init_residual" not in inspect.signature(make).parameters:
            raise ValueError(
                f"zero_init_residual: {config.model} has no last normalisation in its "
                "blocks that could start at 0; leave it off, or choose a resnet"
            )
        options["zero_init_residual"] = True
    return make(
        num_classes=data.num_classes,
        norm_momentum=config.norm_momentum,
        dtype=jnp.dtype(config.dtype),
        **options,
    )


NORM = r"(^|/)(BatchNorm_\d+|norm_\w+)/"
"""Paths of the norm layers' parameters, which the L2 penalty leaves out."""

VIRTUAL_BATCH = "virtual_batch"
"""Where the model state holds what mixup carries: no collection of the network."""


def make_loss(
    model: Model,
    label_smoothing: float,
    *,
    l2: float = 0.0,
    mixup_alpha: float = 0.0,
    random_erasing: float = 0.0,
) -> Callable:
    """Mean cross entropy of a batch, with the new model state and the accuracy.

    The loss is that of the virtual batch and its soft labels, plus the penalty; the
    accuracy is of the same outputs, but on the real labels.
    """
    of_norm = matching("l2", NORM)

    def loss_fn(params, model_state, batch, rng):
        collections, carried = dict(model_state), {}
        images = batch["image"]
        labels = jax.nn.one_hot(batch["label"], model.num_classes)
        if mixup_alpha:
            key, previous = jax.random.fold_in(rng, 0), collections.pop(VIRTUAL_BATCH)
            virtual = virtual_batch.running_mixup(
                key, previous, images, labels, alpha=mixup_alpha
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


# === Optimizer ========================================================================


def build_schedule(
    config: Config, data: pipeline.Data, peak_value: float
) -> optax.Schedule:
    """The learning rate of a step."""
    rising = round(config.warmup_epochs * data.steps_per_epoch)
    steps = data.steps(config.epochs)
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(peak_value, steps - rising)
        after = optax.join_schedules([optax.constant_schedule(0.0), cosine], [rising])
    elif config.schedule == "polynomial":
        after = optax.polynomial_schedule(peak_value, 0.0, 2, steps)
    elif config.schedule == "exponential":
        after = _by_half_epochs(peak_value, config.decay_rate, data)
    else:
        after = lbopt.schedules.staircase(
            peak_value, config.decay_epochs, steps_per_epoch=data.steps_per_epoch
        )
    return lbopt.schedules.warmup(
        peak_value,
        rising,
        after,
        init_value=config.warmup_start,
        shape=config.warmup_shape,
    )


def _by_half_epochs(value: float, factor: float, data: pipeline.Data) -> optax.Schedule:
    """A number that is multiplied by a factor after each half of an epoch."""
    return optax.exponential_decay(value, data.steps(0.5), factor, staircase=True)


def build_optimizer(
    config: Config, data: pipeline.Data, loss_fn: Callable, arguments: tuple
) -> tuple[optax.GradientTransformation, registry.Layers | None]:
    """The optimizer, and the layers it found; `arguments` are the loss's, or shapes."""
    settings = dataclasses.asdict(getattr(config, config.optimizer))
    peak_value = settings.pop("learning_rate")
    layers: Any = None
    spread: dict[str, Any] = {}
    if config.has_curvature:
        norm_blocks = settings.pop("norm_blocks", "unit_wise")
        layers = lbopt.trace_layers(
            loss_fn,
            *arguments,
            has_aux=True,
            norm_blocks=norm_blocks,
            doubly_factored=config.doubly_factored,
        )
        print(layers)
    if config.devices > 1:
        spread = {"axis_name": "data", "axis_size": config.devices}
        spread["placement"] = config.placement
    if config.optimizer == "sp_ngd":
        rate = lbopt.schedules.polynomial(
            peak_value,
            settings.pop("power"),
            settings.pop("decay_start"),
            settings.pop("decay_end") * config.epochs,
            steps_per_epoch=data.steps_per_epoch,
        )
        settings.pop("fisher")  # of the step
        return lbopt.sp_ngd(rate, layers, **settings, **spread), layers
    rate = build_schedule(config, data, peak_value)
    if config.optimizer == "kfac":
        decay = settings.pop("kl_clip_decay")
        if settings["kl_clip"] is not None and decay < 1:
            settings["kl_clip"] = _by_half_epochs(settings["kl_clip"], decay, data)
        return lbopt.kfac(rate, layers, **settings, **spread), layers
    if config.optimizer == "lars":
        after_kfac = settings.pop("after_kfac")
        lars = lbopt.lars(rate, **settings)
        if not after_kfac:
            return lars, None
        return optax.chain(_natural_gradient(config, layers, spread), lars), layers
    if config.optimizer == "nlcg":
        if layers is None:
            return lbopt.nlcg(rate, **settings), None
        settings["preconditioner"] = _natural_gradient(config, layers, spread)
        axis_name = spread.get("axis_name")
        return lbopt.nlcg(rate, **settings, axis_name=axis_name), layers
    if config.optimizer == "rmsprop":
        # The slots of TensorFlow's start at 1, as the baselines of Adya et al. did.
        return optax.rmsprop(rate, **settings, initial_scale=1.0), None
    decay = optax.add_decayed_weights(settings.pop("weight_decay"))
    return optax.chain(decay, optax.sgd(rate, **settings)), None


def _natural_gradient(
    config: Config, layers: Any, spread: dict[str, Any]
) -> optax.GradientTransformation:
    """K-FAC as a preconditioner of another optimizer."""
    kfac = config.kfac
    return lbopt.scale_by_kfac(
        layers,
        damping=kfac.damping,
        factor_decay=kfac.factor_decay,
        stats_period=kfac.stats_period,
        inverse_period=kfac.inverse_period,
        **spread,
    )


# === Step =============================================================================


class Program(NamedTuple):
    """The three functions of a run; nothing is compiled before they are called."""

    init: Callable[[], training.TrainState]
    train_step: Callable
    eval_step: Callable


def build_program(config: Config, data: pipeline.Data) -> Program:
    """Puts model, loss and optimizer together, by shapes alone."""
    mesh = None
    if config.devices > 1:
        if config.devices > len(jax.devices()):
            raise ValueError(
                f"devices={config.devices}, but there are {len(jax.devices())}; start "
                "anew with that many, or ask for fewer"
            )
        mesh = lbopt.sharding.make_mesh(jax.devices()[: config.devices])
    model = build_model(config, data)
    batch = pipeline.batch_shapes(config.batch_size, data.image_shape)
    loss_fn = make_loss(
        model,
        config.label_smoothing,
        l2=config.l2,
        mixup_alpha=config.mixup_alpha,
        random_erasing=config.random_erasing,
    )
    model_key, run_key = jax.random.split(jax.random.key(config.seed))

    def init_model():
        images = jnp.zeros((1, *data.image_shape))
        model_state = dict(model.init(model_key, images, train=True))
        params = model_state.pop("params")
        if config.mixup_alpha:
            model_state[VIRTUAL_BATCH] = virtual_batch.empty(
                batch["image"].shape, data.num_classes
            )
        return params, model_state

    params, model_state = jax.eval_shape(init_model)
    arguments = (params, model_state, batch, run_key)
    tx, layers = build_optimizer(config, data, loss_fn, arguments)
    eval_step = training.make_eval_step(make_eval(model))
    if config.weight_average:
        average = lbopt.average_params(config.weight_average, warm_up=True)
        tx = optax.chain(tx, average)
        eval_step = _of_averages(eval_step)

    def init() -> training.TrainState:
        params, model_state = jax.jit(init_model)()
        return training.init_state(tx, params, model_state, run_key, mesh)

    train_step = training.make_train_step(
        loss_fn,
        tx,
        layers,
        mesh,
        fisher=config.sp_ngd.fisher if config.optimizer == "sp_ngd" else config.fisher,
        accumulate=config.accumulate,
        per_example=(VIRTUAL_BATCH,) if config.mixup_alpha else (),
    )
    return Program(init, train_step, eval_step)


# === Evaluation =======================================================================


def _of_averages(eval_step: Callable) -> Callable:
    """The evaluation of the averaged weights."""

    def of_averages(state: training.TrainState, batch: Any) -> Any:
        averages = lbopt.averaged_params(state.opt_state)
        return eval_step(state._replace(params=averages), batch)

    return of_averages


def make_eval(model: Model) -> Callable:
    """Sums of loss and of right answers over the images that count."""

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
    eval_step: Callable, state: training.TrainState, data: pipeline.Data
) -> dict[str, float]:
    """Mean loss and accuracy over the test images."""
    sums = [jax.device_get(eval_step(state, batch)) for batch in data.test]
    totals = {key: float(sum(s[key] for s in sums)) for key in sums[0]}
    images = totals.pop("images")
    return {key: total / images for key, total in totals.items()}


# === The run: metrics, checkpoints, picture ===========================================


class Run(NamedTuple):
    """A run whose settings have passed every check."""

    config: Config
    directory: pathlib.Path
    data: pipeline.Data
    program: Program


def prepare(config: Config) -> Run:
    """Opens the data, builds the program and claims the directory; compiles nothing.

    Raises:
        FileExistsError: If the directory holds a run that is not to be resumed.
        FileNotFoundError: If the data set is not prepared.
        ValueError: If settings do not suit the data, the optimizer or the run resumed.
    """
    data = open_data(config)
    program = build_program(config, data)
    directory = config.directory or pathlib.Path("runs") / "-".join(
        (config.dataset.replace("/", "_"), config.model, config.optimizer)
    )
    runs.claim(directory, config, resume=config.resume)
    return Run(config, directory, data, program)


def train(run: Run) -> float:
    """Carries out a run, or what is left of it; returns its final test accuracy."""
    config, directory, data, program = run
    state, start, total_steps = program.init(), 0, data.steps(config.epochs)
    evaluated = data.steps(config.eval_epochs)
    saved = data.steps(config.checkpoint_epochs)
    with checkpoints.Checkpoints(directory / "checkpoints") as store:
        if latest := store.restore_latest(state):
            start, state, batches_taken = latest
            data.train.set_state(batches_taken)
        with metrics.Reporter(
            directory,
            name=config.optimizer,
            total_steps=total_steps,
            batch_size=config.batch_size,
            steps_per_epoch=data.steps_per_epoch,
            start_step=start,
        ) as reporter:
            for step in range(start + 1, total_steps + 1):
                last = step == total_steps
                state, step_metrics = program.train_step(state, next(data.train))
                if step % config.log_period == 0 or step % evaluated == 0 or last:
                    # Reading a metric waits for its step, so the others run ahead.
                    reporter.train(step, step_metrics)
                with reporter.paused():
                    if step % evaluated == 0 or last:
                        reporter.test(step, evaluate(program.eval_step, state, data))
                    if step % saved == 0 or last:
                        store.save(step, state, data.train.get_state())
    draw([run], directory / "curves.png")
    log = directory / "metrics.jsonl"
    return figures.read_curve(log, "test", "accuracy").values[-1]


def draw(drawn: Sequence[Run], path: pathlib.Path) -> None:
    """Draws the curves of runs that differ in the optimizer only."""
    config = drawn[0].config
    title = f"{config.model} on {config.dataset}, batch {config.batch_size:,}"
    logs = {run.config.optimizer: run.directory / "metrics.jsonl" for run in drawn}
    figures.draw_runs(logs, path, title=title)
