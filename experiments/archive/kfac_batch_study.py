"""K-FAC and SGD by batch size: updates to a fixed training loss; and two step sizes.

    python -m experiments.archive.kfac_batch_study

A small convolutional network without normalisation on `strokes/20_small`. At batches of
64, 256, 1,024 and 2,048 SGD with Nesterov momentum and K-FAC with the KL clip get as
many settings each, with constant rates, and take turns at every step. Targets are the
training losses at which the best of either ends at batch 256; training losses are means
over the last 2,048 images, so that they are as noisy at every batch size. At batch
1,024 the KL step with a decaying bound, c₀ζᵏ, and a constant rate, stands beside
exponentially decaying rates without a bound; k counts half epochs in both.

K-FAC's statistics are taken at every step, from labels drawn from the model, and its
inverses at every fifth. What is finished is kept in `runs/kfac_batch_study` and not
repeated. Writes `experiments/results/kfac_batch_study.json` and
`docs/figures/kfac_batch_sizes.png`; about half an hour on 2 cores.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from experiments import figures
from experiments.settings import Config, Kfac, Sgd
from experiments.side_by_side import Outcome, outcomes_in

TRAINING_IMAGES = 10_240
AVERAGED_IMAGES = 2048
"""What a training loss is a mean over."""
UPDATES = {64: 320, 256: 160, 1024: 80, 2048: 60}
"""Of every contestant, by batch size."""
BASE_BATCH = 256
"""Where the targets are from, and what speed-ups are over."""
ABLATION_BATCH = 1024

RUNS = pathlib.Path("runs/kfac_batch_study")
ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "kfac_batch_study.json"
FIGURE = ROOT / "docs" / "figures" / "kfac_batch_sizes.png"

# As many settings of each optimizer, and of each step size.
SGD_GRID = [Sgd(learning_rate=rate) for rate in (0.02, 0.05, 0.1, 0.2)]
KFAC_GRID = [
    Kfac(learning_rate=rate, damping=damping)
    for rate, damping in itertools.product((0.03, 0.1), (1e-3, 1e-2))
]
KL_GRID = list(itertools.product((0.003, 0.01), (0.8, 0.95)))
"""The bounds c₀ and their decays ζ."""
RATE_GRID = list(itertools.product((0.005, 0.01), (0.8, 0.95)))
"""The rates without a bound, and their decays."""
LABELS = {"sgd": "SGD", "kfac": "K-FAC"}
LARGEST_RATE = 0.3
"""Of the KL step, whose bound is meant to shorten every step."""
ABLATION_DAMPING = 1e-2

Outcomes = dict[str, Outcome]
Named = dict[str, Config]


# === Contestants ======================================================================


def constant_rates(batch_size: int, updates: int, **settings: Any) -> Config:
    """A run on the small images whose rate stays, evaluated at its end."""
    epochs = updates * batch_size / TRAINING_IMAGES
    return Config(
        dataset="strokes/20_small",
        fisher="sampled",
        batch_size=batch_size,
        epochs=epochs,
        schedule="exponential",
        warmup_epochs=0.0,
        eval_epochs=epochs,
        **settings,
    )


def configure(batch_size: int) -> Config:
    """A run of the comparison, but for its optimizer."""
    return constant_rates(batch_size, UPDATES[batch_size], model="convnet")


def contestants(batch_size: int) -> Named:
    """Every setting of both optimizers."""
    base = configure(batch_size)
    sgd = {
        f"sgd rate {x.learning_rate:g}": dataclasses.replace(
            base, optimizer="sgd", sgd=x
        )
        for x in SGD_GRID
    }
    kfac = {
        f"kfac rate {x.learning_rate:g} damping {x.damping:g}": dataclasses.replace(
            base, optimizer="kfac", kfac=x
        )
        for x in KFAC_GRID
    }
    return sgd | kfac


def step_sizes() -> Named:
    """K-FAC by the KL step, and by decaying rates alone."""
    base = configure(ABLATION_BATCH)
    kl = {
        f"kl bound {c:g} decay {decay:g}": dataclasses.replace(
            base,
            kfac=Kfac(
                learning_rate=LARGEST_RATE,
                damping=ABLATION_DAMPING,
                kl_clip=c,
                kl_clip_decay=decay,
            ),
        )
        for c, decay in KL_GRID
    }
    rates = {
        f"rate {rate:g} decay {decay:g}": dataclasses.replace(
            base,
            decay_rate=decay,
            kfac=Kfac(learning_rate=rate, damping=ABLATION_DAMPING, kl_clip=None),
        )
        for rate, decay in RATE_GRID
    }
    return kl | rates


def outcomes_of(name: str, configs: Mapping[str, Config]) -> Outcomes:
    """What they did, from the file if they have run before."""
    return outcomes_in(RUNS / f"{name}.json", configs)


# === Losses ===========================================================================


def averaged(outcome: Outcome, batch_size: int) -> list[float]:
    """Training losses over the last images; the first after as many updates."""
    width = max(1, AVERAGED_IMAGES // batch_size)
    windows = np.lib.stride_tricks.sliding_window_view(outcome.losses, width)
    return windows.mean(axis=1).tolist()


def last_loss(outcome: Outcome, batch_size: int) -> float:
    """The training loss at the end; inf for none."""
    loss = averaged(outcome, batch_size)[-1]
    return loss if math.isfinite(loss) else math.inf


def updates_to(outcome: Outcome, batch_size: int, loss: float) -> int | None:
    """The updates after which a training loss was first reached."""
    width = max(1, AVERAGED_IMAGES // batch_size)
    reached = (
        updates
        for updates, value in enumerate(averaged(outcome, batch_size), start=width)
        if value <= loss
    )
    return next(reached, None)


def best(outcomes: Mapping[str, Outcome], batch_size: int, loss: float) -> str:
    """Who reached a loss in the fewest updates, or came closest to it."""

    def order(name: str) -> tuple[float, float]:
        updates = updates_to(outcomes[name], batch_size, loss)
        end = last_loss(outcomes[name], batch_size)
        return math.inf if updates is None else updates, end

    return min(outcomes, key=order)


# === The study ========================================================================


def target_of(kind: str, base: Mapping[str, Outcome]) -> float:
    """The training loss at which an optimizer's best ends at the base batch."""
    return min(
        last_loss(outcome, BASE_BATCH)
        for name, outcome in base.items()
        if name.startswith(kind)
    )


def row_of(name: str, outcome: Outcome, batch_size: int, loss: float) -> dict[str, Any]:
    """One contestant as a line of the record."""
    updates = updates_to(outcome, batch_size, loss)
    times = [statistics.median(outcome.seconds[1:]), *outcome.seconds[1:]]
    return {
        "name": name,
        "batch_size": batch_size,
        "loss": round(last_loss(outcome, batch_size), 4),
        "accuracy": round(outcome.accuracy, 4),
        "step_time": round(times[0], 4),
        "updates": updates,
        # With a median step for the first, which compiles.
        "seconds": None if updates is None else round(sum(times[:updates]), 2),
    }


def scaling(by_size: Mapping[int, Outcomes], loss: float) -> list[dict[str, Any]]:
    """The best setting of each optimizer at each batch size, and its speed-up."""
    rows = []
    for kind in LABELS:
        chosen = {}
        for size, outcomes in by_size.items():
            own = {k: x for k, x in outcomes.items() if k.startswith(kind)}
            name = best(own, size, loss)
            chosen[size] = row_of(name, own[name], size, loss)
        base = chosen[BASE_BATCH]["updates"]
        for size, row in chosen.items():
            reached = None not in (base, row["updates"])
            row |= {
                "optimizer": kind,
                "speed_up": round(base / row["updates"], 2) if reached else None,
                "ideal": size / BASE_BATCH,
            }
            rows.append(row)
    return rows


def ablation(outcomes: Outcomes, loss: float) -> dict[str, Any]:
    """The best of each step size, and all that was tried."""
    kinds = {
        kind: {k: x for k, x in outcomes.items() if k.startswith(kind)}
        for kind in ("kl", "rate")
    }
    tried = [row_of(k, x, ABLATION_BATCH, loss) for k, x in outcomes.items()]
    chosen = {kind: best(own, ABLATION_BATCH, loss) for kind, own in kinds.items()}
    return {"best": chosen, "tried": tried}


def draw(targets: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draws updates to each target against batch size, and the ideal slopes."""
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.4), layout="constrained", dpi=160)
    panels = figure.subplots(1, len(targets), sharey=True)
    for panel, (whose, target) in zip(panels, targets.items(), strict=True):
        for index, (kind, label) in enumerate(LABELS.items()):
            own = [row for row in target["scaling"] if row["optimizer"] == kind]
            reached = [row for row in own if row["updates"] is not None]
            sizes = [row["batch_size"] for row in reached]
            updates = [row["updates"] for row in reached]
            figures.plot(panel, index, sizes, updates, label)
            for row in reached:
                if row["batch_size"] == BASE_BATCH:
                    ideal = [row["updates"] * BASE_BATCH / size for size in UPDATES]
                    dotted = {"color": "0.6", "linewidth": 0.8, "linestyle": ":"}
                    panel.plot(list(UPDATES), ideal, **dotted)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(list(UPDATES))
        for axis in (panel.xaxis, panel.yaxis):
            formatter = matplotlib.ticker.StrMethodFormatter("{x:,.0f}")
            axis.set_major_formatter(formatter)
        panel.minorticks_off()
        panel.set_xlabel("batch size")
        end = f"{LABELS[whose]}'s end at {BASE_BATCH}, {target['loss']:.2f} nats"
        panel.set_title(f"to {end}", fontsize=9)
    panels[0].set_ylabel("updates")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Dotted: in inverse proportion to the batch", fontsize=9)
    return figure


def main() -> None:
    """Runs the study, writes its record and its picture, prints the record."""
    # What was compiled before an interruption need not be compiled again.
    jax.config.update("jax_compilation_cache_dir", str(RUNS.resolve() / "compiled"))
    by_size = {size: outcomes_of(str(size), contestants(size)) for size in UPDATES}
    targets = {}
    for kind in LABELS:
        loss = target_of(kind, by_size[BASE_BATCH])
        rows = scaling(by_size, loss)
        targets[kind] = {"loss": round(loss, 4), "scaling": rows}
    loss = target_of("sgd", by_size[BASE_BATCH])
    record = {
        "command": "python -m experiments.kfac_batch_study",
        "targets": targets,
        "tried": [
            row_of(name, outcome, size, loss)
            for size, outcomes in by_size.items()
            for name, outcome in outcomes.items()
        ],
        "ablation": ablation(outcomes_of("step-sizes", step_sizes()), loss),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(targets).savefig(FIGURE)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
