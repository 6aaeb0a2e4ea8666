"""The average of the weights against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import weight_average
from lbopt import training


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_is_tensorflow_s_moving_average(decay):
    tx = optax.chain(optax.sgd(0.1), weight_average.track(decay))
    w = np.asarray([1.0, -2.0])
    state = training.init_state(tx, {"w": jnp.asarray(w)}, {}, jax.random.key(0))
    average = w.copy()
    for k in range(12):
        g = np.cos(k + w)
        grads = {"w": jnp.asarray(g, jnp.float32)}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(params=params, opt_state=opt_state)
        w = w - 0.1 * g
        kept = min(decay, (1 + k) / (10 + k))
        average = kept * average + (1 - kept) * w
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        evaluated = weight_average.averaged(state)
        np.testing.assert_allclose(evaluated.params["w"], average, rtol=1e-5)
    assert abs(average - w).max() > 0.01


def test_the_step_is_left_as_it_is():
    tx = weight_average.track(0.9)
    params = {"w": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates is params
