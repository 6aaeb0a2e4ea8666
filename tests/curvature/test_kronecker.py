"""Kronecker blocks: factors and natural gradients re-derived in plain NumPy."""

import functools
import math

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import lbopt
from lbopt import linalg
from lbopt.curvature import kronecker, linear_maps
from tests import oracles
from tests.oracles import quick_jit

# Relative, of float32 against the same arithmetic in float64: the damped factors have
# conditions of at most a few hundred.
SINGLE = 1e-5
DOUBLE = 1e-10


def error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# ------------------------------------------------- the textbook's network, by hand


def softmax(f):
    p = np.exp(f - f.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_exact_kfac_of_a_classifier_agrees_with_the_definition():
    """Forward, backward, expectation over labels and damped solves, all in NumPy."""
    rng = np.random.default_rng(0)
    n, damping = 12, 0.05
    w1, w2 = (
        rng.normal(size=(6, 4)),
        rng.normal(size=(5, 3)),
    )  # the last row is the bias
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
        g1 = back(g2)
        big_g2 = big_g2 + (p[:, c, None] * g2).T @ g2 / n
        big_g1 = big_g1 + (p[:, c, None] * g1).T @ g1 / n
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
    tx = lbopt.kfac(0.1, layers, damping=damping, momentum=None)

    @quick_jit
    def step(params):
        _, grads, curvature = evaluate(params, *batch)
        updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
        return curvature, updates

    curvature, updates = step(params)
    for path, (a, g), gradient in zip(params, factors, gradients, strict=True):
        assert error(curvature[path].a, a) < SINGLE
        assert error(curvature[path].g, g) < SINGLE
        pi = math.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        natural = np.linalg.inv(a + pi * math.sqrt(damping) * np.eye(len(a)))
        natural = natural @ gradient
        natural = natural @ np.linalg.inv(g + math.sqrt(damping) / pi * np.eye(len(g)))
        own = updates[path]
        assert error(np.vstack([own["kernel"], own["bias"]]), -0.1 * natural) < SINGLE


# ------------------------------------------------- every kind of block, over steps


class Mixture(nn.Module):
    """One layer of each kind of block."""

    dtype: type

    @nn.compact
    def __call__(self, words, image):
        kinds = {"param_dtype": self.dtype}
        gain = self.param("gain", nn.initializers.ones, (6,), self.dtype)
        x = nn.Conv(4, (3, 2), strides=(1, 2), name="conv", **kinds)(image)
        x = nn.BatchNorm(use_running_average=False, name="norm", **kinds)(x)
        x = nn.Conv(3, (2, 2), padding="VALID", name="reduced", **kinds)(nn.tanh(x))
        x = x.mean((1, 2))
        e = nn.Embed(7, 3, name="embed", **kinds)(words).mean(1)
        x = nn.Dense(6, name="dense", **kinds)(jnp.concatenate([x, e], -1))
        return nn.Dense(2, use_bias=False, name="top", **kinds)(nn.tanh(x) * gain[None])


def rows_of(path, x):
    """Patches of the two convolutions, ones appended."""
    if path == "conv":  # SAME: 4×4 in, strides 1 and 2, kernel 3×2
        pads = [oracles.same_padding(4, 3, 1, 1), oracles.same_padding(4, 2, 2, 1)]
        size, strides = (3, 2), (1, 2)
    else:
        pads, size, strides = [(0, 0), (0, 0)], (2, 2), (1, 1)
    patches = oracles.conv_patches(x, size, strides, pads, (1, 1), (1, 1))
    return oracles.with_ones(patches)


def moments(loss, params, grads, words, image):
    """The statistics of one batch of ``Mixture``, in NumPy."""
    n = len(words)
    calls = oracles.layer_calls(loss, params, words, image, whole=True)
    calls = {path: pairs[0] for path, pairs in calls.items()}
    found = {}
    for path, sharing in (("conv", "expand"), ("reduced", "reduce")):
        x, g = (np.asarray(v, np.float64) for v in calls[path])
        g = g.reshape(n, -1, g.shape[-1])
        found[path] = oracles.second_moments(rows_of(path, x), g, sharing)
    for path in ("dense", "top"):
        x, g = (np.asarray(v, np.float64)[:, None] for v in calls[path])
        x = oracles.with_ones(x) if path == "dense" else x
        found[path] = oracles.second_moments(x, g)
    x, g = calls["embed"]
    one_hot = np.eye(7)[np.asarray(x)]
    a, g = oracles.second_moments(one_hot, np.asarray(g, np.float64))
    found["embed"] = (np.diag(np.diag(a)), g)
    x, g = (np.asarray(v, np.float64).reshape(n, -1, 4) for v in calls["norm"])
    x_hat = oracles.normalised(x, (0, 1), 1e-5)
    found["norm"] = (oracles.unit_wise(x_hat, g),)
    found["gain"] = (n * np.asarray(grads["gain"], np.float64) ** 2,)
    return found


def solve(path, statistics, damping, leaves):
    """The natural gradient of one layer's arrays."""
    leaves = {k: np.asarray(v, np.float64) for k, v in leaves.items()}
    if path == "gain":
        return {"gain": leaves["gain"] / (statistics[0] + damping)}
    if path == "norm":
        v = np.stack([leaves["scale"], leaves["bias"]], -1)[..., None]
        scale, bias = np.linalg.solve(statistics[0] + damping * np.eye(2), v)[..., 0].T
        return {"scale": scale, "bias": bias}
    if path == "embed":
        natural = oracles.natural_gradient(*statistics, damping, leaves["embedding"])
        return {"embedding": natural}
    kernel = leaves["kernel"]
    rows = [kernel.reshape(-1, kernel.shape[-1])]
    rows += [leaves["bias"][None]] if "bias" in leaves else []
    natural = oracles.natural_gradient(*statistics, damping, np.concatenate(rows))
    found = {"kernel": natural[: len(rows[0])].reshape(kernel.shape)}
    return found | ({"bias": natural[-1]} if "bias" in leaves else {})


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, SINGLE), (jnp.float64, DOUBLE)]
)
def test_every_block_follows_its_definition_over_steps(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        follow(dtype, tolerance)


def follow(dtype, tolerance, steps=7, n=8):
    decay, stats_period, inverse_period, damping = 0.8, 2, 3, 0.1
    rng = np.random.default_rng(0)
    model = Mixture(dtype)
    words = jnp.asarray(rng.integers(0, 6, (steps, n, 5)))  # word 6 never occurs
    images = jnp.asarray(rng.normal(size=(steps, n, 4, 4, 2)), dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), words[0], images[0])
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape) / s.size**0.25, dtype),
        shapes["params"],
    )

    def loss_fn(params, words, image):
        f, _ = model.apply({"params": params}, words, image, mutable=["batch_stats"])
        return jnp.mean(jnp.sum(jnp.cosh(f), -1))

    layers = lbopt.trace_layers(
        loss_fn,
        params,
        words[0],
        images[0],
        weight_sharing=lambda path: "reduce" if path == "reduced" else "expand",
    )
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
    tx = lbopt.scale_by_kfac(
        layers,
        damping=damping,
        factor_decay=decay,
        stats_period=stats_period,
        inverse_period=inverse_period,
    )

    @quick_jit
    def step(params, state, words, image):
        _, grads, curvature = evaluate(params, words, image, due=lbopt.refresh(state))
        natural, state = tx.update(grads, state, params, curvature=curvature)
        after = jax.tree.map(lambda p, u: p - 0.05 * u, params, natural)
        return grads, natural, after, state

    state, sums, weight, inverted = tx.init(params), {}, 0.0, {}
    worst = 0.0
    for t in range(steps):
        grads, natural, after, state = step(params, state, words[t], images[t])
        batch = moments(loss_fn, params, grads, words[t], images[t])
        if t % stats_period == 0:
            # Adam's form: an average that starts at zero, divided by its weight.
            weight = decay * weight + (1 - decay)
            for path, now in batch.items():
                old = sums.get(path, [0.0] * len(now))
                sums[path] = [
                    decay * o + (1 - decay) * x for o, x in zip(old, now, strict=True)
                ]
        if t % inverse_period == 0:
            inverted = {p: [x / weight for x in s] for p, s in sums.items()}
        for path, statistics in inverted.items():
            own = grads[path] if path != "gain" else {"gain": grads["gain"]}
            mine = natural[path] if path != "gain" else {"gain": natural["gain"]}
            expected = solve(path, statistics, damping, own)
            for name, value in expected.items():
                worst = max(worst, error(mine[name], value))
                assert worst < tolerance, f"{path}/{name} at step {t}"
        params = after
    assert set(inverted) == set(layers)


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


@hypothesis.given(seed=seeds)
@property_test
def test_statistics_do_not_depend_on_the_order_of_examples(seed):
    x, g = random_rows(seed)
    order = np.random.default_rng(seed).permutation(8)
    for actual, expected in zip(
        statistics(x[order], g[order], d_out=2), statistics(x, g, d_out=2), strict=True
    ):
        assert error(actual, expected) < SINGLE


# ------------------------------------------------- exact damping, first inverses


def cut(matrix, block_size):
    """A matrix without what couples its equal diagonal blocks."""
    parts = 1 if block_size is None else -(-len(matrix) // block_size)
    block = np.arange(len(matrix)) // -(-len(matrix) // parts)
    return np.where(block[:, None] == block, matrix, 0)


# Blocks of 2: three of the five inputs' and two of the three outputs', each padded.
@pytest.mark.parametrize("block_size", [None, 2])
def test_exact_damping_is_the_dense_solve(block_size):
    rng = np.random.default_rng(0)
    x, y, v = rng.normal(size=(9, 5)), rng.normal(size=(9, 3)), rng.normal(size=(5, 3))
    a, g = x.T @ x / 9, y.T @ y / 9
    with jax.enable_x64(True):
        block = dense_block(5, 3, jnp.float64, use_bias=False)
        block = block.variant(True, block_size)
        factors = block.pack(kronecker.KroneckerFactors(jnp.asarray(a), jnp.asarray(g)))
        for damping in (1e-3, 10.0):
            inverses = block.invert(factors, damping)
            natural = block.precondition(inverses, {"kernel": jnp.asarray(v)})
            full = np.kron(cut(a, block_size), cut(g, block_size))
            full += damping * np.eye(15)
            expected = np.linalg.solve(full, v.ravel()).reshape(5, 3)
            assert error(natural["kernel"], expected) < DOUBLE


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_first_inverses_are_the_identity(groups, exact):
    window = linear_maps.patches.Window(
        (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)
    )
    linear = linear_maps.conv_linear(
        window, lambda x: x, 3, 4, True, True, groups=groups
    )
    block = kronecker.kronecker_block(linear, "expand", jnp.float32)
    block = block.variant(True, None) if exact else block
    factors, inverses = block.init((5,))
    assert not any(x.any() for x in factors)
    rng = np.random.default_rng(0)
    leaves = {
        "kernel": jnp.float32(rng.normal(size=(5, 2, 2, 3, 4))),
        "bias": jnp.float32(rng.normal(size=(5, 4))),
    }
    natural = block.precondition(inverses, leaves)
    jax.tree.map(np.testing.assert_array_equal, natural, leaves)


def test_copies_are_preconditioned_one_by_one():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 9, 4))
    a = np.einsum("cni,cnj->cij", rows, rows)
    g, v = a[:, :2, :2], rng.normal(size=(3, 4, 2))
    block = dense_block(4, 2, use_bias=False)
    factors = kronecker.KroneckerFactors(*(linalg.pack(jnp.float32(m)) for m in (a, g)))
    inverses = block.invert(factors, 0.1)
    natural = block.precondition(inverses, {"kernel": jnp.float32(v)})["kernel"]
    for i in range(3):
        expected = oracles.natural_gradient(a[i], g[i], 0.1, v[i])
        assert error(natural[i], expected) < SINGLE


def test_a_factor_of_zeros_is_damped_alone():
    block = dense_block(4, 2)
    factors, _ = block.init(())
    inverses = block.invert(factors, 0.04)
    for inverse in inverses:
        np.testing.assert_allclose(inverse, np.eye(len(inverse)) / 0.2, rtol=SINGLE)
