"""Several optimizers trained on the same batches, alternating at every step.

Other work of the machine then slows all of them down alike, so that the ratio of their
step times is meaningful, and their accuracies differ by the optimizer alone.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

import lbopt
from experiments import study
from experiments.classifier import build_program, evaluate, open_data
from experiments.settings import Config

# Settings that the contestants must have in common.
_SHARED = ("dataset", "data_dir", "batch_size", "epochs", "seed", "augment")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one contestant.

    Attributes:
      accuracy: test accuracy at the end.
      losses: training loss before each step.
      seconds: wall time of each step; the first compiles.
      renewals: for each statistic, as ``layer path.name``, the steps that renewed it.
      statistic_bytes: bytes that each device sent for statistics at each step.
      curve: steps done and the test accuracy then, every ``eval_epochs``.
    """

    accuracy: float
    losses: list[float]
    seconds: list[float]
    renewals: dict[str, list[int]]
    statistic_bytes: list[float]
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def refreshed(self) -> float:
        """Returns the share of all statistics, over the run, that were renewed."""
        possible = len(self.renewals) * len(self.losses)
        return sum(map(len, self.renewals.values())) / max(possible, 1)


def train_together(configs: Mapping[str, Config]) -> dict[str, Outcome]:
    """Trains every contestant on the same batches, one step of each in turn.

    They may differ in optimizer, devices and accumulation. Nothing is written.

    Returns:
      The outcomes by name.

    Raises:
      ValueError: if they differ in the data or the length of the run.
    """
    first = next(iter(configs.values()))
    for name, config in configs.items():
        for key in _SHARED:
            if getattr(config, key) != getattr(first, key):
                raise ValueError(
                    f"{key}={getattr(config, key)!r} of {name!r} must be "
                    f"{getattr(first, key)!r}, as of the first contestant; all train "
                    "on the same data"
                )
    data = open_data(first)
    programs = {name: build_program(c, data) for name, c in configs.items()}
    states = {name: program.init() for name, program in programs.items()}
    outcomes = {name: Outcome(0.0, [], [], {}, []) for name in configs}

    def accuracy(name: str) -> float:
        return evaluate(programs[name], states[name], data)["accuracy"]

    for step in range(data.steps(first.epochs)):
        batch = next(data.train)
        for name, program in programs.items():
            outcome = outcomes[name]
            for statistic in _due(configs[name], states[name]):
                outcome.renewals.setdefault(statistic, []).append(step)
            start = time.perf_counter()
            states[name], metrics = program.train_step(states[name], batch)
            jax.block_until_ready(states[name])
            outcome.seconds.append(time.perf_counter() - start)
            outcome.losses.append(float(metrics["loss"]))
            if outcome.renewals:
                report: Any = optax.tree.get(states[name].opt_state, "report")
                outcome.statistic_bytes.append(float(np.sum(report.statistic_bytes)))
            if (step + 1) % data.steps(configs[name].eval_epochs) == 0:
                outcome.curve.append((step + 1, accuracy(name)))
    return {
        name: dataclasses.replace(outcome, accuracy=accuracy(name))
        for name, outcome in outcomes.items()
    }


def outcomes_in(
    path: pathlib.Path, contestants: Mapping[str, Config]
) -> dict[str, Outcome]:
    """Returns the outcomes, from a file if the contestants have run before."""
    return study.outcomes_in(path, contestants, train_together, Outcome)


def steps_to(outcome: Outcome, accuracy: float) -> int | None:
    """Returns the first step after which the test accuracy was reached."""
    return next((step for step, value in outcome.curve if value >= accuracy), None)


def _due(config: Config, state: Any) -> list[str]:
    """Returns the names of the statistics that the coming step renews."""
    if not config.has_curvature:
        return []
    flags = jax.device_get(lbopt.refresh(state.opt_state))
    return [
        f"{path}.{name}"
        for path, layer in flags.items()
        for name, due in layer._asdict().items()
        if due
    ]
