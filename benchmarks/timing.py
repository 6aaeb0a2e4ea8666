"""Steps of several optimizers timed in turn, and the ratios between them.

A *cycle* is four steps.  The statistics are renewed every second step and the inverses
every fourth, so each cycle holds every kind of step, in the order of ``CYCLE``, and one
program serves them all.  At each step of a cycle every contestant takes one step, one
after the other; a ratio always divides two steps that were taken side by side, so that
what else the machine is doing then falls on both.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

STATS_PERIOD = 2
INVERSE_PERIOD = 4
CYCLE = ("full", "none", "stats", "none")
"""What each step renews: statistics and inverses, nothing, statistics, nothing."""

STRETCHES = 10
"""Parts of a run that a ratio's smallest and largest values are taken over."""

SETTINGS: dict[str, dict[str, float]] = {
    "none": {"none": 1.0},
    "stats": {"stats": 1.0},
    "full": {"full": 1.0},
    "1/10": {"stats": 0.9, "full": 0.1},
    "10/10": {"none": 0.9, "full": 0.1},
}
"""Settings and their shares of each kind of step.

``a/b`` renews the statistics every a steps and the inverses every b.
"""


class Compiled(NamedTuple):
    """A compiled step and what compiling it took.

    Attributes:
      call: the compiled program.
      seconds: wall time of tracing, lowering and compiling, nothing cached.
      temporary_bytes: XLA's own temporary memory.
    """

    call: Callable[..., Any]
    seconds: float
    temporary_bytes: int


class Contestant(NamedTuple):
    """An optimizer at work on a workload.

    Attributes:
      name: its name in the tables.
      step: ``(state, batch, index) -> (state, loss)``; the steps count from 0.
      state: where it starts.
      has_curvature: whether its steps differ in what they renew.
      setup_seconds: what it did once before compiling (finding the layers).
      compile_seconds: all programs that the settings need, together.
      state_bytes: the optimizer's state.
      temporary_bytes: XLA's temporary memory, the largest of its programs.
    """

    name: str
    step: Callable[[Any, Any, int], tuple[Any, jax.Array]]
    state: Any
    has_curvature: bool
    setup_seconds: float
    compile_seconds: float
    state_bytes: int
    temporary_bytes: int


class Turn(NamedTuple):
    """One step of one contestant.

    Attributes:
      name: the contestant's.
      index: the step's number, from 0.
      seconds: its wall time.
      loss: the loss before it.
      state: the contestant's state after it, which its next turn uses up.
    """

    name: str
    index: int
    seconds: float
    loss: float
    state: Any


class Samples(NamedTuple):
    """The steps of one contestant, by cycle and position in the cycle.

    Attributes:
      seconds: wall time of each step, warm-up left out.
      losses: the loss before each step, warm-up included.
    """

    seconds: list[list[float]]
    losses: list[float]


class Spread(NamedTuple):
    """The median of some numbers and how far they lie apart."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As in a table."""
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(numbers: Sequence[float]) -> Spread:
    """The median, smallest and largest of numbers."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def compile_step(function: Any, *args: Any) -> Compiled:
    """Compiles a jitted function ahead of time, with nothing left from earlier traces.

    Args:
      function: what ``jax.jit`` returned.
      *args: example arguments.

    Returns:
      The program and its cost.
    """
    jax.clear_caches()
    start = time.perf_counter()
    program = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Compiled(program, seconds, int(memory.temp_size_in_bytes))


def turns(
    contestants: Sequence[Contestant],
    batches: Callable[[int], Any],
    steps: int,
    length: int = 1,
) -> Iterator[Turn]:
    """Lets the contestants take turns at every step.

    Args:
      contestants: who runs; their states are used up.
      batches: ``index -> batch``, the same for all; made outside the timed spans.
      steps: of each contestant.
      length: steps of a cycle.

    Yields:
      The turns as they are taken.
    """
    states = {c.name: c.state for c in contestants}
    for index in range(steps):
        batch = jax.block_until_ready(batches(index))
        # The order changes, so that nobody always follows the same neighbour.
        shift = sum(divmod(index, length)) % len(contestants)
        for c in (*contestants[shift:], *contestants[:shift]):
            start = time.perf_counter()
            states[c.name], loss = jax.block_until_ready(
                c.step(states[c.name], batch, index)
            )
            seconds = time.perf_counter() - start
            yield Turn(c.name, index, seconds, float(loss), states[c.name])


def interleave(
    contestants: Sequence[Contestant],
    batches: Callable[[int], Any],
    rounds: int,
    length: int = len(CYCLE),
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Samples]:
    """Runs cycles of steps, the contestants taking turns at every step.

    Args:
      contestants: who runs; their states are used up.
      batches: as for ``turns``.
      rounds: cycles that are timed, after one that is not.
      length: steps of a cycle.
      report: told how far it is.

    Returns:
      The samples of each contestant by name.
    """
    samples = {c.name: Samples([[] for _ in range(rounds)], []) for c in contestants}
    steps = (rounds + 1) * length
    for number, turn in enumerate(turns(contestants, batches, steps, length), 1):
        cycle = turn.index // length
        samples[turn.name].losses.append(turn.loss)
        if cycle:
            samples[turn.name].seconds[cycle - 1].append(turn.seconds)
        if number % (length * len(contestants)) == 0:
            report(f"round {cycle} of {rounds}" + ("" if cycle else " (warm-up)"))
    return samples


def milliseconds(seconds: Sequence[Sequence[float]]) -> dict[str, Spread]:
    """The time of each kind of step over all rounds."""
    return {
        kind: spread(
            [1e3 * row[i] for row in seconds for i, k in enumerate(CYCLE) if k == kind]
        )
        for kind in dict.fromkeys(CYCLE)
    }


def ratios(
    seconds: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]
) -> dict[str, Spread]:
    """Step time over the baseline's in each setting, paired round by round.

    Args:
      seconds: the contestant's times, by round and position in the cycle.
      baseline: those of the baseline.

    Returns:
      The spread over the rounds of each setting's ratio.
    """
    rounds: list[Mapping[str, float]] = []
    for own, base in zip(seconds, baseline, strict=True):
        pairs = [a / b for a, b in zip(own, base, strict=True)]
        rounds.append(
            {
                kind: statistics.mean(
                    p for p, k in zip(pairs, CYCLE, strict=True) if k == kind
                )
                for kind in CYCLE
            }
        )
    return {
        setting: spread([sum(w * r[k] for k, w in shares.items()) for r in rounds])
        for setting, shares in SETTINGS.items()
    }


def stretched_ratios(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Step times over the baseline's, step by step beside them.

    Args:
      own: seconds of the contestant's steps.
      base: those of the baseline.

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
