"""AlexNet and AlexNet-BN: published norms and counts, and oracles in plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import alexnet
from tests import oracles

KEY = jax.random.key(0)
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "head")
MODELS = {"plain": alexnet.AlexNet, "bn": alexnet.AlexNetBN}


def published_init(model):
    return functools.partial(model.init, KEY, jnp.zeros((1, 227, 227, 3)), train=True)


# ------------------------------------------------------------------ at full size


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_shapes_are_those_of_caffe(make):
    model = make(num_classes=1000)
    run = functools.partial(
        model.init_with_output, KEY, jnp.zeros((1, 227, 227, 3)), train=True,
        capture_intermediates=True, mutable=True,
    )  # fmt: skip
    logits, state = jax.eval_shape(run)
    assert (logits.shape, logits.dtype) == ((1, 1000), jnp.float32)
    seen = state["intermediates"]
    outputs = {name: seen[name]["__call__"][0].shape for name in LAYERS}
    assert outputs == {
        "conv1": (1, 55, 55, 96),
        "conv2": (1, 27, 27, 256),
        "conv3": (1, 13, 13, 384),
        "conv4": (1, 13, 13, 384),
        "conv5": (1, 13, 13, 256),
        "fc6": (1, 4096),
        "fc7": (1, 4096),
        "head": (1, 1000),
    }
    params = state["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "conv1": (11, 11, 3, 96),
        "conv2": (5, 5, 48, 256),  # of two groups
        "conv3": (3, 3, 256, 384),
        "conv4": (3, 3, 192, 384),
        "conv5": (3, 3, 192, 256),
        "fc6": (9216, 4096),
        "fc7": (4096, 4096),
        "head": (4096, 1000),
    }
    # 34,944 + 307,456 + 885,120 + 663,936 + 442,624 + 37,752,832 + 16,781,312
    # + 4,097,000; batch normalisation has no parameters.
    assert sum(x.size for x in jax.tree.leaves(params)) == 60_965_224
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert ("batch_stats" in state) == (make is alexnet.AlexNetBN)


# Kernels and biases, of You et al.'s table of norms at the start (AlexNet-BN).
PUBLISHED = {
    "conv1": (1.87, 0.098),
    "conv2": (5.54, 0.16),
    "conv3": (9.41, 0.196),
    "conv4": (8.15, 0.196),
    "conv5": (6.65, 0.16),
    "fc6": (30.7, 6.4),
    "fc7": (20.5, 6.4),
    "head": (20.2, 0.316),
}


def test_initial_norms_of_alexnet_bn_are_the_published_ones():
    init = published_init(alexnet.AlexNetBN(num_classes=1000))

    @jax.jit
    def norms():
        return jax.tree.map(lambda x: jnp.linalg.norm(x.ravel()), init()["params"])

    found = norms()
    for name, (kernel, bias) in PUBLISHED.items():
        layer = found[name]
        np.testing.assert_allclose(layer["kernel"], kernel, rtol=0.01, err_msg=name)
        np.testing.assert_allclose(layer["bias"], bias, rtol=0.003, err_msg=name)


# ------------------------------------------------------------------ at small size


@pytest.fixture(scope="module", params=MODELS)
def small(request):
    """A network whose second pooling has windows over the edge: 75 → 17 → 8 → 4 → 2."""
    model = MODELS[request.param](num_classes=6)
    images = 1000 * jax.random.normal(jax.random.key(1), (3, 75, 75, 3))
    init = functools.partial(model.init, train=True)
    variables = dict(jax.jit(init)(KEY, images))
    params = jax.tree.map(np.asarray, variables["params"])
    if "batch_stats" in variables:
        random = np.random.default_rng(0)
        variables["batch_stats"] = jax.tree.map(
            lambda x: random.uniform(0.5, 1.5, x.shape).astype(np.float32),
            variables["batch_stats"],
        )
    return request.param, model, {**variables, "params": params}, images


def test_initial_values(small):
    kind, _, variables, _ = small
    constants = {
        "plain": (0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
        "bn": (0.01, 0.01, 0.01, 0.01, 0.01, 0.1, 0.1, 0.01),
    }[kind]
    deviations = (0.01,) * 5 + (0.005, 0.005, 0.01)
    for name, constant, std in zip(LAYERS, constants, deviations, strict=True):
        layer = variables["params"][name]
        np.testing.assert_array_equal(layer["bias"], np.float32(constant))
        kernel = layer["kernel"]
        # The deviation of n normals deviates by a share of sqrt(1 / 2n).
        spread = 4 * (0.5 / kernel.size) ** 0.5
        np.testing.assert_allclose(kernel.std(), std, rtol=spread, err_msg=name)
        assert abs(kernel.mean()) < 4 * std / kernel.size**0.5
        assert abs(kernel).max() > 3.5 * std, "not truncated"


def pooled(x):
    """Caffe's pooling, window by window."""
    n, height, width, channels = x.shape
    rows, columns = -(-(height - 3) // 2) + 1, -(-(width - 3) // 2) + 1
    out = np.empty((n, rows, columns, channels), x.dtype)
    for i in range(rows):
        for j in range(columns):
            window = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            out[:, i, j] = window.max((1, 2))
    return out


def response_normed(x):
    """Caffe's local response normalisation, channel by channel, in float64."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for c in range(x.shape[-1]):
        window = x[..., max(0, c - 2) : c + 3]
        energy = (window**2).sum(-1)
        out[..., c] = x[..., c] / (1 + 1e-4 / 5 * energy) ** 0.75
    return out


def convolved(x, layer, stride=1, pad=0, groups=1):
    """Each group of filters reads its own part of the channels."""
    kernels = np.split(layer["kernel"], groups, axis=-1)
    parts = np.split(np.asarray(x, np.float32), groups, axis=-1)
    outputs = [
        oracles.convolved(part, kernel, stride, pad)
        for part, kernel in zip(parts, kernels, strict=True)
    ]
    return np.maximum(np.concatenate(outputs, -1) + layer["bias"], 0)


def expected(kind, variables, x):
    """Logits in evaluation, in the words of the specification; what the norms get."""
    params, inputs = variables["params"], []

    def normed(x):
        if kind == "plain":
            return x
        stats = variables["batch_stats"][f"BatchNorm_{len(inputs)}"]
        inputs.append(x)
        return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-4)

    def first(x):
        return pooled(response_normed(x)) if kind == "plain" else normed(pooled(x))

    x = first(convolved(x, params["conv1"], stride=4))
    x = first(convolved(x, params["conv2"], pad=2, groups=2))
    x = normed(convolved(x, params["conv3"], pad=1))
    x = normed(convolved(x, params["conv4"], pad=1, groups=2))
    x = pooled(convolved(x, params["conv5"], pad=1, groups=2))
    x = x.reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"], inputs


def test_evaluation_is_that_of_the_specification(small):
    kind, model, variables, images = small
    logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    same, _ = expected(kind, variables, images)
    assert same.std() > 1e-3
    np.testing.assert_allclose(logits, same, rtol=1e-3, atol=1e-4 * abs(same).max())
    assert logits.dtype == jnp.float32
    # Evaluation needs no random numbers, and treats images one by one.
    alone = model.apply(variables, images[1:2], train=False)
    np.testing.assert_allclose(
        alone[0], logits[1], rtol=1e-3, atol=1e-4 * abs(same).max()
    )


def test_dropout_keeps_and_doubles_half_of_the_hidden_units(small):
    kind, model, variables, images = small

    def run(seed):
        return model.apply(
            variables, images, train=True, rngs={"dropout": jax.random.key(seed)},
            mutable=["batch_stats", "intermediates"], capture_intermediates=True,
        )  # fmt: skip

    (logits, state), (same, _), (other, _) = run(0), run(0), run(1)
    np.testing.assert_array_equal(logits, same)
    assert not np.allclose(logits, other)
    seen, kept = state["intermediates"], []
    for name, dropout in (("fc6", "Dropout_0"), ("fc7", "Dropout_1")):
        before = np.maximum(seen[name]["__call__"][0], 0)
        after = np.asarray(seen[dropout]["__call__"][0])
        kept.append(after[before > 0] > 0)
        assert abs(kept[-1].mean() - 0.5) < 0.03, kind  # 3 × 4096 units, half above 0
        np.testing.assert_allclose(after[after > 0], 2 * before[after > 0])
    length = min(map(len, kept))
    assert abs(np.corrcoef(kept[0][:length], kept[1][:length])[0, 1]) < 0.1


def test_batch_norm_takes_the_statistics_of_the_pooled_activations():
    images = jax.random.normal(jax.random.key(2), (4, 67, 67, 3))
    model = alexnet.AlexNetBN(num_classes=6)
    variables = jax.jit(functools.partial(model.init, train=True))(KEY, images)
    conv1 = jax.tree.map(np.asarray, variables["params"]["conv1"])
    first = pooled(convolved(images, conv1, stride=4))
    for settings, decay in (({}, 0.9), ({"norm_momentum": 0.7}, 0.7)):
        model = alexnet.AlexNetBN(num_classes=6, **settings)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        _, new = jax.jit(apply)(variables, images, rngs={"dropout": KEY})
        stats = new["batch_stats"]["BatchNorm_0"]
        mean, var = first.mean((0, 1, 2)), first.var((0, 1, 2))
        np.testing.assert_allclose(stats["mean"], (1 - decay) * mean, rtol=1e-3)
        moved = decay + (1 - decay) * var
        np.testing.assert_allclose(stats["var"], moved, rtol=1e-3)


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("shape", [(2, 3, 3, 9), (4, 1), (1, 2, 2, 3)])
def test_local_response_norm_against_a_loop(shape):
    x = 300 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = alexnet.local_response_norm(jnp.asarray(x))
    expected = response_normed(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (abs(expected / x) < 0.7).any(), "the norm divides by something"
    half = alexnet.local_response_norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, rtol=0.02)


@pytest.mark.parametrize(
    ("size", "out"), [(55, 27), (27, 13), (13, 6), (15, 7), (8, 4), (4, 2), (2, 1)]
)
def test_pooling_against_a_loop(size, out):
    x = np.random.default_rng(0).normal(size=(2, size, size + 3, 3)).astype(np.float32)
    got = alexnet.max_pool(jnp.asarray(x) - 10)
    assert got.shape[1] == out
    np.testing.assert_array_equal(got, pooled(x - 10))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_small_images_are_refused(make):
    model = make(num_classes=2)
    init = functools.partial(model.init, train=True)
    smallest = jax.eval_shape(init, KEY, jnp.zeros((1, 39, 39, 3)))
    assert smallest["params"]["fc6"]["kernel"].shape == (256, 4096)
    with pytest.raises(ValueError, match=r"x: AlexNet.*39×39.*got 60×38.*227"):
        jax.eval_shape(init, KEY, jnp.zeros((1, 60, 38, 3)))
