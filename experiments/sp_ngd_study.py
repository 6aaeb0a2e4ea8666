"""The parts of SP-NGD measured: stale statistics, an ablation, and tuned SGD.

    python -m experiments.sp_ngd_study

Every optimizer of a comparison trains on the same batches in turn, so that step times
are taken side by side. What is finished is kept in `runs/sp_ngd_study` and not
repeated. Writes `experiments/results/sp_ngd_study.json` and `docs/figures/refresh.png`.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from experiments import compilation_cache, study
from experiments.settings import Config, Sgd, SpNgd
from experiments.side_by_side import Outcome, outcomes_in, steps_to

SEEDS = (0, 1, 2)
STEPS = 100
TRAINING_IMAGES = 10_240
DEVICES = 4
MICRO_BATCH = 256
BATCH_SIZES = (256, 1024, 4096)
ONE_DEVICE_BATCH = 512
"""Of the ablation and the comparison with tuned SGD, which run on one device."""

RUNS = pathlib.Path("runs/sp_ngd_study")
RESULTS = study.RESULTS / "sp_ngd_study.json"
FIGURE = study.FIGURES / "refresh.png"

FRESH = SpNgd(stale_threshold=None)
Outcomes = dict[str, Outcome]

# As many settings of each; a tenth of SGD's steps warm up, and both rates decay.
SGD_GRID = [
    Sgd(learning_rate=rate, momentum=momentum)
    for rate, momentum in itertools.product((0.2, 0.4, 0.8, 1.6, 3.2), (0.9, 0.95))
]
SP_NGD_GRID = [
    SpNgd(learning_rate=rate, power=power)
    for rate, power in itertools.product((0.015, 0.03, 0.06, 0.12, 0.24), (1.0, 2.0))
]


def configure(batch_size: int, seed: int, devices: int, micro_batch: int) -> Config:
    """Returns the settings of a run of `STEPS` steps with SGD."""
    return Config(
        optimizer="sgd",
        sgd=Sgd(),
        dataset="strokes/20_small",
        batch_size=batch_size,
        devices=devices,
        micro_batch_size=micro_batch // devices,
        epochs=STEPS * batch_size / TRAINING_IMAGES,
        warmup_epochs=0.0,
        seed=seed,
    )


def with_sp_ngd(config: Config, settings: SpNgd) -> Config:
    """Returns the settings of the same run with SP-NGD."""
    return dataclasses.replace(config, optimizer="sp_ngd", sp_ngd=settings)


def stale_contestants(batch_size: int, seed: int) -> dict[str, Config]:
    """Returns SGD, SP-NGD that renews everything at every step, and SP-NGD.

    Micro-batches are of one size, so that BatchNorm is the same whatever the batch.
    Convolutions in a loop are slow on a CPU: the last seed's largest batch goes
    without SGD.
    """
    sgd = configure(batch_size, seed, DEVICES, MICRO_BATCH)
    curved = {
        "fresh": with_sp_ngd(sgd, FRESH),
        "stale": with_sp_ngd(sgd, SpNgd()),
    }
    last = (batch_size, seed) == (BATCH_SIZES[-1], SEEDS[-1])
    return curved if last else {"sgd": sgd, **curved}


def on_one_device(seed: int) -> Config:
    """Returns the settings of SGD on one device, without accumulation."""
    batch = ONE_DEVICE_BATCH
    return configure(batch, seed, devices=1, micro_batch=batch)


def ablation_contestants(seed: int) -> dict[str, Config]:
    """Returns SGD, and SP-NGD by Fisher matrix, norm blocks and staleness."""
    sgd = on_one_device(seed)
    contestants = {"sgd": sgd}
    for fisher, norm_blocks, stale in itertools.product(
        ("sampled", "empirical"), ("full", "unit_wise"), (False, True)
    ):
        settings = dataclasses.replace(
            SpNgd() if stale else FRESH, fisher=fisher, norm_blocks=norm_blocks
        )
        name = f"{fisher} {norm_blocks} {'stale' if stale else 'fresh'}"
        contestants[name] = with_sp_ngd(sgd, settings)
    return contestants


def tuning_contestants(
    sgd: Sequence[Sgd], sp_ngd: Sequence[SpNgd], seed: int
) -> dict[str, Config]:
    """Returns both optimizers' settings; accuracy is read every fourth step."""
    base = on_one_device(seed)
    base = dataclasses.replace(
        base,
        warmup_epochs=base.epochs / 10,
        eval_epochs=4 * ONE_DEVICE_BATCH / TRAINING_IMAGES,
    )
    contestants = {
        f"sgd rate {x.learning_rate:g} momentum {x.momentum:g}": dataclasses.replace(
            base, sgd=x
        )
        for x in sgd
    }
    contestants |= {
        f"sp_ngd rate {x.learning_rate:g} power {x.power:g}": with_sp_ngd(base, x)
        for x in sp_ngd
    }
    return contestants


def tuned() -> list[dict[str, Any]]:
    """Returns the steps to SGD's end of each optimizer's best setting, by seed."""
    first = outcomes_of("tuning-0", tuning_contestants(SGD_GRID, SP_NGD_GRID, 0))
    sgd = [x for name, x in first.items() if name.startswith("sgd")]
    sp_ngd = [x for name, x in first.items() if name.startswith("sp_ngd")]
    best_sgd = max(range(len(sgd)), key=lambda i: sgd[i].accuracy)
    target = sgd[best_sgd].accuracy
    best = min(
        range(len(sp_ngd)),
        key=lambda i: (steps_to(sp_ngd[i], target) or STEPS + 1, -sp_ngd[i].accuracy),
    )
    chosen = (SGD_GRID[best_sgd],), (SP_NGD_GRID[best],)
    rows = [
        {"seed": 0, "name": name, "accuracy": round(x.accuracy, 4)}
        | {"steps_to_sgd": steps_to(x, target)}
        for name, x in first.items()
    ]
    for seed in SEEDS[1:]:
        outcomes = outcomes_of(f"tuned-{seed}", tuning_contestants(*chosen, seed))
        end = next(iter(outcomes.values())).accuracy
        rows += [
            {"seed": seed, "name": name, "accuracy": round(x.accuracy, 4)}
            | {"steps_to_sgd": steps_to(x, end)}
            for name, x in outcomes.items()
        ]
    return rows


def outcomes_of(name: str, contestants: Mapping[str, Config]) -> Outcomes:
    """Returns the outcomes, from the file if the contestants have run before."""
    return outcomes_in(RUNS / f"{name}.json", contestants)


def rows_of(seeds: Sequence[Outcomes]) -> list[dict[str, Any]]:
    """Returns the lines of a table: one for each contestant, with all its seeds."""
    rows = []
    for name in seeds[0]:
        own = [outcomes[name] for outcomes in seeds if name in outcomes]
        ratios = [
            sum(outcomes[name].seconds[1:]) / sum(outcomes["sgd"].seconds[1:])
            for outcomes in seeds
            if "sgd" in outcomes
        ]
        row: dict[str, Any] = {
            "name": name,
            "accuracy": [round(x.accuracy, 4) for x in own],
            "final_loss": [round(statistics.mean(x.losses[-5:]), 4) for x in own],
            "step_time_over_sgd": [round(x, 3) for x in ratios],
        }
        if own[0].renewals:
            shares = [share_of_statistics(x) for x in own]
            row["refreshed"] = [round(x.refreshed(), 4) for x in own]
            row["refreshed_by_quarter"] = [
                round(float(x), 3)
                for x in np.mean(shares, 0).reshape(4, -1).mean(1).tolist()
            ]
            if own[0].statistic_bytes[0]:  # one device sends nothing
                row["bytes"] = [round(share_of_bytes(x), 4) for x in own]
        rows.append(row)
    return rows


def share_of_statistics(outcome: Outcome) -> np.ndarray:
    """Returns the share of the statistics that each step renewed."""
    renewed = np.zeros(len(outcome.losses))
    for steps in outcome.renewals.values():
        renewed[steps] += 1
    return renewed / len(outcome.renewals)


def share_of_bytes(outcome: Outcome) -> float:
    """Returns the bytes sent for statistics over those of sending all at every step."""
    most = outcome.statistic_bytes[0]  # at the first step all are due
    return statistics.mean(outcome.statistic_bytes) / most


def draw(stale: Mapping[int, Outcome]) -> matplotlib.figure.Figure:
    """Draws which step renewed which statistic, a panel for each batch size."""
    figure = matplotlib.figure.Figure(figsize=(7.2, 7.6), layout="constrained", dpi=160)
    panels = figure.subplots(len(stale), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (batch_size, outcome) in zip(panels, stale.items(), strict=True):
        # The inputs' factors first: what changes least is on top.
        order = {"a": 0, "g": 1, "f": 2}
        names = sorted(outcome.renewals, key=lambda s: order[s.rpartition(".")[2]])
        for row, name in enumerate(names):
            kind = order[name.rpartition(".")[2]]
            steps = outcome.renewals[name]
            colour = ("#0072B2", "#D55E00", "#009E73")[kind]
            panel.plot(steps, [row] * len(steps), "|", color=colour, markersize=4)
        kinds = [name.rpartition(".")[2] for name in names]
        ends = [kinds.index(k) + kinds.count(k) / 2 - 0.5 for k in order]
        panel.set_yticks(ends, ["inputs, A", "outputs, G", "BatchNorm"])
        panel.tick_params(axis="y", length=0)
        panel.invert_yaxis()
        panel.set_title(
            f"batch {batch_size:,}: {outcome.refreshed():.0%} of the statistics "
            f"renewed, {share_of_bytes(outcome):.0%} of their bytes sent",
            fontsize=9,
        )
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.suptitle(
        "Each row is a statistic of ResNet-8, each mark a step that renewed it",
        fontsize=10,
    )
    return figure


def main() -> None:
    """Runs the study, writes its record and its picture, prints its tables."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    compilation_cache.share_programs(RUNS)
    stale = {
        size: [
            outcomes_of(f"stale-{size}-{seed}", stale_contestants(size, seed))
            for seed in SEEDS
        ]
        for size in BATCH_SIZES
    }
    draw({size: seeds[0]["stale"] for size, seeds in stale.items()}).savefig(FIGURE)
    ablation = [
        outcomes_of(f"ablation-{seed}", ablation_contestants(seed)) for seed in SEEDS
    ]
    record = {
        "command": "python -m experiments.sp_ngd_study",
        "steps": STEPS,
        "seeds": SEEDS,
        "stale": {str(size): rows_of(seeds) for size, seeds in stale.items()},
        "ablation": rows_of(ablation),
        "tuned": tuned(),
    }
    study.write_record(RESULTS, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
