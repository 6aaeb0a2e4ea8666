"""The parts of a long measurement, each in a process of its own, within a budget.

A part reports row by row, and what it has reported is in the record at once: a part
that is stopped at its limit, or whose process dies, keeps the rows that it had.  A part
that was finished by the same code on the same device is not repeated.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import harness
from benchmarks.harness import Record
from experiments import compilation_cache, runs

Report = Callable[[str, Record], None]

ROOT = pathlib.Path(__file__).parent.parent

# A process takes about ten seconds to import jax and to find its device.
_LEAST_SECONDS = 15.0


class NotNeededError(Exception):
    """Raised by a part that has nothing to measure; the message says why."""


class Run(NamedTuple):
    """What a part is given beside its settings.

    Attributes:
      report: takes the name of a row and the row, which is in the record from then on.
      deadline: the time, in seconds since the epoch, at which the part is stopped.
      rows: the rows of the parts before, by part and name.
    """

    report: Report
    deadline: float
    rows: dict[str, dict[str, Record]]

    def left(self) -> float:
        """Returns the seconds until the part is stopped."""
        return self.deadline - time.time()


class Part(NamedTuple):
    """A part of a measurement.

    Attributes:
      name: its name in the record.
      measure: ``(run, **settings) -> None``, a function of a module.
      limit: seconds that it may take.
      settings: arguments of ``measure``; numbers, words and tuples of them.
    """

    name: str
    measure: Callable[..., None]
    limit: float
    settings: dict[str, Any]


class Outcome(NamedTuple):
    """How a part ended: ``"done"``, ``"stopped"``, ``"failed"`` or ``"skipped"``."""

    status: str
    why: str = ""


Start = Callable[[Part, Run, pathlib.Path], Outcome]
"""``(part, run, folder) -> outcome``: carries out one part."""


def at_once(part: Part, run: Run, folder: pathlib.Path) -> Outcome:
    """Carries out a part in this process, which nothing stops at the deadline.

    Args:
      part: the part.
      run: where its rows go.
      folder: compiled programs are stored in its subfolder ``compiled``.

    Returns:
      The outcome.
    """
    compilation_cache.share_programs(folder)
    # Everything: a hundred programs of a second each are two minutes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        part.measure(run, **part.settings)
    except NotNeededError as reason:
        return Outcome("skipped", str(reason))
    # Any error: the other parts are to be measured, and the record says what happened.
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}"[:500])
    return Outcome("done")


def in_own_process(part: Part, run: Run, folder: pathlib.Path) -> Outcome:
    """Carries out a part in a process of its own, and ends that at the deadline.

    Compiling cannot be interrupted otherwise, the device's memory is empty at the
    start, its peak is that of the part, and a crash ends no other part.

    Args:
      part: the part.
      run: where its rows go.
      folder: compiled programs are stored in its subfolder ``compiled``.

    Returns:
      The outcome.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    # Rows come back through the pipe: a function of this process cannot be sent.
    arguments = (part, run.deadline, run.rows, folder, theirs)
    process = spawn.Process(target=_work, args=arguments)
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, run.left())):
            message = ours.recv()
            if isinstance(message, Outcome):
                return message
            run.report(*message)
    except EOFError:
        process.join()
        return Outcome("failed", f"its process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return Outcome("stopped", "its time limit was reached")


def _work(
    part: Part,
    deadline: float,
    rows: dict[str, dict[str, Record]],
    folder: pathlib.Path,
    pipe: multiprocessing.connection.Connection,
) -> None:
    """Carries out a part on the other side of the pipe."""
    run = Run(lambda name, row: pipe.send((name, row)), deadline, rows)
    pipe.send(at_once(part, run, folder))


def carry_out(
    parts: Sequence[Part],
    record: Record,
    folder: pathlib.Path,
    identity: Record,
    *,
    budget: float,
    again: bool = False,
    start: Start = in_own_process,
) -> None:
    """Carries out the parts that the record does not have, and writes it as it grows.

    Args:
      parts: the parts, the most important ones first.
      record: gets ``parts``, by name: ``status``, ``why``, ``seconds``, ``identity``
        and ``rows``.
      folder: ``record.json`` is written into it.
      identity: what measured; a part is repeated if it was measured by something else.
      budget: seconds for all parts together.
      again: whether parts that are done are repeated.
      start: carries out one part.
    """
    end = time.time() + budget
    done = record.setdefault("parts", {})
    for part in parts:
        own = {**identity, "settings": _plain(part.settings)}
        before = done.get(part.name, {})
        same = before.get("identity") == own
        if same and before["status"] == "done" and not again:
            harness.tell(f"{part.name}: in the record")
            continue
        if end - time.time() < _LEAST_SECONDS:
            if not (same and before["rows"]):  # rows of a part that was stopped stay
                why = f"the budget of {budget:.0f} s is spent"
                done[part.name] = _entry(own, Outcome("skipped", why), 0.0, {})
            continue
        begin = time.time()
        limit = min(part.limit, end - begin)
        harness.tell(f"{part.name}: at most {limit:.0f} s")
        rows: dict[str, Record] = {}

        def report(name: str, row: Record, rows: dict[str, Record] = rows) -> None:
            rows[name] = row
            harness.tell(f"  {name}")
            _save(record, folder)

        running = Outcome("stopped", "the run was interrupted")
        done[part.name] = _entry(own, running, 0.0, rows)
        known = {name: entry["rows"] for name, entry in done.items()}
        outcome = start(part, Run(report, begin + limit, known), folder)
        done[part.name] = _entry(own, outcome, time.time() - begin, rows)
        harness.tell(f"{part.name}: {' '.join(outcome)}")
        _save(record, folder)
    _save(record, folder)


def _entry(
    identity: Record, outcome: Outcome, seconds: float, rows: dict[str, Record]
) -> Record:
    return {
        **outcome._asdict(),
        "seconds": round(seconds, 1),
        "identity": identity,
        "rows": rows,
    }


def _save(record: Record, folder: pathlib.Path) -> None:
    # Not written in place: a run that is interrupted meanwhile has to continue from it.
    runs.write_text(folder / "record.json", json.dumps(record, indent=2) + "\n")


def _plain(value: Any) -> Any:
    """Returns settings as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value


def code() -> Record:
    """Returns the commit, None outside of a checkout, and a digest of all code.

    The digest decides whether code is the same: it holds what is not committed, and
    machines that only get a copy of the files have no commit.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    digest = hashlib.sha256()
    for folder in ("benchmarks", "experiments", "lbopt"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {"commit": commit, "digest": digest.hexdigest()[:16]}
