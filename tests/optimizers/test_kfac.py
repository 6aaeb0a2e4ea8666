"""The ready optimizers are the chains that their docstrings write out."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from tests.problems import assert_close


def trajectory(gradients, tx):
    """The parameters after three steps with given gradients."""
    params, _, batches = gradients

    def step(carry, given):
        params, state = carry
        updates, state = tx.update(given[0], state, params, curvature=given[1])
        return (optax.apply_updates(params, updates), state), params

    init = (params, tx.init(params))
    return jax.jit(lambda init: jax.lax.scan(step, init, batches)[0][0])(init)


def test_kfac_is_the_recursion_of_its_docstring(gradients):
    w, layers, batches = gradients
    rate, mu, lam, beta = 0.1, 0.9, 1e-2, 1e-3
    tx = lbopt.kfac(
        rate,
        layers,
        momentum=mu,
        damping=lam,
        weight_decay=beta,
        kl_clip=None,
        factor_decay=0.5,
    )
    core = lbopt.scale_by_kfac(layers, damping=lam + beta, factor_decay=0.5)
    update = jax.jit(lambda g, s, c: core.update(g, s, curvature=c))
    state, v = core.init(w), jax.tree.map(jnp.zeros_like, w)
    for i in range(3):
        h, curvature = jax.tree.map(lambda x: x[i], batches)
        g = jax.tree.map(lambda h, w: h + beta * w, h, w)
        delta, state = update(g, state, curvature)
        v = jax.tree.map(lambda v, d: mu * v + d, v, delta)
        w = jax.tree.map(lambda w, v: w - rate * v, w, v)
    assert_close(trajectory(gradients, tx), w, rtol=1e-4, atol=1e-5)


def test_options_of_kfac(gradients):
    layers = gradients[1]
    core = functools.partial(lbopt.scale_by_kfac, layers, factor_decay=0.8)
    plain = lbopt.kfac(0.1, layers, momentum=None, damping=1e-3, kl_clip=None)
    chain = optax.chain(core(damping=1e-3), optax.scale_by_learning_rate(0.1))
    assert_close(trajectory(gradients, plain), trajectory(gradients, chain))
    clipped = lbopt.kfac(0.1, layers, momentum=None, damping=1e-3, kl_clip=1e-4)
    chain = optax.chain(
        lbopt.clip_by_kl(core(damping=1e-3), 1e-4, 0.1),
        optax.scale_by_learning_rate(0.1),
    )
    assert_close(trajectory(gradients, clipped), trajectory(gradients, chain))


def test_the_first_setting_of_kfac(gradients):
    layers = gradients[1]
    core = lbopt.scale_by_kfac(
        layers, damping=lambda k: jnp.maximum(0.1 * 0.9**k, 3e-3), factor_decay=0.8
    )
    chain = optax.chain(
        lbopt.clip_by_kl(core, 0.01, 0.1), optax.trace(0.7), optax.scale(-0.1)
    )
    found = trajectory(gradients, lbopt.kfac(0.1, layers))
    assert_close(found, trajectory(gradients, chain))


def test_schedules_and_the_decay(gradients):
    layers = gradients[1]
    scheduled = lbopt.kfac(
        optax.constant_schedule(0.1),
        layers,
        damping=optax.constant_schedule(1e-2),
        weight_decay=0.1,
        kl_clip=None,
    )
    chain = optax.chain(
        optax.add_decayed_weights(0.1),
        lbopt.scale_by_kfac(layers, damping=1e-2 + 0.1, factor_decay=0.8),
        optax.trace(0.7),
        optax.scale(-0.1),
    )
    assert_close(trajectory(gradients, scheduled), trajectory(gradients, chain))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": -1e-4}, r"weight_decay=-0.0001 must be 0 or positive"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); None for none"),
        ({"momentum": -0.5}, r"momentum=-0.5 must lie in \[0, 1\)"),
        ({"damping": -1.0, "weight_decay": 2.0}, r"damping=-1.0 must be positive"),
        ({"kl_clip": 0.0}, r"kl_clip=0.0 must be positive; None for no"),
    ],
)
def test_settings_out_of_range(gradients, settings, message):
    with pytest.raises(ValueError, match=message):
        lbopt.kfac(0.1, gradients[1], **settings)


# ---------------------------------------------------------------- distributed K-FAC


def test_distributed_kfac_is_kfac_with_a_bound_and_stale_inverses(gradients):
    layers = gradients[1]
    bound = optax.exponential_decay(1e-2, 1, 0.5, staircase=True)
    periods = lbopt.Periods(inverses=2)
    tx = lbopt.distributed_kfac(1.0, layers, kl_clip=bound, periods=periods)
    chain = optax.chain(
        lbopt.clip_by_kl(lbopt.scale_by_kfac(layers, periods=periods), bound, 1.0),
        optax.trace(0.9),
        optax.scale(-1.0),
    )
    assert_close(trajectory(gradients, tx), trajectory(gradients, chain))


def test_a_step_of_distributed_kfac_is_as_long_as_its_bound(gradients):
    params, layers, batches = gradients
    c = 1e-2
    tx = lbopt.distributed_kfac(1.0, layers, kl_clip=c, momentum=0.0)
    grads, curvature = jax.tree.map(lambda x: x[0], batches)
    updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    core = lbopt.scale_by_kfac(layers)
    natural, _ = core.update(grads, core.init(params), curvature=curvature)
    # The step is a multiple of the natural gradient, of squared length c in F̂.
    ratio = optax.tree.norm(updates) / optax.tree.norm(natural)
    length = ratio**2 * optax.tree.vdot(natural, grads)
    assert abs(float(length) - c) < 1e-4 * c
    long = lbopt.distributed_kfac(1e-3, layers, kl_clip=1e3, momentum=0.0)
    updates, _ = long.update(grads, long.init(params), params, curvature=curvature)
    assert_close(updates, jax.tree.map(lambda u: -1e-3 * u, natural), rtol=1e-4)
