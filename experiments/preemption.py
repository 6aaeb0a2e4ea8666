"""Notices SIGTERM, the request to stop, in all processes at the same step.

Slurm (``--signal=TERM@120``), Kubernetes and cloud machines all send SIGTERM some time
before they kill; it is the one signal that jax's preemption service listens to.  With
several processes jax hears it in any of them and has all agree on a later step; a
Python handler would take the signal from jax.  A single process has a Python handler.
"""

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context manager, for the main thread, that records SIGTERM.

    Inside the block SIGTERM does not end the process.  The previous handler is back
    after it, except that with several processes jax keeps the signal.
    """

    def __init__(self):
        self._requested = False
        self._shared = jax.distributed.is_initialized()

    def __enter__(self) -> Self:
        """Installs the handler."""
        if not self._shared:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the previous handler."""
        if not self._shared:
            # None: a handler that Python did not install and cannot put back.
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Returns whether to save now and stop; once true, it stays so.

        Args:
          step: steps done so far.  With several processes all must ask after every
            step; they get the same answer at the same step, about a second after the
            signal.
        """
        if self._shared and not self._requested:
            self._requested = multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._requested = True
