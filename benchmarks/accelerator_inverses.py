"""Damped inverses on an accelerator: XLA's Cholesky, lbopt's inversion, and eigh.

Matrices are ill-conditioned as factors are: Gram matrices of half as many rows as they
have columns, with a damping of 1e-3 on eigenvalues of about one.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from benchmarks.harness import Record
from benchmarks.parts import Run
from lbopt import linalg

DAMPING = 1e-3
# Vectors of which each inverse has to return M⁻¹ M v: a whole product in float64 on the
# host would take longer than everything that is timed.
_VECTORS = 8


def cholesky(packed: jax.Array, damping: jax.Array) -> jax.Array:
    """The inverse by XLA's own Cholesky and two triangular solves, batched."""
    matrix = _damped(packed, damping)
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1]), matrix.shape)
    half = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    return linalg.matmul(jnp.swapaxes(half, -1, -2), half)


def eigh(packed: jax.Array, damping: jax.Array) -> jax.Array:
    """The inverse by XLA's eigendecomposition, batched."""
    vectors, values = lax.linalg.eigh(linalg.unpack(packed))
    scaled = vectors / (values + damping[..., None])[..., None, :]
    return linalg.matmul(scaled, jnp.swapaxes(vectors, -1, -2))


def _damped(packed: jax.Array, damping: jax.Array) -> jax.Array:
    matrix = linalg.unpack(packed)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1]), matrix.shape)
    return matrix + damping[..., None, None] * eye


METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cholesky": cholesky,
    "damped_inverse": linalg.damped_inverse,
    "eigh": eigh,
}


def measure(
    run: Run,
    *,
    cases: Sequence[tuple[int, int]],
    eigh_most: int,
    repeats: int,
    seconds: float,
) -> None:
    """Times each method on each case.

    Args:
      run: gets a row for each case.
      cases: numbers of matrices and of rows, ``(1, n)`` for a single one.
      eigh_most: the largest n of which eigenvalues are found.
      repeats: timed calls of each program, fewer if they take longer than ``seconds``.
      seconds: as above.
    """
    for count, n in cases:
        packed = matrices(count, n)
        damping = jnp.full(packed.shape[:-1], DAMPING)
        row: Record = {}
        for name, method in METHODS.items():
            if name == "eigh" and n > eigh_most:
                continue
            start = time.perf_counter()
            program = jax.jit(method).lower(packed, damping).compile()
            compiled = time.perf_counter() - start
            inverse = jax.block_until_ready(program(packed, damping))
            times: list[float] = []
            while len(times) < repeats and (not times or sum(times) < seconds):
                start = time.perf_counter()
                jax.block_until_ready(program(packed, damping))
                times.append(time.perf_counter() - start)
            wrong = error(inverse, packed)
            row[name] = {
                "milliseconds": timing.spread([1e3 * t for t in times])._asdict(),
                "compile_seconds": compiled,
                "error": wrong if np.isfinite(wrong) else None,  # JSON has no NaN
            }
        run.report(f"{count} of {n}" if count > 1 else str(n), row)


def matrices(count: int, n: int) -> jax.Array:
    """Returns packed Gram matrices, ``[packed]`` or ``[count, packed]``."""

    @jax.jit
    def make(rng: jax.Array) -> jax.Array:
        rows = jax.random.normal(rng, (count, n // 2, n))
        gram = linalg.matmul(jnp.swapaxes(rows, -1, -2), rows) / (n // 2)
        packed = linalg.pack(gram)
        return packed[0] if count == 1 else packed

    return make(jax.random.key(n))


def error(inverse: jax.Array, packed: jax.Array) -> float:
    """Returns ‖R M V − V‖ / ‖V‖ for random V, in float64, of the worst matrix."""
    n = inverse.shape[-1]
    vectors = np.random.default_rng(0).normal(size=(n, _VECTORS))
    # Unpacked on the device, where each number is only moved.
    whole = np.asarray(jax.jit(linalg.unpack)(packed), np.float64)
    product = (whole + DAMPING * np.eye(n)) @ vectors
    returned = np.asarray(inverse, np.float64) @ product
    errors = np.linalg.norm(returned - vectors, axis=(-2, -1))
    return float(np.max(errors) / np.linalg.norm(vectors))
