"""Times contestants side by side, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import harness
from benchmarks.contestants import Contestant

STRETCHES = 10
"""Parts of a run over which the smallest and largest value of a ratio are taken."""


class Spread(NamedTuple):
    """The median of some numbers, the smallest and the largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Formats it for a table."""
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(numbers: Sequence[float]) -> Spread:
    """Returns the median, smallest and largest of ``numbers``."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def race(
    contestants: Sequence[Contestant],
    batches: Callable[[int], Any],
    steps: int,
    *,
    warm_up: int = 0,
    cycle: int = 1,
    watch: Callable[[str, int, Any], None] = lambda _name, _index, _state: None,
) -> list[dict[str, Any]]:
    """Runs the contestants side by side: at every step, each takes one step.

    Ratios are to divide steps of the same number, which were taken next to each other.

    Args:
      contestants: who runs; their states are donated.
      batches: ``index -> batch``, the same for all and not timed.
      steps: timed steps of each contestant.
      warm_up: steps before those, which are not timed.
      cycle: steps after which the kinds of steps recur.
      watch: called after each step with the contestant's name, the step's number and
        the contestant's state, which its next step donates.

    Returns:
      For each contestant its part of the record: its costs, ``losses`` before each step
      (warm-up included) and ``seconds`` of the timed steps, a list for each cycle if
      there is more than one step in it.
    """
    states = {c.name: c.state for c in contestants}
    seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
    losses: dict[str, list[float]] = {c.name: [] for c in contestants}
    for index in range(warm_up + steps):
        batch = jax.block_until_ready(batches(index))
        # The order changes, so that nobody always follows the same neighbour.
        shift = sum(divmod(index, cycle)) % len(contestants)
        for c in (*contestants[shift:], *contestants[:shift]):
            start = time.perf_counter()
            states[c.name], loss = jax.block_until_ready(
                c.step(states[c.name], batch, index)
            )
            elapsed = time.perf_counter() - start
            losses[c.name].append(float(loss))
            if index >= warm_up:
                seconds[c.name].append(elapsed)
            watch(c.name, index, states[c.name])
        if not (index + 1) % 10:
            harness.tell(f"step {index + 1} of {warm_up + steps}")
    shape = (-1, cycle) if cycle > 1 else (-1,)
    return [
        {
            "name": c.name,
            "setup_seconds": c.setup_seconds,
            "compile_seconds": c.compile_seconds,
            "state_bytes": c.state_bytes,
            "temporary_bytes": c.temporary_bytes,
            "losses": losses[c.name],
            "seconds": np.reshape(seconds[c.name], shape).tolist(),
        }
        for c in contestants
    ]


def costs(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the table of compile times, memory and losses, the baseline first."""
    base = entries[0]["compile_seconds"]
    return [
        ("", "setup s", "compile s", "state MB", "temporary MB", "loss"),
        *(
            (
                e["name"],
                f"{e['setup_seconds']:.1f}",
                f"{e['compile_seconds']:.1f} ({e['compile_seconds'] / base:.1f}×)",
                f"{e['state_bytes'] / 1e6:.1f}",
                f"{e['temporary_bytes'] / 1e6:.1f}",
                harness.course(e["losses"]),
            )
            for e in entries
        ),
    ]


def stretched_ratios(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Divides step times by the baseline's, over the whole run and over stretches.

    Args:
      own: seconds of the contestant's steps.
      base: seconds of the baseline's steps.

    Returns:
      ``total``, the quotient of the sums, and ``paired``, the median of the steps'
      quotients; each with its smallest and largest value over ten equal stretches.
    """
    pairs = np.asarray([own, base])
    stretches = np.array_split(pairs, min(STRETCHES, len(own)), axis=1)

    def total(pairs: np.ndarray) -> float:
        return float(pairs[0].sum() / pairs[1].sum())

    def paired(pairs: np.ndarray) -> float:
        return float(statistics.median(pairs[0] / pairs[1]))

    return {
        figure.__name__: Spread(
            figure(pairs), min(map(figure, stretches)), max(map(figure, stretches))
        )._asdict()
        for figure in (total, paired)
    }


def stretched_rows(ratios: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the table of the ``stretched_ratios`` of each contestant."""
    return [
        ("over SGD", "total / total", "median of steps"),
        *(
            (name, str(Spread(**r["total"])), str(Spread(**r["paired"])))
            for name, r in ratios.items()
        ),
    ]
