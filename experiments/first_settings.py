"""First settings: five networks, the defaults of lbopt, AdamW and Muon at three rates.

    python -m experiments.first_settings

Each network has kernels that start at zero (`models/small_networks.py`), except the
ResNet, whose residual branches do. K-FAC, SP-NGD and LARS run with nothing but the rate
that their pages name; AdamW and Muon with three rates each. What is finished is kept in
`runs/first_settings` and not repeated. Writes `experiments/results/first_settings.json`
and prints the table of the page; about 20 minutes on 2 cores. Digits are those of
scikit-learn, which is in the extra `test`; the other data are drawn here.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbopt
from experiments import compilation_cache, study
from experiments.models import resnet, small_networks
from lbopt import training

STEPS = 200
READINGS = (0, 50, 200)
AVERAGED = 10
"""Batches, up to a reading, whose mean loss it is; at step 0 it is the first alone."""
SEEDS = (0, 1)

RUNS = pathlib.Path("runs/first_settings")
RESULTS = study.RESULTS / "first_settings.json"

Data = dict[str, np.ndarray]


# === Data =============================================================================


def digits() -> Data:
    """Returns scikit-learn's handwritten digits: 1,797 images `[8, 8, 1]`."""
    from sklearn import datasets  # of an extra that only this function needs

    x, y = datasets.load_digits(return_X_y=True)
    return {"x": x.astype(np.float32).reshape(-1, 8, 8, 1) / 16, "y": y}


def corpus(vocabulary: int = 16, length: int = 16, sequences: int = 2048) -> Data:
    """Returns token sequences in which two tokens determine the odds of the next."""
    random = np.random.default_rng(0)
    odds = random.dirichlet(np.full(vocabulary, 0.2), size=(vocabulary, vocabulary))
    below = np.cumsum(odds, axis=-1)
    tokens = random.integers(vocabulary, size=(sequences, length + 1))
    for t in range(2, length + 1):
        drawn = random.random((sequences, 1))
        row = below[tokens[:, t - 2], tokens[:, t - 1]]
        # The last sum may round below one.
        tokens[:, t] = np.minimum(np.sum(row < drawn, axis=-1), vocabulary - 1)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def drawings(images: int = 1024, side: int = 16) -> Data:
    """Returns noisy images of a disc and a square, and each pixel's class of three."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    y = np.zeros((images, side, side), np.int64)
    for kind in (1, 2):
        top, left = random.uniform(3, side - 3, size=(2, images, 1, 1))
        radius = random.uniform(2, 4, size=(images, 1, 1))
        away = np.abs(rows - top), np.abs(columns - left)
        y[(np.hypot(*away) if kind == 1 else np.maximum(*away)) < radius] = kind
    x = (y > 0) + 0.3 * random.standard_normal(y.shape)
    return {"x": x[..., None].astype(np.float32), "y": y}


# === Networks =========================================================================


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        title: Its name in the table.
        model: The network.
        data: Opens the data.
        batch_size: Examples in a step.
        train: Keyword arguments of the network in training.
    """

    title: str
    model: Any
    data: Callable[[], Data]
    batch_size: int
    train: Mapping[str, Any] = {}


TASKS = {
    "mlp": Task("MLP", small_networks.Mlp(10), digits, 128),
    "resnet": Task(
        "ResNet-8",
        resnet.ResNet8(num_classes=10, width=8, zero_init_residual=True),
        digits,
        128,
        {"train": True},
    ),
    "vit": Task("ViT", small_networks.VisionTransformer(10), digits, 128),
    "language_model": Task(
        "transformer",
        small_networks.CausalTransformer(16),
        corpus,
        64,
    ),
    "unet": Task("U-Net", small_networks.UNet(3), drawings, 32),
}
"""The networks by name."""


def make_loss(task: Task) -> Callable[..., Any]:
    """Returns the mean cross entropy over a batch's images, tokens or pixels."""

    def loss_fn(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        del rng
        outputs, model_state = task.model.apply(
            {"params": params, **model_state},
            batch["x"],
            mutable=list(model_state),
            **task.train,
        )
        terms = batch["y"].size  # all tokens or pixels, not the examples
        logits = lbopt.likelihood(outputs, "categorical", terms=terms)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(loss), (model_state, {})

    return loss_fn


# === Contestants ======================================================================


@dataclasses.dataclass(frozen=True)
class Setting:
    """An optimizer and its rate; all else is its default.

    Attributes:
        optimizer: A key of `OPTIMIZERS`.
        rate: The learning rate.
    """

    optimizer: str
    rate: float


OPTIMIZERS: dict[str, Callable[[Any, Any], optax.GradientTransformation]] = {
    "K-FAC": lbopt.kfac,
    "SP-NGD": lbopt.sp_ngd,
    "LARS": lambda rate, _: lbopt.lars(rate),
    "LARS, the paper's": lambda rate, _: lbopt.lars(rate, variant="paper"),
    "AdamW": lambda rate, _: optax.adamw(rate),
    "Muon": lambda rate, _: optax.contrib.muon(rate),
}
"""Optimizers as functions of the rate and the layers."""
WITH_CURVATURE = ("K-FAC", "SP-NGD")

SETTINGS = [
    Setting("K-FAC", 0.1),
    Setting("SP-NGD", 0.1),
    *[Setting("AdamW", rate) for rate in (1e-3, 3e-3, 1e-2)],
    *[Setting("Muon", rate) for rate in (5e-3, 2e-2, 5e-2)],
    Setting("LARS", 10.0),
    Setting("LARS, the paper's", 10.0),
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        losses: Loss of each batch, before the step that it belongs to.
        skipped: Steps that were skipped, because loss or gradient was not finite.
    """

    losses: list[float]
    skipped: int

    def at(self, step: int) -> float:
        """Returns the mean loss of the last batches up to a step."""
        return statistics.fmean(self.losses[max(0, step - AVERAGED + 1) : step + 1])

    def highest(self) -> float:
        """Returns the largest loss of a batch as a multiple of the first."""
        return float(np.max(self.losses) / self.losses[0])  # NaN if one is NaN


def train(
    task: Task, settings: Mapping[str, Setting], seed: int, steps: int = STEPS
) -> dict[str, Outcome]:
    """Trains with each setting, from the same start and on the same batches."""
    data, loss_fn = task.data(), make_loss(task)
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    drawn = [
        random.choice(len(data["x"]), task.batch_size, replace=False)
        for _ in range(steps + 1)
    ]
    batches = [jax.tree.map(lambda x, i=i: x[i], data) for i in drawn]
    initialise = functools.partial(task.model.init, **task.train)
    model_state = dict(jax.jit(initialise)(key, batches[0]["x"][:1]))
    params = model_state.pop("params")
    arguments = (params, model_state, batches[0], key)
    layers = lbopt.trace_layers(loss_fn, *arguments, has_aux=True)
    compiled, outcomes = {}, {}
    for name, setting in settings.items():
        optimizer = setting.optimizer
        make = functools.partial(_make, optimizer, layers)
        # With the rate in the state, the rates of an optimizer share a program.
        tx = optax.inject_hyperparams(make)(rate=setting.rate)
        if optimizer not in compiled:
            known = layers if optimizer in WITH_CURVATURE else None
            compiled[optimizer] = training.make_train_step(loss_fn, tx, known)
        # Copies, because a step donates its state.
        own, own_state = jax.tree.map(jnp.copy, (params, model_state))
        state, losses = training.init_state(tx, own, own_state, key), []
        for batch in batches:
            state, metrics = compiled[optimizer](state, batch)
            losses.append(float(metrics["loss"]))
        outcomes[name] = Outcome(losses, int(state.skipped))
    return outcomes


def _make(optimizer: str, layers: Any, rate: Any) -> optax.GradientTransformation:
    return OPTIMIZERS[optimizer](rate, layers)


# === The record =======================================================================


def row_of(network: str, setting: Setting, seeds: Sequence[Outcome]) -> dict[str, Any]:
    """Returns a line of the record: one network and one setting, by seed."""
    return {
        "network": network,
        "optimizer": setting.optimizer,
        "rate": setting.rate,
        "loss": {str(k): [round(x.at(k), 4) for x in seeds] for k in READINGS},
        "highest_over_first": [round(x.highest(), 2) for x in seeds],
        "skipped": [x.skipped for x in seeds],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table: means over seeds, and the highest loss of all."""
    lines = [
        "| network | optimizer, rate | step 0 | 50 | 200 | highest / first |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        losses = [f"{statistics.fmean(row['loss'][str(k)]):.3f}" for k in READINGS]
        optimizer = f"{row['optimizer']}, {row['rate']:g}"
        highest = f"{np.max(row['highest_over_first']):.2f}"
        cells = [TASKS[row["network"]].title, optimizer, *losses, highest]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Carries out what is left of the study, writes its record, prints its table."""
    compilation_cache.share_programs(RUNS)
    settings = {f"{x.optimizer} {x.rate:g}": x for x in SETTINGS}
    rows = []
    for network, task in TASKS.items():
        seeds = [
            study.outcomes_in(
                RUNS / f"{network}-{seed}.json",
                settings,
                functools.partial(train, task, seed=seed),
                Outcome,
            )
            for seed in SEEDS
        ]
        rows += [
            row_of(network, setting, [outcomes[name] for outcomes in seeds])
            for name, setting in settings.items()
        ]
    record = {
        "command": "python -m experiments.first_settings",
        "steps": STEPS,
        "seeds": SEEDS,
        "rows": rows,
    }
    study.write_record(RESULTS, record)
    print(table(rows))


if __name__ == "__main__":
    main()
