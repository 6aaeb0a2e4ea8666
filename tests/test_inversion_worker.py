"""The worker's process by itself: what it reads, what it writes, and how it ends."""

import os
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import inversion_worker
from lbopt.curvature import factor
from lbopt.inversion_worker import Job

SYMMETRIC, DIAGONAL = factor.symmetric(3), factor.diagonal((2,))
ROWS = 4


def job_in(folder, functions=(SYMMETRIC.invert, DIAGONAL.invert), cores=None):
    shapes = [((ROWS, f.size), (ROWS, f.wire)) for f in (SYMMETRIC, DIAGONAL)]
    paths = [str(folder / name) for name in ("factors", "inverses")]
    for path in paths:
        (folder / path).write_bytes(bytes(8 * ROWS * (6 + 2 + 2)))
    return Job(functions, shapes, "float64", *paths, cores)


@pytest.fixture
def start():
    """Starts a worker with a job; it has ended after the test."""
    started = []

    def with_job(job):
        process = subprocess.Popen(
            [sys.executable, "-c", inversion_worker.PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        return process

    yield with_job
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()


def ask(process):
    process.stdin.write(b".")
    process.stdin.flush()
    return pickle.load(process.stdout)


def packed_matrices(seed):
    x = np.random.default_rng(seed).normal(size=(ROWS, 3, 3))
    dense = x @ x.transpose(0, 2, 1)
    return dense, np.stack(
        [np.asarray(factor.pack(SYMMETRIC, jnp.asarray(m))) for m in dense]
    )


def test_it_inverts_what_lies_in_the_file_each_time(tmp_path, start):
    chooses = hasattr(os, "sched_setaffinity")
    job = job_in(tmp_path, cores=[0] if chooses else None)
    process = start(job)
    symmetric, diagonal, *damping = inversion_worker.views(
        job.factors, inversion_worker.input_shapes(job), job.dtype, "r+"
    )
    wires = inversion_worker.views(
        job.inverses, [wire for _, wire in job.shapes], job.dtype, "r"
    )
    for seed in range(2):
        dense, packed = packed_matrices(seed)
        symmetric[:], diagonal[:] = packed, seed + 1
        damping[0][:], damping[1][:] = np.arange(1, 5), 0.5
        assert ask(process) is None
        inverses = np.asarray(SYMMETRIC.expand(jnp.asarray(wires[0], jnp.float32)))
        for k, inverse in enumerate(inverses):
            expected = np.linalg.inv(dense[k] + (k + 1) * np.eye(3))
            np.testing.assert_allclose(inverse, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(wires[1], 1 / (seed + 1.5), rtol=1e-12)
    if chooses:
        assert os.sched_getaffinity(process.pid) == {0}
    process.stdin.close()  # nobody is left to work for
    assert process.wait(timeout=30) == 0


def test_an_error_is_told_and_is_not_the_end(tmp_path, start):
    process = start(job_in(tmp_path, functions=(np.linalg.inv, DIAGONAL.invert)))
    for _ in range(2):
        assert "Error" in ask(process)
        assert process.poll() is None
