"""A training step with a program for each kind of step, chosen on the host.

With fixed periods the host knows what a step renews.  A program that renews nothing has
no statistics, no averages and no inversions in it, where a single program for all steps
has conditionals around them, which cost an accelerator time even if they are never
taken.

An accelerator gets three programs: nothing is due, statistics are, and statistics and
inverses are.  A CPU, which conditionals cost nothing, gets two: one for nothing, and
one for all else, with flags as arguments.  XLA's CPU compiler takes longer for
statistics without conditionals around them, because it fuses them with their
surroundings.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

from lbopt._typing import OptState, Params
from lbopt.curvature.refresh import Due
from lbopt.mesh_step import Step
from lbopt.settings import due_at
from lbopt.transforms import kfac_state


class ScheduledStep:
    """Calls the program for what a step renews.

    The number of the step is ``state.step``.  It is read once, and counted from then
    on, so that no step waits for the one before; a state that the last call did not
    return is read again.  Until an optimizer has made its first update everything is
    due, so that a first step that was skipped is made up for.

    Args:
      program: returns the compiled step that renews what is due.
      init: the optimizer's ``init``, which tells its periods; None if nothing is
        scheduled.
      static: whether each kind of step has a program of its own; None for accelerators
        alone.
    """

    def __init__(
        self,
        program: Callable[[Due], Step],
        init: Callable[[Params], OptState] | None,
        static: bool | None = None,
    ) -> None:
        self._program, self._init, self._static = program, init, static
        # The first is made here, so that settings are checked before a call.
        self._programs: dict[Due, Step] = {Due(): program(Due())}
        self._periods: tuple[int, int] | None = None
        self._expected: Any = None  # the ``step`` of the state returned last
        self._number = 0
        self._started = False

    def __call__(self, state: Any, batch: Any, statistics_batch: Any = None) -> Any:
        """Takes one step.

        Args:
          state: the training state, which is donated.
          batch: the examples.
          statistics_batch: the examples of the statistics, if not the batch's.

        Returns:
          The state and the metrics.
        """
        due = self._due(state)
        kind = self._kind(state, due)
        flags = Due() if kind.is_static else Due(*map(_as_argument, due))
        state, metrics = self.program(kind)(state, batch, statistics_batch, flags)
        self._expected = state.step
        self._number += 1
        return state, metrics

    def program(self, kind: Due) -> Step:
        """Returns the compiled step for what is due, or for flags as arguments."""
        if kind not in self._programs:
            self._programs[kind] = self._program(kind)
        return self._programs[kind]

    def _kind(self, state: Any, due: Due) -> Due:
        """Returns the program for what is due: its own, or the one with flags."""
        if not due.is_static or isinstance(state.step, jax.core.Tracer):
            return Due()
        static = self._static
        if static is None:
            # A state from a checkpoint may hold arrays of NumPy, which jax will place.
            own = isinstance(state.step, jax.Array)
            devices = state.step.devices() if own else jax.devices()
            static = all(device.platform != "cpu" for device in devices)
        return due if static or not any(due) else Due()

    def lower(
        self,
        state: Any,
        batch: Any,
        statistics_batch: Any = None,
        *,
        due: Due = Due(),
    ) -> Any:
        """Lowers one of the programs, as ``jax.jit(...).lower`` does.

        Args:
          state: the training state, or its shapes.
          batch: the examples, or their shapes.
          statistics_batch: as in a call.
          due: what the step renews; by default flags in the state decide.

        Returns:
          What ``jax.jit(...).lower`` returns.
        """
        program: Any = self.program(due if due.is_static else Due())
        flags = Due() if due.is_static else due
        # Without what is left out, so that the compiled step is called likewise.
        if statistics_batch is None and flags == Due():
            return program.lower(state, batch)
        return program.lower(state, batch, statistics_batch, flags)

    def _due(self, state: Any) -> Due:
        """Returns what the coming step renews."""
        # In a program of the user's own the number of the step is not known.
        if self._init is None or isinstance(state.step, jax.core.Tracer):
            return Due()
        if self._periods is None:
            self._periods = _periods(self._init, state.params)
        if self._expected is not state.step:
            self._number, self._started = int(state.step), False
        if not self._started:
            states = kfac_state.curvature_states(state.opt_state)
            self._started = all(int(one.count) > 0 for one in states)
        return due_at(self._number if self._started else 0, *self._periods)


def _as_argument(flag: Any) -> Any:
    """Returns a flag as an array, so that both of its values have one program."""
    return None if flag is None else np.asarray(flag)


def _periods(init: Callable[[Params], OptState], params: Params) -> tuple[int, int]:
    """Returns the periods of an optimizer's statistics and inverses; 0 for flags."""

    def found(params: Params) -> list[Any]:
        return [
            one.refresh.periods for one in kfac_state.curvature_states(init(params))
        ]

    # From ``init`` rather than from a state, which may be that of other settings.
    # Compiled, so that none of the optimizer's arrays are made.
    known = [(int(a), int(b)) for a, b in jax.jit(found)(params)]
    # Several optimizers with schedules of their own decide by flags.
    return known[0] if len(set(known)) == 1 else (0, 0)
