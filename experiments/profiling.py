"""A trace of a few steps, by ``jax.profiler``."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

STEPS = range(3, 6)
"""The steps of a start that are traced: the first compiles, the second settles."""


class Profile:
    """Traces a few steps of a process into a directory; a context manager.

    The directory gets ``perfetto_trace.json.gz``, which https://ui.perfetto.dev shows
    without any installation, and the files of TensorBoard's profiler.

    Args:
      directory: the directory; None to trace nothing.
    """

    def __init__(self, directory: pathlib.Path | None):
        self._directory = directory
        self._running = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Writes the trace of a run that ends before its last traced step."""
        self._running.close()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Names a step in the trace, if it is to be traced.

        Args:
          number: the number of the step since the process began, from 1.
        """
        if self._directory is None or number not in STEPS:
            yield
            return
        if number == STEPS.start:
            trace = jax.profiler.trace(self._directory, create_perfetto_trace=True)
            self._running.enter_context(trace)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def stop_after(self, number: int, results: Any) -> bool:
        """Writes the trace after its last step, once the devices are done with it.

        Args:
          number: the number of the step since the process began, from 1.
          results: the arrays that the step returned.

        Returns:
          Whether the trace was written now.
        """
        if self._directory is None or number != STEPS[-1]:
            return False
        jax.block_until_ready(results)
        self._running.close()
        return True
