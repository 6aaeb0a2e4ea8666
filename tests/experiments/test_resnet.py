"""The networks: sizes of the literature, shapes, statistics and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import registry, resnet


def shapes(model, size):
    image = jnp.zeros((2, size, size, 3))
    init = jax.eval_shape(lambda key: model.init(key, image, train=True), KEY)
    logits = jax.eval_shape(lambda v: model.apply(v, image, train=False), init)
    return init, logits


KEY = jax.random.key(0)


# Counts of the first five: torchvision's documentation, and He et al. (2015), table 6,
# whose 0.27, 0.46, 0.66 and 0.85 million have parameter-free shortcuts (option A).
@pytest.mark.parametrize(
    ("name", "num_classes", "size", "count"),
    [
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet101", 1000, 224, 44_549_160),
        ("resnet8", 20, 32, 78_692),
        ("resnet20", 10, 32, 272_474),
        ("resnet32", 10, 32, 466_906),
        ("resnet44", 10, 32, 661_338),
        ("resnet56", 10, 32, 855_770),
    ],
)
def test_parameter_counts(name, num_classes, size, count):
    init, logits = shapes(registry.MODELS[name](num_classes=num_classes), size)
    assert sum(x.size for x in jax.tree.leaves(init["params"])) == count
    assert logits.shape == (2, num_classes)


def test_a_cifar_network_is_the_published_one_plus_its_projections():
    init, _ = shapes(resnet.ResNet20(num_classes=10), 32)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    count = sum(x.size for x in jax.tree.leaves(init["params"]))
    assert count - projections == 269_722  # 0.27 M in the paper


@pytest.fixture(scope="module")
def small():
    model = resnet.ResNet8(num_classes=4, width=4)
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    return (
        model,
        jax.jit(model.init, static_argnames="train")(KEY, images, train=True),
        images,
    )


def test_training_updates_the_running_statistics_and_evaluation_does_not(small):
    model, variables, images = small
    _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    stem = new["batch_stats"]["norm_stem"]["mean"]
    assert not np.allclose(stem, variables["batch_stats"]["norm_stem"]["mean"])
    _, same = model.apply(variables, images, train=False, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"]
    )


def test_norm_momentum_is_the_decay_of_running_statistics(small):
    _, variables, images = small
    means = []
    for momentum in (0.9, 0.6):
        model = resnet.ResNet8(num_classes=4, width=4, norm_momentum=momentum)
        _, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        means.append(new["batch_stats"]["norm_stem"]["mean"])
    # From zero, the statistics move by 1 - momentum of the batch's: 0.1 and 0.4.
    np.testing.assert_allclose(4 * means[0], means[1], rtol=1e-5)


def test_evaluation_treats_images_one_by_one(small):
    model, variables, images = small
    together = model.apply(variables, images, train=False)
    alone = model.apply(variables, images[3:4], train=False)
    np.testing.assert_allclose(alone[0], together[3], rtol=1e-4, atol=1e-5)


def test_zero_init_makes_every_block_the_identity(small):
    _, _, images = small
    model = resnet.ResNet8(num_classes=4, width=4, zero_init_residual=True)
    variables = model.init(KEY, images, train=True)
    block = variables["params"]["stage1_block1"]
    assert not block["BatchNorm_1"]["scale"].any()
    assert block["BatchNorm_0"]["scale"].all()
    changed = jax.tree.map(lambda x: x, variables)
    changed["params"]["stage1_block1"]["Conv_1"]["kernel"] *= 3
    np.testing.assert_array_equal(
        model.apply(variables, images, train=True, mutable=["batch_stats"])[0],
        model.apply(changed, images, train=True, mutable=["batch_stats"])[0],
    )


def test_bfloat16_activations_keep_float32_parameters_and_logits(small):
    _, _, images = small
    model = resnet.ResNet8(num_classes=4, width=4, dtype=jnp.bfloat16)
    variables = model.init(KEY, images, train=True)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, state = model.apply(
        variables, images, train=True, mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )  # fmt: skip
    assert logits.dtype == jnp.float32
    block = state["intermediates"]["stage3_block1"]["__call__"][0]
    assert block.dtype == jnp.bfloat16


def test_axis_name_averages_statistics_over_the_mapped_axis(small):
    model, variables, images = small
    whole, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    mapped = resnet.ResNet8(num_classes=4, width=4, axis_name="shard")
    halves = images.reshape(2, 4, *images.shape[1:])

    def apply(shard):
        return mapped.apply(variables, shard, train=True, mutable=["batch_stats"])[0]

    logits = jax.vmap(apply, axis_name="shard")(halves)
    np.testing.assert_allclose(logits.reshape(whole.shape), whole, rtol=1e-3, atol=1e-4)


def test_a_bottleneck_strides_in_its_three_by_three_convolution():
    model = resnet.ResNet50(num_classes=2, width=4)
    image = jnp.zeros((1, 64, 64, 3))

    def run(key):
        return model.init_with_output(
            key, image, train=True, capture_intermediates=True,
            mutable=["params", "batch_stats", "intermediates"],
        )[1]["intermediates"]  # fmt: skip

    block = jax.eval_shape(run, KEY)["stage2_block1"]
    sizes = [block[f"Conv_{i}"]["__call__"][0].shape[1] for i in range(3)]
    assert sizes == [16, 8, 8]
