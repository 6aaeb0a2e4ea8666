"""Metrics of the curvature, counted by hand for a tiny model."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from experiments import curvature_metrics
from lbopt import training
from tests.problems import Mlp, classify

FLOAT = 4  # bytes
# ``Mlp``: A [5, 5] and G [5, 5] of first; A [5, 5] and G [3, 3] of last. As triangles
# 15, 15, 15 and 6 numbers, each statistic with one unit.
NUMBERS = 15 + 15 + 15 + 6
PROBLEM = classify(Mlp())
LAYERS = PROBLEM.trace()
EVALUATED = PROBLEM.evaluate(LAYERS)
PERIODS = {"damping": 1e-2, "periods": lbopt.Periods(2, 4)}


def compiled(tx):
    """The state before the first step, and a step with its metrics."""
    tx = optax.chain(optax.add_decayed_weights(1e-4), tx)
    _, grads, curvature = EVALUATED

    @jax.jit
    def update(state, scale):
        first = curvature["first"]
        changed = {**curvature, "first": first._replace(a=scale * first.a)}
        _, state = tx.update(grads, state, PROBLEM.params, curvature=changed)
        return state, curvature_metrics.of(state)

    return jax.jit(tx.init)(PROBLEM.params), update


def steps(state, update, number, scale=1.0):
    """The metrics of several steps, by name."""
    found = []
    for _ in range(number):
        state, metrics = update(state, scale)
        found.append({key: float(value) for key, value in metrics.items()})
    return {key: [metrics[key] for metrics in found] for key in found[0]}


@pytest.fixture(scope="module")
def periods():
    return compiled(lbopt.scale_by_kfac(LAYERS, **PERIODS))


def test_an_optimizer_without_curvature_has_none():
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    assert curvature_metrics.of(tx.init(PROBLEM.params)) == {}


def test_periods(periods):
    before = jax.device_get(jax.jit(curvature_metrics.of)(periods[0]))
    assert set(map(float, before.values())) == {0.0}, "before the first step"
    metrics = steps(*periods, 7)
    assert metrics["refreshed"] == [1, 0, 1, 0, 1, 0, 1]
    assert metrics["refreshed_bytes"] == pytest.approx(metrics["refreshed"])
    assert metrics["inversions"] == [4, 0, 0, 0, 4, 0, 0]
    assert metrics["inverse_age"] == [0, 1, 2, 3, 0, 1, 2]
    assert metrics["inverse_age_max"] == metrics["inverse_age"]
    for name in ("sent_bytes", "boosted", "rejected"):
        assert metrics[name] == [0] * 7


def test_statistics_that_stay_similar_are_renewed_ever_more_seldom():
    # At steps 1, 2, 3, 5, 8, ... of the rule: all are similar under such a threshold.
    tx = lbopt.scale_by_kfac(
        LAYERS, damping=1e-2, factor_decay=0.0, stale_threshold=1e9
    )
    metrics = steps(*compiled(tx), 9)
    assert metrics["refreshed"] == [1, 1, 1, 0, 1, 0, 0, 1, 0]
    assert metrics["inversions"] == [4, 4, 4, 0, 4, 0, 0, 4, 0]
    assert metrics["inverse_age"] == [0, 0, 0, 1, 0, 1, 2, 0, 1]


def test_four_devices_tell_what_each_sends():
    tx = lbopt.kfac(0.1, LAYERS, placement=lbopt.Placement("data", 4), **PERIODS)
    mesh = lbopt.sharding.make_mesh(jax.devices()[:4])

    def loss_fn(params, model_state, batch, rng):
        del rng
        return PROBLEM.loss_fn(params, *batch), (model_state, {})

    take = training.make_train_step(loss_fn, tx, LAYERS, mesh)

    @jax.jit
    def step(state, _):
        state, _ = take(state, PROBLEM.args)
        return state, curvature_metrics.of(state.opt_state)

    state = training.init_state(tx, PROBLEM.params, {}, jax.random.key(0), mesh)
    metrics = steps(state, step, 5)
    # Shares of 4, 4, 4 and 2 numbers, one for each device.
    statistics = 4 * (4 + 4 + 4 + 2) * FLOAT
    # To the owners in a round for each of two sizes; back in shares, as much again; and
    # each unit's shares to all.
    inverses = (4 * (4 + 2) + 4 * (4 + 2) + (3 * 4 + 2)) * FLOAT
    both = statistics + inverses
    assert metrics["sent_bytes"] == [both, 0, statistics, 0, both]
    assert metrics["refreshed"] == [1, 0, 1, 0, 1]
    assert metrics["inversions"] == [4, 0, 0, 0, 4]
    assert metrics["inverse_age_max"] == [0, 1, 2, 3, 0]


def test_a_statistic_that_is_not_finite_is_rejected(periods):
    metrics = steps(*periods, 1, scale=jnp.inf)
    assert metrics["rejected"] == [1]
    assert metrics["refreshed"] == [3 / 4]
    assert metrics["refreshed_bytes"] == pytest.approx([(NUMBERS - 15) / NUMBERS])
    assert metrics["inversions"] == [2], "a layer is inverted when it has both"
    # The first layer has no inverse yet: as old as the run.
    assert metrics["inverse_age_max"] == [1]
    assert metrics["inverse_age"] == [1 / 2]


def test_a_layer_whose_inverse_failed_is_boosted(periods):
    metrics = steps(*periods, 1, scale=-1e6)  # no Cholesky factor
    assert metrics["refreshed"] == metrics["boosted"] == metrics["rejected"] == [1]
    assert metrics["inversions"][0] in (2, 3), "its G may be sound"
