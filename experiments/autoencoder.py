"""Deep autoencoders: tuned SGD, tuned K-FAC, and K-FAC that sets its own step sizes.

    python -m experiments.autoencoder            784-1000-500-250-30 and mirror image
    python -m experiments.autoencoder --small    64-100-50-25-10 likewise

The problem of Martens & Grosse 2015, of 28×28 grey images made from `strokes`, and a
small one of scikit-learn's digits, which is in the extra `test`. Six settings each of
SGD with Nesterov momentum and of K-FAC with the KL clip are tried with seed 0; with
seed 1 the best of each run beside K-FAC under the quadratic model, which has no rate.
Contestants see the same batches and take turns at every step, so that their times can
be compared. What is finished is kept in `runs/autoencoder` and not repeated. Writes
`experiments/results/autoencoder.json` and `docs/figures/autoencoder.png`, or
`autoencoder_small`; about 20 minutes on 2 cores, or 3.

As in the paper: Bernoulli likelihood, statistics from labels drawn from the model, the
inverses renewed every 20 steps, weight decay 1e-5 for K-FAC, λ₀ = 150 where it adapts,
iterates averaged with 0.99, and the better of θ and its average reported. Different
from it: the images; tanh units and Glorot's weights (`models/autoencoder.py`); no
inversions at each of the first ten steps; batches that do not grow, and statistics of
all of a batch; one λ for the model and the preconditioner. Losses are cross entropies
less the images' own entropy, which no network can undercut.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import optax

import lbopt
from experiments import compilation_cache, figures, study
from experiments.data import grey
from experiments.models.autoencoder import Autoencoder
from lbopt import training

INVERSE_PERIOD = 20
WEIGHT_DECAY = 1e-5
AVERAGE = 0.99
"""Decay of the average of the iterates, which every contestant has."""
EVALUATED = 1024
"""Training images, the first ones, that the training loss is of."""

RUNS = pathlib.Path("runs/autoencoder")
RESULTS, FIGURES = study.RESULTS, study.FIGURES


# === Settings =========================================================================


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Settings of SGD with Nesterov momentum, in the words of `optax.sgd`."""

    learning_rate: float
    momentum: float


@dataclasses.dataclass(frozen=True)
class Kfac:
    """Settings of K-FAC, in the words of `lbopt.kfac`."""

    learning_rate: float
    damping: float


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    """Settings of K-FAC under `scale_by_quadratic_model`, in its words."""

    damping: float = 150.0


Settings = Sgd | Kfac | QuadraticModel


def sgd_grid(paces: Sequence[float], momenta: Sequence[float]) -> list[Settings]:
    """Returns SGD by momentum and pace, which is the rate over (1 - momentum)."""
    return [
        Sgd(learning_rate=round(pace * (1 - momentum), 9), momentum=momentum)
        for pace, momentum in itertools.product(paces, momenta)
    ]


def kfac_grid(rates: Sequence[float], dampings: Sequence[float]) -> list[Settings]:
    """Returns K-FAC with every rate and every damping."""
    return [Kfac(*setting) for setting in itertools.product(rates, dampings)]


# === Problems =========================================================================


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its images, and the length of a run.

    Attributes:
        name: Begins the names of the files.
        title: Title of the picture.
        widths: As for `Autoencoder`.
        images: Opens the images.
        batch_size: Images in a step, drawn anew for each.
        steps: Updates of every contestant.
        eval_period: Steps between two readings of the training loss.
        sgd: Settings of SGD that are tried.
        kfac: Settings of K-FAC that are tried.
        kl_clip: Bound of K-FAC's steps, in the words of `lbopt.kfac`.
    """

    name: str
    title: str
    widths: tuple[int, ...]
    images: Callable[[], grey.Images]
    batch_size: int
    steps: int
    eval_period: int
    sgd: list[Settings]
    kfac: list[Settings]
    kl_clip: float


STROKES = Problem(
    name="autoencoder",
    title="784-1000-500-250-30 and mirror image, 28×28 images of strokes",
    widths=(1000, 500, 250, 30),
    images=grey.strokes,
    batch_size=512,
    steps=600,
    eval_period=5,
    sgd=sgd_grid((0.005, 0.01, 0.02), (0.95, 0.99)),
    kfac=kfac_grid((0.03, 0.3), (0.3, 1.0, 3.0)),
    kl_clip=0.1,
)
DIGITS = Problem(
    name="autoencoder_small",
    title="64-100-50-25-10 and mirror image, scikit-learn's digits",
    widths=(100, 50, 25, 10),
    images=grey.digits,
    batch_size=500,
    steps=1000,
    eval_period=5,
    sgd=sgd_grid((0.1, 0.2, 0.4), (0.9, 0.95)),
    kfac=kfac_grid((0.1, 0.3, 1.0), (0.3, 1.0)),
    kl_clip=0.1,
)


# === Training =========================================================================


def entropy(images: jax.Array) -> jax.Array:
    """Returns each image's entropy, its values being probabilities."""
    p, q = images, 1 - images
    xlogy = jax.scipy.special.xlogy
    return -jnp.sum(xlogy(p, p) + xlogy(q, q), axis=-1)


def make_loss(model: Autoencoder) -> Callable:
    """Returns the mean cross entropy of a batch less its images' entropy, in nats."""

    def loss_fn(params, model_state, images, rng):
        del rng
        outputs: Any = model.apply({"params": params}, images)
        logits = lbopt.likelihood(outputs, "bernoulli")
        cross_entropy = optax.sigmoid_binary_cross_entropy(logits, images).sum(-1)
        return jnp.mean(cross_entropy - entropy(images)), (model_state, {})

    return loss_fn


def make_optimizer(
    settings: Settings, layers: Any, kl_clip: float
) -> optax.GradientTransformation:
    """Builds the optimizer with its numbers in its state: one program for all."""

    def sgd(learning_rate, momentum):
        return optax.sgd(learning_rate, momentum, nesterov=True)

    def kfac(learning_rate, damping):
        return lbopt.kfac(
            learning_rate,
            layers,
            momentum=0.9,
            damping=damping,
            weight_decay=WEIGHT_DECAY,
            kl_clip=kl_clip,
            factor_decay=0.95,
            periods=lbopt.Periods(inverses=INVERSE_PERIOD),
        )

    def quadratic_model(damping):
        precondition = lbopt.scale_by_kfac(
            layers, periods=lbopt.Periods(inverses=INVERSE_PERIOD)
        )
        return lbopt.scale_by_quadratic_model(
            precondition, damping=damping, weight_decay=WEIGHT_DECAY
        )

    make = {Sgd: sgd, Kfac: kfac, QuadraticModel: quadratic_model}[type(settings)]
    tx = optax.inject_hyperparams(make)(**dataclasses.asdict(settings))
    return optax.chain(tx, lbopt.average_params(AVERAGE))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one contestant.

    Attributes:
        seconds: Wall time of each step; the first may compile.
        curve: Steps done, and the training losses of θ and of its average then.
        test_losses: The test losses of θ and of its average at the end.
    """

    seconds: list[float]
    curve: list[tuple[int, float, float]]
    test_losses: tuple[float, float]

    def losses(self) -> list[float]:
        """Returns the lower training loss at each reading; inf if neither is finite."""
        return [
            min(filter(math.isfinite, pair), default=math.inf)
            for _, *pair in self.curve
        ]

    def step_time(self) -> float:
        """Returns the median time of a step, compilation apart."""
        return statistics.median(self.seconds[1:])

    def elapsed(self) -> list[float]:
        """Returns the training time until each reading, the first step a median one."""
        times = [self.step_time(), *self.seconds[1:]]
        total = [0.0, *itertools.accumulate(times)]
        return [total[step] for step, *_ in self.curve]


def train_together(
    problem: Problem, contestants: Mapping[str, Settings], seed: int
) -> dict[str, Outcome]:
    """Trains every contestant on the same batches, a step of each in turn."""
    images = problem.images()
    model = Autoencoder(problem.widths)
    loss_fn = make_loss(model)
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, images.train[:1])["params"]
    batch = jax.ShapeDtypeStruct((problem.batch_size, images.train.shape[1]), "float32")
    layers = lbopt.trace_layers(loss_fn, params, {}, batch, key, has_aux=True)
    optimizers = {
        name: make_optimizer(settings, layers, problem.kl_clip)
        for name, settings in contestants.items()
    }
    # Settings of one kind share a program.
    steps = {
        type(settings): training.make_train_step(
            loss_fn,
            optimizers[name],
            None if isinstance(settings, Sgd) else layers,
            fisher="sampled",
        )
        for name, settings in contestants.items()
    }
    states = {
        name: training.init_state(tx, params, {}, key)
        for name, tx in optimizers.items()
    }
    mean_loss = jax.jit(lambda params, images: loss_fn(params, {}, images, key)[0])

    def losses(name: str, of: np.ndarray) -> tuple[float, float]:
        both = states[name].params, lbopt.averaged_params(states[name].opt_state)
        theta, average = (float(mean_loss(params, of)) for params in both)
        return theta, average

    evaluated = images.train[:EVALUATED]
    seconds = {name: [] for name in contestants}
    curves = {name: [(0, *losses(name, evaluated))] for name in contestants}
    random = np.random.default_rng(seed)
    for step in range(1, problem.steps + 1):
        drawn = random.choice(len(images.train), problem.batch_size, replace=False)
        batch = images.train[drawn]
        for name, settings in contestants.items():
            start = time.perf_counter()
            states[name], _ = steps[type(settings)](states[name], batch)
            jax.block_until_ready(states[name])
            seconds[name].append(time.perf_counter() - start)
            if step % problem.eval_period == 0:
                curves[name].append((step, *losses(name, evaluated)))
    return {
        name: Outcome(seconds[name], curves[name], losses(name, images.test))
        for name in contestants
    }


def outcomes_of(
    problem: Problem, contestants: Mapping[str, Settings], seed: int
) -> dict[str, Outcome]:
    """Returns the outcomes, from a file if the contestants have run before."""
    return study.outcomes_in(
        RUNS / f"{problem.name}-{seed}.json",
        contestants,
        lambda settings: train_together(problem, settings, seed),
        Outcome,
    )


# === The study ========================================================================


def name_of(settings: Settings) -> str:
    """Returns the settings in words."""
    numbers = dataclasses.asdict(settings).items()
    words = " ".join(f"{name} {value:g}" for name, value in numbers)
    return f"{type(settings).__name__} {words}".replace("_", " ")


def reading_at(outcome: Outcome, loss: float) -> int | None:
    """Returns the first reading at which a training loss was reached."""
    losses = outcome.losses()
    return next((i for i, value in enumerate(losses) if value <= loss), None)


def chosen(problem: Problem) -> tuple[dict[str, Settings], dict[str, Outcome]]:
    """Returns the contestants of the comparison, and all outcomes with seed 0.

    SGD's best has the lowest training loss at the end, K-FAC's reaches that in the
    fewest steps.
    """
    settings = {name_of(x): x for x in (*problem.sgd, *problem.kfac)}
    tried = outcomes_of(problem, settings, seed=0)
    sgd, kfac = map(name_of, problem.sgd), map(name_of, problem.kfac)
    best_sgd = min(sgd, key=lambda name: tried[name].losses()[-1])
    target = tried[best_sgd].losses()[-1]

    def order(name: str) -> tuple[float, float]:
        reading = reading_at(tried[name], target)
        return math.inf if reading is None else reading, tried[name].losses()[-1]

    contestants = {
        "SGD": settings[best_sgd],
        "K-FAC": settings[min(kfac, key=order)],
        "K-FAC, quadratic model": QuadraticModel(),
    }
    return contestants, tried


def row_of(outcome: Outcome, target: float) -> dict[str, Any]:
    """Returns a line of the record: one contestant to the end and to the target."""
    reading = reading_at(outcome, target)
    reached = reading is not None
    _, theta, average = outcome.curve[-1]
    return {
        "loss": round(outcome.losses()[-1], 4),
        "loss_of_weights_and_average": [round(theta, 4), round(average, 4)],
        "test_losses": [round(x, 4) for x in outcome.test_losses],
        "step_time": round(outcome.step_time(), 5),
        "updates_to_sgd": outcome.curve[reading][0] if reached else None,
        "seconds_to_sgd": round(outcome.elapsed()[reading], 2) if reached else None,
    }


def draw(
    title: str, outcomes: Mapping[str, Outcome], target: float
) -> matplotlib.figure.Figure:
    """Draws training loss against updates and against time."""
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.6), layout="constrained", dpi=160)
    by_updates, by_time = figure.subplots(1, 2, sharey=True)
    for index, (name, outcome) in enumerate(outcomes.items()):
        steps, losses = [step for step, *_ in outcome.curve], outcome.losses()
        figures.plot(by_updates, index, steps, losses, name, marked=False)
        figures.plot(by_time, index, outcome.elapsed(), losses, name, marked=False)
    for panel in (by_updates, by_time):
        panel.axhline(target, color="0.6", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        panel.minorticks_off()
        panel.set_xlim(left=0)
    by_updates.set_ylabel("training loss above entropy (nats)")
    by_updates.set_xlabel("updates")
    by_time.set_xlabel("training time (s), compilation apart")
    study.legend_below(figure, by_updates)
    figure.suptitle(title, fontsize=10)
    return figure


def carry_out(problem: Problem) -> dict[str, Any]:
    """Carries out what is left of a study; writes its record and its picture."""
    contestants, tried = chosen(problem)
    outcomes = outcomes_of(problem, contestants, seed=1)
    target, of_tuning = (
        outcomes["SGD"].losses()[-1],
        min(tried[name_of(x)].losses()[-1] for x in problem.sgd),
    )
    record = {
        "command": "python -m experiments.autoencoder"
        + (" --small" if problem is DIGITS else ""),
        "batch_size": problem.batch_size,
        "steps": problem.steps,
        "tried": {name: row_of(x, of_tuning) for name, x in tried.items()},
        "compared": {
            name: {"settings": name_of(contestants[name])} | row_of(outcome, target)
            for name, outcome in outcomes.items()
        },
    }
    study.write_record(RESULTS / f"{problem.name}.json", record)
    draw(problem.title, outcomes, target).savefig(FIGURES / f"{problem.name}.png")
    return record


def main(arguments: Sequence[str]) -> None:
    """Does what the command line, without the program's name, asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="the digits")
    problem = DIGITS if parser.parse_args(arguments).small else STROKES
    compilation_cache.share_programs(RUNS)
    print(json.dumps(carry_out(problem), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
