"""Trains a residual network with K-FAC, SP-NGD or SGD: one run, from top to bottom.

    python experiments/imagenet_resnet50.py                      a run of K-FAC
    python experiments/imagenet_resnet50.py --optimizer sgd      a run of SGD
    python experiments/imagenet_resnet50.py --devices 4          on several devices
    python experiments/imagenet_resnet50.py demo                 SP-NGD beside SGD
    python experiments/imagenet_resnet50.py --help               every setting

The defaults are the demo's: a ResNet-8 of 78,692 parameters on the embedded data set
`strokes` (20 classes, 10,240 images), 40 steps of batch 2,048. On other data:

    ... --model resnet50 --dataset imagenet2012 --data-dir ~/tensorflow_datasets
"""

import contextlib
import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import lbopt
from experiments import checkpoints, figures, metrics, runs
from experiments.data import pipeline, virtual_batch
from experiments.models import resnet
from experiments.settings import Config
from lbopt import training
from lbopt.curvature import registry

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
    )


# === Model ============================================================================


def build_model(config: Config, data: pipeline.Data) -> resnet.ResNet:
    """The network, without parameters."""
    return resnet.MODELS[config.model](
        num_classes=data.num_classes,
        zero_init_residual=config.zero_init_residual,
        norm_momentum=config.norm_momentum,
        dtype=jnp.dtype(config.dtype),
    )


VIRTUAL_BATCH = "virtual_batch"
"""Where the model state holds what mixup carries: no collection of the network."""


def make_loss(
    model: resnet.ResNet,
    label_smoothing: float,
    *,
    mixup_alpha: float = 0.0,
    random_erasing: float = 0.0,
) -> Callable:
    """Mean cross entropy of a batch, with the new model state and the accuracy.

    The loss is that of the virtual batch and its soft labels; the accuracy is of the
    same outputs, but on the real labels.
    """

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
            variables, images, train=True, mutable=list(collections)
        )
        logits = lbopt.likelihood(logits, "categorical")
        targets = optax.smooth_labels(labels, label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return loss, ({**collections, **carried}, {"accuracy": accuracy})

    return loss_fn


# === Optimizer ========================================================================


def build_optimizer(
    config: Config, data: pipeline.Data, loss_fn: Callable, arguments: tuple
) -> tuple[optax.GradientTransformation, registry.Layers | None]:
    """The optimizer, and the layers it found; `arguments` are the loss's, or shapes."""
    settings = dataclasses.asdict(getattr(config, config.optimizer))
    spread = {}
    if config.devices > 1:
        spread = {"axis_name": "data", "axis_size": config.devices}
        spread["placement"] = config.placement
    if config.optimizer == "sp_ngd":
        learning_rate = lbopt.schedules.polynomial(
            settings.pop("learning_rate"),
            settings.pop("power"),
            settings.pop("decay_start"),
            settings.pop("decay_end") * config.epochs,
            steps_per_epoch=data.steps_per_epoch,
        )
        settings.pop("fisher")  # of the step
        layers = lbopt.trace_layers(
            loss_fn, *arguments, has_aux=True, norm_blocks=settings.pop("norm_blocks")
        )
        print(layers)
        return lbopt.sp_ngd(learning_rate, layers, **settings, **spread), layers
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.pop("learning_rate"),
        warmup_steps=round(config.warmup_epochs * data.steps_per_epoch),
        decay_steps=data.steps(config.epochs),
    )
    if config.optimizer == "sgd":
        decay = optax.add_decayed_weights(settings.pop("weight_decay"))
        sgd = optax.sgd(learning_rate, nesterov=True, **settings)
        return optax.chain(decay, sgd), None
    layers = lbopt.trace_layers(loss_fn, *arguments, has_aux=True)
    kfac = lbopt.kfac(learning_rate, layers, **settings, **spread)
    print(layers)
    return kfac, layers


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

    def init() -> training.TrainState:
        params, model_state = jax.jit(init_model)()
        return training.init_state(tx, params, model_state, run_key, mesh)

    train_step = training.make_train_step(
        loss_fn,
        tx,
        layers,
        mesh,
        fisher=config.sp_ngd.fisher if config.optimizer == "sp_ngd" else "empirical",
        accumulate=config.accumulate,
        per_example=(VIRTUAL_BATCH,) if config.mixup_alpha else (),
    )
    return Program(init, train_step, training.make_eval_step(make_eval(model)))


# === Evaluation =======================================================================


def make_eval(model: resnet.ResNet) -> Callable:
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


DEMO_DEVICES = 4


def demo_configs(config: Config) -> list[Config]:
    """The same run with SGD and with SP-NGD, in a new directory for both."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    root = (config.directory or pathlib.Path("runs")) / f"demo-{now}"
    devices = min(DEMO_DEVICES, len(jax.devices()))
    return [
        dataclasses.replace(
            config, optimizer=name, directory=root / name, devices=devices
        )
        for name in ("sgd", "sp_ngd")
    ]


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for."""
    demo = arguments[:1] == ["demo"]
    try:
        config = tyro.cli(Config, args=arguments[demo:], description=__doc__)
        with contextlib.suppress(RuntimeError):  # too late: jax has its devices already
            count = DEMO_DEVICES if demo else config.devices
            jax.config.update("jax_num_cpu_devices", count)
        prepared = [prepare(c) for c in (demo_configs(config) if demo else [config])]
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    accuracies = {run.config.optimizer: train(run) for run in prepared}
    picture = prepared[0].directory / "curves.png"
    if demo:
        picture = prepared[0].directory.parent / "sgd_and_sp_ngd.png"
        draw(prepared, picture)
    for optimizer, accuracy in accuracies.items():
        print(f"{optimizer:6} test accuracy {accuracy:.1%}")
    print(f"picture: {picture.resolve()}")


if __name__ == "__main__":
    main(sys.argv[1:])
