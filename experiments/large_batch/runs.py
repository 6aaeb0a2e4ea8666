"""One run: an optimizer with its settings, a batch size and a seed."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lbopt
from experiments.large_batch.contestants import Contestant
from experiments.large_batch.problems import Problem, Task
from lbopt import training


@dataclasses.dataclass(frozen=True)
class Run:
    """The outcome of a run.

    Attributes:
        settings: Settings of the optimizer.
        seed: Seed of the initial parameters and of the order of the examples.
        errors: `[step, error]` at each reading; a run that diverged has few.
        seconds_a_step: The median of a step's wall time, readings apart.
    """

    settings: dict[str, float]
    seed: int
    errors: list[list[float]]
    seconds_a_step: float

    def error_at(self, steps: int) -> float:
        """Returns the error after some steps; inf if it was not read."""
        return next((x for step, x in self.errors if step == steps), math.inf)

    def steps_to(self, target: float) -> int | None:
        """Returns the steps of the first reading at the target."""
        return next((int(step) for step, x in self.errors if x <= target), None)

    def last_error(self) -> float:
        """Returns the error at the end."""
        return self.errors[-1][1] if self.errors else math.inf


class Runner:
    """Runs one optimizer at one batch size; all settings and seeds share a program.

    Args:
        problem: The problem.
        contestant: The optimizer.
        batch_size: Examples in a step.
        task: The problem's task, opened.
    """

    def __init__(
        self, problem: Problem, contestant: Contestant, batch_size: int, task: Task
    ):
        self.problem, self.contestant = problem, contestant
        self.batch_size, self.task = batch_size, task
        self._init = jax.jit(task.variables)
        shapes = jax.eval_shape(task.variables, jax.random.key(0))
        batch = {k: v[:batch_size] for k, v in task.train.items()}
        self.layers = None
        if contestant.curvature:
            self.layers = lbopt.trace_layers(
                task.loss_fn, *shapes, batch, jax.random.key(0), has_aux=True
            )
        self._step = jax.jit(self._step_of, donate_argnums=0)
        self._error = jax.jit(task.error)

    def _optimizer(self, settings: Mapping[str, Any]) -> Any:
        return self.contestant.optimizer(settings, self.layers, self.problem)

    def _step_of(self, state: Any, settings: Any, train: Any, chosen: Any) -> Any:
        step = training.make_train_step(
            self.task.loss_fn,
            self._optimizer(settings),
            self.layers,
            fisher=self.contestant.fisher or "empirical",
        )
        return step(state, {name: x[chosen] for name, x in train.items()})

    def run(
        self,
        settings: Mapping[str, float],
        seed: int,
        report: Callable[[int, float, Any], None] = lambda _step, _error, _state: None,
    ) -> Run:
        """Trains until the target is reached and the budget is spent, or to the end.

        Args:
            settings: Settings of the optimizer.
            seed: Seed of the initial parameters and of the order.
            report: Called with the step, the error and the state at each reading.

        Returns:
            The outcome.
        """
        params, model_state = self._init(jax.random.key(seed))
        tx = self._optimizer(settings)
        state = training.init_state(tx, params, model_state, jax.random.key(seed))
        given = {name: jnp.float32(value) for name, value in settings.items()}
        train = {name: jnp.asarray(x) for name, x in self.task.train.items()}
        order = _order(self.problem.examples, self.batch_size, seed)
        period = self.problem.period(self.batch_size)
        budget = self.problem.steps_in_epochs(self.batch_size)
        errors, seconds, reached = [], [], False
        for step in range(1, self.problem.steps(self.batch_size) + 1):
            begin = time.perf_counter()
            state, _ = self._step(state, given, train, next(order))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begin)
            if step % period == 0:
                average = lbopt.averaged_params(state.opt_state)
                error = float(self._error(average, state.model_state))
                if not math.isfinite(error) or int(state.skipped) > step // 2:
                    break
                errors.append([step, round(error, 5)])
                report(step, error, state)
                reached = reached or error <= self.problem.target
            if reached and step >= budget:
                break
        return Run(dict(settings), seed, errors, round(float(np.median(seconds)), 5))


def _order(examples: int, batch_size: int, seed: int):
    """Yields the indices of each batch, in a new order at each epoch."""
    random = np.random.default_rng(seed)
    while True:
        shuffled = random.permutation(examples)
        for first in range(0, examples - batch_size + 1, batch_size):
            yield shuffled[first : first + batch_size]
