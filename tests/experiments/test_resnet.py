"""The networks: sizes of the literature, shapes, statistics, precision and memory."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from experiments import classifier
from experiments.models import preact_resnet, registry, resnet
from lbopt import sharding, training
from tests import oracles


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


# ------------------------------------------------------------------ in training

CLASSES = 3
TINY = functools.partial(
    resnet.ResNet,
    num_classes=CLASSES,
    block=resnet.BasicBlock,
    width=4,
    stem_reduction=1,
)
TINY_PREACT = functools.partial(
    preact_resnet.PreactResNet, num_classes=CLASSES, width=4
)


def problem(model, size, batch=8, **kinds):
    """Loss, parameters and the other arguments; `kinds` are of its twin in training."""
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    labels = jnp.arange(batch) % CLASSES
    variables = jax.jit(functools.partial(model.init, train=True))(KEY, images)
    variables = jax.tree.map(lambda x: x.astype(images.dtype), dict(variables))
    params = variables.pop("params")
    args = (params, variables, {"image": images, "label": labels}, jax.random.key(2))
    layers = lbopt.trace_layers(
        classifier.make_loss(model, 0.0), *args, has_aux=True, strict=True
    )
    return classifier.make_loss(model.clone(**kinds), 0.0), args, layers


@pytest.fixture
def float64():
    """Rounding far below any difference; gradients of norms cancel in float32."""
    with jax.enable_x64(True):
        yield jnp.float64


def test_remat_saves_memory_and_changes_no_number(float64):
    found, temporary = [], []
    for remat in (False, True):
        model = TINY(stage_sizes=(3,), remat=remat, dtype=float64)
        loss_fn, args, layers = problem(model, 16)
        evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)
        compiled = (
            jax.jit(evaluate)
            .lower(*args)
            .compile(compiler_options=resnet.CPU_KEEPS_BARRIERS)
        )
        # Initial parameters, losses, running statistics, gradients and curvature.
        found.append((args[0], compiled(*args)))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert_all_close(*found, 1e-12)
    assert temporary[1] < 0.8 * temporary[0]


@pytest.mark.parametrize("make", [TINY, TINY_PREACT], ids=["resnet", "preact_resnet"])
def test_remat_is_of_every_block_and_keeps_the_names(make):
    images, trees = jnp.zeros((2, 8, 8, 3)), []
    for remat, blocks in ((False, 0), (True, 3)):
        model = make(stage_sizes=(1, 2), remat=remat)
        init = functools.partial(model.init, train=True)
        trees.append(jax.eval_shape(init, KEY, images))
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        program = str(jax.make_jaxpr(apply)(trees[-1], images))
        assert program.count("prevent_cse=True") == blocks
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])


def assert_all_close(actual, expected, tolerance):
    """Each array to within a share of its largest entry."""

    def one(path, a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        atol = tolerance * np.abs(b).max(initial=1e-30)
        np.testing.assert_allclose(a, b, 0, atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(one, actual, expected)


def test_curvature_over_devices_with_axis_name_is_that_of_one_device(float64):
    found = []
    for devices in (1, 4):
        kinds = {"axis_name": "data"} if devices > 1 else {}
        model = TINY(stage_sizes=(1,), dtype=float64, remat=devices > 1)
        loss_fn, args, layers = problem(model, 8, **kinds)
        evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)

        def mean(*args, evaluate=evaluate):
            return jax.lax.pmean(evaluate(*args), "data")

        whole, along = jax.P(), jax.P("data")
        spread = jax.shard_map(
            mean,
            mesh=sharding.make_mesh(jax.devices()[:devices]),
            in_specs=(whole, whole, along, whole),
            out_specs=whole,
            check_vma=False,
        )
        found.append(jax.device_get(jax.jit(spread)(*args)))
    # Losses, running statistics, gradients and curvature.
    assert_all_close(found[1], found[0], 1e-12)


# ------------------------------------------------------------------ bfloat16


OPTIMIZERS = {
    "kfac": functools.partial(lbopt.kfac, 0.02, damping=0.1),
    "sp_ngd": functools.partial(
        lbopt.sp_ngd, 0.02, damping=0.1, norm_damping=0.1, momentum=0.5
    ),
}


@pytest.fixture(scope="module")
def bfloat16():
    return problem(TINY(stage_sizes=(1,), dtype=jnp.bfloat16), 16)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_a_bfloat16_run_is_float32(bfloat16, name):
    loss_fn, (params, model_state, batch, rng), layers = bfloat16
    tx = OPTIMIZERS[name](layers=layers)
    step = training.make_train_step(loss_fn, tx, layers)
    state = jax.eval_shape(lambda: training.init_state(tx, params, model_state, rng))
    after, _ = jax.eval_shape(step, state, batch)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == shapes
    floating = [t for _, t in shapes if jnp.issubdtype(t, jnp.inexact)]
    assert len(floating) > 40
    assert set(floating) == {jnp.dtype("float32")}


def test_bfloat16_activations_have_statistics_of_float32_accuracy(bfloat16):
    loss_fn, args, layers = bfloat16
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)

    def both(*args):
        return evaluate(*args)[2], seen_by_layers(loss_fn, *args)

    # Without excess precision every activation is rounded where the program says so,
    # the same one for the statistics, the layers and the oracle.
    options = {"xla_allow_excess_precision": False}
    curvature, seen = (
        jax.jit(both).lower(*args).compile(compiler_options=options)(*args)
    )
    n = len(args[2]["label"])
    for path, layer in layers.items():
        x, g = seen[path]
        expected = jnp.float32 if path == "head" else jnp.bfloat16
        assert (x.dtype, g.dtype) == (expected, expected)
        # Sums of 2,048 terms in float32, one by one, are at most 2,048 · 2⁻²⁴ = 1.2e-4
        # off. One rounding to bfloat16 is 2⁻⁹ = 2e-3.
        x, g = (np.asarray(y, np.float64) for y in (x, n * g))
        found = curvature[path]
        if layer.block.kind == "unit_wise":
            x_hat = oracles.normalised(x, (0, 1, 2), 1e-5)
            rows = (y.reshape(n, -1, y.shape[-1]) for y in (x_hat, g))
            assert_all_close(found.f, oracles.unit_wise(*rows), 1e-4)
            continue
        if path == "head":
            rows = oracles.with_ones(x)[:, None], g[:, None]
        else:
            ones, pad = (1, 1), ((1, 1), (1, 1))
            patches = oracles.conv_patches(x, (3, 3), ones, pad, ones, ones)
            rows = patches, g.reshape(n, -1, g.shape[-1])
        a, b = (np.einsum("nsi,nsj->ij", y, y) / n for y in rows)
        a, b = (np.einsum("nsi,nsj->ij", y, y) / n for y in rows)
        assert_all_close(found.a, a / rows[0].shape[1], 1e-4)
        assert_all_close(found.g, b, 1e-4)


def seen_by_layers(loss_fn, params, model_state, batch, rng):
    """Each layer's input and the gradient at its output, as the network rounds them."""
    inputs, outputs = {}, {}

    def run(shifts):
        def interceptor(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            if not isinstance(context.module, nn.Conv | nn.BatchNorm | nn.Dense):
                return y
            path = "/".join(context.module.path)
            inputs[path], outputs[path] = args[0], y
            return y if shifts is None else y + shifts[path]

        with nn.intercept_methods(interceptor):
            return loss_fn(params, model_state, batch, rng)[0], (dict(inputs), outputs)

    shapes = jax.eval_shape(lambda: run(None)[1][1])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    grads, (inputs, _) = jax.grad(run, has_aux=True)(zeros)
    return {path: (inputs[path], grads[path]) for path in grads}
