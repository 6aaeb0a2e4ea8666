"""Kronecker blocks: factors and natural gradients re-derived in plain NumPy."""

import functools

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import lbopt
from lbopt.curvature import kronecker, linear_maps
from tests import oracles
from tests.oracles import error, quick_jit
from tests.problems import assert_equal

# Relative, of float32 against the same arithmetic in float64: the damped factors have
# conditions of at most a few hundred.
SINGLE = 1e-5
DOUBLE = 1e-10


# ------------------------------------------------- the textbook's network, by hand


def softmax(f):
    p = np.exp(f - f.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_exact_kfac_of_a_classifier_agrees_with_the_definition():
    """Forward, backward, expectation over labels and damped solves, all in NumPy."""
    rng = np.random.default_rng(0)
    n, damping = 12, 0.05
    w1, w2 = (rng.normal(size=size) for size in ((6, 4), (5, 3)))  # with bias rows
    x, y = rng.normal(size=(n, 5)), rng.integers(0, 3, n)

    a0 = np.c_[x, np.ones(n)]
    a1 = np.c_[np.tanh(a0 @ w1), np.ones(n)]
    p = softmax(a1 @ w2)

    def back(g2):
        """The gradient at the first layer's output, from that at the second's."""
        return (g2 @ w2[:-1].T) * (1 - a1[:, :-1] ** 2)

    g2 = p - np.eye(3)[y]
    gradients = [a0.T @ back(g2) / n, a1.T @ g2 / n]
    big_g1 = big_g2 = 0.0
    for c in range(3):
        g2 = p - np.eye(3)[c]
        big_g2 = big_g2 + (p[:, c, None] * g2).T @ g2 / n
        big_g1 = big_g1 + (p[:, c, None] * back(g2)).T @ back(g2) / n
    factors = [(a0.T @ a0 / n, big_g1), (a1.T @ a1 / n, big_g2)]

    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
    params = {
        f"layers_{i}": {"kernel": jnp.float32(w[:-1]), "bias": jnp.float32(w[-1])}
        for i, w in ((0, w1), (2, w2))
    }

    def loss_fn(params, x, y):
        f = lbopt.likelihood(model.apply({"params": params}, x), "categorical")
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y))

    batch = jnp.float32(x), jnp.asarray(y)
    layers = lbopt.trace_layers(loss_fn, params, *batch, strict=True)
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, fisher="exact")
    tx = lbopt.kfac(0.1, layers, damping=damping, momentum=None, kl_clip=None)

    @quick_jit
    def step(params):
        _, grads, curvature = evaluate(params, *batch)
        updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
        return curvature, updates

    curvature, updates = step(params)
    for path, (a, g), gradient in zip(params, factors, gradients, strict=True):
        assert error(curvature[path].a, a) < SINGLE
        assert error(curvature[path].g, g) < SINGLE
        natural = oracles.natural_gradient(a, g, damping, gradient)
        own = updates[path]
        assert error(np.vstack([own["kernel"], own["bias"]]), -0.1 * natural) < SINGLE


# ------------------------------------------------- properties


def dense_block(d_in, d_out, dtype=jnp.float32, use_bias=True):
    linear = linear_maps.dense_linear((d_in, d_out), use_bias, True)
    return kronecker.kronecker_block(linear, "expand", dtype)


@functools.partial(quick_jit, static_argnames="d_out")
def statistics(x, g, d_out):
    block = dense_block(x.shape[-1], d_out)
    due = kronecker.KroneckerFactors(True, True)
    sums = block.estimate(x, g / len(x), due)
    return block.statistics(block.mean(sums, len(x)))


property_test = hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, database=None
)
seeds = st.integers(0, 2**32 - 1)


def random_rows(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    x = jnp.float32(scale * rng.normal(size=(8, 3, 4)))
    return x, jnp.float32(rng.normal(size=(8, 3, 2)))


@hypothesis.given(seed=seeds, log_scale=st.floats(-8, 8))
@property_test
def test_factors_are_symmetric_and_positive_semi_definite(seed, log_scale):
    for factor in statistics(*random_rows(seed, 10.0**log_scale), d_out=2):
        np.testing.assert_array_equal(factor, factor.T)
        values = np.linalg.eigvalsh(np.asarray(factor, np.float64))
        assert values[0] >= -1e-6 * values[-1]


@hypothesis.given(seed=seeds, parts=st.sampled_from([2, 4, 8]))
@property_test
def test_statistics_are_unchanged_by_splitting_the_batch(seed, parts):
    x, g = random_rows(seed)
    whole = statistics(x, g, d_out=2)
    split = [
        statistics(*pair, d_out=2)
        for pair in zip(jnp.split(x, parts), jnp.split(g, parts), strict=True)
    ]
    mean = jax.tree.map(lambda *s: sum(s) / parts, *split)
    for actual, expected in zip(mean, whole, strict=True):
        assert error(actual, expected) < SINGLE


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_shared_layer_follows_its_definition(sharing, use_bias):
    x, g = random_rows(0)
    linear = linear_maps.dense_linear((4, 2), use_bias, True)
    block = kronecker.kronecker_block(linear, sharing, jnp.float32)
    sums = block.estimate(x, g / 8, kronecker.KroneckerFactors(True, True))
    found = block.statistics(block.mean(sums, 8))
    rows = oracles.with_ones(x) if use_bias else x
    for factor, expected in zip(
        found, oracles.second_moments(rows, g, sharing), strict=True
    ):
        assert error(factor, expected) < SINGLE
    gradient = np.concatenate(
        [leaf.reshape(-1, 2) for leaf in block.gradient(x, g).values()]
    )
    assert error(gradient, np.einsum("nsi,nso->io", rows, g)) < SINGLE
    if sharing == "reduce":
        rows, g = rows.mean(1, keepdims=True), g.sum(1, keepdims=True)
    each = np.einsum("nsi,nso->nio", rows, g)
    bases = jnp.eye(4 + use_bias), jnp.eye(2)
    squares = block.moments.sum_squares(random_rows(0)[1], x, *bases)
    assert error(squares, (each**2).sum(0)) < SINGLE
    nothing = block.estimate(x, g, kronecker.KroneckerFactors(False, False))
    assert not any(np.any(x) for x in nothing)


# ------------------------------------------------- inverses


# Blocks of 2: three of the five inputs' and two of the three outputs', each padded.
@pytest.mark.parametrize("block_size", [None, 2])
def test_natural_gradient_is_the_dense_solve_copy_by_copy(block_size):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 9, 5))
    a = np.einsum("cni,cnj->cij", rows, rows)
    g, v = a[:, :3, :3], rng.normal(size=(3, 5, 3))
    with jax.enable_x64(True):
        block = dense_block(5, 3, jnp.float64, use_bias=False).cut(block_size)
        factors = block.pack(kronecker.KroneckerFactors(jnp.asarray(a), jnp.asarray(g)))
        inverses = block.invert(factors, 0.1)
        natural = block.precondition(inverses, {"kernel": jnp.asarray(v)})["kernel"]
    for i in range(3):
        # The diagonal blocks of a factor share its trace, and so π.
        pair = (oracles.cut(m[i], block_size) for m in (a, g))
        assert error(natural[i], oracles.natural_gradient(*pair, 0.1, v[i])) < DOUBLE


@pytest.mark.parametrize("groups", [1, 2])
def test_first_inverses_are_the_identity(groups):
    window = linear_maps.patches.Window(
        (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)
    )
    linear = linear_maps.conv_linear(
        window, lambda x: x, 3, 4, True, True, groups=groups
    )
    block = kronecker.kronecker_block(linear, "expand", jnp.float32)
    factors, inverses = block.init((5,))
    assert not any(x.any() for x in factors)
    rng = np.random.default_rng(0)
    leaves = {
        "kernel": jnp.float32(rng.normal(size=(5, 2, 2, 3, 4))),
        "bias": jnp.float32(rng.normal(size=(5, 4))),
    }
    assert_equal(block.precondition(inverses, leaves), leaves)


def test_a_factor_of_zeros_is_damped_alone():
    block = dense_block(4, 2)
    factors, _ = block.init(())
    inverses = block.invert(factors, 0.04)
    for inverse in inverses:
        np.testing.assert_allclose(inverse, np.eye(len(inverse)) / 0.2, rtol=SINGLE)
