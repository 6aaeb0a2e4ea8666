"""The presets of LARS against the tables of their sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import presets

IMAGES = 1_281_167
K = 1_024
# AlexNet's γ₀ and top-1, AlexNet-BN's γ₀ and top-1.
ALEXNETS = {
    512: (2, 58.7, 2, 60.2),
    4 * K: (10, 58.5, 10, 60.4),
    8 * K: (10, 58.2, 14, 60.1),
    16 * K: (14, 55.0, 23, 59.3),
    32 * K: (14, 46.9, 22, 57.8),
}
# γ₀, warm-up, top-1 with minimal and with extended augmentation.
RESNET50 = {
    256: (4, 0, 73.8, 75.8),
    1 * K: (9, 5, 73.3, 75.4),
    8 * K: (30, 5, 73.5, 75.2),
    16 * K: (33, 12, 72.9, 74.4),
    32 * K: (40, 12, 72.5, 72.5),
}
# γ₀, epochs, warm-up, top-1.
GOOGLENET = {
    256: (4, 100, 5, 70.3),
    1 * K: (6, 100, 10, 69.7),
    2 * K: (7, 150, 25, 71.1),
    4 * K: (10, 200, 30, 69.9),
    8 * K: (10, 250, 60, 69.0),
    16 * K: (10, 350, 110, 67.2),
}
# γ₀, warm-up, m, β, decay steps, BN span, mean epochs to 75.9 %.
MLPERF = {
    1632: (7.4, 2, 0.9, 5e-5, 27476, 204, 35.0),
    3264: (10.5, 2, 0.9, 5e-5, 14523, 204, 35.2),
    4096: (10, 5, 0.9, 2e-4, 13137, 64, 40.0),
    8192: (17, 5, 0.9, 2e-4, 6095, 64, 42.0),
    13056: (12.8, 9, 0.9, 2.5e-5, 4710, 204, 45.4),
    32768: (21.2, 16, 0.94, 2.5e-5, 2267, 128, 56.0),
    49152: (19.405, 24, 0.951807, 1e-4, 1846, 256, 68.0),
    58880: (23.246, 29, 0.951807, 1e-4, 1785, 230, 79.9),
    65536: (24.699, 31, 0.951807, 1e-4, 1133, 128, 84.5),
    67840: (24.699, 31, 0.951807, 1e-4, 1133, 424, 85.9),
}
ALL = [
    *presets.YOU_2017.items(),
    *presets.YOU_2017_LONGER.items(),
    *presets.YOU_2017_MOMENTUM.items(),
    *presets.CAFFE_2017.items(),
    *presets.MLPERF.items(),
    *presets.CLOUD_TPU.items(),
]


def test_the_tables_of_the_paper():
    keys = {("alexnet", size) for size in ALEXNETS}
    keys |= {("alexnet_bn", size) for size in ALEXNETS}
    keys |= {("resnet50", size) for size in RESNET50}
    keys |= {("googlenet", size) for size in GOOGLENET}
    assert set(presets.YOU_2017) == keys
    for size, (rate, top1, rate_bn, top1_bn) in ALEXNETS.items():
        for model, row in (
            ("alexnet", (rate, 100, 2, top1, None)),
            ("alexnet_bn", (rate_bn, 100, 5, top1_bn, None)),
        ):
            assert presets.YOU_2017[model, size][3:8] == row
    for size, (rate, warmup, minimal, extended) in RESNET50.items():
        row = (rate, 100, warmup, minimal, extended)
        assert presets.YOU_2017["resnet50", size][3:8] == row
    for size, (rate, epochs, warmup, top1) in GOOGLENET.items():
        row = (rate, epochs, warmup, None, top1)
        assert presets.YOU_2017["googlenet", size][3:8] == row
    for preset in presets.YOU_2017.values():
        assert preset.variant == "paper"
        assert (preset.momentum, preset.weight_decay) == (0.9, 5e-4)
        assert (preset.trust_coefficient, preset.power) == (1e-3, 2)


def test_longer_runs_of_the_paper():
    rows = {
        ("alexnet", 16 * K): (55.0, 55.9, 56.7, 57.3, 58.2),
        ("alexnet_bn", 32 * K): (57.8, 59.2, 59.5, 59.5, 59.9),
        ("resnet50", 16 * K): (74.4, 74.1, 74.6, 74.8, 75.5),
    }
    assert len(presets.YOU_2017_LONGER) == 15
    for (model, size), values in rows.items():
        short = presets.YOU_2017[model, size]
        for epochs, top1 in zip((100, 125, 150, 175, 200), values, strict=True):
            preset = presets.YOU_2017_LONGER[model, size, epochs]
            assert preset.epochs == epochs
            assert preset.learning_rate == short.learning_rate
            both = (None, top1) if model == "resnet50" else (top1, None)
            assert (preset.accuracy, preset.accuracy_extended) == both
        of_100 = presets.YOU_2017_LONGER[model, size, 100]
        name = "accuracy_extended" if model == "resnet50" else "accuracy"
        assert getattr(of_100, name) == getattr(short, name)


def test_runs_of_the_paper_without_lars():
    rows = {
        ("alexnet", 512): (0.02, 2.5, 58.8),
        ("alexnet", 4096): (0.05, 2.5, 53.1),
        ("alexnet", 8192): (0.03, 2.5, 44.8),
        ("alexnet_bn", 512): (0.02, 0, 60.2),
        ("alexnet_bn", 4096): (0.18, 0, 58.9),
        ("alexnet_bn", 8192): (0.30, 0, 58.0),
        ("googlenet", 256): (0.02, 0, 69.2),
    }
    assert set(presets.YOU_2017_MOMENTUM) == set(rows)
    for key, (rate, warmup, top1) in rows.items():
        preset = presets.YOU_2017_MOMENTUM[key]
        assert preset.variant == "momentum"
        assert (preset.learning_rate, preset.warmup_epochs) == (rate, warmup)
        assert top1 in (preset.accuracy, preset.accuracy_extended)
        assert preset.epochs == 100


def test_the_solver_files():
    # γ₀, steps of the warm-up and of the run, steps in an epoch, accumulation, β.
    rows = {
        ("alexnet", 8 * K): (10, 600, 15_600, 156, 1, 5e-4),
        ("alexnet", 16 * K): (16, 400, 7_800, 78, 2, 5e-4),
        ("alexnet_bn", 8 * K): (10, 600, 15_600, 156, 1, 5e-4),
        ("alexnet_bn", 16 * K): (24, 400, 7_800, 78, 2, 5e-4),
        ("alexnet_bn", 32 * K): (32, 400, 4_000, 40, 4, 5e-4),
        ("resnet50", 512): (4, 0, 250_000, 2_500, 1, 1e-4),
        ("resnet50", 1 * K): (9, 10_000, 125_000, 1_250, 1, 5e-4),
    }
    assert set(presets.CAFFE_2017) == set(rows)
    for key, (rate, warmup, total, per_epoch, parts, decay) in rows.items():
        preset = presets.CAFFE_2017[key]
        assert (preset.accumulation, preset.weight_decay) == (parts, decay)
        assert preset.variant == "paper"
        eta = preset.schedule(per_epoch)
        after = rate * (1 - warmup / total) ** 2  # counted from step 0
        np.testing.assert_allclose(eta(warmup), after, rtol=1e-5)
        np.testing.assert_allclose(eta(total), 0.0, atol=1e-7)
        assert float(eta(total - 1)) > 0
        if warmup:
            assert float(eta(0)) == 1.0
            np.testing.assert_allclose(eta(warmup // 2), (1 + rate) / 2, rtol=1e-6)
            last = rate - (rate - 1) / warmup
            np.testing.assert_allclose(eta(warmup - 1), last, rtol=1e-6)


def test_the_schedule_of_caffe_at_8k():
    eta = presets.CAFFE_2017["alexnet_bn", 8 * K].schedule(156)
    values = [float(eta(step)) for step in (0, 300, 600)]
    np.testing.assert_allclose(values, [1.0, 5.5, 9.2456], rtol=1e-5)


@pytest.mark.parametrize("size", MLPERF)
def test_the_convergence_points_of_mlperf(size):
    preset = presets.MLPERF[size]
    rate, warmup, momentum, decay, steps, span, mean = MLPERF[size]
    assert (preset.learning_rate, preset.warmup_epochs) == (rate, warmup)
    assert (preset.momentum, preset.weight_decay) == (momentum, decay)
    assert (preset.decay_steps, preset.bn_span) == (steps, span)
    assert preset.epochs_to_target == mean
    assert mean <= preset.epochs < mean + 6
    # The listed decay is the whole run, or what follows the warm-up.
    lengths = np.array([0, warmup]) + steps / (IMAGES / size)
    assert np.abs(lengths - preset.epochs).min() < 0.2
    assert_mlperf_schedule(preset)


def assert_mlperf_schedule(preset):
    per_epoch = IMAGES / preset.batch_size
    begin = round(preset.warmup_epochs * per_epoch)
    total = round(preset.epochs * per_epoch)
    eta = preset.schedule(per_epoch)
    assert preset.variant == "mlperf"
    assert float(eta(0)) == 0.0
    np.testing.assert_allclose(eta(1), preset.learning_rate / begin, rtol=1e-5)
    np.testing.assert_allclose(eta(begin), preset.learning_rate, rtol=1e-6)
    last = 1e-4 + (preset.learning_rate - 1e-4) / (total - begin + 1) ** 2
    np.testing.assert_allclose(eta(total), last, rtol=1e-2)
    np.testing.assert_allclose(eta(total + 1), 1e-4, rtol=1e-5)


def test_other_settings_for_mlperf_s_model():
    assert set(presets.MLPERF) == {*MLPERF, 2048}
    readme = presets.MLPERF[2048]
    assert (readme.learning_rate, readme.warmup_epochs, readme.epochs) == (8.5, 5, 41)
    assert (readme.momentum, readme.weight_decay) == (0.9, 2e-4)
    assert readme.epochs_to_target is None
    assert presets.MLPERF[4096].epochs == 42
    rows = {16 * K: (25, 5, 7_116), 32 * K: (32, 14, 3_558)}
    assert set(presets.CLOUD_TPU) == set(rows)
    for size, (rate, warmup, steps) in rows.items():
        preset = presets.CLOUD_TPU[size]
        assert (preset.learning_rate, preset.warmup_epochs) == (rate, warmup)
        assert round(preset.epochs * IMAGES / size) == steps
        assert (preset.weight_decay, preset.accuracy) == (1e-4, 76.0)
        assert_mlperf_schedule(preset)
    assert_mlperf_schedule(readme)


def test_keys_are_models_and_batch_sizes():
    for key, preset in ALL:
        model_and_size = key[:2] if isinstance(key, tuple) else ("resnet50", key)
        assert model_and_size == (preset.model, preset.batch_size)
        assert preset.warmup_epochs < preset.epochs


def two_steps(preset):
    """Weights, gradients, updates of two steps, and their rates."""
    params = {
        "dense": {"kernel": jnp.array([[3.0, -4.0], [1.0, 2.0]]), "bias": jnp.ones(2)}
    }
    grads = jax.tree.map(lambda w: 0.3 * w + 0.1, params)
    tx = preset.optimizer(steps_per_epoch=10)
    update, state, updates = jax.jit(tx.update), tx.init(params), []
    for _ in range(2):
        step, state = update(grads, state, params)  # at the same weights
        updates.append(step["dense"])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    eta = preset.schedule(10)
    return params["dense"], grads["dense"], updates, [float(eta(k)) for k in (0, 1)]


@pytest.mark.parametrize(
    "preset",
    [
        presets.YOU_2017["resnet50", 8 * K],
        presets.YOU_2017_LONGER["alexnet", 16 * K, 150],
        presets.CAFFE_2017["alexnet_bn", 32 * K],
    ],
)
def test_the_paper_s_variant_adapts_biases(preset):
    params, grads, (first, second), rates = two_steps(preset)
    assert rates[0] == 1.0
    for name, w in params.items():
        g, beta = grads[name], preset.weight_decay
        norm = jnp.linalg.norm
        trust = 1e-3 * norm(w) / (norm(g) + beta * norm(w))
        step = -trust * (g + beta * w)
        np.testing.assert_allclose(first[name], rates[0] * step, rtol=1e-5)
        rate = 0.9 * rates[0] + rates[1]
        np.testing.assert_allclose(second[name], rate * step, rtol=1e-5)


@pytest.mark.parametrize("preset", [presets.MLPERF[4096], presets.CLOUD_TPU[32 * K]])
def test_mlperf_s_variant_leaves_biases_alone(preset):
    params, grads, (first, second), rates = two_steps(preset)
    assert rates[0] == 0.0
    assert all(not x.any() for x in first.values())
    np.testing.assert_allclose(second["bias"], -rates[1] * grads["bias"], rtol=1e-5)
    bound = rates[1] * 1e-3 * jnp.linalg.norm(params["kernel"])
    assert 0.9 * bound < jnp.linalg.norm(second["kernel"]) <= bound


def test_a_baseline_is_momentum_with_the_rate_inside():
    preset = presets.YOU_2017_MOMENTUM["alexnet", 512]
    params, grads, (first, second), rates = two_steps(preset._replace(init_value=0.01))
    for name, w in params.items():
        g = grads[name] + 5e-4 * w
        np.testing.assert_allclose(first[name], -rates[0] * g, rtol=1e-5)
        rate = 0.9 * rates[0] + rates[1]
        np.testing.assert_allclose(second[name], -rate * g, rtol=1e-5)


def test_options_reach_the_optimizer():
    preset = presets.YOU_2017["resnet50", 8 * K]
    params = {"kernel": jnp.array([[3.0, 4.0], [1.0, 0.0]])}
    tx = preset.optimizer(10, stacked="kernel")
    updates, _ = tx.update(params, tx.init(params), params)
    norms = jnp.linalg.norm(updates["kernel"], axis=1)
    np.testing.assert_allclose(norms, [5e-3, 1e-3], rtol=1e-5)  # of each copy
    with pytest.raises(TypeError, match="stacked"):
        presets.YOU_2017_MOMENTUM["alexnet", 512].optimizer(10, stacked="kernel")
