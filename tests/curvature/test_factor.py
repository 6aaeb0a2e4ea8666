"""Every kind of factor against whole matrices in NumPy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import linalg
from lbopt.curvature import factor
from tests import oracles
from tests.oracles import quick_jit

DAMPING = 0.3
# The damped matrices below have conditions of at most a hundred.
ROUNDING = 1e-4


class Case(NamedTuple):
    """A factor, ``pack`` and ``dense`` between a packed copy and its matrix."""

    kind: factor.Factor
    rows: int  # of the matrix of one copy
    block: int  # of its diagonal blocks, which are all that it has
    pack: Any
    work: int
    eigen: bool = False


def pack_pairs(m):
    even = m[::2, ::2].diagonal(), m[::2, 1::2].diagonal(), m[1::2, 1::2].diagonal()
    return np.stack(even, -1)


def pack_triangle(m):
    return linalg.pack(jnp.asarray(m, jnp.float32))


CASES = {
    "symmetric": Case(factor.symmetric(5), 5, 5, pack_triangle, 125),
    "even": Case(factor.symmetric(4), 4, 4, pack_triangle, 64),
    "parts": Case(factor.symmetric(7, 2), 4, 4, pack_triangle, 64),
    "diagonal": Case(factor.diagonal((3,)), 3, 1, np.diag, 3),
    "shaped": Case(factor.diagonal((2, 3)), 6, 1, np.diag, 6),
    "pairs": Case(factor.pairs(3), 6, 2, pack_pairs, 3),
    "eigen": Case(factor.eigen(factor.symmetric(5)), 5, 5, pack_triangle, 125, True),
}
every_kind = pytest.mark.parametrize("name", CASES)


def drawn(case, copies, seed=0):
    """Positive definite matrices ``[copies, rows, rows]``, and packed copies."""
    x = np.random.default_rng(seed).normal(size=(copies, case.rows, case.rows))
    own = np.kron(np.eye(case.rows // case.block), np.ones([case.block] * 2))
    matrices = x @ np.swapaxes(x, -1, -2) * own
    packed = [np.asarray(case.pack(m), np.float32) for m in matrices]
    return matrices, jnp.asarray(np.stack(packed)).reshape(copies, case.kind.size)


def dense(case, inverse):
    """The inverse of one copy, as the library keeps it, as a matrix."""
    if case.eigen:
        vectors = np.asarray(inverse.vectors)
        return vectors @ np.diag(1 / (inverse.values + inverse.damping)) @ vectors.T
    inverse = np.asarray(inverse)
    if case.block == 1:
        return np.diag(inverse.reshape(-1))
    if case.block == 2:
        m = np.zeros((case.rows, case.rows))
        for c, (a, b, d) in enumerate(inverse):
            m[2 * c : 2 * c + 2, 2 * c : 2 * c + 2] = [[a, b], [b, d]]
        return m
    return inverse


@every_kind
def test_sizes(name):
    case = CASES[name]
    kind = case.kind
    _, packed = drawn(case, 1)
    assert kind.size == packed.shape[1] == kind.multiplicity().size
    assert kind.work == case.work
    assert kind.parts == (2 if name == "parts" else 1)
    assert kind.order == (7 if name == "parts" else case.rows)
    damping = jnp.float32(DAMPING)
    wire = jax.eval_shape(kind.invert, packed[0], damping)
    assert wire.shape == kind.identity(jnp.float32).shape == (kind.wire,)
    assert wire.dtype == kind.identity(jnp.float32).dtype == jnp.float32


@every_kind
def test_multiplicity_gives_norm_and_trace(name):
    case = CASES[name]
    matrices, packed = drawn(case, 2)
    often = np.asarray(case.kind.multiplicity())
    packed = np.asarray(packed, np.float64)
    norm = (often * packed**2).sum(-1)
    np.testing.assert_allclose(norm, (matrices**2).sum((1, 2)), rtol=1e-6)
    trace = packed[:, often == 1].sum(-1)
    expected = np.trace(matrices, axis1=1, axis2=2)
    np.testing.assert_allclose(trace, expected, rtol=1e-6)


@every_kind
def test_inverses(name):
    case = CASES[name]
    matrices, packed = drawn(case, 3)
    damping = jnp.float32(DAMPING)
    invert = quick_jit(case.kind.invert)
    wires = jnp.stack([invert(p, damping) for p in packed])
    expanded = case.kind.expand(wires)
    if name == "shaped":
        assert expanded.shape == (3, 2, 3)
    for i, m in enumerate(matrices):
        one = jax.tree.map(lambda x, i=i: x[i], expanded)
        expected = np.linalg.inv(m + DAMPING * np.eye(case.rows))
        np.testing.assert_allclose(
            dense(case, one), expected, rtol=ROUNDING, atol=ROUNDING
        )


@every_kind
@pytest.mark.parametrize("copies", [(), (2,), (2, 3)])
def test_the_identity_leaves_gradients_alone(name, copies):
    case = CASES[name]
    wire = case.kind.identity(jnp.float32)
    wires = jnp.broadcast_to(wire, (*copies, case.kind.wire))
    expanded = case.kind.expand(wires)
    for index in np.ndindex(*copies):
        one = jax.tree.map(lambda x, index=index: x[index], expanded)
        np.testing.assert_array_equal(dense(case, one), np.eye(case.rows))


def test_rounding_of_nearly_singular_pairs_keeps_them_positive():
    # In float32 a d - b² of these is negative or 0, where exactly it is not.
    rng = np.random.default_rng(0)
    g = rng.normal(size=(200, 2)).astype(np.float32)
    rows = np.stack([g[:, 0] ** 2, g[:, 0] * g[:, 1], g[:, 1] ** 2], -1)
    a, b, d = rows.T
    assert (a * d - b * b < 0).any()
    damping = 1e-9
    inverse = factor.pairs(200).invert(jnp.asarray(rows).ravel(), jnp.float32(damping))
    x, y, z = np.asarray(inverse, np.float64).reshape(-1, 3).T
    assert np.isfinite(inverse).all()
    assert (x > 0).all()
    assert (z > 0).all()
    # The eigenvalue across the gradient is 1 / λ; rounding may only shorten the step.
    across = (x + z) * damping
    assert across.max() == pytest.approx(1, rel=1e-3)
    assert (y * b <= 0).all()


@pytest.mark.parametrize("name", ["symmetric", "parts"])
def test_a_matrix_that_is_not_positive_definite_gives_numbers_not_finite(name):
    case = CASES[name]
    _, packed = drawn(case, 1)
    wire = case.kind.invert(packed[0] - 100, jnp.float32(DAMPING))
    assert not np.isfinite(wire).all()


def test_negative_eigenvalues_are_clipped():
    case = CASES["eigen"]
    m = np.diag([-1e-3, 1.0, 2.0, 3.0, 4.0])
    found = case.kind.expand(case.kind.invert(case.pack(m), jnp.float32(DAMPING)))
    np.testing.assert_allclose(found.values, [0, 1, 2, 3, 4], atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 3])
def test_products_with_a_cut_matrix_from_either_side(block_size):
    kind = factor.cut_symmetric(5, block_size)
    assert kind.parts == (1 if block_size is None else 2)
    m, v = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    whole = jnp.asarray(m)
    whole = whole if block_size is None else linalg.diagonal_blocks(whole, 2)
    dense = oracles.cut(m, block_size)
    assert oracles.error(factor.times(kind, whole, jnp.asarray(v)), dense @ v) < 1e-6
    right = factor.times_right(kind, jnp.asarray(v), whole)
    assert oracles.error(right, v @ dense) < 1e-6


def test_factors_of_one_kind_share_a_program():
    first, second = factor.symmetric(5), factor.symmetric(9, 2)
    assert (first.invert, first.shape) == (second.invert, second.shape)
    assert factor.eigen(first).invert == factor.eigen(second).invert
    assert factor.eigen(first).invert != first.invert
    assert factor.diagonal((3,)).invert != factor.symmetric(2).invert
