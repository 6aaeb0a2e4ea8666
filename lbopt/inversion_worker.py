"""The worker process of ``lbopt.background``, which inverts factors on CPU cores.

Messages are pickled on its standard input and output; the numbers are in two files that
both processes map into memory.
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

# Imported, not run with ``-m``: pickle finds ``Job`` by its module's name, which would
# be ``__main__`` there.
PROGRAM = "from lbopt import inversion_worker; inversion_worker.main()"


class Job(NamedTuple):
    """The inversions that a worker repeats at every command.

    Attributes:
      functions: for each class of units a module's function that inverts one of them,
        ``(packed, damping) -> wire``.
      shapes: for each class the shapes of its factors ``[units, size]`` and of its
        inverses ``[units, wire]``.
      dtype: the type of all numbers.
      factors: path of the file with the factors of each class, followed by the damping
        of each of their units.
      inverses: path of the file with the inverses.
      cores: CPU cores to run on; None for any.
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
    """Maps a file into memory as arrays that are stored one after another."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = np.memmap(path, dtype, mode, shape=(sum(sizes),))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]


def input_shapes(job: Job) -> list[tuple[int, ...]]:
    """The shapes of the arrays that a worker reads: factors, then damping."""
    inputs = [shape for shape, _ in job.shapes]
    return [*inputs, *((rows,) for rows, _ in inputs)]


def compiled(job: Job) -> list[Callable[..., Any]]:
    """For each class a compiled function that inverts all its units."""

    def in_turn(invert: Callable[..., Any]) -> Callable[..., Any]:
        # In turn, not batched, for the reason that linalg.one_by_one gives.
        return jax.jit(lambda *rows: jax.lax.map(lambda one: invert(*one), rows))

    return [in_turn(invert) for invert in job.functions]


def main() -> None:
    """Inverts the factors in the file once for each byte on standard input."""
    commands = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # replies only: prints would garble them
    job: Job = pickle.load(commands)
    if job.cores is not None:
        os.sched_setaffinity(0, job.cores)
    # The affinity comes first: the backend starts one thread for each core it may use.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    inputs = views(job.factors, input_shapes(job), job.dtype, "r")
    outputs = views(job.inverses, [wire for _, wire in job.shapes], job.dtype, "r+")
    functions, classes = compiled(job), len(job.shapes)
    while commands.read(1):  # empty at the end of file: the parent is gone
        try:
            for function, factors, damping, wires in zip(
                functions, inputs[:classes], inputs[classes:], outputs, strict=True
            ):
                wires[:] = function(jnp.asarray(factors), jnp.asarray(damping))
            error = None
        except Exception:  # of any kind: the parent reports it
            error = traceback.format_exc()
        pickle.dump(error, replies)
        replies.flush()
