"""Published settings: they build, and their rates are those of the presets."""

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


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    config = CONFIGS[name]
    program = classifier.build_program(config, data_of(config))
    state = jax.eval_shape(program.init)
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    assert sum(sizes) > 70_000
    assert state.opt_state


def rates(config, preset):
    """Both schedules at 200 steps of the run."""
    data = data_of(config)
    rate = getattr(config, config.optimizer).learning_rate
    ours = classifier.build_schedule(config, data, rate)
    theirs = preset.schedule(data.steps_per_epoch)
    steps = np.linspace(0, data.steps(config.epochs) - 1, 200).astype(int)
    return [[float(f(step)) for step in steps] for f in (ours, theirs)]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("imagenet_resnet50 lars", presets.YOU_2017["resnet50", 8_192]),
        ("imagenet_alexnet alexnet_bn", presets.YOU_2017["alexnet_bn", 8_192]),
        ("imagenet_alexnet alexnet", presets.YOU_2017["alexnet", 8_192]),
    ],
)
def test_lars_has_the_rates_of_its_preset(name, preset):
    config = CONFIGS[name]
    ours, theirs = rates(config, preset)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert max(ours) > 0.9 * preset.learning_rate
    assert config.lars.weight_decay == preset.weight_decay
    assert config.lars.variant == preset.variant


def test_nlcg_has_the_rates_of_its_preset_but_at_the_start():
    config = CONFIGS["cifar100_resnet32 nlcg"]
    ours, theirs = rates(config, presets.ADYA_2018[config.batch_size])
    warm = 200 * config.warmup_epochs / config.epochs
    np.testing.assert_allclose(ours[int(warm) + 1 :], theirs[int(warm) + 1 :])
    assert ours[0] == pytest.approx(0.1)  # of the example on a single machine
    assert np.all(np.diff(ours[: int(warm)]) > 0)
    assert config.l2 == presets.ADYA_2018[config.batch_size].l2


def test_baselines_differ_from_nlcg_in_the_optimizer_alone():
    nlcg = vars(CONFIGS["cifar100_resnet32 nlcg"])
    for name in ("momentum", "sgd", "rmsprop", "lars"):
        other = vars(CONFIGS[f"cifar100_resnet32 {name}"])
        changed = {key for key in nlcg if nlcg[key] != other[key]}
        assert changed == {"optimizer", other["optimizer"]}


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")}, 2),
        ({"optimizer": "lars", "lars": Lars(after_kfac=True)}, 1),
    ],
    ids=["nlcg", "lars"],
)
def test_the_natural_gradient_in_other_optimizers(settings, devices, capsys):
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
    assert "stage1_block1" in capsys.readouterr().out
