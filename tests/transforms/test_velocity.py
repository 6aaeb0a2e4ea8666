"""The momentum that is the last change of the weights, and its buffered twin."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbopt import schedules
from lbopt.transforms.velocity import (
    VelocityBufferState,
    VelocityState,
    scale_by_velocity,
)
from tests.problems import assert_close, assert_equal

STEPS, MOMENTUM = 8, 0.9
PARAMS = {
    "kernel": jax.random.normal(jax.random.key(0), (4, 3)),
    "bias": jnp.arange(3.0),
}
GRADS = jax.tree.map(
    lambda w: jax.random.normal(jax.random.key(1), (STEPS, *w.shape)), PARAMS
)
# One step at the first rate, then a decay that the steps do not see the end of.
DECAY = schedules.polynomial(0.3, 2.0, 0.5, 5.5, steps_per_epoch=2)
both_variants = pytest.mark.parametrize("variant", ["paper", "code"])


def shrink_kernel():
    """A stand-in for the rescaling: after each step the kernel has norm 1."""

    def update(updates, state, params):
        end = params["kernel"] + updates["kernel"]
        new = end / jnp.linalg.norm(end) - params["kernel"]
        return {"kernel": new, "bias": updates["bias"]}, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def trajectory(tx, params=PARAMS, grads=GRADS):
    """The parameters after each step, all steps in one scan of one program."""

    def step(carry, given):
        params, state = carry
        updates, state = tx.update(given, state, params, stranger=object())
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[1])
    return run((params, tx.init(params)))


def textbook(rate, variant, rescale):
    """Eq. 22 to 24, or the released code's loop, in NumPy."""
    w = {k: np.asarray(x, np.float64) for k, x in PARAMS.items()}
    last, v = dict(w), {k: np.zeros_like(x) for k, x in w.items()}
    history = []
    for t in range(STEPS):
        eta, before, first = (float(rate(i)) for i in (t, max(t - 1, 0), 0))
        for k, x in w.items():
            p = np.asarray(GRADS[k][t], np.float64)
            if variant == "paper":
                v[k] = MOMENTUM / first * eta * (x - last[k]) - eta * p
            else:
                v[k] = MOMENTUM * min(1, eta / before) * v[k] - eta * p
            last[k], w[k] = x, x + v[k]
        if rescale:
            w["kernel"] = w["kernel"] / np.linalg.norm(w["kernel"])
        history.append(dict(w))
    return {k: np.stack([row[k] for row in history]) for k in w}


@both_variants
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    "rate",
    [0.3, DECAY, optax.piecewise_constant_schedule(0.1, {2: 3.0})],
    ids=["constant", "decay", "growth"],
)
def test_is_the_textbook_loop(rate, rescale, variant):
    tx = scale_by_velocity(rate, MOMENTUM, velocity=variant)
    tx = optax.chain(tx, shrink_kernel()) if rescale else tx
    schedule = rate if callable(rate) else lambda step: rate
    expected = textbook(schedule, variant, rescale)
    assert_close(trajectory(optax.with_extra_args_support(tx)), expected, 1e-4, 1e-5)


@both_variants
def test_a_rate_that_reaches_zero_stops(variant):
    rate = optax.piecewise_constant_schedule(0.3, {3: 0.0})
    history = trajectory(scale_by_velocity(rate, MOMENTUM, velocity=variant))["bias"]
    assert np.all(np.isfinite(history))
    assert_equal(history[3:], jnp.broadcast_to(history[2], history[3:].shape))


@both_variants
def test_the_first_step_has_no_velocity(variant):
    tx = scale_by_velocity(0.5, MOMENTUM, velocity=variant)
    grads = jax.tree.map(lambda g: g[0], GRADS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert_equal(updates, jax.tree.map(lambda g: -0.5 * g, grads))
    assert state.count == 1
    kind = VelocityState if variant == "paper" else VelocityBufferState
    assert type(state) is kind


@both_variants
def test_init_from_shapes(variant):
    tx = scale_by_velocity(DECAY, MOMENTUM, velocity=variant)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert_equal(tx.init(shapes), tx.init(PARAMS))


@both_variants
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_shares_memory(variant, compiled):
    tx = scale_by_velocity(0.5, MOMENTUM, velocity=variant)
    update = jax.jit(tx.update) if compiled else tx.update
    grads = jax.tree.map(lambda g: g[0], GRADS)
    state = tx.init(PARAMS)
    for _ in range(2):
        leaves = jax.tree.leaves((PARAMS, grads, state))
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
        updates, state = update(grads, state, PARAMS)
        leaves = jax.tree.leaves((PARAMS, updates, state))
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@both_variants
def test_types_are_kept(variant):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = scale_by_velocity(DECAY, MOMENTUM, velocity=variant)
    state = tx.init(params)
    updates, after = tx.update({"w": jnp.ones(3)}, state, params)
    assert updates["w"].dtype == jnp.float32  # the gradient's
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_the_paper_s_form_needs_the_parameters():
    grads = jax.tree.map(lambda g: g[0], GRADS)
    tx = scale_by_velocity(0.1, MOMENTUM)
    with pytest.raises(ValueError, match=r"update needs params, whose change is the"):
        tx.update(grads, tx.init(PARAMS))
    tx = scale_by_velocity(0.1, MOMENTUM, velocity="code")
    tx.update(grads, tx.init(PARAMS))


def test_a_schedule_from_zero():
    warm_up = optax.linear_schedule(0.0, 0.1, 5)
    with pytest.raises(ValueError, match=r'0.0 at step 0.*velocity="code"'):
        scale_by_velocity(warm_up, MOMENTUM).init(PARAMS)
    tx = scale_by_velocity(warm_up, MOMENTUM, velocity="code")
    assert np.all(np.isfinite(trajectory(tx)["bias"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate=0.0 must be positive; the step is"),
        ({"learning_rate": -0.1}, r"learning_rate=-0.1 must be positive"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); 0 for none"),
        ({"momentum": -0.5}, r"momentum=-0.5 must lie in \[0, 1\)"),
        ({"velocity": "nesterov"}, r"velocity='nesterov' must be 'paper' or 'code'"),
    ],
)
def test_settings_out_of_range(change, message):
    settings = {"learning_rate": 0.1, "momentum": 0.9} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(scale_by_velocity)(**settings)
