"""The presets of NLCG against the table and the recipe of the authors' release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import presets
from lbopt.presets.nlcg import boundaries

IMAGES = 50_000  # of CIFAR-100
# NLCG, RMSProp, momentum, SGD.
ROWS = {
    128: (0.662, 0.649, 0.646, 0.637),
    256: (0.684, 0.651, 0.649, 0.638),
    512: (0.674, 0.648, 0.650, 0.635),
    1024: (0.654, 0.647, 0.650, 0.635),
    2048: (0.639, 0.645, 0.649, 0.631),
    4096: (0.645, 0.653, 0.652, 0.618),
    8192: (0.670, 0.660, 0.660, 0.550),
    16384: (0.560, 0.370, 0.370, 0.350),
}


def test_the_table_of_the_release():
    assert set(presets.ADYA_2018) == set(ROWS)
    for size, row in ROWS.items():
        p = presets.ADYA_2018[size]
        percent = np.array([p.accuracy, p.rmsprop, p.momentum, p.sgd])
        np.testing.assert_allclose(percent / 100, row)
        assert (p.model, p.batch_size) == ("resnet32", size)
        assert (p.epochs, p.warmup_epochs, p.init_value) == (200, 25, 0.001)
        assert p.l2 == 2e-4


def test_the_rates_of_the_examples():
    assert presets.ADYA_2018[2048].learning_rate == pytest.approx(0.8)
    assert presets.ADYA_2018[4096].learning_rate == pytest.approx(1.6)


def test_boundaries_by_the_length_of_the_run():
    assert boundaries(100) == boundaries(200) == (102, 153, 204)
    assert boundaries(201) == boundaries(300) == (153, 229, 306)
    assert boundaries(301) == boundaries(400) == (204, 306, 408)


@pytest.mark.parametrize("size", [128, 2048, 16384])
def test_the_schedule_of_a_row(size):
    preset, per_epoch = presets.ADYA_2018[size], IMAGES / size
    eta, peak = preset.schedule(per_epoch), 0.1 * size / 256
    count = int(25 * per_epoch)
    for k in (0, 1, count // 2, count - 1):
        exact = peak - (peak - 0.001) * (1 - k / count) ** 0.5
        np.testing.assert_allclose(eta(k), exact, rtol=1e-5)
    np.testing.assert_allclose(eta(count), peak, rtol=1e-6)
    for epoch, factor in ((102, 1.0), (153, 0.1)):
        last = int(epoch * per_epoch)
        np.testing.assert_allclose(eta(last), peak * factor, rtol=1e-5)
        np.testing.assert_allclose(eta(last + 1), 0.1 * peak * factor, rtol=1e-5)
    np.testing.assert_allclose(eta(int(200 * per_epoch)), 0.01 * peak, rtol=1e-5)


def test_longer_runs_drop_later():
    eta = presets.ADYA_2018[2048]._replace(epochs=300).schedule(10)
    values = [float(eta(step)) for step in (1530, 1531, 2291, 3000)]
    np.testing.assert_allclose(values, [0.8, 0.08, 0.008, 0.008], rtol=1e-5)


def test_our_settings_for_imagenet():
    preset = presets.NLCG_RESNET50
    eta = preset.schedule(20)
    np.testing.assert_allclose(eta(0), 0.001, rtol=1e-6)
    np.testing.assert_allclose([eta(225), eta(600)], 25.6, rtol=1e-6)
    values = [float(eta(20 * epoch + 1)) for epoch in (30, 60, 80)]
    np.testing.assert_allclose(values, [2.56, 0.256, 0.0256], rtol=1e-5)
    assert preset.accuracy is None
    assert preset.l2 == 1e-4


@pytest.mark.parametrize("preset", [presets.ADYA_2018[2048], presets.NLCG_RESNET50])
def test_a_preset_is_an_optimizer(preset):
    params = {"dense": {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.ones(2)}}
    curvature = {"dense": {"kernel": jnp.array([[1.0, 0.2]]), "bias": jnp.ones(2)}}

    def loss_fn(w):
        parts = jax.tree.map(lambda h, x: 0.5 * jnp.sum(h * x**2), curvature, w)
        return sum(jax.tree.leaves(parts))

    tx = preset.optimizer(steps_per_epoch=40)
    state, w = tx.init(params), params
    update = jax.jit(lambda g, s, w, loss: tx.update(g, s, w, value=loss))
    for k in range(3):
        loss, grads = jax.value_and_grad(loss_fn)(w)
        updates, state = update(grads, state, w, loss)
        if k == 0:  # the first direction is the gradient's
            scaled = jax.tree.map(lambda g: -0.001 * g, grads)
            for x, y in zip(*map(jax.tree.leaves, (updates, scaled)), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5)
        w = jax.tree.map(jnp.add, w, updates)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(w))
    assert float(loss_fn(w)) < float(loss_fn(params))
