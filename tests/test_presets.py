"""The presets against the facts of their sources, and what their optimizers do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt import presets
from lbopt.presets.nlcg import boundaries
from tests.oracles import quick_jit
from tests.problems import Mlp, all_finite, assert_equal, classify

IMAGES = 1_281_167
K = 1_024

# === LARS =============================================================================

# γ₀, epochs, warm-up, top-1 with minimal and with extended augmentation.
YOU = {
    ("alexnet", 512): (2, 100, 2, 58.7, None),
    ("alexnet", 4 * K): (10, 100, 2, 58.5, None),
    ("alexnet", 8 * K): (10, 100, 2, 58.2, None),
    ("alexnet", 16 * K): (14, 100, 2, 55.0, None),
    ("alexnet", 32 * K): (14, 100, 2, 46.9, None),
    ("alexnet_bn", 512): (2, 100, 5, 60.2, None),
    ("alexnet_bn", 4 * K): (10, 100, 5, 60.4, None),
    ("alexnet_bn", 8 * K): (14, 100, 5, 60.1, None),
    ("alexnet_bn", 16 * K): (23, 100, 5, 59.3, None),
    ("alexnet_bn", 32 * K): (22, 100, 5, 57.8, None),
    ("resnet50", 256): (4, 100, 0, 73.8, 75.8),
    ("resnet50", 1 * K): (9, 100, 5, 73.3, 75.4),
    ("resnet50", 8 * K): (30, 100, 5, 73.5, 75.2),
    ("resnet50", 16 * K): (33, 100, 12, 72.9, 74.4),
    ("resnet50", 32 * K): (40, 100, 12, 72.5, 72.5),
    ("googlenet", 256): (4, 100, 5, None, 70.3),
    ("googlenet", 1 * K): (6, 100, 10, None, 69.7),
    ("googlenet", 2 * K): (7, 150, 25, None, 71.1),
    ("googlenet", 4 * K): (10, 200, 30, None, 69.9),
    ("googlenet", 8 * K): (10, 250, 60, None, 69.0),
    ("googlenet", 16 * K): (10, 350, 110, None, 67.2),
}
# Without LARS: γ₀, epochs, warm-up, top-1.
MOMENTUM = {
    ("alexnet", 512): (0.02, 100, 2.5, 58.8, None),
    ("alexnet", 4 * K): (0.05, 100, 2.5, 53.1, None),
    ("alexnet", 8 * K): (0.03, 100, 2.5, 44.8, None),
    ("alexnet_bn", 512): (0.02, 100, 0, 60.2, None),
    ("alexnet_bn", 4 * K): (0.18, 100, 0, 58.9, None),
    ("alexnet_bn", 8 * K): (0.30, 100, 0, 58.0, None),
    ("googlenet", 256): (0.02, 100, 0, None, 69.2),
}
# γ₀, warm-up, m, β, decay steps, BN span, mean epochs to 75.9 %; of 2,048 the README.
MLPERF = {
    1_632: (7.4, 2, 0.9, 5e-5, 27_476, 204, 35.0),
    2_048: (8.5, 5, 0.9, 2e-4, None, None, None),
    3_264: (10.5, 2, 0.9, 5e-5, 14_523, 204, 35.2),
    4_096: (10, 5, 0.9, 2e-4, 13_137, 64, 40.0),
    8_192: (17, 5, 0.9, 2e-4, 6_095, 64, 42.0),
    13_056: (12.8, 9, 0.9, 2.5e-5, 4_710, 204, 45.4),
    32_768: (21.2, 16, 0.94, 2.5e-5, 2_267, 128, 56.0),
    49_152: (19.405, 24, 0.951807, 1e-4, 1_846, 256, 68.0),
    58_880: (23.246, 29, 0.951807, 1e-4, 1_785, 230, 79.9),
    65_536: (24.699, 31, 0.951807, 1e-4, 1_133, 128, 84.5),
    67_840: (24.699, 31, 0.951807, 1e-4, 1_133, 424, 85.9),
}


@pytest.mark.parametrize(
    ("table", "rows", "variant"),
    [
        (presets.YOU_2017, YOU, "paper"),
        (presets.YOU_2017_MOMENTUM, MOMENTUM, "momentum"),
    ],
    ids=["lars", "momentum"],
)
def test_the_tables_of_you_et_al(table, rows, variant):
    assert {key: preset[2:7] for key, preset in table.items()} == rows
    for key, preset in table.items():
        assert key == (preset.model, preset.batch_size)
        assert preset.variant == variant
        assert (preset.momentum, preset.weight_decay) == (0.9, 5e-4)


def test_longer_runs_of_you_et_al():
    rows = {
        ("alexnet", 16 * K): (55.0, 55.9, 56.7, 57.3, 58.2),
        ("alexnet_bn", 32 * K): (57.8, 59.2, 59.5, 59.5, 59.9),
        ("resnet50", 16 * K): (74.4, 74.1, 74.6, 74.8, 75.5),
    }
    assert len(presets.YOU_2017_LONGER) == 15
    for key, values in rows.items():
        for epochs, top1 in zip((100, 125, 150, 175, 200), values, strict=True):
            preset = presets.YOU_2017_LONGER[*key, epochs]
            both = (None, top1) if key[0] == "resnet50" else (top1, None)
            rate, _, warmup, *_ = YOU[key]
            assert preset[:7] == (*key, rate, epochs, warmup, *both)


def test_the_solver_files():
    # γ₀, steps of the warm-up and of the run, steps in an epoch, β.
    rows = {
        ("alexnet", 8 * K): (10, 600, 15_600, 156, 5e-4),
        ("alexnet", 16 * K): (16, 400, 7_800, 78, 5e-4),
        ("alexnet_bn", 8 * K): (10, 600, 15_600, 156, 5e-4),
        ("alexnet_bn", 16 * K): (24, 400, 7_800, 78, 5e-4),
        ("alexnet_bn", 32 * K): (32, 400, 4_000, 40, 5e-4),
        ("resnet50", 512): (4, 0, 250_000, 2_500, 1e-4),
        ("resnet50", 1 * K): (9, 10_000, 125_000, 1_250, 5e-4),
    }
    assert set(presets.CAFFE_2017) == set(rows)
    for key, (rate, warmup, total, per_epoch, decay) in rows.items():
        preset = presets.CAFFE_2017[key]
        assert key == (preset.model, preset.batch_size)
        assert (preset.weight_decay, preset.variant) == (decay, "paper")
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
    eta = presets.CAFFE_2017["alexnet_bn", 8 * K].schedule(156)
    values = [float(eta(step)) for step in (0, 300, 600)]
    np.testing.assert_allclose(values, [1.0, 5.5, 9.2456], rtol=1e-5)


@pytest.mark.parametrize("size", MLPERF)
def test_the_convergence_points_of_mlperf(size):
    preset = presets.MLPERF[size]
    rate, warmup, momentum, decay, steps, span, mean = MLPERF[size]
    assert (preset.model, preset.batch_size) == ("resnet50", size)
    assert (preset.learning_rate, preset.warmup_epochs) == (rate, warmup)
    assert (preset.momentum, preset.weight_decay) == (momentum, decay)
    assert (preset.bn_span, preset.epochs_to_target) == (span, mean)
    if steps:
        assert mean <= preset.epochs < mean + 6
        # The listed decay is the whole run, or what follows the warm-up.
        lengths = np.array([0, warmup]) + steps / (IMAGES / size)
        assert np.abs(lengths - preset.epochs).min() < 0.2
    assert_mlperf_schedule(preset)


def assert_mlperf_schedule(preset):
    per_epoch = IMAGES / preset.batch_size
    begin = round(preset.warmup_epochs * per_epoch)
    total = round(preset.epochs * per_epoch)
    eta, rate = preset.schedule(per_epoch), preset.learning_rate
    assert preset.variant == "mlperf"
    assert float(eta(0)) == 0.0
    np.testing.assert_allclose(eta(1), rate / begin, rtol=1e-5)
    length = total - begin + 1  # D = T − t_w + 1
    for step in (begin, (begin + total) // 2, total - 1, total, total + 1):
        left = 1 - (step - begin) / length
        expected = 1e-4 + (rate - 1e-4) * left**2
        np.testing.assert_allclose(eta(step), expected, rtol=1e-5, atol=1e-7)


def test_other_settings_for_mlperf_s_model():
    assert set(presets.MLPERF) == set(MLPERF)
    assert [presets.MLPERF[size].epochs for size in (2_048, 4_096)] == [41, 42]
    rows = {16 * K: (25, 5, 7_116), 32 * K: (32, 14, 3_558)}
    assert set(presets.CLOUD_TPU) == set(rows)
    for size, (rate, warmup, steps) in rows.items():
        preset = presets.CLOUD_TPU[size]
        assert (preset.batch_size, preset.learning_rate) == (size, rate)
        assert preset.warmup_epochs == warmup
        assert round(preset.epochs * IMAGES / size) == steps
        assert (preset.weight_decay, preset.accuracy) == (1e-4, 76.0)
        assert_mlperf_schedule(preset)


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
    assert all_finite(updates)
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


@pytest.mark.parametrize("model", ["alexnet", "alexnet_bn"])
def test_a_baseline_is_momentum_with_the_rate_inside(model):
    preset = presets.YOU_2017_MOMENTUM[model, 4 * K]
    params, grads, (first, second), rates = two_steps(preset)
    assert (rates[0] == 0) == (model == "alexnet"), "with a warm-up"
    for name, w in params.items():
        g = grads[name] + 5e-4 * w
        np.testing.assert_allclose(first[name], -rates[0] * g, rtol=1e-5)
        rate = 0.9 * rates[0] + rates[1]
        np.testing.assert_allclose(second[name], -rate * g, rtol=1e-5)


def test_options_reach_the_optimizer():
    preset = presets.YOU_2017["resnet50", 8 * K]
    params = {"kernel": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    tx = preset.optimizer(10, skip="kernel")
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -params["kernel"], rtol=1e-6)
    with pytest.raises(TypeError, match="skip"):
        presets.YOU_2017_MOMENTUM["alexnet", 512].optimizer(10, skip="kernel")


# === SP-NGD ===========================================================================

# Osawa et al. 2022, Table 2: α, p, e_start, e_end, η₀, m₀, λ, epochs; steps, and the
# last rate over the first; the released code's epochs and steps.
OSAWA = {
    4_096: ((0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35), 10_948, 8.6e-6, 10_948),
    8_192: ((0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35), 5_434, 2.4e-4, 5_478),
    16_384: ((0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35), 2_737, 2.4e-4, 2_737),
    32_768: ((0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45), 1_760, 2.5e-4, 1_760),
    65_536: ((0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60), 1_173, 4.9e-4, 1_173),
    131_072: ((1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 90), 873, 1.4e-3, 782),
}
# Tables 1 and 2: top-1 with stale and with fresh statistics, minutes; the code's top-1.
RESULTS = {
    4_096: (74.8, 75.2, 32.5, 75.9),
    8_192: (75.3, 75.5, 16.9, 76.4),
    16_384: (75.2, 75.3, 6.8, 76.6),
    32_768: (75.4, 75.6, 5.5, 76.9),
    65_536: (75.6, 75.6, None, 76.3),
    131_072: (74.9, 74.9, None, 75.0),
}


@pytest.mark.parametrize("size", OSAWA)
def test_the_rows_of_table_2(size):
    preset, (row, steps, last, _) = presets.OSAWA_2022[size], OSAWA[size]
    assert preset[:9] == (size, *row)
    assert preset.result == (steps, *RESULTS[size][:3])
    assert preset.stale_threshold == (0.1 if size < 65_536 else None)
    # §6: erasing with probability 1/2, rescaling in place of decay.
    assert (preset.random_erasing, preset.rescale) == (0.5, "always")
    assert (preset.norm_damping, preset.norm_blocks) == (1.0, "unit_wise")
    per_epoch = IMAGES / size
    # The table's steps leave the last, incomplete batch of each epoch out or in.
    assert abs(preset.epochs * per_epoch / steps - 1) < 0.01
    schedule = preset.schedule(per_epoch)
    for step in (0, preset.start * per_epoch * 0.99):
        assert float(schedule(step)) == pytest.approx(preset.learning_rate)
    end = float(schedule(preset.epochs * per_epoch)) / preset.learning_rate
    assert end == pytest.approx(last, rel=0.03)


@pytest.mark.parametrize("size", OSAWA)
def test_the_released_code_differs_where_it_does(size):
    paper, code = presets.OSAWA_2022[size], presets.OSAWA_2019[size]
    steps, top1 = OSAWA[size][-1], RESULTS[size][-1]
    changed = {"stale_threshold": None, "variant": "code"}
    changed |= {"result": (steps, top1, top1, None)}
    if size == 131_072:
        changed |= {"power": 3.0, "start": 1, "end": 95, "epochs": 80}
    assert code == paper._replace(**changed)
    assert (code.norm_damping, code.norm_blocks) == (16.0, "full")
    assert code.rescale == "shrink_only"
    assert code.epochs * IMAGES / size == pytest.approx(steps, rel=0.001)


@pytest.mark.parametrize("table", [presets.OSAWA_2022, presets.OSAWA_2019])
def test_sp_ngd_rescales_as_its_preset_says(table):
    problem = classify(Mlp())
    layers = problem.trace()
    tx = table[32_768].optimizer(layers, steps_per_epoch=40)
    _, grads, curvature = problem.evaluate(layers)
    state = tx.init(problem.params)
    updates, state = jax.jit(
        lambda g, s: tx.update(g, s, problem.params, curvature=curvature)
    )(grads, state)
    assert all_finite(updates)
    kernel = np.asarray(problem.params["first"]["kernel"] + updates["first"]["kernel"])
    target = np.sqrt(2 * kernel.shape[1])
    if table is presets.OSAWA_2022:
        assert np.linalg.norm(kernel) == pytest.approx(target, rel=1e-5)
    else:
        assert np.linalg.norm(kernel) <= target * (1 + 1e-5)
    assert lbopt.refresh(state)["first"].a.dtype == bool


class Normed(nn.Module):
    """A norm layer, whose damping and block differ, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("table", [presets.OSAWA_2022, presets.OSAWA_2019])
def test_sp_ngd_gets_the_numbers_of_its_row(table):
    size, per_epoch, code = 16_384, 10, table is presets.OSAWA_2019
    (alpha, power, start, end, rate, momentum, damping, _), *_ = OSAWA[size]
    preset = table[size]
    assert (preset.mixup_alpha, preset.random_erasing) == (alpha, 0.5)
    problem = classify(Normed())
    layers = problem.trace(norm_blocks="full" if code else "unit_wise")
    by_hand = lbopt.sp_ngd(
        lbopt.schedules.polynomial(
            rate, power, start=start, end=end, steps_per_epoch=per_epoch
        ),
        layers,
        damping=damping,
        momentum=momentum,
        kl_clip=None,
        stale_threshold=None if code else 0.1,
        norm_damping=16.0 if code else 1.0,
        rescale="shrink_only" if code else "always",
        velocity="code" if code else "paper",
    )
    _, grads, curvature = problem.evaluate(layers)
    found = []
    for tx in (preset.optimizer(layers, per_epoch), by_hand):
        params, state = problem.params, tx.init(problem.params)
        update = quick_jit(
            lambda s, p, tx=tx: tx.update(grads, s, p, curvature=curvature)
        )
        for _ in range(3):  # the third step has a velocity, and is no longer fresh
            updates, state = update(state, params)
            params = jax.tree.map(jnp.add, params, updates)
        found.append((params, state))
    assert_equal(*found)
    state = lbopt.curvature_state(found[0][1])
    assert float(state.last_damping) == pytest.approx(damping)


# === NLCG =============================================================================

# NLCG, RMSProp, momentum, SGD.
ADYA = {
    128: (66.2, 64.9, 64.6, 63.7),
    256: (68.4, 65.1, 64.9, 63.8),
    512: (67.4, 64.8, 65.0, 63.5),
    1_024: (65.4, 64.7, 65.0, 63.5),
    2_048: (63.9, 64.5, 64.9, 63.1),
    4_096: (64.5, 65.3, 65.2, 61.8),
    8_192: (67.0, 66.0, 66.0, 55.0),
    16_384: (56.0, 37.0, 37.0, 35.0),
}


def test_the_table_of_adya_et_al():
    assert set(presets.ADYA_2018) == set(ADYA)
    for size, row in ADYA.items():
        p = presets.ADYA_2018[size]
        assert (p.accuracy, p.rmsprop, p.momentum, p.sgd) == row
        assert (p.model, p.batch_size) == ("resnet32", size)
        assert (p.epochs, p.warmup_epochs, p.init_value) == (200, 25, 0.001)
        assert p.l2 == 2e-4
    rates = [presets.ADYA_2018[size].learning_rate for size in (2_048, 4_096)]
    assert rates == pytest.approx([0.8, 1.6])


def test_boundaries_by_the_length_of_the_run():
    assert boundaries(100) == boundaries(200) == (102, 153, 204)
    assert boundaries(201) == boundaries(300) == (153, 229, 306)
    assert boundaries(301) == boundaries(400) == (204, 306, 408)
    eta = presets.ADYA_2018[2048]._replace(epochs=300).schedule(10)
    values = [float(eta(step)) for step in (1530, 1531, 2291, 3000)]
    np.testing.assert_allclose(values, [0.8, 0.08, 0.008, 0.008], rtol=1e-5)


@pytest.mark.parametrize("size", [128, 2048, 16384])
def test_the_schedule_of_a_row(size):
    preset, per_epoch = presets.ADYA_2018[size], 50_000 / size  # images of CIFAR-100
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
def test_nlcg_descends(preset):
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
    assert all_finite(w)
    assert float(loss_fn(w)) < float(loss_fn(params))
