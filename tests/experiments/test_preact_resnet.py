"""The pre-activation networks: counts, initial values, and an oracle in jax.lax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import preact_resnet
from tests import oracles

KEY = jax.random.key(0)


def count(model, size=32):
    image = jnp.zeros((1, size, size, 3))
    init = functools.partial(model.init, train=True)
    params = jax.eval_shape(init, KEY, image)["params"]
    return sum(x.size for x in jax.tree.leaves(params))


def counted(blocks, num_classes):
    """Parameters of three equal stages, added up by hand."""
    total, before = 3 * 9 * 16, 16
    for channels in (16, 32, 64):
        norms = 2 * before + 2 * channels
        total += norms + 9 * before * channels + 9 * channels**2 + before * channels
        total += (blocks - 1) * (4 * channels + 18 * channels**2)
        before = channels
    return total + 2 * 64 + 64 * num_classes + num_classes


def test_parameter_counts():
    # The first is the count of the authors' network for CIFAR-100.
    assert count(preact_resnet.PreactResNet32(num_classes=100)) == 472_820
    assert counted(5, 100) == 472_820
    assert count(preact_resnet.PreactResNet8(num_classes=20)) == counted(1, 20)
    deep = preact_resnet.PreactResNet(num_classes=10, stage_sizes=(9, 9, 9))
    assert count(deep) == counted(9, 10)


@pytest.fixture(scope="module")
def small():
    model = preact_resnet.PreactResNet(num_classes=5, stage_sizes=(2, 1, 2), width=4)
    random = np.random.default_rng(0)
    images = random.normal(size=(8, 16, 16, 3)).astype(np.float32)
    init = functools.partial(model.init, train=True)

    # Norms that start as the identity would hide where they stand.
    def drawn(path, leaf):
        name, fan_in = path[-1].key, np.prod(leaf.shape[:-1])
        if name == "kernel":
            return (random.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)
        centre = 1 if name in {"scale", "var"} else 0
        return random.uniform(centre - 0.7, centre + 0.7, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(
        drawn, jax.eval_shape(init, KEY, images)
    )
    return model, variables, images


def convolved(x, kernel, stride=1):
    return oracles.convolved(x, kernel, stride, kernel.shape[0] // 2)


def expected(variables, images, *, train):
    """Logits and the output of each block, in the words of the specification."""
    params, stats = variables["params"], variables["batch_stats"]

    def norm_relu(x, params, stats):
        mean, var = stats["mean"], stats["var"]
        if train:
            mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
        normed = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
        return np.maximum(normed, 0)

    x, blocks = convolved(images, params["conv_stem"]["kernel"]), {}
    for stage, size in enumerate((2, 1, 2), start=1):
        for index in range(1, size + 1):
            name = f"stage{stage}_block{index}"
            p, s = params[name], stats[name]
            stride = 2 if stage > 1 and index == 1 else 1
            y = norm_relu(x, p["BatchNorm_0"], s["BatchNorm_0"])
            if index == 1:
                x = convolved(y, p["conv_proj"]["kernel"], stride)
            y = convolved(y, p["Conv_0"]["kernel"], stride)
            y = norm_relu(y, p["BatchNorm_1"], s["BatchNorm_1"])
            x = blocks[name] = x + convolved(y, p["Conv_1"]["kernel"])
    x = norm_relu(x, params["norm_final"], stats["norm_final"])
    head = params["head"]
    return np.mean(x, (1, 2)) @ head["kernel"] + head["bias"], blocks


@pytest.mark.parametrize("train", [True, False])
def test_forward_is_that_of_the_specification(small, train):
    model, variables, images = small
    apply = functools.partial(
        model.apply, train=train, mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )  # fmt: skip
    logits, state = jax.jit(apply)(variables, images)
    same, blocks = expected(variables, images, train=train)
    for name, block in blocks.items():
        got = state["intermediates"][name]["__call__"][0]
        np.testing.assert_allclose(got, block, rtol=1e-4, atol=1e-4)
        assert (block < -0.1).any(), "a ReLU after the sum would show"
    assert {name: block.shape[1:] for name, block in blocks.items()} == {
        "stage1_block1": (16, 16, 4),
        "stage1_block2": (16, 16, 4),
        "stage2_block1": (8, 8, 8),
        "stage3_block1": (4, 4, 16),
        "stage3_block2": (4, 4, 16),
    }
    np.testing.assert_allclose(logits, same, rtol=1e-4, atol=1e-4)
    assert logits.dtype == jnp.float32


def test_only_the_first_block_of_a_stage_projects(small):
    params = small[1]["params"]
    assert {name for name, p in params.items() if "conv_proj" in p} == {
        "stage1_block1",
        "stage2_block1",
        "stage3_block1",
    }


def test_norm_momentum_is_the_decay_of_running_statistics(small):
    _, variables, images = small
    stem = convolved(images, variables["params"]["conv_stem"]["kernel"])
    before = variables["batch_stats"]["stage1_block1"]["BatchNorm_0"]["mean"]
    for settings, decay in (({}, 0.99), ({"norm_momentum": 0.6}, 0.6)):
        model = preact_resnet.PreactResNet(
            num_classes=5, stage_sizes=(2, 1, 2), width=4, **settings
        )
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        _, new = jax.jit(apply)(variables, images)
        mean = new["batch_stats"]["stage1_block1"]["BatchNorm_0"]["mean"]
        moved = decay * before + (1 - decay) * np.mean(stem, (0, 1, 2))
        np.testing.assert_allclose(mean, moved, rtol=1e-5)


def test_initial_kernels_have_variance_one_over_fan_in():
    model = preact_resnet.PreactResNet(num_classes=10, stage_sizes=(2, 1))
    params = jax.jit(functools.partial(model.init, train=True))(
        KEY, jnp.zeros((1, 32, 32, 3))
    )["params"]
    kernels = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim == 4
    ]
    assert len(kernels) == 1 + 3 + 2 + 3
    for path, kernel in kernels:
        variance = 1 / np.prod(kernel.shape[:3])
        # The variance of n truncated normals deviates by about sqrt(1.4 / n).
        name, spread = jax.tree_util.keystr(path), 4 * (1.4 / kernel.size) ** 0.5
        np.testing.assert_allclose(kernel.var(), variance, rtol=spread, err_msg=name)
        # Cut off at twice the deviation of the normal that was truncated.
        highest = 2 * variance**0.5 / 0.87962566
        assert 0.9 * highest < abs(kernel).max() <= highest * (1 + 1e-5), name
    limit = (6 / (32 + 10)) ** 0.5  # of Glorot's uniform numbers
    assert 0.95 * limit < abs(params["head"]["kernel"]).max() <= limit
    assert not params["head"]["bias"].any()
