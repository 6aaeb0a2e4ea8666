"""Kernels held at the norm of their initialisation."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.transforms.rescale import rescale_weights
from tests.problems import (
    CLASSES,
    Mlp,
    Problem,
    all_finite,
    assert_equal,
    classify,
    cross_entropy,
    labels,
)

DEPTH, INIT_SAMPLES = 3, 4096
# d_out of each kernel, and the axes that one copy's norm is taken over.
KERNELS = {
    "conv": (8, (0, 1, 2, 3)),
    "grouped": (12, (0, 1, 2, 3)),
    "transposed": (7, (0, 1, 2, 3)),
    "general": (2 * 5, (0, 1, 2)),
    "two_axes": (10, (0, 1, 2)),
    "batched": (2 * 4, (0, 1, 2)),
    "stack/layer": (10, (0, 2)),  # the copies lie on axis 1
    "head": (CLASSES, (0, 1)),
}
every_kernel = pytest.mark.parametrize("path", KERNELS)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(10, name="layer")(x)), None


class Everything(nn.Module):
    """Every kind of kernel, and of what is none."""

    @nn.compact
    def __call__(self, x, words):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=False, name="batch_norm")(x)
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x)
        x = nn.relu(x)
        x = nn.ConvTranspose(7, (2, 2), transpose_kernel=True, name="transposed")(x)
        x = nn.DenseGeneral((2, 5), name="general")(jnp.mean(x, (1, 2)))
        x = nn.DenseGeneral(10, axis=(1, 2), name="two_axes")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        x, _ = nn.scan(
            Body, variable_axes={"params": 1}, split_rngs={"params": True}, length=DEPTH
        )(name="stack")(x, None)
        y = nn.Embed(5, 6, name="words")(words)
        y = jnp.stack([y, jnp.square(y)])
        y = nn.DenseGeneral(4, batch_dims=0, axis=-1, name="batched")(y)
        free = self.param("free", nn.initializers.ones, (1, 1))
        return nn.Dense(CLASSES, name="head")(x + free * jnp.mean(y))


def normal(tree, seed, scale):
    """Random arrays of a tree's shapes."""
    rng = np.random.default_rng(seed)
    make = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(make, tree)


def step_of(params):
    return normal(params, 2, 0.1)


@pytest.fixture(scope="module")
def problem():
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    args, model = (x, jnp.arange(8) % 5), Everything()
    shapes = jax.eval_shape(model.init, jax.random.key(1), *args)["params"]
    params = normal(shapes, 1, 0.3)

    def loss_fn(params, x, words, y):
        f, _ = model.apply({"params": params}, x, words, mutable=["batch_stats"])
        return cross_entropy(lbopt.likelihood(f, "categorical"), y)

    return Problem(loss_fn, params, (*args, labels(8)))


@pytest.fixture(scope="module")
def layers(problem):
    return problem.trace(batch_size=8)


@pytest.fixture(scope="module")
def rescaled(problem, layers):
    """The step, what became of it, and the parameters after it."""
    step, tx = step_of(problem.params), rescale_weights(layers)
    update = jax.jit(tx.update)
    updates, state = update(step, tx.init(problem.params), problem.params)
    assert state == optax.EmptyState()
    return step, updates, optax.apply_updates(problem.params, updates)


@pytest.fixture(scope="module")
def mlp():
    problem = classify(Mlp())
    return problem.params, problem.trace(), step_of(problem.params)


def kernel_at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree["kernel"], np.float64)


def norm_of(kernel, path):
    return np.sqrt(np.sum(np.square(kernel), KERNELS[path][1], keepdims=True))


@every_kernel
def test_the_norm_after_the_step(problem, rescaled, path):
    step, _, after = rescaled
    target = np.sqrt(2 * KERNELS[path][0])
    kernel = kernel_at(after, path)
    np.testing.assert_allclose(norm_of(kernel, path), target, rtol=1e-6)
    end = kernel_at(problem.params, path) + kernel_at(step, path)
    expected = target * end / norm_of(end, path)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


def test_every_kernel_is_in_the_table(layers):
    found = {path for path, layer in layers.items() if "kernel" in layer.shapes}
    assert found == set(KERNELS)
    assert {"batch_norm", "layer_norm", "words", "free"} == set(layers) - found


def test_all_else_is_left_alone(rescaled):
    step, updates, _ = rescaled
    before, after = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if "kernel" not in jax.tree_util.keystr(path)
        }
        for tree in (step, updates)
    )
    assert len(before) == 14  # 8 biases, 2 norm layers of 2, an embedding, a free one
    assert_equal(after, before)


def test_only_what_is_too_large_shrinks(problem, layers):
    copies = jnp.asarray([0.2, 1.0, 5.0])[None, :, None]
    params = jax.tree.map(lambda w: w, problem.params)
    params["stack"]["layer"]["kernel"] *= copies
    step, state, verdicts = step_of(params), optax.EmptyState(), {}
    always, shrunk = (
        jax.jit(rescale_weights(layers, shrink_only=only).update)(step, state, params)
        for only in (False, True)
    )
    for path, (d_out, _) in KERNELS.items():
        end = kernel_at(params, path) + kernel_at(step, path)
        large = norm_of(end, path) > np.sqrt(2 * d_out)
        expected = np.where(large, kernel_at(always[0], path), kernel_at(step, path))
        assert_equal(kernel_at(shrunk[0], path), expected)
        verdicts[path] = large.ravel().tolist()
    assert verdicts["conv"] == [True]
    assert verdicts["head"] == [False]
    assert verdicts["stack/layer"] == [False, False, True]  # each copy for itself


@pytest.mark.parametrize("path", ["grouped", "head"])
def test_he_s_initialisation_has_this_norm(layers, path):
    # sp_ngd.md section 6.3: "√(2 d_out) is exactly the expected norm of a HeNormal
    # (fan-in) initialisation".  Exactly so is the norm's square.
    shape = (INIT_SAMPLES, *layers[path].shapes["kernel"])
    init = nn.initializers.he_normal(batch_axis=0)
    kernels = init(jax.random.key(3), shape)
    mean = np.sum(np.square(kernels)) / INIT_SAMPLES
    # The head has 30 entries, so the mean is known to 1.2 / √(30 · 4096), 0.3 %.
    np.testing.assert_allclose(mean, 2 * KERNELS[path][0], rtol=0.015)


def test_a_kernel_that_ends_at_zero(mlp):
    params, layers, _ = mlp
    step = jax.tree.map(jnp.negative, params)
    tx = rescale_weights(layers)
    updates, _ = tx.update(step, tx.init(params), params)
    assert all_finite(updates)
    assert not np.any(optax.apply_updates(params, updates)["first"]["kernel"])


def test_low_precision(mlp):
    params, layers, step = mlp
    params, step = optax.tree.cast((params, step), jnp.bfloat16)
    tx = rescale_weights(layers)
    updates, _ = tx.update(step, tx.init(params), params)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    kernel = optax.apply_updates(params, updates)["first"]["kernel"]
    norm = np.linalg.norm(np.asarray(kernel, np.float64))
    np.testing.assert_allclose(norm, np.sqrt(2 * 5), rtol=5e-3)


@pytest.mark.parametrize(
    "mask",
    [
        {"first": True, "last": False},
        {"first": {"kernel": True, "bias": False}, "last": {"kernel": False}},
    ],
)
def test_inside_masked(mlp, mask):
    params, layers, step = mlp
    expected, _ = rescale_weights(layers).update(step, optax.EmptyState(), params)
    tx = optax.masked(rescale_weights(layers), mask)
    updates, _ = tx.update(step, tx.init(params), params)
    assert_equal(updates["first"], expected["first"])
    assert_equal(updates["last"], step["last"])


def test_errors_at_the_door(mlp):
    params, layers, step = mlp
    tx = rescale_weights(layers)
    with pytest.raises(ValueError, match=r"update needs params, which it rescales"):
        tx.update(step, tx.init(params))
    with pytest.raises(
        ValueError, match=r"params has no kernel at 'last'.*make layers"
    ):
        tx.init({"first": params["first"]})
    other = classify(Mlp(width=7)).params
    with pytest.raises(
        ValueError, match=r"'first'.*\[4, 7\] where layers has \[4, 5\]"
    ):
        tx.init(other)
    unchecked = inspect.unwrap(rescale_weights)
    with pytest.raises(ValueError, match=r"layers=dict must be the result of lbopt"):
        unchecked(dict(layers))
    nothing = type(layers)({})
    with pytest.raises(ValueError, match=r"holds no kernel.*leave rescale_weights out"):
        unchecked(nothing)
