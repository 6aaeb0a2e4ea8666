"""Optimizers and learning rates out of settings, against the presets and formulas."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from experiments import imagenet_resnet50, optimizers
from experiments.configs import alexnet
from experiments.data.pipeline import Data
from experiments.settings import Config, Kfac, Lars, Nlcg, RmsProp, Sgd, SpNgd
from lbopt import presets
from tests import problems

STEPS_PER_EPOCH = 10.0
DATA = Data(
    train=None,
    test=None,
    image_shape=(4, 4, 3),
    num_classes=problems.CLASSES,
    steps_per_epoch=STEPS_PER_EPOCH,
)


class Net(nn.Module):
    """A normalisation, which the variants treat differently, between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(problems.WIDTH, name="first")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(problems.CLASSES, name="last")(nn.tanh(x))


VARIABLES = Net().init(jax.random.key(0), problems.inputs())
PARAMS = VARIABLES["params"]
STATISTICS = {"batch_stats": VARIABLES["batch_stats"]}


def loss_fn(params, x, y):
    variables = {"params": params, **STATISTICS}
    logits, _ = Net().apply(variables, x, mutable=["batch_stats"])
    loss = problems.cross_entropy(lbopt.likelihood(logits, "categorical"), y)
    return loss, {}


ARGUMENTS = (PARAMS, problems.inputs(), problems.labels())
PROBLEM = problems.Problem(loss_fn, PARAMS, ARGUMENTS[1:], has_aux=True)


def build(config):
    return optimizers.build_optimizer(config, DATA, loss_fn, ARGUMENTS, 1)


def evaluated(layers=None):
    """The gradient, and what else an update takes."""
    if layers is None:
        (loss, _), grads = PROBLEM.untapped()
        return grads, {"value": loss}
    (loss, _), grads, curvature = PROBLEM.evaluate(layers)
    return grads, {"value": loss, "curvature": curvature}


def three_updates(tx, evaluated):
    """What an optimizer does with the same gradient three times."""
    grads, extra = evaluated
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), updates

    def run():
        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=3)[1]

    return jax.jit(run)()


# === Optimizers of published runs =====================================================

CONFIGS = imagenet_resnet50.CONFIGS | alexnet.CONFIGS
TABLES = {
    "sp_ngd": presets.OSAWA_2022,
    "sp_ngd_2019": presets.OSAWA_2019,
    "lars": {n: p for (net, n), p in presets.YOU_2017.items() if net == "resnet50"},
    "lars_mlperf": presets.MLPERF,
}
OF_PRESETS = {
    name: TABLES[table][config.batch_size]
    for name, config in CONFIGS.items()
    if (table := name.rpartition("_")[0]) in TABLES
}
OF_PRESETS |= {
    "nlcg": presets.NLCG_RESNET50,
    "alexnet": presets.YOU_2017["alexnet", 8_192],
    "alexnet_bn": presets.YOU_2017["alexnet_bn", 8_192],
}
STEPS = np.arange(500_501)
"""More than any run has; of one shape, so that operations are compiled once."""


@pytest.mark.parametrize("name", OF_PRESETS)
def test_an_optimizer_is_given_what_its_preset_gives_it(name, monkeypatch):
    config, preset = CONFIGS[name], OF_PRESETS[name]
    data = dataclasses.replace(DATA, steps_per_epoch=1_281_167 / config.batch_size)
    assert data.steps(config.epochs) < len(STEPS)
    method = config.optimizer
    arguments = inspect.signature(getattr(lbopt, method))
    given = []

    def record(*args, **kwargs):
        bound = arguments.bind(*args, **kwargs)
        bound.apply_defaults()
        given.append(bound.arguments)
        return optax.with_extra_args_support(optax.identity())

    monkeypatch.setattr(optimizers.lbopt, method, record)
    monkeypatch.setattr(f"lbopt.presets.{method}.{method}", record)
    _, layers = optimizers.build_optimizer(config, data, loss_fn, ARGUMENTS, 1)
    if method == "sp_ngd":
        assert layers is not None
        assert layers["norm"].block.kind == preset.norm_blocks
    of = () if layers is None else (layers,)
    preset.optimizer(*of, data.steps_per_epoch)
    ours, theirs = given
    rates = [arguments.pop("learning_rate")(STEPS) for arguments in given]
    np.testing.assert_allclose(*rates, rtol=1e-6, atol=1e-12)
    assert np.max(rates[0]) > 0.9 * preset.learning_rate
    assert ours == theirs


def test_sgd_is_nesterovs_with_the_rate_outside():
    config = CONFIGS["sgd"]
    inputs = evaluated()
    made = three_updates(build(config)[0], inputs)["first"]["kernel"]
    g = inputs[0]["first"]["kernel"]
    rate = optimizers.build_schedule(config, DATA, config.sgd.learning_rate)
    v = jnp.zeros_like(g)
    for step, updates in enumerate(made):
        v = 0.9 * v + g
        problems.assert_close(updates, -rate(step) * (g + 0.9 * v))


@pytest.mark.slow
def test_the_kl_step_of_kfac_keeps_to_its_bound():
    config = CONFIGS["kfac"]
    own = dataclasses.replace(config.kfac, weight_decay=0.0)
    tx, layers = build(dataclasses.replace(config, kfac=own))
    inputs = evaluated(layers)
    grads, _ = inputs
    first = jax.tree.map(lambda x: x[0], three_updates(tx, inputs))
    # With η = √(c / Δᵀ g) it is (η Δ)ᵀ g = √c √(Δᵀ g), of Δᵀ F̂ Δ = Δᵀ g.
    along = -optax.tree.vdot(first, grads)
    bare = lbopt.scale_by_kfac(layers, damping=own.damping)
    delta = jax.tree.map(lambda x: x[0], three_updates(bare, inputs))
    length = optax.tree.vdot(delta, grads)
    assert length > own.kl_clip, "the bound is felt"
    assert float(along) == pytest.approx(float(jnp.sqrt(own.kl_clip * length)), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "rmsprop", "rmsprop": RmsProp()},
        {"optimizer": "sgd", "sgd": Sgd(weight_decay=0.1)},
        {"optimizer": "lars", "lars": Lars(after_kfac=True)},
        {"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")},
        {"optimizer": "kfac", "kfac": Kfac(kl_clip=None)},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_layers_are_traced_for_curvature_alone(settings):
    config = Config(**settings)
    tx, layers = build(config)
    assert (layers is not None) == config.has_curvature
    assert jax.eval_shape(tx.init, PARAMS)


# === Learning rates ===================================================================


def values(steps, **settings):
    settings = {"epochs": 4.0, "warmup_epochs": 1.0, **settings}
    rate = optimizers.build_schedule(Config(**settings), DATA, 2.0)
    return [float(rate(step)) for step in steps]


def test_cosine_begins_after_the_warm_up():
    steps = (0, 5, 10, 25, 40)
    assert values(steps) == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


def test_cosine_of_a_run_that_is_all_warm_up():
    assert values((0, 1), epochs=0.1, warmup_epochs=0.099) == pytest.approx([0.0, 2.0])


def test_polynomial_counts_from_the_start_or_from_the_warm_ups_end():
    steps = (0, 5, 10, 20, 40)
    start = values(steps, schedule="polynomial", warmup_start=1.0)
    assert start == pytest.approx([1, 1.5, 2 * 0.75**2, 2 * 0.5**2, 0], abs=1e-6)
    # 31 steps from 10 on, as MLPerf counts.
    after = values((10, 20, 41), schedule="polynomial", decay_from="warmup")
    assert after == pytest.approx([2, 2 * (21 / 31) ** 2, 0], abs=1e-6)
    to = {"schedule": "polynomial", "decay_from": "warmup", "end_value": 0.01}
    ended = values((10, 20, 41, 100), **to)
    expected = [2, 0.01 + 1.99 * (21 / 31) ** 2, 0.01, 0.01]
    assert ended == pytest.approx(expected, abs=1e-6)


def test_staircase_falls_to_a_tenth():
    settings = {"schedule": "staircase", "decay_epochs": (2.0, 3.0)}
    at = values((10, 20, 21, 31), **settings)
    assert at == pytest.approx([2, 2, 0.2, 0.02])


def test_warm_up_shapes_lead_to_the_peak():
    expected = {"linear": 1.5, "quadratic": 1.25, "sqrt": 2 - np.sqrt(0.5)}
    for shape, half in expected.items():
        settings = {"schedule": "exponential", "warmup_shape": shape}
        at = values((0, 5, 10), warmup_start=1.0, **settings)
        assert at == pytest.approx([1, half, 2]), shape


@pytest.mark.parametrize(
    ("end", "last"), [(None, (0.1 / 1.1) ** 2), (4.0, 0.0), (8.0, 0.25)]
)
def test_sp_ngd_has_a_schedule_of_its_own(end, last):
    settings = {"optimizer": "sp_ngd", "sp_ngd": SpNgd(decay_end=end, power=2.0)}
    at = values((0, 40), schedule="staircase", decay_epochs=(1.0,), **settings)
    assert at == pytest.approx([2.0, 2.0 * last], abs=1e-6)
