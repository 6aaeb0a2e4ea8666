"""Several optimizers trained on the same batches, alternating at every step.

Other load on the machine then affects all of them alike, so the ratios of their step
times are meaningful, and their accuracies differ only by the optimizer.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

import lbopt
from experiments import runs
from experiments.classifier import build_program, evaluate, open_data
from experiments.settings import Config

_SHARED = ("dataset", "data_dir", "batch_size", "epochs", "seed", "augment")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one contestant.

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
        """Returns the share of statistics that were renewed, over the run."""
        possible = len(self.renewals) * len(self.losses)
        return sum(map(len, self.renewals.values())) / max(possible, 1)


def train_together(configs: Mapping[str, Config]) -> dict[str, Outcome]:
    """Trains every contestant on the same batches, one step of each in turn.

    Args:
      configs: the contestants by name; they may differ in optimizer, devices and
        accumulation. Nothing is written.

    Returns:
      The outcome of each.

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
    """Returns the outcomes of contestants, from a file if they were trained before.

    Args:
      path: the file; written, with its directory, when all are trained.
      contestants: the contestants by name, as for ``train_together``.

    Returns:
      The outcome of each.
    """
    if not path.exists():
        print(f"{path.stem}: training {len(contestants)} contestants", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = train_together(contestants)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: dataclasses.asdict(x) for key, x in outcomes.items()}
        runs.write_text(path, json.dumps(kept))
    return {k: Outcome(**x) for k, x in json.loads(path.read_text("utf-8")).items()}


def steps_to(outcome: Outcome, accuracy: float) -> int | None:
    """Returns the first step at which the test accuracy was reached, or None."""
    return next((step for step, value in outcome.curve if value >= accuracy), None)


def _due(config: Config, state: Any) -> list[str]:
    """Returns the names of the statistics that the next step renews."""
    if not config.has_curvature:
        return []
    flags = jax.device_get(lbopt.refresh(state.opt_state))
    return [
        f"{path}.{name}"
        for path, layer in flags.items()
        for name, due in layer._asdict().items()
        if due
    ]
