"""The average of the parameters against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt


@pytest.mark.parametrize(("decay", "warm_up"), [(0.3, True), (0.9999, True), (0.9, 0)])
def test_is_the_recursion_of_its_docstring(decay, warm_up):
    tx = optax.chain(optax.sgd(0.1), lbopt.average_params(decay, warm_up=bool(warm_up)))
    w = np.asarray([1.0, -2.0])
    params = {"w": jnp.asarray(w)}
    state, average = tx.init(params), w.copy()
    update = jax.jit(tx.update)
    for k in range(12):
        g = np.cos(k + w)
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        w = w - 0.1 * g
        kept = min(decay, (1 + k) / (10 + k)) if warm_up else decay
        average = kept * average + (1 - kept) * w
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(
            lbopt.averaged_params(state)["w"], average, rtol=1e-5
        )
    assert abs(average - w).max() > 0.01


def test_the_step_is_left_as_it_is():
    tx = lbopt.average_params(0.9)
    params = {"w": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates is params


def test_errors():
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        lbopt.average_params(1.0)
    tx = lbopt.average_params()
    with pytest.raises(ValueError, match=r"average_params.update needs params"):
        tx.update({}, tx.init({}))
    with pytest.raises(ValueError, match=r"must hold one average, not 0; put lbopt.a"):
        lbopt.averaged_params(optax.sgd(0.1).init({}))
