"""The small convolutional network: counts by hand, and an oracle in jax.lax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import convnet
from tests import oracles

KEY = jax.random.key(0)


def params_of(model, size):
    init = functools.partial(model.init, train=True)
    variables = jax.eval_shape(init, KEY, jnp.zeros((1, size, size, 3)))
    assert list(variables) == ["params"]  # nothing is normalised
    return variables["params"]


def test_parameter_counts():
    quick = convnet.ConvNet(num_classes=10, channels=(32, 32, 64))
    # 2,432 + 25,632 + 51,264, and 4 · 4 · 64 inputs of the head
    count = sum(x.size for x in jax.tree.leaves(params_of(quick, 32)))
    assert count == 2_432 + 25_632 + 51_264 + 10_250
    half = convnet.ConvNet(num_classes=20)
    # 1,216 + 6,416 + 12,832, and 2 · 2 · 32 inputs
    count = sum(x.size for x in jax.tree.leaves(params_of(half, 16)))
    assert count == 1_216 + 6_416 + 12_832 + 2_580
    wide = convnet.WideConvNet(num_classes=20)
    # 1,216 + 25,664, 4 · 4 · 64 inputs of 128 hidden units, and 128 of the head
    count = sum(x.size for x in jax.tree.leaves(params_of(wide, 16)))
    assert count == 1_216 + 25_664 + 131_200 + 2_580


def pooled(x, reduce):
    n, h, w, c = x.shape
    return reduce(x.reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))


@pytest.mark.parametrize("hidden", [None, 7])
def test_the_largest_then_two_means_are_pooled(hidden):
    model = convnet.ConvNet(num_classes=3, channels=(4, 3, 5), hidden=hidden)
    random = np.random.default_rng(0)
    x = images = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: 0.2 * random.normal(size=leaf.shape).astype(np.float32),
        params_of(model, 8),
    )
    for layer, reduce in enumerate((np.max, np.mean, np.mean), start=1):
        kernel, bias = params[f"conv{layer}"]["kernel"], params[f"conv{layer}"]["bias"]
        x = oracles.convolved(x, kernel, pad=2)
        x = pooled(np.maximum(x + bias[None, None, None], 0), reduce)
    inputs = x.reshape(2, -1)
    if hidden is not None:
        kernel, bias = params["hidden"]["kernel"], params["hidden"]["bias"]
        inputs = np.maximum(inputs @ kernel + bias, 0)
    expected = inputs @ params["head"]["kernel"] + params["head"]["bias"]
    logits = model.apply({"params": params}, images, train=False)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-5)
