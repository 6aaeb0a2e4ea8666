"""The blocks of normalisation layers, from their definition in NumPy.

How each of Flax's layers normalises is tested in ``test_flax_layers``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import unit_wise
from tests import oracles
from tests.oracles import quick_jit
from tests.problems import assert_equal

BOTH = ("scale", "bias")
# float32 against float64: sums of at most a hundred products.
ROUNDING = 1e-5


@pytest.mark.parametrize("kind", ["unit_wise", "full"])
@pytest.mark.parametrize(
    ("names", "batched"),
    [(BOTH, True), (("scale",), True), (("bias",), True), (BOTH, False)],
)
def test_statistics_and_gradients_are_built_example_by_example(kind, names, batched):
    # Channels along two axes, with locations between them.
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 4, 3, 5, 2)).astype(np.float32)
    mean, rstd = rng.normal(size=(2, 1, 3, 1, 2)).astype(np.float32)
    block = unit_wise.BLOCKS[kind](
        6, names, batched, jnp.float32, feature_axes=(-3, -1), shape=(3, 2)
    )
    residual = unit_wise.NormResidual(*map(jnp.asarray, (x, mean, rstd)))
    due = type(block.factors)(True)
    n = len(x) if batched else 1
    sums = quick_jit(block.estimate)(residual, jnp.asarray(g / n), due)
    x_hat = (x.astype(float) - mean) * rstd
    x_hat, c = (np.moveaxis(v, 2, 1).reshape(n, -1, 6) for v in (x_hat, g))
    oracle = oracles.unit_wise if kind == "unit_wise" else oracles.full_norm
    expected = oracle(x_hat, c, names)
    found = block.statistics(block.mean(sums, n)).f
    np.testing.assert_allclose(
        found, expected, rtol=ROUNDING, atol=ROUNDING * expected.max()
    )
    gradients = block.gradient(residual, jnp.asarray(g))
    assert tuple(gradients) == names
    totals = {"scale": (c * x_hat).sum((0, 1)), "bias": c.sum((0, 1))}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, totals[name].reshape(3, 2), rtol=1e-4, atol=1e-5
        )
    off = block.estimate(residual, jnp.asarray(g), type(block.factors)(False))
    assert not np.any(off.f)


@pytest.mark.parametrize("names", [BOTH, ("scale",)])
def test_natural_gradients_are_solved_channel_by_channel(names):
    # Two copies of a lifted layer, whose parameters have a shape of their own.
    rng = np.random.default_rng(0)
    k = len(names)
    rows = rng.normal(size=(2, 6, 9, k))
    f = np.einsum("xcni,xcnj->xcij", rows, rows) / 9
    leaves = {n: rng.normal(size=(2, 3, 2)) for n in names}
    block = unit_wise.unit_wise_block(6, names, True, jnp.float32, shape=(3, 2))
    factors = block.pack(unit_wise.UnitWiseFactors(jnp.float32(f)))
    inverses = block.invert(factors, 0.1)
    natural = block.precondition(inverses, jax.tree.map(jnp.float32, leaves))
    column = np.stack([leaves[n].reshape(2, 6) for n in names], -1)[..., None]
    solved = np.linalg.solve(f + 0.1 * np.eye(k), column)[..., 0]
    for i, name in enumerate(names):
        expected = solved[..., i].reshape(2, 3, 2)
        np.testing.assert_allclose(natural[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 5])
def test_the_full_block_is_cut_like_any_other_factor(block_size):
    # Two copies of a lifted layer; the oracle inverts each diagonal block by itself.
    rng = np.random.default_rng(0)
    block = unit_wise.full_block(4, BOTH, True, jnp.float32)
    block = block.cut(block_size)
    rows = rng.normal(size=(2, 20, 8))
    f = np.einsum("cni,cnj->cij", rows, rows) / 20
    leaves = {n: rng.normal(size=(2, 4)) for n in BOTH}
    factors = block.pack(unit_wise.FullFactors(jnp.float32(f)))
    inverses = block.invert(factors, 0.3)
    natural = block.precondition(inverses, jax.tree.map(jnp.float32, leaves))
    size = 8 if block_size is None else 4
    expected = np.zeros((2, 8))
    column = np.concatenate([leaves[n] for n in BOTH], -1)
    for copy, first in np.ndindex(2, 8 // size):
        cut = slice(first * size, (first + 1) * size)
        damped = f[copy, cut, cut] + 0.3 * np.eye(size)
        expected[copy, cut] = np.linalg.solve(damped, column[copy, cut])
    actual = np.concatenate([natural[n] for n in BOTH], -1)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [BOTH, ("scale",)])
def test_first_inverses_are_the_identity(names):
    block = unit_wise.unit_wise_block(6, names, True, jnp.float32)
    factors, inverses = block.init((2,))
    assert not factors.f.any()
    leaves = {n: jnp.full((2, 6), 3.0 + i) for i, n in enumerate(names)}
    assert_equal(block.precondition(inverses, leaves), leaves)
