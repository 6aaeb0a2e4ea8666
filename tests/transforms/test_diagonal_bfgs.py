"""The diagonal of the BFGS update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbopt.transforms.diagonal_bfgs import EPS, scale_by_diagonal_bfgs
from tests.problems import assert_equal

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
TX = scale_by_diagonal_bfgs()


def draw(rng):
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), PARAMS
    )


def flat(tree):
    return np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )


def pairs(seed, count):
    """Displacements and changes whose curvature is positive."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        t = draw(rng)
        noise = draw(rng)
        yield t, jax.tree.map(lambda t, n: 2 * t + 0.3 * n, t, noise)


def test_is_the_diagonal_of_the_bfgs_update():
    state = TX.init(PARAMS)
    zeros = optax.tree.zeros_like(PARAMS)
    _, state = TX.update(PARAMS, state, displacement=zeros, change=zeros)
    for t, y in pairs(0, 4):
        h, tv, yv = flat(state.h), flat(t), flat(y)
        b = np.diag(h)
        bfgs = (
            b - np.outer(b @ tv, tv @ b) / (tv @ b @ tv) + np.outer(yv, yv) / (yv @ tv)
        )
        updates, state = TX.update(PARAMS, state, displacement=t, change=y)
        np.testing.assert_allclose(flat(state.h), np.abs(np.diag(bfgs)), rtol=2e-5)
        np.testing.assert_allclose(flat(updates), 1 / (flat(state.h) + EPS), rtol=1e-5)


def test_the_first_gradient_passes_unchanged():
    state = TX.init(PARAMS)
    grads = draw(np.random.default_rng(1))
    zeros = optax.tree.zeros_like(PARAMS)
    updates, after = TX.update(grads, state, displacement=zeros, change=grads)
    assert_equal(updates, grads)
    assert_equal(after.h, state.h)
    assert after.count == 1


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_without_curvature_the_diagonal_stays_bit_for_bit(sign):
    state = TX.init(PARAMS)
    for t, y in pairs(2, 3):
        _, state = TX.update(PARAMS, state, displacement=t, change=y)
    t, y = next(pairs(3, 1))
    uphill = jax.tree.map(lambda y: sign * y, y)
    _, after = TX.update(PARAMS, state, displacement=t, change=uphill)
    assert_equal(after.h, state.h)
    still = optax.tree.zeros_like(t)
    _, after = TX.update(PARAMS, state, displacement=still, change=y)
    assert_equal(after.h, state.h)


def test_the_diagonal_stays_positive():
    rng = np.random.default_rng(4)
    state, changed = TX.init(PARAMS), 0
    for _ in range(200):
        t, y = draw(rng), draw(rng)  # unrelated: y·t has either sign
        _, after = TX.update(PARAMS, state, displacement=t, change=y)
        changed += bool((flat(after.h) != flat(state.h)).any())
        assert (flat(after.h) > 0).all()
        assert np.isfinite(flat(after.h)).all()
        state = after
    assert 50 < changed < 150


def test_an_entry_that_overflows_stays():
    state = TX.init(PARAMS)
    t, y = next(pairs(6, 1))
    y["a"] = y["a"].at[0, 0].set(1e25)  # whose square is not finite
    t["a"] = t["a"].at[0, 0].set(1e-20)
    _, after = TX.update(PARAMS, state, displacement=t, change=y)
    assert after.h["a"][0, 0] == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.h))
    assert np.all(flat(after.h["b"]) != 1)


def test_the_diagonal_is_float32_where_parameters_are_not():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = TX.init(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.h))
    t, y = next(pairs(5, 1))
    updates, after = TX.update(params, state, displacement=t, change=y)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize("given", [{}, {"displacement": PARAMS}, {"change": PARAMS}])
def test_needs_displacement_and_change(given):
    with pytest.raises(ValueError, match=r"needs displacement= and change=.*nlcg"):
        TX.update(PARAMS, TX.init(PARAMS), **given)
