"""How many steps K-FAC needs for what SGD reaches: the demo, tuned, over three seeds.

    python -m experiments.archive.demo_study

Ten settings of each optimizer are tried with seed 0, and the best of each is run with
two more seeds. SGD's best has the highest test accuracy at the end, K-FAC's the fewest
steps to that accuracy. Runs that are finished are not repeated, so the study may be
stopped and continued. About 15 minutes on 2 cores; writes
`experiments/results/demo_study.json`.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
from typing import Any

from experiments import figures
from experiments.loop import prepare, train
from experiments.settings import Config, Kfac, Sgd

SEEDS = (0, 1, 2)
RUNS = pathlib.Path("runs/demo_study")
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "demo_study.json"

SGD = [
    Sgd(learning_rate=rate, momentum=momentum)
    for rate, momentum in itertools.product((0.4, 0.6, 0.8, 1.1, 1.6), (0.9, 0.95))
]
KFAC = [
    Kfac(learning_rate=rate, damping=damping)
    for rate, damping in itertools.product((0.03, 0.05, 0.1, 0.2, 0.4), (1e-3, 1e-2))
]


def directory_of(settings: Sgd | Kfac, seed: int) -> pathlib.Path:
    """Where the run with these settings is kept."""
    optimizer = "sgd" if isinstance(settings, Sgd) else "kfac"
    values = "-".join(f"{v:g}" for v in dataclasses.astuple(settings) if v is not None)
    return RUNS / f"{optimizer}-{values}-seed{seed}"


def configure(settings: Sgd | Kfac, seed: int) -> Config:
    """The demo with these settings; the test accuracy is read every other step."""
    demo = Config(
        seed=seed, eval_epochs=0.4, directory=directory_of(settings, seed), resume=True
    )
    if isinstance(settings, Sgd):
        return dataclasses.replace(demo, optimizer="sgd", sgd=settings)
    return dataclasses.replace(demo, optimizer="kfac", kfac=settings)


def accuracies(settings: Sgd | Kfac, seed: int) -> figures.Curve:
    """The test accuracies of one run, which is carried out if it is not there."""
    directory = directory_of(settings, seed)
    if not (directory / "report.md").exists():
        train(prepare(configure(settings, seed)))
    return figures.read_curve(directory / "metrics.jsonl", "test", "accuracy")


def steps_to(curve: figures.Curve, accuracy: float) -> int | None:
    """The first step at which the test accuracy was reached."""
    pairs = zip(curve.steps, curve.values, strict=True)
    return next((step for step, value in pairs if value >= accuracy), None)


def row(settings: Sgd | Kfac, seed: int, target: float | None) -> dict[str, Any]:
    """One run as a line of the record."""
    curve = accuracies(settings, seed)
    return {
        **dataclasses.asdict(settings),
        "seed": seed,
        "steps": curve.steps[-1],
        "accuracy": round(curve.values[-1], 4),
        "seconds": round(curve.seconds[-1], 1),
        "steps_to_sgd": None if target is None else steps_to(curve, target),
    }


def main() -> None:
    """Runs the study and prints its table."""
    sgd = [row(settings, 0, None) for settings in SGD]
    best_sgd = max(range(len(SGD)), key=lambda i: sgd[i]["accuracy"])
    target = sgd[best_sgd]["accuracy"]
    kfac = [row(settings, 0, target) for settings in KFAC]
    best_kfac = min(
        range(len(KFAC)),
        key=lambda i: (kfac[i]["steps_to_sgd"] or 10**9, -kfac[i]["accuracy"]),
    )
    seeds = []
    for seed in SEEDS:
        of_sgd = row(SGD[best_sgd], seed, None)
        of_kfac = row(KFAC[best_kfac], seed, of_sgd["accuracy"])
        seeds.append({"sgd": of_sgd, "kfac": of_kfac})
    crossings = [s["kfac"]["steps_to_sgd"] for s in seeds]
    reached = None not in crossings
    record = {
        "command": "python -m experiments.demo_study",
        "sgd_settings": sgd,
        "kfac_settings": kfac,
        "seeds": seeds,
        "mean_steps_to_sgd": statistics.mean(crossings) if reached else None,
        "mean_accuracy": {
            name: statistics.mean(s[name]["accuracy"] for s in seeds)
            for name in ("sgd", "kfac")
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
