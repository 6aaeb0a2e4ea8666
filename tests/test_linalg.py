"""Packing, damping and inversion against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lbopt import linalg
from tests.oracles import quick_jit

F32 = float(np.finfo(np.float32).eps)
# Products of matrices of at most a few hundred rows in float32.
ROUNDING = 1e-5


def symmetric(seed, *shape):
    x = np.random.default_rng(seed).normal(size=(*shape, shape[-1]))
    return x + np.swapaxes(x, -1, -2)


def spd(seed, n, condition=100.0):
    """A symmetric matrix with eigenvalues from 1 to ``condition``."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * np.geomspace(1, condition, n)) @ q.T


@quick_jit
def packed_and_inverted(matrix, damping):
    return linalg.damped_inverse(linalg.pack(matrix), damping)


def inverse(matrix, damping=0.0):
    damping = jnp.broadcast_to(jnp.asarray(damping, matrix.dtype), matrix.shape[:-2])
    return np.asarray(packed_and_inverted(jnp.asarray(matrix), damping), np.float64)


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# ------------------------------------------------------------------ packing

# Op by op, every size would compile dozens of programs.
pack, unpack = quick_jit(linalg.pack), quick_jit(linalg.unpack)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8])
def test_packing_keeps_every_entry_once(n):
    lower = np.tril(np.arange(n * n).reshape(n, n)).astype(np.float32)
    matrix = lower + np.tril(lower, -1).T
    packed = pack(jnp.asarray(matrix))
    assert packed.shape == (linalg.packed_size(n),)
    assert sorted(packed.tolist()) == sorted(lower[np.tril_indices(n)].tolist())
    np.testing.assert_array_equal(unpack(packed), matrix)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_packing_does_not_read_above_the_diagonal_of_its_blocks(n):
    matrix = symmetric(0, n)
    half = (n + 1) // 2
    spoiled = matrix.copy()
    for own in (slice(half), slice(half, n)):
        block = spoiled[own, own]
        block[np.triu_indices(len(block), 1)] = np.nan
    unpacked = unpack(pack(jnp.asarray(spoiled, jnp.float32)))
    np.testing.assert_array_equal(unpacked, matrix.astype(np.float32))


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_stacked_matrices_are_packed_one_by_one(n, stack):
    matrix = symmetric(1, *stack, n).astype(np.float32)
    packed = pack(jnp.asarray(matrix))
    assert packed.shape == (*stack, linalg.packed_size(n))
    for index in np.ndindex(*stack):
        one = pack(jnp.asarray(matrix[index]))
        np.testing.assert_array_equal(packed[index], one)
    np.testing.assert_array_equal(unpack(packed), matrix)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_types_stay(dtype):
    with jax.enable_x64(True):
        packed = linalg.pack(jnp.asarray(spd(0, 5), dtype))
        assert packed.dtype == dtype
        assert linalg.unpack(packed).dtype == dtype
        assert linalg.damped_inverse(packed, jnp.ones((), dtype)).dtype == dtype
        assert all(x.dtype == dtype for x in linalg.eigendecompose(packed))


def test_matrix_size_is_the_inverse_of_packed_size():
    # 66,000 rows is where float arithmetic on n² would first lose bits in float32.
    for n in [*range(200), 4608, 65_535, 66_000, 100_000_000]:
        assert linalg.matrix_size(linalg.packed_size(n)) == n


@pytest.mark.parametrize("packed", [2, 4, 5, 7, 11])
def test_sizes_that_no_matrix_has_are_refused(packed):
    message = rf"packed={packed} must be n \(n \+ 1\) / 2 .*lbopt.linalg.pack"
    with pytest.raises(ValueError, match=message):
        linalg.unpack(jnp.ones(packed))


# ------------------------------------------------------------------ π-damping


@pytest.mark.parametrize("nu", [(9.0, 4.0), (2.0, 3.0, 5.0), (7.0,)])
def test_factors_share_the_damping_by_their_traces(nu):
    n = len(nu)
    amounts = linalg.pi_damping(0.04, *map(jnp.asarray, nu))
    expected = (0.04 / np.prod(nu)) ** (1 / n) * np.array(nu)
    np.testing.assert_allclose(amounts, expected, rtol=ROUNDING)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_trace_that_is_not_sound_makes_the_shares_equal(bad):
    # Of two stacked layers only the second is unsound.
    nu_a, nu_g = jnp.array([9.0, bad]), jnp.array([4.0, 7.0])
    on_a, on_g = linalg.pi_damping(0.04, nu_a, nu_g)
    np.testing.assert_allclose(on_a, [0.3, 0.2], rtol=ROUNDING)
    np.testing.assert_allclose(on_g, [0.4 / 3, 0.2], rtol=ROUNDING)


@pytest.mark.parametrize("nu", [(1e-30, 1e30), (1e-38, 1e-38), (3e38, 1e38)])
def test_traces_far_apart_do_not_overflow(nu):
    amounts = linalg.pi_damping(1e-4, *map(jnp.asarray, nu))
    expected = [np.sqrt(x / y) * 1e-2 for x, y in (nu, nu[::-1])]
    np.testing.assert_allclose(amounts, expected, rtol=1e-4)


# ------------------------------------------------------------------ damped inverses


@pytest.mark.parametrize("n", [1, 2, 3, 64, 255, 256, 257, 300, 515])
def test_inverse_is_the_inverse_in_float64(n):
    with jax.enable_x64(True):
        matrix = spd(n, n)
        expected = np.linalg.inv(matrix + 0.5 * np.eye(n))
        # Forward error of an inverse: ε times the condition, 100 here.
        assert error(inverse(matrix, 0.5), expected) < 1e-12


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("n", [64, 300, 515])
def test_inverse_is_as_good_as_lapacks_cholesky(n, condition):
    matrix = spd(n, n, condition).astype(np.float32)
    expected = np.linalg.inv(matrix.astype(np.float64))
    factor = scipy.linalg.cho_factor(matrix)
    lapack = scipy.linalg.cho_solve(factor, np.eye(n, dtype=np.float32))
    assert lapack.dtype == np.float32
    assert error(inverse(matrix), expected) < 4 * error(lapack, expected)


def test_inverse_is_symmetric_and_stacked_matrices_are_inverted_one_by_one():
    stack = np.stack([[spd(3 * i + j, 7) for j in range(3)] for i in range(2)])
    damping = np.arange(6.0).reshape(2, 3)
    inverses = inverse(stack.astype(np.float32), damping)
    for i, j in np.ndindex(2, 3):
        expected = np.linalg.inv(stack[i, j] + damping[i, j] * np.eye(7))
        assert error(inverses[i, j], expected) < 100 * F32
        assert error(inverses[i, j].T, inverses[i, j]) < 10 * F32


@pytest.mark.parametrize("n", [1, 5, 300])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (-1, -1), (-1, 0)])
def test_what_is_not_positive_definite_gives_numbers_that_are_not_finite(
    n, row, column
):
    matrix = spd(0, n).astype(np.float32)
    bad = -1.0 if row == column else np.nan
    matrix[row, column] = matrix[column, row] = bad
    assert not np.isfinite(inverse(matrix)).all()
    # Damping repairs an indefinite matrix, and does not hide a NaN.
    assert np.isfinite(inverse(matrix, 1e3)).all() == (row == column)


# ------------------------------------------------------------------ eigenvalues


@pytest.mark.parametrize("n", [1, 2, 17, 257, 300, 513])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_sweep_of_accelerators_is_as_good_as_a_cholesky(n, condition):
    matrix = spd(3, n, condition).astype(np.float32)
    expected = np.linalg.inv(matrix.astype(np.float64))
    found = np.asarray(quick_jit(linalg.swept_inverse)(jnp.asarray(matrix)))
    np.testing.assert_array_equal(found, found.T)
    # The error of an inverse from a Cholesky is of this order (Higham 2002, 14.5),
    # and grows by far less than n where rounding errors have any sign.
    assert error(found, expected) < 4 * np.sqrt(n) * F32 * condition + ROUNDING


@pytest.mark.parametrize("n", [3, 300])
@pytest.mark.parametrize("spoil", [-10.0, np.nan])
def test_the_sweep_tells_what_has_no_inverse(n, spoil):
    matrix = np.eye(n, dtype=np.float32)
    matrix[n - 1, n - 1] = spoil
    found = np.asarray(quick_jit(linalg.swept_inverse)(jnp.asarray(matrix)))
    assert not np.isfinite(found).all()


def test_an_accelerator_inverts_together_and_a_cpu_in_turn():
    shapes = (
        jax.ShapeDtypeStruct((3, linalg.packed_size(300)), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.float32),
    )

    def text_for(platform):
        traced = jax.jit(linalg.damped_inverse).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for platform in ("tpu", "cuda"):
        assert "3x150x150" in text_for(platform)  # the pivots of all matrices
    assert "3x150x150" not in text_for("cpu")
    compiled = jax.jit(linalg.damped_inverse).lower(*shapes).compile().as_text()
    assert " conditional(" not in compiled  # nothing is left to choose


def test_eigendecomposition_puts_the_matrix_together_again():
    stack = np.stack([spd(i, 6) for i in range(3)]).astype(np.float32)
    values, vectors = linalg.eigendecompose(linalg.pack(jnp.asarray(stack)))
    again = np.einsum("sij,sj,skj->sik", vectors, values, vectors)
    assert error(again, stack) < 100 * F32
    np.testing.assert_allclose(values, np.linalg.eigvalsh(stack), rtol=1e-4)


def test_negative_eigenvalues_are_clipped():
    packed = linalg.pack(jnp.diag(jnp.array([-1e-3, 2.0, 1.0])))
    values, _ = linalg.eigendecompose(packed)
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0], atol=1e-6)


def test_all_finite_sees_every_array():
    one = jnp.ones(3)
    assert bool(linalg.all_finite(one, one))
    assert not bool(linalg.all_finite(one, one.at[2].set(jnp.nan)))
    assert not bool(linalg.all_finite(one.at[0].set(-jnp.inf), one))


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8])
def test_multiplicity_tells_the_diagonal_from_the_rest(n):
    # Packed numbers that say where they stand: 1 on the diagonal, 2 below it.
    marks = np.where(np.eye(n, dtype=bool), 1, 2).astype(np.float32)
    packed = linalg.pack(jnp.asarray(marks))
    np.testing.assert_array_equal(linalg.packed_multiplicity(n), packed)


def block_diagonal(matrix, parts):
    """The entries of a matrix that stand in its diagonal blocks, the others zero."""
    n = matrix.shape[-1]
    number = np.arange(n) // int(np.ceil(n / parts))
    return np.where(number[:, None] == number[None, :], matrix, 0)


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("n", "parts"), [(6, 1), (6, 2), (6, 6), (7, 2), (7, 3), (10, 4), (1, 1)]
)
def test_blocks_of_a_matrix_act_like_their_block_diagonal(n, parts, stack):
    rng = np.random.default_rng([n, parts])
    # Not symmetric, so that a transposed block shows.
    matrix = rng.normal(size=(*stack, n, n)).astype(np.float32)
    x = rng.normal(size=(*stack, n, 2)).astype(np.float32)
    blocks = linalg.diagonal_blocks(jnp.asarray(matrix), parts)
    size = int(np.ceil(n / parts))
    assert blocks.shape == (*stack, parts, size, size)
    padding = [(0, 0)] * len(stack) + [(0, parts * size - n)] * 2
    padded = np.pad(matrix, padding)
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        np.testing.assert_array_equal(blocks[..., i, :, :], padded[..., rows, rows])
    product = linalg.block_matmul(blocks, jnp.asarray(x))
    expected = block_diagonal(matrix, parts) @ x
    np.testing.assert_allclose(product, expected, rtol=ROUNDING, atol=ROUNDING)
