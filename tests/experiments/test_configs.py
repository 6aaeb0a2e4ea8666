"""Published settings: the papers' numbers, the presets' rates, and all of it builds."""

import dataclasses

import jax
import numpy as np
import pytest

import lbopt
from experiments import (
    cifar100_resnet32,
    classifier,
    imagenet_alexnet,
    imagenet_resnet50,
    loop,
    optimizers,
)
from experiments.data.pipeline import Data
from experiments.settings import Lars, Nlcg
from lbopt import presets

# Training images, classes, pixels: the sets themselves are not at hand.
SETS = {
    "imagenet2012": (1_281_167, 1000, 224),
    "cifar100": (50_000, 100, 32),
    "strokes": (10_240, 20, 32),
}
CONFIGS = {
    f"{module.__name__.rpartition('.')[2]} {name}": config
    for module in (imagenet_resnet50, cifar100_resnet32, imagenet_alexnet)
    for name, config in module.CONFIGS.items()
}
RESNET50 = imagenet_resnet50.CONFIGS
SHORT = {4_096: "4k", 8_192: "8k", 16_384: "16k", 32_768: "32k"}
SHORT |= {65_536: "65k", 131_072: "131k"}


def data_of(config):
    images, classes, pixels = SETS[config.dataset.partition("/")[0]]
    pixels = config.recipe.image_size or pixels
    return Data(
        train=None,
        test=None,
        image_shape=(pixels, pixels, 3),
        num_classes=classes,
        steps_per_epoch=images / config.batch_size,
    )


def schedule_of(config):
    peak_value = getattr(config, config.optimizer).learning_rate
    return optimizers.build_schedule(config, data_of(config), peak_value)


def steps_of(config):
    return data_of(config).steps(config.epochs)


# === Tables of the papers =============================================================

# Osawa et al. 2022, Table 2: α, p, e_start, e_end, η₀, m₀, λ, epochs, steps; and the
# last rate over the first.
SP_NGD = {
    4_096: (0.4, 11.0, 1, 53, 8.18e-3, 0.997, 2.5e-4, 35, 10_948, 8.6e-6),
    8_192: (0.4, 8.0, 1, 53.5, 1.25e-2, 0.993, 2.5e-4, 35, 5_434, 2.4e-4),
    16_384: (0.4, 8.0, 1, 53.5, 2.5e-2, 0.985, 2.5e-4, 35, 2_737, 2.4e-4),
    32_768: (0.6, 3.5, 1.5, 49.5, 3.0e-2, 0.97, 2.0e-4, 45, 1_760, 2.5e-4),
    65_536: (0.6, 2.9, 2, 64.5, 4.0e-2, 0.95, 1.5e-4, 60, 1_173, 4.9e-4),
    131_072: (1.0, 2.9, 3, 100, 7.0e-2, 0.93, 1.0e-4, 90, 873, 1.4e-3),
}


@pytest.mark.parametrize("batch", SP_NGD)
def test_sp_ngd_has_the_numbers_of_table_2(batch):
    *row, steps, last = SP_NGD[batch]
    config = RESNET50[f"sp_ngd_{SHORT[batch]}"]
    own = config.sp_ngd
    assert [
        *(config.mixup_alpha, own.power, own.decay_start, own.decay_end),
        *(own.learning_rate, own.momentum, own.damping, config.epochs),
    ] == row
    assert (config.batch_size, config.micro_batch_size) == (batch, 32)
    assert own.stale_threshold == (0.1 if batch < 65_536 else None)
    # §6: erasing with probability 1/2, squashed images, rescaling in place of decay.
    assert (config.random_erasing, config.recipe.crop) == (0.5, "plain")
    assert (own.rescale, own.velocity, own.fisher) == ("always", "paper", "empirical")
    assert config.l2 == config.label_smoothing == config.warmup_epochs == 0
    assert not config.sync_norm
    assert steps_of(config) == pytest.approx(steps, rel=0.01)
    rate = schedule_of(config)
    assert float(rate(0)) == pytest.approx(own.learning_rate)
    end = float(rate(config.epochs * data_of(config).steps_per_epoch))
    assert end / own.learning_rate == pytest.approx(last, rel=0.03)


# The JSON files of the released code: epochs and iterations.
RELEASED = {4_096: (35, 10_948), 8_192: (35, 5_478), 16_384: (35, 2_737)}
RELEASED |= {32_768: (45, 1_760), 65_536: (60, 1_173), 131_072: (80, 782)}


@pytest.mark.parametrize("batch", RELEASED)
def test_sp_ngd_as_released_differs_where_it_does(batch):
    paper = RESNET50[f"sp_ngd_{SHORT[batch]}"]
    code = RESNET50[f"sp_ngd_2019_{SHORT[batch]}"]
    assert (code.epochs, steps_of(code)) == (
        RELEASED[batch][0],
        pytest.approx(RELEASED[batch][1], rel=0.001),
    )
    own = vars(paper.sp_ngd) | {"norm_damping": 16.0, "norm_blocks": "full"}
    own |= {"stale_threshold": None, "rescale": "shrink_only", "velocity": "code"}
    if batch == 131_072:
        own |= {"power": 3.0, "decay_start": 1.0, "decay_end": 95.0}
    assert vars(code.sp_ngd) == own
    same = {"sp_ngd": code.sp_ngd, "epochs": code.epochs, "mixup_form": "code"}
    assert vars(code) == vars(paper) | same


# You et al., table of ResNet-50: γ₀ and the epochs of the warm-up.
LARS = {
    256: ("256", 4, 0),
    1_024: ("1k", 9, 5),
    8_192: ("8k", 30, 5),
    16_384: ("16k", 33, 12),
    32_768: ("32k", 40, 12),
}


@pytest.mark.parametrize("batch", LARS)
def test_lars_has_the_numbers_of_its_table(batch):
    name, rate, warmup = LARS[batch]
    config = RESNET50[f"lars_{name}"]
    assert config.batch_size == batch
    assert (config.lars.learning_rate, config.warmup_epochs) == (rate, warmup)
    assert (config.lars.momentum, config.lars.weight_decay) == (0.9, 5e-4)
    assert (config.lars.trust_coefficient, config.lars.variant) == (1e-3, "paper")
    assert (config.epochs, config.recipe.crop) == (100, "plain")
    assert config.l2 == config.label_smoothing == 0


# MLPerf 4.0's convergence points: γ₀, warm-up, m, β, steps of the decay, images that
# share BatchNorm's statistics, devices. Of 2,048 the README has what is not None.
MLPERF = {
    1_632: ("1632", 7.4, 2, 0.9, 5e-5, 27_476, 204),
    2_048: ("2k", 8.5, 5, 0.9, 2e-4, None, None),
    3_264: ("3264", 10.5, 2, 0.9, 5e-5, 14_523, 204),
    4_096: ("4k", 10, 5, 0.9, 2e-4, 13_137, 64),
    8_192: ("8k", 17, 5, 0.9, 2e-4, 6_095, 64),
    13_056: ("13k", 12.8, 9, 0.9, 2.5e-5, 4_710, 204),
    32_768: ("32k", 21.2, 16, 0.94, 2.5e-5, 2_267, 128),
    49_152: ("49k", 19.405, 24, 0.951807, 1e-4, 1_846, 256),
    58_880: ("58k", 23.246, 29, 0.951807, 1e-4, 1_785, 230),
    65_536: ("65k", 24.699, 31, 0.951807, 1e-4, 1_133, 128),
    67_840: ("67k", 24.699, 31, 0.951807, 1e-4, 1_133, 424),
}


@pytest.mark.parametrize("batch", MLPERF)
def test_lars_of_mlperf_has_the_numbers_of_its_convergence_point(batch):
    name, rate, warmup, momentum, decay, decay_steps, span = MLPERF[batch]
    config = RESNET50[f"lars_mlperf_{name}"]
    assert config.batch_size == batch
    assert (config.lars.learning_rate, config.warmup_epochs) == (rate, warmup)
    assert (config.lars.momentum, config.lars.weight_decay) == (momentum, decay)
    assert (config.lars.trust_coefficient, config.lars.variant) == (1e-3, "mlperf")
    assert (config.label_smoothing, config.l2) == (0.1, 0)
    assert (config.recipe.crop, config.norm_momentum) == ("inception", 0.9)
    if span:
        assert config.micro_batch_size == span
        # Submitters counted from step 0 or from the warm-up's end; a decay ends with
        # the run, to an epoch.
        per_epoch = data_of(config).steps_per_epoch
        ends = np.array([decay_steps / per_epoch, decay_steps / per_epoch + warmup])
        assert np.min(np.abs(ends - config.epochs)) < 1
    # A command for any cluster: whole micro-batches and evaluations on as many devices.
    devices = batch // config.micro_batch_size
    assert config.accumulate(devices) == 1
    assert config.eval_batch_size % devices == 0


def test_lars_of_mlperf_has_the_rates_of_its_compliance_rules():
    config = RESNET50["lars_mlperf_4k"]
    steps, rate = steps_of(config), schedule_of(config)
    warmup = round(5 * 1_281_167 / 4_096)
    length = steps - warmup + 1  # D = T − t_w + 1
    for step in (0, 1, warmup // 2, warmup, 5_000, steps - 1, steps, steps + 1):
        left = 1 - min(step - warmup, length) / length
        expected = 1e-4 + (10 - 1e-4) * left**2
        if step <= warmup:
            expected = 10 * step / warmup
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert float(rate(warmup)) == 10
    assert float(rate(steps + 1)) == pytest.approx(1e-4)


def test_sgd_is_that_of_goyal_et_al():
    config = RESNET50["sgd"]
    assert (config.batch_size, config.micro_batch_size) == (8_192, 32)
    assert abs(steps_of(config) - 14_076) <= 1  # as SP-NGD's table 1 lists it
    assert (config.sgd.momentum, config.sgd.nesterov) == (0.9, True)
    assert (config.l2, config.sgd.weight_decay) == (1e-4, 0.0)
    assert config.zero_init_residual
    rate, per_epoch = schedule_of(config), data_of(config).steps_per_epoch
    at = {epoch: float(rate(int(epoch * per_epoch) + 1)) for epoch in (5, 29.9, 30, 60)}
    assert float(rate(0)) == pytest.approx(0.1)
    assert at == pytest.approx({5: 3.2, 29.9: 3.2, 30: 0.32, 60: 0.032})
    assert float(rate(steps_of(config) - 1)) == pytest.approx(0.0032)
    rising = rate(np.arange(int(5 * per_epoch) + 1))
    np.testing.assert_allclose(np.diff(rising), 3.1 / (5 * per_epoch), rtol=1e-2)


def test_kfac_shortens_its_steps_to_a_hundredth():
    config = RESNET50["kfac"]
    assert config.kfac.kl_clip_decay ** (2 * config.epochs) == pytest.approx(
        1e-4, rel=0.05
    )
    assert config.fisher == "sampled"
    assert float(schedule_of(config)(0)) == config.kfac.learning_rate
    assert float(schedule_of(config)(30_000)) == config.kfac.learning_rate


# === Rates of the presets =============================================================

SAME_RATES = [
    *(
        (f"imagenet_resnet50 sp_ngd_{SHORT[batch]}", preset)
        for batch, preset in presets.OSAWA_2022.items()
    ),
    *(
        (f"imagenet_resnet50 sp_ngd_2019_{SHORT[batch]}", preset)
        for batch, preset in presets.OSAWA_2019.items()
    ),
    *(
        (f"imagenet_resnet50 lars_{row[0]}", presets.YOU_2017["resnet50", batch])
        for batch, row in LARS.items()
    ),
    *(
        (f"imagenet_resnet50 lars_mlperf_{row[0]}", presets.MLPERF[batch])
        for batch, row in MLPERF.items()
    ),
    ("imagenet_resnet50 nlcg", presets.NLCG_RESNET50),
    ("imagenet_alexnet alexnet_bn", presets.YOU_2017["alexnet_bn", 8_192]),
    ("imagenet_alexnet alexnet", presets.YOU_2017["alexnet", 8_192]),
]


STEPS = np.arange(500_501)
"""More than any run has; of one shape, so that operations are compiled once."""


@pytest.mark.parametrize(
    ("name", "preset"), SAME_RATES, ids=[name for name, _ in SAME_RATES]
)
def test_rates_are_the_presets_at_every_step(name, preset):
    config = CONFIGS[name]
    assert config.batch_size == preset.batch_size
    assert steps_of(config) < len(STEPS)
    theirs = preset.schedule(data_of(config).steps_per_epoch)
    actual = np.asarray(schedule_of(config)(STEPS))
    np.testing.assert_allclose(actual, theirs(STEPS), rtol=1e-6, atol=1e-12)
    assert np.max(actual) > 0.9 * preset.learning_rate


def test_every_preset_of_resnet50_has_a_config():
    covered = {id(preset) for _, preset in SAME_RATES}
    for table in (presets.OSAWA_2022, presets.OSAWA_2019, presets.MLPERF):
        assert covered >= {id(preset) for preset in table.values()}
    resnets = [p for (model, _), p in presets.YOU_2017.items() if model == "resnet50"]
    assert covered >= set(map(id, resnets))


def test_nlcg_has_the_rates_of_its_preset_but_at_the_start():
    config = CONFIGS["cifar100_resnet32 nlcg"]
    preset = presets.ADYA_2018[config.batch_size]
    steps = np.linspace(0, steps_of(config) - 1, 200).astype(int)
    theirs = preset.schedule(data_of(config).steps_per_epoch)(steps)
    ours = schedule_of(config)(steps)
    warm = int(200 * config.warmup_epochs / config.epochs)
    np.testing.assert_allclose(ours[warm + 1 :], theirs[warm + 1 :])
    assert ours[0] == pytest.approx(0.1)  # of the example on a single machine
    assert np.all(np.diff(ours[:warm]) > 0)
    assert config.l2 == preset.l2


def test_baselines_differ_from_nlcg_in_the_optimizer_alone():
    nlcg = vars(CONFIGS["cifar100_resnet32 nlcg"])
    for name in ("momentum", "sgd", "rmsprop", "lars"):
        other = vars(CONFIGS[f"cifar100_resnet32 {name}"])
        changed = {key for key in nlcg if nlcg[key] != other[key]}
        assert changed == {"optimizer", other["optimizer"]}


# === The command line =================================================================


@pytest.mark.parametrize("name", ["sp_ngd_131k", "kfac", "lars_mlperf_67k", "nlcg"])
def test_a_name_on_the_command_line_stands_for_its_settings(
    name, tmp_path, monkeypatch
):
    read = []

    def prepare(config):
        read.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr(loop, "prepare", prepare)
    for arguments in ([], ["--data-dir", str(tmp_path), "--batch-size", "1024"]):
        with pytest.raises(SystemExit, match="far enough"):
            imagenet_resnet50.main([name, *arguments])
    changed = {"data_dir": tmp_path, "batch_size": 1_024}
    assert read == [RESNET50[name], dataclasses.replace(RESNET50[name], **changed)]


def test_help_lists_every_published_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        imagenet_resnet50.main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out.partition("their sources report:")[2]
    lines = [line.split() for line in listed.splitlines() if line.strip()]
    runs = imagenet_resnet50.PUBLISHED.items()
    for words, (name, run) in zip(lines, runs, strict=False):
        assert words[:2] == [name, f"{run.config.batch_size:,}"]
        assert words[-1] == run.reported.split()[-1], "one line each"


def test_published_runs_take_all_devices_there_are():
    for name, run in imagenet_resnet50.PUBLISHED.items():
        config = run.config
        assert (config.devices, config.dataset) == (0, "imagenet2012"), name
        assert config.batch_size % config.micro_batch_size == 0, name
        assert config.accumulate(1) == config.batch_size // config.micro_batch_size


# === All of it builds =================================================================

# Tracing the curvature of ResNet-50 takes long; `test_optimizers` does so on a small
# network for all of its settings.
ORDINARY = {
    "imagenet_resnet50 sgd",
    "cifar100_resnet32 nlcg",
    "imagenet_alexnet alexnet_bn",
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_every_config_builds(name):
    config = CONFIGS[name]
    program = classifier.build_program(config, data_of(config))
    state = jax.eval_shape(program.init)
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    assert sum(sizes) > 70_000
    assert state.opt_state


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")}, 2),
        ({"optimizer": "lars", "lars": Lars(after_kfac=True)}, 1),
    ],
    ids=["nlcg", "lars"],
)
def test_the_natural_gradient_in_other_optimizers(settings, devices):
    config = CONFIGS["cifar100_resnet32 strokes"]
    config = dataclasses.replace(
        config, model="preact_resnet8", devices=devices, **settings
    )
    assert config.has_curvature
    data = dataclasses.replace(data_of(config), image_shape=(8, 8, 3))
    program = classifier.build_program(config, data)
    state = jax.eval_shape(program.init)
    due = jax.tree.leaves(jax.eval_shape(lbopt.refresh, state.opt_state))
    assert len(due) == 2 * 11 + 7  # A and G of layers with kernels, F of norm layers
    assert "stage1_block1" in str(program.layers)
