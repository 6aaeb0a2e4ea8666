"""What the benchmarks' commands share: the record's head, tables and arguments."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import timing
from experiments import processor

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "kfac-jax")


def begin(
    name: str, argv: Sequence[str] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Starts a record and says on what machine; nothing compiled is taken from disk.

    Args:
      name: the module that is run.
      argv: arguments of the command line; those of the process if None.
      settings: what the command line does not say.

    Returns:
      The head of the record.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    record = _environment(name, argv, settings)
    print(f"{record['processor']}, {record['cores']} cores, {record['device']}")
    return record


def _environment(
    name: str, argv: Sequence[str] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Where, when and with what settings the figures were taken.

    Args:
      name: the module that is run.
      argv: arguments of the command line; those of the process if None.
      settings: what the command line does not say.

    Returns:
      The head of the record.
    """
    arguments = sys.argv[1:] if argv is None else argv
    versions = {package: _version(package) for package in _PACKAGES}
    return {
        "command": " ".join([f"python -m benchmarks.{name}", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor.name(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "python": platform.python_version(),
        "versions": {package: v for package, v in versions.items() if v},
        "settings": dict(settings),
    }


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every command takes.

    Args:
      name: the module that is run.
      doc: its docstring, whose first line describes it.

    Returns:
      The parser.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(doc or "").partition("\n")[0],
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="a JSON file for every figure"
    )
    return parser


def add_sizes(
    parser: argparse.ArgumentParser, known: Mapping[str, tuple[int, str]]
) -> None:
    """Lets the command line set the sizes of a measurement.

    Args:
      parser: the benchmark's.
      known: their names, with defaults and what they are.
    """
    for name, (default, text) in known.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=text)


def sizes(options: argparse.Namespace, known: Mapping[str, Any]) -> dict[str, int]:
    """What the command line says of the sizes that ``add_sizes`` added."""
    return {name: getattr(options, name) for name in known}


def positive(text: str) -> int:
    """A number of at least 1, as an argument's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def tell(line: str) -> None:
    """Says how far a run is."""
    print(line, file=sys.stderr, flush=True)


def write(record: Mapping[str, Any], path: pathlib.Path | None) -> None:
    """Writes the record, if there is where to."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def entry(
    contestant: timing.Contestant, seconds: Any, losses: Sequence[float]
) -> dict[str, Any]:
    """A contestant's part of the record, before any ratio.

    Args:
      contestant: who ran.
      seconds: wall times of its steps.
      losses: the loss before each step.

    Returns:
      The part.
    """
    return {
        "name": contestant.name,
        "setup_seconds": contestant.setup_seconds,
        "compile_seconds": contestant.compile_seconds,
        "state_bytes": contestant.state_bytes,
        "temporary_bytes": contestant.temporary_bytes,
        "losses": losses,
        "seconds": seconds,
    }


def costs(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of what contestants cost besides time, and of their losses.

    Args:
      entries: their parts of the record, the baseline's first.

    Returns:
      Its lines.
    """
    rows = [("", "setup s", "compile s", "state MB", "temporary MB", "loss")]
    base = entries[0]["compile_seconds"]
    rows += [
        (
            e["name"],
            f"{e['setup_seconds']:.1f}",
            f"{e['compile_seconds']:.1f} ({e['compile_seconds'] / base:.1f}×)",
            f"{e['state_bytes'] / 1e6:.1f}",
            f"{e['temporary_bytes'] / 1e6:.1f}",
            course(e["losses"]),
        )
        for e in entries
    ]
    return aligned(rows)


def course(losses: Sequence[float]) -> str:
    """The first and the last loss, and a warning if training does not work.

    Args:
      losses: before each step.

    Returns:
      A cell of a table.
    """
    course = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    if not all(map(math.isfinite, losses)):
        return f"{course} NOT FINITE"
    return course if losses[-1] < losses[0] else f"{course} NOT FALLING"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
