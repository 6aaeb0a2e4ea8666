"""The bound on the KL divergence of a step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from tests.problems import Mlp, assert_close, assert_equal, classify

BOUND, RATE = 1e-3, 0.3


def test_a_long_step_has_the_squared_length_c():
    problem = classify(Mlp())
    layers = problem.trace()
    inner = lbopt.scale_by_kfac(layers, damping=1e-2)
    _, grads, curvature = problem.evaluate(layers)
    natural, _ = inner.update(grads, inner.init(problem.params), curvature=curvature)
    tx = lbopt.clip_by_kl(inner, BOUND, RATE)
    clipped, state = tx.update(grads, tx.init(problem.params), curvature=curvature)
    # Δᵀ∇h is the step's squared length in the damped curvature, and the step is −ηΔ.
    length = RATE**2 * sum(
        float(np.vdot(u, g))
        for u, g in zip(jax.tree.leaves(natural), jax.tree.leaves(grads), strict=True)
    )
    assert length > BOUND
    scale = np.sqrt(BOUND / length)
    assert_close(clipped, jax.tree.map(lambda u: u * scale, natural))
    np.testing.assert_allclose(state.scale, scale, rtol=1e-5)
    assert state.count == 1


def test_a_short_step_is_left_alone():
    tx = lbopt.clip_by_kl(optax.identity(), 100.0, RATE)
    grads = {"w": jnp.array([3.0, 4.0])}
    updates, state = tx.update(grads, tx.init(grads))
    assert_equal(updates, grads)
    assert state.scale == 1


def test_schedules_are_asked_for_the_step():
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    bound = optax.piecewise_constant_schedule(1.0, {1: 4.0})
    tx = lbopt.clip_by_kl(optax.identity(), bound, rate)
    grads = {"w": jnp.array([30.0, 40.0])}
    state = tx.init(grads)
    _, state = tx.update(grads, state)
    np.testing.assert_allclose(state.scale, 1 / 50, rtol=1e-6)
    _, state = tx.update(grads, state)
    np.testing.assert_allclose(state.scale, 2 / (0.5 * 50), rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_a_bound_that_has_become_none_admits_no_step(bad):
    bound = lambda step: jnp.where(step < 1, 1.0, bad)
    tx = lbopt.clip_by_kl(optax.identity(), bound, RATE)
    grads = {"w": jnp.array([3.0, 4.0])}
    updates, state = tx.update(grads, tx.init(grads))
    assert state.scale > 0
    updates, state = tx.update(grads, state)
    assert state.scale == 0
    assert_equal(updates, {"w": jnp.zeros(2)})


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_length_of_a_narrow_step_does_not_overflow(dtype):
    tx = lbopt.clip_by_kl(optax.identity(), BOUND, RATE)
    grads = {"w": jnp.array([300.0, 400.0], dtype), "v": jnp.full(4096, 2.0, dtype)}
    updates, state = tx.update(grads, tx.init(grads))
    squares = sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values())
    scale = np.sqrt(BOUND / (RATE**2 * squares))
    np.testing.assert_allclose(state.scale, scale, rtol=1e-5)
    assert updates["w"].dtype == dtype


def test_a_product_that_is_not_positive_is_not_clipped():
    for factor in (0.0, -1.0):
        tx = lbopt.clip_by_kl(optax.scale(factor), BOUND, RATE)
        grads = {"w": jnp.array([3.0, 4.0])}
        updates, state = tx.update(grads, tx.init(grads))
        assert state.scale == 1
        assert_close(updates, {"w": factor * grads["w"]})


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_the_bound_is_positive(c):
    message = r"c=\S+ must be positive; leave clip_by_kl out"
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.clip_by_kl)(optax.identity(), c, RATE)
    with pytest.raises(ValueError, match=r"learning_rate=\S+ must be 0 or positive"):
        lbopt.clip_by_kl(optax.identity(), BOUND, -RATE)
