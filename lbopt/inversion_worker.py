"""The process that inverts factors for ``lbopt.background``, on CPU cores of its own.

Messages are pickled on its standard input and output; the numbers lie in two files that
both processes have mapped.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What the process runs; its module is imported as the one that messages are pickled by.
PROGRAM = "from lbopt import inversion_worker; inversion_worker.main()"


class Job(NamedTuple):
    """What a worker is asked to do again and again.

    Attributes:
      functions: for each class of units what inverts one, ``(packed, damping) ->
        wire``, a function of a module.
      shapes: for each class the shapes of its factors ``[class, size]`` and inverses
        ``[class, wire]``.
      dtype: the type of all numbers.
      factors: the file with the factors of each class, then what is added to their
        diagonals.
      inverses: the file with the inverses.
      cores: CPU cores to stay on; None for any.
    """

    functions: Sequence[Callable[..., Any]]
    shapes: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    dtype: str
    factors: str
    inverses: str
    cores: Sequence[int] | None


def views(
    path: str, shapes: Sequence[tuple[int, ...]], dtype: str, mode: Any
) -> list[np.ndarray]:
    """Arrays that lie in a file one after the other."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = np.memmap(path, dtype, mode, shape=(sum(sizes),))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]


def input_shapes(job: Job) -> list[tuple[int, ...]]:
    """The shapes of what a worker reads."""
    inputs = [shape for shape, _ in job.shapes]
    return [*inputs, *((rows,) for rows, _ in inputs)]


def compiled(job: Job) -> list[Callable[..., Any]]:
    """For each class what inverts all its units, one after the other."""

    def by_turns(invert: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda *rows: jax.lax.map(lambda one: invert(*one), rows))

    return [by_turns(invert) for invert in job.functions]


def main() -> None:
    """Inverts what lies in the file each time that it is told to."""
    commands = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may speak there
    job: Job = pickle.load(commands)
    if job.cores is not None:
        os.sched_setaffinity(0, job.cores)
    # Before the backend starts, which sees the cores and makes threads for them.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    inputs = views(job.factors, input_shapes(job), job.dtype, "r")
    outputs = views(job.inverses, [wire for _, wire in job.shapes], job.dtype, "r+")
    functions, classes = compiled(job), len(job.shapes)
    while commands.read(1):  # nothing is left to read where the other process is gone
        try:
            for function, factors, damping, wires in zip(
                functions, inputs[:classes], inputs[classes:], outputs, strict=True
            ):
                wires[:] = function(jnp.asarray(factors), jnp.asarray(damping))
            error = None
        except Exception:  # whatever it is, the other process is told
            error = traceback.format_exc()
        pickle.dump(error, replies)
        replies.flush()
