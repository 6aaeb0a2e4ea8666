"""Layers as matrices applied to rows: the map itself is the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import patches
from lbopt.curvature import linear_maps

ROUNDING = 1e-5  # float32 sums of at most a hundred products


def window(**options):
    default = {
        "size": (2, 3),
        "strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "input_dilation": (1, 1),
        "kernel_dilation": (1, 1),
    }
    return patches.Window(**(default | options))


def conv_linear(channels, geometry, **options):
    return linear_maps.conv_linear(
        geometry, lambda x: x, channels, 4, True, True, **options
    )


CASES = {
    "dense": (
        nn.Dense(4),
        (3, 2, 5),
        lambda: linear_maps.dense_linear((5, 4), True, True),
    ),
    "general": (
        nn.DenseGeneral((2, 2), axis=(1, 3)),
        (3, 2, 4, 5),
        lambda: linear_maps.dense_linear((2, 5, 2, 2), True, True, axis=(1, 3)),
    ),
    "general, kernels by position": (
        nn.DenseGeneral(4, batch_dims=(0,), use_bias=False),
        (2, 3, 5),
        lambda: linear_maps.dense_linear((2, 5, 4), False, True, batch_dims=(0,)),
    ),
    "conv": (
        nn.Conv(4, (2, 3), strides=(1, 2), padding="VALID"),
        (3, 5, 6, 2),
        lambda: conv_linear(2, window(strides=(1, 2))),
    ),
    "conv, groups": (
        nn.Conv(4, (2, 3), padding="VALID", feature_group_count=2),
        (3, 5, 6, 4),
        lambda: conv_linear(2, window(), groups=2),
    ),
    "conv, mirrored": (
        nn.ConvTranspose(4, (2, 3), padding="VALID", transpose_kernel=True),
        (3, 5, 6, 2),
        lambda: conv_linear(2, window(padding=((1, 1), (2, 2))), flip=True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_times_matrix_are_the_layers_outputs(name):
    layer, shape, make = CASES[name]
    linear = make()
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=shape))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), params)
    rows = linear.input_rows(x)
    if linear.use_bias:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)
    matrix = linear_maps.join_bias(params, linear)
    outputs = linear.output_rows(layer.apply({"params": params}, x))
    product = np.einsum("...nsi,...io->...nso", rows, matrix)
    np.testing.assert_allclose(product, outputs, rtol=ROUNDING, atol=ROUNDING)
    means = linear.input_mean(x, jnp.float32)
    expected = linear.input_rows(x).mean(-2)
    np.testing.assert_allclose(means, expected, rtol=ROUNDING, atol=ROUNDING)
    again = linear_maps.split_bias(matrix, linear)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", CASES)
def test_copies_are_joined_and_split_one_by_one(name):
    layer, shape, make = CASES[name]
    linear = make()
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    leaves = jax.tree.map(
        lambda s: jnp.float32(rng.normal(size=(2, 3, *s.shape))), shapes
    )
    matrix = linear_maps.join_bias(leaves, linear)
    for i, j in np.ndindex(2, 3):
        one = jax.tree.map(lambda v: v[i, j], leaves)
        np.testing.assert_array_equal(matrix[i, j], linear_maps.join_bias(one, linear))
    again = linear_maps.split_bias(matrix, linear)
    jax.tree.map(np.testing.assert_array_equal, again, leaves)


def test_axes_before_the_map_are_shared_beyond_the_first():
    x = jnp.arange(2.0 * 3 * 5 * 6 * 2).reshape(2, 3, 5, 6, 2)

    def merge(x):
        return x.reshape(-1, *x.shape[-3:])

    def conv(batched):
        return linear_maps.conv_linear(window(), merge, 2, 4, False, batched)

    assert conv(True).input_rows(x).shape == (2, 3 * 4 * 4, 12)
    # Under a per-example vmap the layer sees one example: every axis is shared.
    assert conv(False).input_rows(x).shape == (1, 2 * 3 * 4 * 4, 12)
    assert conv(True).input_rows(x[0, 0]).shape == (1, 4 * 4, 12)
    for batched, shape in ((True, (2, 3 * 5 * 6, 2)), (False, (1, 2 * 3 * 5 * 6, 2))):
        dense = linear_maps.dense_linear((2, 4), False, batched)
        assert dense.input_rows(x).shape == shape


def test_moments_count_the_appended_ones():
    rows = np.random.default_rng(0).normal(size=(3, 4, 2))
    moment = linear_maps.moment_of(jnp.float32(rows), True, jnp.float32)
    flat = np.c_[rows.reshape(12, 2), np.ones(12)]
    np.testing.assert_allclose(moment, flat.T @ flat, rtol=ROUNDING, atol=ROUNDING)
