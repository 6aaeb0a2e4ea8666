"""The command line, record, tables and processes that all benchmarks share."""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import processor
from lbopt import tables

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "kfac-jax")

Record = dict[str, Any]


def command(
    name: str,
    doc: str | None,
    measure: Callable[..., Record],
    table: Callable[[Record], str],
    settings: Mapping[str, Any],
    **numbers: tuple[int, str],
) -> Callable[..., Record]:
    """Makes a benchmark's ``main``: parse, measure, write the record, print its table.

    Args:
      name: the benchmark's module.
      doc: the module's docstring; its first line becomes the command's description.
      measure: ``(**numbers) -> record``, without the head that ``begin`` makes.
      table: turns the whole record into text.
      settings: fixed settings, for the record.
      **numbers: options of the command line, each with its default and its help.

    Returns:
      ``(argv=None, **sizes) -> record``; the sizes go to ``measure``.
    """

    def main(argv: Sequence[str] | None = None, **sizes: Any) -> Record:
        options = vars(parser(name, doc, **numbers).parse_args(argv))
        record = begin(name, argv, settings)
        record |= measure(**{number: options[number] for number in numbers}, **sizes)
        write(record, options["output"])
        print(table(record))
        return record

    return main


def parser(
    name: str, doc: str | None, **numbers: tuple[int, str]
) -> argparse.ArgumentParser:
    """Returns a parser with ``--output`` and an option for each of ``numbers``."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(doc or "").partition("\n")[0],
    )
    result.add_argument(
        "--output", type=pathlib.Path, help="JSON file to write all figures to"
    )
    for number, (default, text) in numbers.items():
        flag = f"--{number.replace('_', '-')}"
        result.add_argument(flag, type=positive, default=default, help=text)
    return result


def positive(text: str) -> int:
    """Parses a number of an option.

    Args:
      text: the number.

    Returns:
      The number.

    Raises:
      ArgumentTypeError: for a number below one.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def begin(name: str, argv: Sequence[str] | None, settings: Mapping[str, Any]) -> Record:
    """Starts a record with the command, date, machine, versions and settings."""
    # Compile times are those of compiling, not of reading programs from the disk.
    jax.config.update("jax_enable_compilation_cache", False)
    # Starts the compiler, which would count for the first program that is timed.
    jax.jit(jnp.sin).lower(0.0).compile()
    arguments = sys.argv[1:] if argv is None else argv
    versions = {package: _version(package) for package in _PACKAGES}
    record = {
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
    print(f"{record['processor']}, {record['cores']} cores, {record['device']}")
    return record


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(record: Record, path: pathlib.Path | None) -> None:
    """Writes the record as JSON; does nothing if ``path`` is None."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def read(path: pathlib.Path) -> Record:
    """Reads a record; empty if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns ``function(*args)``, computed in a process that ends afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *args).result()


def tell(line: str) -> None:
    """Prints progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def page(*parts: str | Sequence[Sequence[str]]) -> str:
    """Joins lines and tables into a text; a table is a sequence of rows of cells."""
    lines = [""]
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
        else:  # numbers after a first column of words
            lines += [*tables.aligned(part, right=range(1, len(part[0]))), ""]
    return "\n".join(lines)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def course(losses: Sequence[float]) -> str:
    """Formats the first and last loss, with a warning if the loss does not fall."""
    text = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    if not all(map(math.isfinite, losses)):
        return f"{text} NOT FINITE"
    return text if losses[-1] < losses[0] else f"{text} NOT FALLING"
