"""Where the time of a run goes, as its process sees it."""

import contextlib
import time
from collections.abc import Iterator, Mapping

PHASES = ("compile", "input", "step", "evaluate", "checkpoint", "report", "other")
"""What a process may be doing; `other` is all that is in no phase."""

_NOT_TRAINING = ("evaluate", "checkpoint")


class Phases:
    """A clock that books every second of a process under one phase.

    JAX's dispatch is asynchronous: these are the seconds that the process spends, not
    those of the device, which may compute during any of them.

    Args:
        before: Seconds by phase of the processes that carried the run so far.
    """

    def __init__(self, before: Mapping[str, float]):
        self._seconds = {name: before.get(name, 0.0) for name in PHASES}
        self._open = ["other"]
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books what happens inside under a phase; the innermost counts.

        Args:
            name: One of `PHASES`.

        Yields:
            Nothing.

        Raises:
            ValueError: If there is no such phase.
        """
        if name not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {name!r}")
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase until now."""
        self._book()
        return dict(self._seconds)

    def training(self) -> float:
        """The seconds until now without evaluation and checkpoints."""
        seconds = self.seconds()
        return sum(s for name, s in seconds.items() if name not in _NOT_TRAINING)

    def _book(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
