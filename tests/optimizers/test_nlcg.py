"""NLCG is its core; the defaults are the settings of the authors' release."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from tests.problems import assert_equal

RELEASE = {
    "beta": "fletcher_reeves",
    "preconditioner": "bfgs",
    "step_control": "step",
    "control_period": 5,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": "dai_yuan", "step_control": "online"},
        {"preconditioner": optax.scale(0.5), "control_period": 2},
    ],
)
def test_nlcg_is_its_core(settings):
    tx = lbopt.nlcg(0.1, **settings)
    core = lbopt.scale_by_nlcg(0.1, **RELEASE | settings)
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
