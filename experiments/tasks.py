"""Independent tasks in several processes, and reports of their progress."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import tqdm

_LINE_SECONDS = 30.0


def completed(
    function: Callable[..., Any], tasks: Sequence[tuple], workers: int
) -> Iterator[tuple[tuple, Any]]:
    """Runs tasks in any order, and yields their arguments and results as they end.

    When the iteration is left early, by an error or by the caller, running tasks are
    waited for and the others dropped. Worker processes end when this process is killed.

    Args:
        function: Called with each task's arguments; importable, for the workers.
        tasks: The arguments, one tuple a task.
        workers: The number of processes; 1 for this one alone.

    Yields:
        The arguments of a task, and its result.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, function(*task)
        return
    # Not forked: this process has threads, of tqdm and of libraries in C++.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker
    ) as pool:
        futures = {pool.submit(function, *task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """A bar on a terminal; otherwise a line every half a minute and at the end.

    Args:
        what: Begins the line.
        total: The number of all units.
        done: The number of units that were done before.
        unit: The unit, in the plural.
    """

    def __init__(self, what: str, total: int, done: int, unit: str):
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._bar = tqdm.tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f" {unit}",
            file=sys.stderr,
            disable=None,  # off unless it is a terminal
            dynamic_ncols=True,
            leave=True,
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the bar."""
        self._bar.close()

    def update(self, count: int) -> None:
        """Reports `count` more units as done."""
        self._done += count
        self._bar.update(count)
        late = time.monotonic() - self._last_line > _LINE_SECONDS
        if self._bar.disable and (late or self._done == self._total):
            self._last_line = time.monotonic()
            print(
                f"{self._what}: {self._done:,} of {self._total:,} {self._unit}",
                flush=True,
            )


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends whenever the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
