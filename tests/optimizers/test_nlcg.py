"""NLCG is its core with the settings of the authors' release."""

import jax
import jax.numpy as jnp

import lbopt
from tests.problems import assert_equal


def test_nlcg_is_its_core_with_the_release_s_settings():
    tx = lbopt.nlcg(0.1)
    core = lbopt.scale_by_nlcg(
        0.1,
        beta="fletcher_reeves",
        preconditioner="bfgs",
        step_control="step",
        control_period=5,
    )
    w = jnp.array([1.0, -2.0])
    states = [tx.init(w), core.init(w)]
    for k in range(12):
        value, grads = jax.value_and_grad(lambda w, k=k: jnp.sum(jnp.cos(w + k)))(w)
        (updates, states[0]), (expected, states[1]) = (
            t.update(grads, s, w, value=value)
            for t, s in zip((tx, core), states, strict=True)
        )
        assert_equal(updates, expected)
        w = w + updates
