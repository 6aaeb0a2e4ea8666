"""Masked token losses: the same ten steps, however the batch is padded and divided."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import training
from tests import oracles
from tests.devices import mesh_of, spread

WORDS, STEPS = 7, 10


class Tokens(nn.Module):
    """A tied embedding, a dense layer, a norm layer and a parameter without a rule."""

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(WORDS, 5)
        x = nn.LayerNorm()(nn.tanh(nn.Dense(5)(embed(words))))
        gain = self.param("gain", nn.initializers.ones, (5,))
        return embed.attend(x * gain[None, None])


def loss_fn(params, model_state, batch, rng):
    del rng
    outputs = Tokens().apply({"params": params}, batch["words"])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
    right = (jnp.argmax(outputs, -1) == batch["labels"]) * batch["mask"]
    total = jnp.sum(batch["mask"])
    value = jnp.sum(losses * batch["mask"]) / total
    return value, (model_state, {"accuracy": jnp.sum(right) / total})


def batch_of(step, padded):
    """Sixteen sequences of up to six words, or the five real ones of up to four."""
    rng = np.random.default_rng(step)
    words, labels = rng.integers(0, WORDS, (2, 5, 4))
    mask = np.ones((5, 4))
    mask[1, 2:] = 0
    batch = {"words": words, "labels": labels, "mask": mask}
    if padded:
        # The last two devices of four have padding alone.
        batch = {k: np.pad(x, [(0, 11), (0, 2)]) for k, x in batch.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), batch)


def trajectory(devices, accumulate, padded=True):
    batch = batch_of(0, padded)
    params = Tokens().init(jax.random.key(0), batch["words"])["params"]
    rng = jax.random.key(1)
    layers = lbopt.trace_layers(loss_fn, params, {}, batch, rng, has_aux=True)
    tx = lbopt.kfac(0.05, layers, damping=1e-2, **spread(devices))
    state = training.init_state(tx, params, {}, rng, mesh_of(devices))
    step = training.make_train_step(
        loss_fn, tx, layers, mesh_of(devices), accumulate=accumulate
    )
    losses, accuracies = [], []
    for number in range(STEPS):
        state, metrics = step(state, batch_of(number, padded))
        losses.append(float(metrics["loss"]))
        accuracies.append(float(metrics["accuracy"]))
    assert int(state.skipped) == 0
    return jax.device_get(state.params), np.asarray(losses), np.asarray(accuracies)


@pytest.fixture(scope="module")
def plain():
    return trajectory(None, 1, padded=False)


COMBINATIONS = [(n, k) for n in (None, 2, 4) for k in (1, 2, 4)]
QUICK = [(None, 1), (2, 2), (4, 1)]


@pytest.mark.parametrize(
    ("devices", "accumulate"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in COMBINATIONS
    ],
)
def test_ten_steps_are_those_without_padding(plain, devices, accumulate):
    params, losses, accuracies = trajectory(devices, accumulate)
    assert oracles.error(losses, plain[1]) < 1e-4
    assert oracles.error(accuracies, plain[2]) < 1e-6
    errors = jax.tree.map(oracles.error, params, plain[0])
    assert max(jax.tree.leaves(errors)) < 1e-3, errors
