"""Full-size ResNet-50: its table, its state, and one step of K-FAC."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from experiments.models import resnet
from lbopt import training

CLASSES, SIZE, BATCH = 1000, 64, 2


@pytest.fixture(scope="module")
def problem():
    model = resnet.ResNet50(num_classes=CLASSES)
    images = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    variables = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=True), images
    )

    def loss_fn(params, model_state, batch, rng):
        del rng
        logits, model_state = model.apply(
            {"params": params, **model_state},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(loss), (model_state, {})

    model_state = {"batch_stats": variables["batch_stats"]}
    batch = {"image": images, "label": labels}
    layers = lbopt.trace_layers(
        loss_fn,
        variables["params"],
        model_state,
        batch,
        jax.random.key(0),
        has_aux=True,
        strict=True,
    )
    return model, loss_fn, layers


def test_every_layer_has_a_block_of_its_own(problem):
    *_, layers = problem
    kinds = [layer.block.kind for layer in layers.values()]
    # 53 convolutions and the dense layer; 53 BatchNorms.
    assert (kinds.count("kronecker"), kinds.count("unit_wise")) == (54, 53)
    factors = {p: x.block.init(())[0] for p, x in layers.items() if x.has_tap}
    elements = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: factors)))
    # Triangles of A, of G, and of the 2×2 blocks, as counted from the architecture.
    assert elements == 62_348_671 + 14_618_356 + 79_680


@pytest.mark.slow
def test_one_step_at_full_size(problem):
    model, loss_fn, layers = problem
    image = jax.random.normal(jax.random.key(1), (BATCH, SIZE, SIZE, 3))
    batch = {"image": image, "label": jnp.arange(BATCH)}
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=True))(image)
    model_state = {"batch_stats": variables["batch_stats"]}
    tx = lbopt.kfac(1e-3, layers)
    state = training.init_state(tx, variables["params"], model_state, jax.random.key(2))
    train_step = training.make_train_step(loss_fn, tx, layers)
    before = jax.tree.map(jnp.copy, state.params)
    state, metrics = train_step(state, batch)
    assert int(metrics["skipped"]) == 0
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.params)
    assert all(jax.tree.leaves(moved))
    finite = jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), state.params)
    assert all(jax.tree.leaves(finite))
