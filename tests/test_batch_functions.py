"""Functions of a step's batch that optimizers call, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import batch_functions, training
from tests.devices import mesh_of, spread
from tests.problems import assert_close
from tests.test_statistics_pass import (
    LAYERS,
    MODEL_STATE,
    PARAMS,
    RNG,
    batch_of,
    gradient_by_hand,
    loss_fn,
    mean_of,
    parts_of,
    started,
)

ELSEWHERE = jax.tree.map(lambda x: x + 0.1, PARAMS)


def asking():
    """A transformation whose state has what the functions of the batch give."""

    def update(updates, state, params=None, *, value, value_fn, **extra_args):
        del state
        products = extra_args["fisher_products"]([params, ELSEWHERE])
        return updates, (value, value_fn(params), value_fn(ELSEWHERE), products)

    return optax.GradientTransformationExtraArgs(
        lambda params: (*(jnp.zeros([]),) * 3, jnp.zeros((2, 2))), update
    )


@pytest.mark.parametrize(("devices", "accumulate"), [(None, 1), (None, 2), (4, 2)])
def test_the_functions_of_a_batch(devices, accumulate):
    state, step = started(asking(), devices, layers=None, accumulate=accumulate)
    batch = batch_of(0, size=32)
    state, metrics = step(state, batch)
    value, here, elsewhere, products = state.opt_state
    parts = parts_of(batch, (devices or 1) * accumulate)
    expected = gradient_by_hand(ELSEWHERE, MODEL_STATE, parts)[0]
    assert_close(here, value)  # the same keys
    assert_close(elsewhere - here, expected - metrics["plain"], atol=1e-5)
    assert abs(expected - metrics["plain"]) > 1e-2
    vectors = [PARAMS, ELSEWHERE]
    each = [
        lbopt.fisher_products(
            loss_fn, PARAMS, vectors, MODEL_STATE, part, RNG, has_aux=True
        )
        for part in parts
    ]
    assert_close(products, mean_of(each), rtol=1e-4)


def test_the_loss_is_refused_where_not_all_devices_have_a_share():
    tx = optax.chain(lbopt.scale_by_kfac(LAYERS, **spread(2)), asking())
    state, step = started(tx, 2, statistics_devices=1)
    message = (
        r"fisher_products cannot be evaluated with statistics_devices=1.*_fraction or a"
    )
    with pytest.raises(ValueError, match=message):
        step(state, batch_of(0))


def test_a_step_that_asks_for_both():
    tx = lbopt.scale_by_quadratic_model(
        lbopt.scale_by_kfac(LAYERS), damping=0.1, damping_period=2
    )
    (state, step), losses = started(tx), []
    for _ in range(8):
        state, metrics = step(state, batch_of(0))
        losses.append(float(metrics["plain"]))
    assert losses[-1] < losses[0] / 4
    assert int(state.opt_state.rejected) == 0
    assert float(state.opt_state.damping) < 0.1  # the model is trusted


def test_only_the_micro_batches_count_and_not_the_devices_that_share_them():
    """Loss, parameters, running averages, what lies along the batch, random numbers."""

    def carrying(params, model_state, batch, rng):
        carried = model_state["carried"]
        own = {"batch_stats": model_state["batch_stats"]}
        first = carried["count"] == 0
        share = jnp.where(first, 1.0, jax.random.uniform(jax.random.fold_in(rng, 1)))
        x = share * batch["x"] + (1 - share) * carried["x"]
        loss, (updated, metrics) = loss_fn(params, own, {**batch, "x": x}, rng)
        carried = {"x": x, "count": carried["count"] + 1}
        return loss, ({**updated, "carried": carried}, metrics)

    nothing = jnp.zeros_like(batch_of(0, size=32)["x"])
    start = {**MODEL_STATE, "carried": {"x": nothing, "count": jnp.int32(0)}}
    found = []
    for devices, accumulate in ((None, 4), (2, 2), (4, 1)):
        mesh, tx = mesh_of(devices), optax.sgd(0.1)
        state = training.init_state(tx, PARAMS, start, RNG, mesh)
        train_step = training.make_train_step(
            carrying, tx, mesh=mesh, accumulate=accumulate, per_example=("carried",)
        )
        losses = []
        for step in range(3):
            state, metrics = train_step(state, batch_of(step, size=32))
            losses.append((metrics["loss"], metrics["plain"]))
        assert state.model_state["carried"]["count"] == 3
        found.append(jax.device_get((losses, state.params, state.model_state)))
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    means = found[0][2]["batch_stats"]
    assert not all(
        jax.tree.leaves(jax.tree.map(np.array_equal, means, MODEL_STATE["batch_stats"]))
    )


def test_numbers_without_a_mean_are_those_of_the_last_micro_batch():
    def one(model_state, batch, rng):
        del rng
        total = batch.sum()
        return {"last": batch[0], "mean": model_state["mean"] + total}, total

    start = {"last": jnp.int32(7), "mean": jnp.float32(1)}
    state, mean = batch_functions.accumulated(
        one, 2, start, jnp.arange(1, 5), jax.random.split(RNG)
    )
    assert (int(state["last"]), float(state["mean"])) == (3, 6.0)
    assert float(mean) == 5
