"""Full-size ResNet-50: its table, its memory, and steps of every optimizer."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from experiments import resnet50_steps
from experiments.models import resnet
from lbopt import memory_plan, training

CLASSES, SIZE, BATCH = 1000, 64, 2
# Triangles of A, of G, and of the 2×2 blocks, as counted from the architecture.
FACTORS = 62_348_671 + 14_618_356 + 79_680


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
    arguments = (variables["params"], model_state, batch, jax.random.key(0))
    layers = lbopt.trace_layers(loss_fn, *arguments, has_aux=True, strict=True)
    return arguments, layers


def test_every_layer_has_a_block_of_its_own(problem):
    _, layers = problem
    kinds = [layer.block.kind for layer in layers.values()]
    # 53 convolutions and the dense layer; 53 BatchNorms.
    assert (kinds.count("kronecker"), kinds.count("unit_wise")) == (54, 53)
    factors = [layer.factor_shapes() for layer in layers.values() if layer.has_tap]
    assert sum(x.size for x in jax.tree.leaves(factors)) == FACTORS


def test_the_plan_of_kfac_is_that_of_the_architecture(problem):
    arguments, layers = problem
    params, model_state, batch, rng = arguments
    start = functools.partial(training.init_state, lbopt.kfac(1e-3, layers))
    state = jax.eval_shape(start, params, model_state, rng)
    plan = memory_plan.plan(state, batch)
    assert plan.parameters == 4 * 25_557_032
    # A whole inverse of A and of G for each kernel; the head's has a row for its bias.
    kernels = [x.shape for x in jax.tree.leaves(params) if x.ndim > 1]
    rows = [math.prod(shape[:-1]) + (len(shape) == 2) for shape in kernels]
    columns = [shape[-1] for shape in kernels]
    inverses = sum(n**2 for n in (*rows, *columns))
    assert len(kernels) == 54
    assert plan.inverses == 4 * (inverses + 79_680)
    traces = 2 * 54 + 53
    assert plan.factors == 4 * (FACTORS + traces)
    assert plan.batch == BATCH * (SIZE * SIZE * 3 + 1) * 4


def assert_complete(row):
    """A step that changed every array of parameters, and whose memory was foreseen."""
    assert row["skipped"] == 0
    assert row["finite"]
    assert row["unmoved"] == []
    assert_foreseen(row)


def assert_foreseen(row):
    plan = memory_plan.MemoryPlan(**row["memory_plan"])
    assert plan.arguments == pytest.approx(plan.total, rel=0.1)
    assert plan.temporaries > plan.parameters


STEPS = [name for name in resnet50_steps.CASES if name != resnet50_steps.ACCUMULATED]


def test_every_case_on_record_is_complete():
    """`make slow` runs them all anew."""
    record = json.loads(resnet50_steps.RESULTS.read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in record["rows"]}
    assert list(rows) == list(resnet50_steps.CASES)
    for name, row in rows.items():
        if name == resnet50_steps.ACCUMULATED:
            assert_accumulated(row)
        else:
            assert_complete(row)


def assert_accumulated(row):
    sizes = row["batch_size"], row["devices"], row["micro_batches"]
    assert sizes == (131_072, 8, 512)
    assert_foreseen(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_at_full_size(name):
    assert_complete(resnet50_steps.in_own_process(name))


@pytest.mark.slow
def test_a_batch_of_131072_compiles():
    assert_accumulated(resnet50_steps.in_own_process(resnet50_steps.ACCUMULATED))
