"""Momentum SGD, RMSProp, LARS and NLCG at three batch sizes, with equal epochs.

    python -m experiments.cifar100_study

The recipe of `configs/resnet32.py` on `strokes/100_small`, with a ResNet-8 for the
ResNet-32: 10,240 images of 100 classes, 8 epochs, the largest batch a quarter of the
images. Each optimizer gets four rates at each batch size with seed 0; at the largest
the best of each is repeated with two more seeds, and NLCG preconditioned by K-FAC and
LARS on K-FAC's natural gradient take part. What is finished is kept in
`runs/cifar100_study` and not repeated. Writes `experiments/results/cifar100_study.json`
and `docs/figures/batch_sizes.png`.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from experiments import compilation_cache, figures, study
from experiments.configs import resnet32
from experiments.settings import Config, Kfac, Lars, Nlcg, RmsProp, Sgd
from experiments.side_by_side import Outcome, outcomes_in
from lbopt import presets

SEEDS = (0, 1, 2)
EPOCHS = 8.0
BATCH_SIZES = (160, 640, 2560)
LARGEST = BATCH_SIZES[-1]
FACTORS = (1, 2, 4, 8)
"""Multiples of each optimizer's smallest rate."""

RUNS = pathlib.Path("runs/cifar100_study")
RESULTS = study.RESULTS / "cifar100_study.json"
FIGURE = study.FIGURES / "batch_sizes.png"

BASELINES = ("NLCG", "LARS", "RMSProp", "momentum SGD")
"""The optimizers that run at every batch size."""
WITH_KFAC = ("K-FAC-preconditioned NLCG", "LARS after K-FAC")
"""The optimizers that run at the largest batch size."""


def smallest_rate(name: str, batch_size: int) -> float:
    """Returns the smallest of an optimizer's rates.

    It is the rate of the paper's recipe, 0.1 for a batch of 256, in proportion to the
    batch; for LARS, whose best rates grow more slowly, in proportion to its root.
    """
    if name == "K-FAC-preconditioned NLCG":
        return 0.03
    if "LARS" in name:
        return 5.0 * math.sqrt(batch_size / 640)
    return 0.1 * batch_size / 256


def configure(name: str, batch_size: int, factor: float, seed: int) -> Config:
    """Returns the settings of a run of one optimizer."""
    rate = factor * smallest_rate(name, batch_size)
    config = dataclasses.replace(
        resnet32.STROKES,
        dataset="strokes/100_small",
        model="preact_resnet8",
        norm_momentum=0.7,
        kfac=Kfac(inverse_period=1),
        batch_size=batch_size,
        epochs=EPOCHS,
        decay_epochs=(0.51 * EPOCHS, 0.765 * EPOCHS),
        warmup_epochs=EPOCHS / 8,
        warmup_start=1e-3,
        eval_epochs=EPOCHS / 4,
        seed=seed,
    )
    curved = name in WITH_KFAC
    settings: dict[str, Any]
    if "NLCG" in name:
        kind = "kfac" if curved else "bfgs"
        settings = {"nlcg": Nlcg(learning_rate=rate, preconditioner=kind)}
    elif "LARS" in name:
        lars = Lars(learning_rate=rate, weight_decay=0.0, after_kfac=curved)
        settings = {"lars": lars}
    elif name == "RMSProp":
        settings = {"rmsprop": RmsProp(learning_rate=rate)}
    else:
        settings = {"sgd": Sgd(learning_rate=rate, nesterov=False)}
    (optimizer,) = settings
    return dataclasses.replace(config, optimizer=optimizer, **settings)


def tuned(name: str, batch_size: int) -> dict[float, Outcome]:
    """Returns the outcomes of an optimizer with seed 0, by factor of its rate."""
    contestants = {
        f"{factor:g}": configure(name, batch_size, factor, seed=0) for factor in FACTORS
    }
    outcomes = outcomes_in(RUNS / f"{_plain(name)}-{batch_size}.json", contestants)
    return {float(factor): outcome for factor, outcome in outcomes.items()}


def best(outcomes: Mapping[float, Outcome]) -> float:
    """Returns the factor with the highest accuracy."""
    return max(outcomes, key=lambda factor: outcomes[factor].accuracy)


def repeated(name: str, factor: float, seed: int) -> Outcome:
    """Returns the outcome at the largest batch with another seed."""
    contestants = {name: configure(name, LARGEST, factor, seed)}
    return outcomes_in(RUNS / f"{_plain(name)}-seed{seed}.json", contestants)[name]


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def row_of(name: str, batch_size: int) -> dict[str, Any]:
    """Returns a line of the record: an optimizer at a batch size."""
    outcomes = tuned(name, batch_size)
    chosen = best(outcomes)
    accuracies = [outcomes[chosen].accuracy]
    if batch_size == LARGEST:
        accuracies += [repeated(name, chosen, s).accuracy for s in SEEDS[1:]]
    smallest = smallest_rate(name, batch_size)
    return {
        "name": name,
        "batch_size": batch_size,
        "steps": len(outcomes[chosen].losses),
        "rates": [round(factor * smallest, 6) for factor in outcomes],
        "accuracy_by_rate": [round(x.accuracy, 4) for x in outcomes.values()],
        "rate": round(chosen * smallest, 6),
        "accuracy": [round(x, 4) for x in accuracies],
        "final_loss": round(statistics.mean(outcomes[chosen].losses[-3:]), 4),
    }


def draw(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    """Draws accuracy against batch size: the study's, and beside it the paper's."""
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.6), layout="constrained", dpi=160)
    here, published = figure.subplots(1, 2)
    for index, name in enumerate((*BASELINES, *WITH_KFAC)):
        own = [row for row in rows if row["name"] == name]
        figures.plot(
            here,
            index,
            [row["batch_size"] for row in own],
            [statistics.mean(row["accuracy"]) for row in own],
            name,
        )
    here.set_title("ResNet-8 on strokes/100_small, 8 epochs", fontsize=9)
    columns = {0: "accuracy", 2: "rmsprop", 3: "momentum"}
    table = presets.ADYA_2018
    for index, column in columns.items():
        values = [getattr(preset, column) / 100 for preset in table.values()]
        figures.plot(published, index, list(table), values, BASELINES[index])
    published.set_title("Adya et al.: ResNet-32 on CIFAR-100, 200 epochs", fontsize=9)
    for panel in (here, published):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_thousands))
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
        panel.set_xlabel("batch size")
        panel.set_ylim(bottom=0)
    here.set_xticks(BATCH_SIZES)
    here.minorticks_off()
    here.set_ylabel("test accuracy")
    study.legend_below(figure, here, fontsize=8)
    return figure


def _thousands(value: float, position: int | None) -> str:
    del position
    return f"{value:,.0f}"


def main() -> None:
    """Runs the study, writes its record and its picture, prints the record."""
    compilation_cache.share_programs(RUNS)
    rows = [
        row_of(name, batch_size)
        for batch_size in reversed(BATCH_SIZES)
        for name in (*BASELINES, *(WITH_KFAC if batch_size == LARGEST else ()))
    ]
    record = {"command": "python -m experiments.cifar100_study", "rows": rows}
    study.write_record(RESULTS, record)
    draw(rows).savefig(FIGURE)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
