"""The average of the parameters against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import training


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


AVERAGE, SGD = lbopt.average_params(), optax.sgd(0.1)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.chain(AVERAGE, SGD), "number 1 of a chain of 2, so it averages other"),
        (optax.chain(SGD, AVERAGE, optax.scale(-1.0)), "number 2 of a chain of 3"),
        (optax.chain(optax.chain(SGD, AVERAGE), SGD), "number 1 of a chain of 2"),
        (
            optax.apply_if_finite(optax.chain(AVERAGE, SGD), 3),
            "put lbopt.average_params",
        ),
    ],
)
def test_an_average_that_is_not_the_last_of_its_chain(tx, message):
    state = tx.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        lbopt.averaged_params(state)
    with pytest.raises(ValueError, match=message):
        training.init_state(tx, {"w": jnp.ones(3)}, {}, jax.random.key(0))


@pytest.mark.parametrize(
    "tx",
    [
        AVERAGE,
        optax.chain(optax.chain(SGD, optax.scale(1.0)), optax.chain(SGD, AVERAGE)),
        optax.apply_if_finite(optax.chain(SGD, optax.masked(AVERAGE, True)), 3),
    ],
)
def test_an_average_at_the_end_of_its_chain(tx):
    state = tx.init({"w": jnp.ones(3)})
    assert lbopt.averaged_params(state)["w"].tolist() == [1, 1, 1]
