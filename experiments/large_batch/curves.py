"""Along single runs: training loss beside test error, and the quadratic model's steps.

An optimizer that is late at the target may learn slowly, or it may fit the training
examples quickly and generalise badly. At the same training loss, the second has the
larger test error.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import optax

import lbopt
from experiments import figures, study
from experiments.large_batch.contestants import CONTESTANTS, Contestant
from experiments.large_batch.problems import Problem, Task
from experiments.large_batch.runs import Runner

Curve = Sequence[Sequence[float]]


def read_losses(
    problem: Problem, contestant: Contestant, settings: Mapping[str, float], task: Task
) -> list[list[float]]:
    """Returns `[step, training loss, error]` along a run with seed 0.

    The run has the problem's largest batch size and does not stop at the target. Both
    numbers are of the averaged iterate; the loss is that of as many training examples
    as a batch has.
    """
    batch_size = problem.batch_sizes[-1]
    endless = dataclasses.replace(problem, target=-math.inf)
    runner = Runner(endless, contestant, batch_size, task)
    batch = {name: jnp.asarray(x[:batch_size]) for name, x in task.train.items()}
    loss = jax.jit(lambda *variables: task.loss_fn(*variables, batch, None)[0])
    found: list[list[float]] = []

    def report(step: int, error: float, state: Any) -> None:
        average = lbopt.averaged_params(state.opt_state)
        training = float(loss(average, state.model_state))
        found.append([step, round(training, 5), round(error, 5)])

    runner.run(settings, 0, report)
    return found


def read_lengths(
    problem: Problem, batch_size: int, settings: Mapping[str, float], task: Task
) -> list[list[float]]:
    """Returns `[step, α, μ]` along a run of K-FAC under its quadratic model, seed 0.

    α is the length along the natural gradient, μ the length along the last step.
    """
    contestant = CONTESTANTS["kfac_quadratic"]
    found: list[list[float]] = []

    def report(step: int, error: float, state: Any) -> None:
        del error
        lengths: Any = optax.tree.get(state.opt_state, "lengths")
        found.append([step, *(round(float(length), 5) for length in lengths)])

    Runner(problem, contestant, batch_size, task).run(settings, 0, report)
    return found


def draw(
    losses: Mapping[str, Curve], lengths: Mapping[str, Curve], problem: Problem
) -> matplotlib.figure.Figure:
    """Draws training loss by step, the error by training loss, and momenta.

    `losses` are by contestant, `lengths` by batch size; the grey line is the target.

    Returns:
      The figure.
    """
    figure = matplotlib.figure.Figure(figsize=(9.6, 3.2), layout="constrained", dpi=160)
    by_step, errors, momenta = figure.subplots(1, 3)
    for index, (name, curve) in enumerate(losses.items()):
        steps, training, error = zip(*curve, strict=True)
        title = CONTESTANTS[name].title
        figures.plot(by_step, index, steps, training, title, marked=False)
        figures.plot(errors, index, training, error, title)
    errors.axhline(problem.target, color="0.7", linewidth=1, zorder=0)
    for index, (batch_size, curve) in enumerate(lengths.items(), start=len(losses)):
        steps, _, momentum = zip(*curve, strict=True)
        figures.plot(momenta, index, steps, momentum, f"batch {int(batch_size):,}")
    by_step.set_yscale("log")
    errors.set_xscale("log")
    errors.invert_xaxis()  # time goes to the right here, too
    by_step.set_xlabel(f"steps of {problem.batch_sizes[-1]:,} examples")
    by_step.set_ylabel("training loss (nats)")
    errors.set_xlabel("training loss (nats)")
    errors.set_ylabel(problem.error)
    momenta.set_xlabel("steps")
    momenta.set_ylabel("momentum μ, quadratic model")
    momenta.legend(frameon=False)
    study.legend_below(figure, errors)
    return figure
