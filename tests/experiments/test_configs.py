"""Published runs: none is missing, their recipes are the papers', and all build."""

import dataclasses

import jax
import numpy as np
import pytest

import lbopt
from experiments import classifier, imagenet_resnet50, loop, optimizers
from experiments.configs import alexnet, resnet32
from experiments.data.pipeline import Data
from experiments.settings import Config, Lars, Nlcg
from lbopt import presets

# Training images, classes, pixels: the sets themselves are not at hand.
SETS = {
    "imagenet2012": (1_281_167, 1000, 224),
    "cifar100": (50_000, 100, 32),
    "strokes": (10_240, 20, 32),
}
RESNET50, RESNET32 = imagenet_resnet50.CONFIGS, resnet32.CONFIGS
PUBLISHED = imagenet_resnet50.PUBLISHED
CONFIGS = {
    f"{module.__name__.rpartition('.')[2]} {name}": config
    for module in (imagenet_resnet50, resnet32, alexnet)
    for name, config in module.CONFIGS.items()
}


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


# === Recipes of the papers ============================================================


SIZES = {"4k": 4_096, "8k": 8_192, "16k": 16_384, "32k": 32_768, "65k": 65_536}
SIZES |= {"131k": 131_072, "256": 256, "1k": 1_024, "1632": 1_632, "2k": 2_048}
SIZES |= {"3264": 3_264, "13k": 13_056, "49k": 49_152, "58k": 58_880, "67k": 67_840}


def test_every_preset_of_resnet50_has_a_run():
    """Their settings are compared in `test_optimizers`."""
    found = {name: run.config.batch_size for name, run in PUBLISHED.items()}
    others = {"kfac": 2_048, "nlcg": 65_536, "sgd": 8_192}
    assert others.items() < found.items()
    tables = {
        "sp_ngd": set(presets.OSAWA_2022),
        "sp_ngd_2019": set(presets.OSAWA_2019),
        "lars": {size for model, size in presets.YOU_2017 if model == "resnet50"},
        "lars_mlperf": set(presets.MLPERF),
    }
    for table, sizes in tables.items():
        own = {n: s for n, s in found.items() if n.rpartition("_")[0] == table}
        assert own == {f"{table}_{n}": s for n, s in SIZES.items() if s in sizes}
    assert len(found) == sum(map(len, tables.values())) + len(others) == 31


@pytest.mark.parametrize("name", [name for name in RESNET50 if "sp_ngd" in name])
def test_sp_ngd_mixes_and_erases_in_place_of_decay(name):
    config = RESNET50[name]
    code = "2019" in name
    table = presets.OSAWA_2019 if code else presets.OSAWA_2022
    assert config.mixup_alpha == table[config.batch_size].mixup_alpha
    assert config.mixup_form == ("code" if code else "paper")
    assert (config.random_erasing, config.recipe.crop) == (0.5, "plain")  # §6
    assert config.sp_ngd.fisher == "empirical"
    assert config.l2 == config.label_smoothing == config.warmup_epochs == 0
    assert (config.micro_batch_size, config.sync_norm) == (32, False)


@pytest.mark.parametrize("name", [name for name in RESNET50 if "lars" in name])
def test_lars_crops_and_smooths_as_its_source(name):
    config = RESNET50[name]
    mlperf = "mlperf" in name
    assert config.recipe.crop == ("inception" if mlperf else "plain")
    assert (config.label_smoothing, config.l2) == (0.1 if mlperf else 0, 0)
    assert config.norm_momentum == 0.9
    if mlperf:
        span = presets.MLPERF[config.batch_size].bn_span
        assert config.micro_batch_size == span or span is None
        # A command for any cluster: whole micro-batches and evaluations on as many
        # devices.
        devices = config.batch_size // config.micro_batch_size
        assert config.accumulate(devices) == 1
        assert config.eval_batch_size % devices == 0


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


def test_nlcg_has_the_rates_of_its_preset_but_at_the_start():
    config = RESNET32["nlcg"]
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
    nlcg = vars(RESNET32["nlcg"])
    for name in ("momentum", "sgd", "rmsprop", "lars"):
        other = vars(RESNET32[name])
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
    runs = PUBLISHED.items()
    for words, (name, run) in zip(lines, runs, strict=False):
        assert words[:2] == [name, f"{run.config.batch_size:,}"]
        assert words[-1] == run.reported.split()[-1], "one line each"


def test_published_runs_take_all_devices_there_are():
    for name, run in PUBLISHED.items():
        config = run.config
        assert (config.devices, config.dataset) == (0, "imagenet2012"), name
        assert config.batch_size % config.micro_batch_size == 0, name
        assert config.accumulate(1) == config.batch_size // config.micro_batch_size


# === All of it builds =================================================================

# Tracing the curvature of ResNet-50 takes long; `test_optimizers` does so on a small
# network for all of its settings.
ORDINARY = {
    "imagenet_resnet50 sgd",
    "resnet32 nlcg",
    "alexnet alexnet_bn",
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


def test_a_step_is_made_as_the_settings_say(monkeypatch):
    made = []

    def make_train_step(*args, **kwargs):
        made.append(kwargs)
        return lambda state, batch: (state, {})

    monkeypatch.setattr(classifier.training, "make_train_step", make_train_step)
    asked = {"parallel": "pmap", "statistics_fraction": 0.5, "fisher": "sampled"}
    config = Config(model="convnet", devices=2, micro_batch_size=256, **asked)
    classifier.build_program(config, data_of(config))
    assert made[0].items() >= {**asked, "accumulate": 4}.items()


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")}, 2),
        ({"optimizer": "lars", "lars": Lars(after_kfac=True)}, 1),
    ],
    ids=["nlcg", "lars"],
)
def test_the_natural_gradient_in_other_optimizers(settings, devices):
    config = RESNET32["strokes"]
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
