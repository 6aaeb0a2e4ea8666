"""A run from its settings to its last checkpoint, with interruptions.

A run that is killed at any moment resumes from its newest whole checkpoint, bit for bit
as if it had not been interrupted. A run that is asked to stop (SIGTERM) saves first; so
does a run that cannot read its data.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from experiments import (
    checkpoints,
    figures,
    metrics,
    preemption,
    profiling,
    report,
    resuming,
    runs,
)
from experiments.classifier import Program, build_program, evaluate, open_data
from experiments.data import device_feed, pipeline
from experiments.settings import Config
from lbopt import memory_plan, training


class Run(NamedTuple):
    """A run whose settings have passed every check.

    Attributes:
      config: its settings.
      directory: where its files go.
      data: its data.
      program: its compiled functions.
    """

    config: Config
    directory: pathlib.Path
    data: pipeline.Data
    program: Program


class InterruptedRunError(Exception):
    """Raised when the run was asked to stop and has saved its state."""


def prepare(config: Config) -> Run:
    """Opens the data, builds the program and claims the directory; compiles nothing.

    Args:
      config: the settings of the run.

    Returns:
      The run.

    Raises:
      FileExistsError: if the directory holds a run that is not to be resumed.
      FileNotFoundError: if the data set is not prepared.
      OSError: if the directory cannot be written, or has no space for a checkpoint.
      ValueError: if settings do not suit the data, the optimizer or the resumed run.
    """
    data = open_data(config)
    program = build_program(config, data)
    directory = config.directory or pathlib.Path("runs") / "-".join(
        (config.dataset.replace("/", "_"), config.model, config.optimizer)
    )

    def claim() -> None:
        runs.claim(directory, config, resume=config.resume)
        _require_space(directory, program)

    _by_the_first_process(claim)
    return Run(config, directory, data, program)


def train(
    run: Run,
    preempted: preemption.Preemption | None = None,
    reached: Callable[[int], None] = lambda _step: None,
) -> float:
    """Trains a run from its start, or from its newest checkpoint, to its end.

    Args:
      run: the run.
      preempted: tells when to stop; never if None.
      reached: called after each step with the number of steps done.

    Returns:
      The test accuracy at the end.

    Raises:
      InterruptedRunError: if the run was asked to stop.
      OSError: if the last checkpoint could not be written.
    """
    config, directory, data, program = run
    state, messages = program.init(), []
    place = checkpoints.Place(0, _devices(program), config.placement)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(
            checkpoints.Checkpoints(
                directory / "checkpoints",
                keep=config.keep_checkpoints,
                keep_best=config.keep_best,
                tell=messages.append,
            )
        )
        start = 0
        if found := resuming.restore(store, program, state, place):
            start, state = found.step, found.state
            data.train.set_state(found.place.batches_taken)
            messages += _changes(run, found.place)
        feed = device_feed.DeviceFeed(data.train, program.mesh)
        stack.callback(feed.close)
        reporter = stack.enter_context(
            metrics.Reporter(
                directory,
                name=config.optimizer,
                total_steps=data.steps(config.epochs),
                batch_size=config.batch_size,
                steps_per_epoch=data.steps_per_epoch,
                start_step=start,
                writes=jax.process_index() == 0,
                layers=tuple(program.layers or ()),
            )
        )
        store.tell = reporter.event
        for message in messages:
            reporter.event(message)
        traced = config.profile and jax.process_index() == 0
        profile = profiling.Profile(directory / "profile" if traced else None)
        stack.enter_context(profile)
        steps = _Loop(run, store, reporter, feed, place, preempted, reached, profile)
        accuracy = steps.go(state, start)
    if jax.process_index() == 0:
        try:
            report.write(directory)
        except OSError as error:  # a full disk: the run itself is safe by now
            print(f"no report: {error}; python -m experiments.report {directory}")
    return accuracy


@dataclasses.dataclass
class _Loop:
    """The steps of a run, with the objects that they use."""

    run: Run
    store: checkpoints.Checkpoints
    reporter: metrics.Reporter
    feed: device_feed.DeviceFeed
    place: checkpoints.Place
    preempted: preemption.Preemption | None
    reached: Callable[[int], None]
    profile: profiling.Profile

    def go(self, state: training.TrainState, start: int) -> float:
        """Runs steps, evaluations and checkpoints to the end; returns the accuracy."""
        config, data, program = self.run.config, self.run.data, self.run.program
        total = data.steps(config.epochs)
        evaluated, saved = map(
            data.steps, (config.eval_epochs, config.checkpoint_epochs)
        )
        accuracy, unread = None, []
        for step in range(start + 1, total + 1):
            with self.reporter.phase("input"), self._saving_on_error(step - 1, state):
                batch = next(self.feed)
            if step == start + 1:
                self._begin(state, batch)
            with self.reporter.phase("step"), self.profile.step(step - start):
                state, of_step = program.train_step(state, batch)
            if self.profile.stop_after(step - start, of_step):
                self.reporter.event("wrote the trace of steps to profile/", step)
            self.reached(step)
            unread.append(of_step)
            last, accuracy = step == total, None
            # Reading metrics waits for their step, so the others run ahead.
            if step % config.log_period == 0 or step % evaluated == 0 or last:
                self.reporter.train(step, unread)
                unread = []
            if step % evaluated == 0 or last:
                with self.reporter.phase("evaluate"):
                    test = evaluate(program, state, data)
                self.reporter.test(step, test)
                accuracy = test["accuracy"]
            if step % saved == 0 or last:
                self._save(step, state, accuracy)
            if not last and self.preempted and self.preempted.requested(step):
                self._stop(step, state)
        if total not in self.store.steps() or not self.store.wait():
            self._save(total, state, accuracy)
            self._require_saved(total)
        if accuracy is None:  # the checkpoint was that of the last step
            accuracy = evaluate(program, state, data)["accuracy"]
        return accuracy

    def _begin(self, state: training.TrainState, batch: Any) -> None:
        """Compiles the step, prints its memory plan and writes the facts of the run."""
        data, program = self.run.data, self.run.program
        devices, along = self.place.devices, program.per_example
        needed = memory_plan.plan(state, batch, devices, per_example=along)
        with self.reporter.phase("step"):
            compiled = program.train_step.lower(state, batch).compile()
        needed = memory_plan.with_xla(needed, compiled)
        if jax.process_index() > 0:
            return
        print(needed)
        runs.write_facts(
            self.run.directory,
            devices=devices,
            parameters=sum(x.size for x in jax.tree.leaves(state.params)),
            steps=data.steps(self.run.config.epochs),
            steps_per_epoch=data.steps_per_epoch,
            train_images=data.train_images,
            test_images=data.test_images,
            classes=data.num_classes,
            image_shape=data.image_shape,
            memory_plan=needed._asdict(),
        )

    def _save(self, step: int, state: Any, accuracy: float | None = None) -> None:
        place = self.place._replace(batches_taken=self.feed.get_state())
        with self.reporter.phase("checkpoint"):
            self.store.save(step, state, place, accuracy=accuracy)

    def _stop(self, step: int, state: Any) -> None:
        self._save(step, state)
        self._require_saved(step)
        self.reporter.event("asked to stop; saved", step)
        raise InterruptedRunError(f"saved after step {step}")

    @contextlib.contextmanager
    def _saving_on_error(self, step: int, state: Any) -> Iterator[None]:
        """Saves the state before an error of the data is raised again."""
        try:
            yield
        except Exception:
            if step:
                self._save(step, state)
                self.store.wait()
            raise

    def _require_saved(self, step: int) -> None:
        if not self.store.wait() or step not in self.store.steps():
            raise OSError(
                f"the state after step {step} is not on disk; make space in "
                f"{self.run.directory} and start again with --resume, which goes on "
                f"from step {max(self.store.steps(), default=0)}"
            )


def draw(drawn: Sequence[Run], path: pathlib.Path) -> None:
    """Draws the curves of runs that differ only in the optimizer."""
    config = drawn[0].config
    title = f"{config.model} on {config.dataset}, batch {config.batch_size:,}"
    logs = {run.config.optimizer: run.directory / "metrics.jsonl" for run in drawn}
    figures.draw_runs(logs, path, title=title)


def _devices(program: Program) -> int:
    return 1 if program.mesh is None else program.mesh.size


def _changes(run: Run, then: checkpoints.Place) -> list[str]:
    """Returns messages on differences from the run's earlier start that matter."""
    config, now = run.config, _devices(run.program)
    if then.devices == now:
        return []
    message = f"goes on with {now} devices instead of {then.devices}"
    if config.micro_batch_size is None and not config.sync_norm:
        message += (
            f"; BatchNorm sees {config.batch_size // now} images instead of "
            f"{config.batch_size // then.devices}, which --micro-batch-size would keep"
        )
    return [message]


def _by_the_first_process(act: Callable[[], None]) -> None:
    """Calls ``act`` in process 0; if it raises, every process raises."""
    problem = None
    if jax.process_index() == 0:
        try:
            act()
        except (OSError, ValueError) as error:
            problem = error
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(problem is not None)
        if refused and problem is None:
            raise ValueError("process 0 refuses to start; its log says why")
    if problem is not None:
        raise problem


def _require_space(directory: pathlib.Path, program: Program) -> None:
    state = program.state_shapes(_devices(program), "comm")
    needed = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(
            f"directory={directory} must have {needed / 1e9:.2f} GB free for one "
            f"checkpoint, but has {free / 1e9:.2f} GB; make space or choose another "
            "--directory"
        )
