"""Three factors for a dense layer on a flattened map: built one example at a time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import doubly_factored
from lbopt.curvature.doubly_factored import BiasedDoublyFactors, DoublyFactors
from tests.oracles import cut, error, quick_jit
from tests.problems import assert_equal, classify, cross_entropy

# Relative, of float32 against float64: sums of a few hundred products.
SINGLE = 1e-5
DOUBLE = 1e-10
LOCATIONS, CHANNELS, OUT, BATCH = 4, 3, 5, 6
DAMPING = 0.3


def rectified(seed, *shape):
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0)


def block_of(use_bias=True, dtype=jnp.float32):
    return doubly_factored.doubly_factored_block(
        LOCATIONS, CHANNELS, OUT, use_bias, dtype
    )


@functools.partial(quick_jit, static_argnames="use_bias")
def statistics(x, g, use_bias=True):
    block = block_of(use_bias)
    due = BiasedDoublyFactors(*[True] * 4) if use_bias else DoublyFactors(*[True] * 3)
    return block.statistics(block.mean(block.estimate(x, g / len(x), due), len(x)))


def moments(maps, output_grads):
    """The statistics, from each example's singular vectors."""
    k = c = g = 0.0
    for a, b in zip(maps, output_grads, strict=True):
        u, s, vt = np.linalg.svd(a)
        k = k + s[0] * np.outer(u[:, 0], u[:, 0]) / len(maps)
        c = c + s[0] * np.outer(vt[0], vt[0]) / len(maps)
        g = g + np.outer(b, b) / len(maps)
    return k, c, g


# ------------------------------------------------------------------ rank one


@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (1, 7), (7, 1)])
def test_rank_one_is_split_evenly(shape):
    maps = jnp.float32(rectified(0, 5, *shape))
    for a, kappa, psi in zip(maps, *doubly_factored.rank_one(maps), strict=True):
        u, s, vt = np.linalg.svd(np.asarray(a, np.float64))
        assert error(np.outer(kappa, psi), s[0] * np.outer(u[:, 0], vt[0])) < SINGLE
        for half in (kappa, psi):
            assert np.sum(np.square(half)) == pytest.approx(s[0], rel=SINGLE)


def test_a_map_whose_mean_vanishes_is_not_lost():
    a = np.float32([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]])
    for maps in (a[None], a.T[None]):
        (kappa,), (psi,) = doubly_factored.rank_one(jnp.asarray(maps))
        assert error(np.outer(kappa, psi), maps[0]) < SINGLE


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_whose_squares_no_float_holds(scale):
    maps = jnp.float32(rectified(0, 2, 4, 3) * scale)
    expected = doubly_factored.rank_one(maps / scale)
    for actual, half in zip(doubly_factored.rank_one(maps), expected, strict=True):
        assert error(actual, np.float64(half) * scale**0.5) < SINGLE


def test_numbers_that_are_not_finite_are_not_hidden():
    for bad in (np.nan, np.inf):
        maps = jnp.ones((2, 4, 3)).at[0, 1, 2].set(bad)
        for half in doubly_factored.rank_one(maps):
            assert not jnp.isfinite(half[0]).all()
            assert jnp.isfinite(half[1]).all()


# ------------------------------------------------------------------ statistics


@pytest.mark.parametrize("use_bias", [True, False])
def test_statistics_are_built_example_by_example(use_bias):
    maps = rectified(0, BATCH, LOCATIONS, CHANNELS)
    maps[2] = 0.0  # an example of which nothing is left
    g = np.random.default_rng(1).normal(size=(BATCH, OUT))
    found = statistics(
        jnp.float32(maps.reshape(BATCH, -1)), jnp.float32(g), use_bias=use_bias
    )
    expected = moments(maps, g)
    assert found._fields == ("k", "c", "g", "bias")[: 3 + use_bias]
    for actual, moment in zip(found, (*expected, expected[2]), strict=False):
        assert error(actual, moment) < SINGLE


def drawn(dtype=jnp.float32):
    x = jnp.asarray(rectified(0, BATCH, LOCATIONS * CHANNELS), dtype)
    return x, jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, OUT)), dtype)


def test_bfloat16_inputs_are_taken_apart_in_float32():
    x, g = drawn(jnp.bfloat16)
    found = statistics(x, g.astype(jnp.float32))
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    assert_equal(found, statistics(x.astype(jnp.float32), g.astype(jnp.float32)))


def test_what_is_not_due_is_zero():
    x, g = drawn()
    estimate = block_of().estimate
    made = {"k": {"k", "rows"}, "c": {"c", "rows"}, "g": {"g"}, "bias": {"g"}}
    for name, expected in made.items():
        due = BiasedDoublyFactors(*(field == name for field in made))
        traced = quick_jit(estimate)(x, g, jax.tree.map(jnp.asarray, due))
        for sums in (traced, estimate(x, g, due)):
            nonzero = {f for f, s in sums._asdict().items() if jnp.any(s != 0)}
            assert nonzero == expected


# ------------------------------------------------------------------ inverses


def factors_of(seed, copies=(), sizes=(LOCATIONS, CHANNELS, OUT)):
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(*copies, 2 * d, d)) for d in sizes]
    return [np.swapaxes(x, -1, -2) @ x / x.shape[-2] for x in rows]


def natural(k, c, g, kernel, bias, size=None):
    """Dense solves, with π and the cuts from their definitions."""
    nu = [np.trace(m) / len(m) for m in (k, c, g)]
    k, c, g = (cut(m, size) for m in (k, c, g))
    alone = np.linalg.solve(g + DAMPING * np.eye(len(g)), bias)
    root = (DAMPING / np.prod(nu)) ** (1 / 3)
    k, c, g = (
        m + v * root * np.eye(len(m)) for m, v in zip((k, c, g), nu, strict=True)
    )
    full = np.kron(np.kron(k, c), g)
    return np.linalg.solve(full, kernel.ravel()).reshape(kernel.shape), alone


@pytest.mark.parametrize("block_size", [None, 2])
def test_natural_gradient_is_the_dense_solve(block_size):
    # Copies of a lifted layer, each by itself; factors cut evenly, with padding.
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(2, LOCATIONS * CHANNELS, OUT))
    bias = rng.normal(size=(2, OUT))
    k, c, g = factors_of(0, (2,))
    block = block_of(dtype=jnp.float64).cut(block_size)

    @quick_jit
    def run(statistics, leaves):
        return block.precondition(block.invert(block.pack(statistics), DAMPING), leaves)

    with jax.enable_x64(True):
        found = run(BiasedDoublyFactors(k, c, g, g), {"kernel": kernel, "bias": bias})
    for i in range(2):
        expected = natural(k[i], c[i], g[i], kernel[i], bias[i], block_size)
        assert error(found["kernel"][i], expected[0]) < DOUBLE
        assert error(found["bias"][i], expected[1]) < DOUBLE


@pytest.mark.parametrize(("block_size", "use_bias"), [(None, True), (2, False)])
def test_first_inverses_are_the_identity(block_size, use_bias):
    block = block_of(use_bias).cut(block_size)
    zeros, inverses = block.init((2,))
    assert not any(x.any() for x in zeros)
    rng = np.random.default_rng(0)
    leaves = {"kernel": jnp.float32(rng.normal(size=(2, LOCATIONS * CHANNELS, OUT)))}
    if use_bias:
        leaves["bias"] = jnp.float32(rng.normal(size=(2, OUT)))
    assert_equal(block.precondition(inverses, leaves), leaves)


def test_factors_of_zeros_are_damped_alone():
    block = block_of()
    inverses = block.invert(block.init(())[0], 0.008)
    for inverse, amount in zip(inverses, (0.2, 0.2, 0.2, 0.008), strict=True):
        np.testing.assert_allclose(inverse, np.eye(len(inverse)) / amount, rtol=SINGLE)


# ------------------------------------------------------------------ in a model

MAP = (12, 4)  # 3 × 4 locations, 4 channels


class Head(nn.Module):
    """A convolution's map, flattened, under a wide layer or the mean of two."""

    lift: str = "none"

    @nn.compact
    def __call__(self, x):
        # A smooth rectifier: few zeros, and so a leading pair that stands well apart.
        x = nn.softplus(nn.Conv(MAP[1], (3, 3), name="conv")(x))
        x = x.reshape(*x.shape[:-3], -1)
        kinds = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.lift == "scan":
            add = nn.scan(
                lambda layer, total, x: (total + layer(x), None),
                in_axes=nn.broadcast,
                length=2,
                **kinds,
            )
            wide = nn.Dense(3, name="wide")
            return add(wide, jnp.zeros((*x.shape[:-1], 3)), x)[0] / 2
        if self.lift == "vmap":
            pair = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **kinds)
            return jnp.mean(pair(3, name="wide")(x), 0)
        kind = nn.remat(nn.Dense) if self.lift == "remat" else nn.Dense
        return kind(3, name="wide")(x)


def head(lift):
    """Its cross entropy; with ``examples``, one example at a time."""
    model = Head(lift)
    x = jnp.float32(np.random.default_rng(0).normal(size=(8, 3, 4, 2)))
    problem = classify(model, x)
    if lift != "examples":
        return problem

    def loss_fn(params, x, y):
        one = functools.partial(model.apply, {"params": params})
        return cross_entropy(jax.vmap(one)(x), y)

    return problem._replace(loss_fn=loss_fn)


@pytest.mark.parametrize("lift", ["none", "remat", "examples", "vmap", "scan"])
def test_a_layer_under_transforms(lift):
    problem = head(lift)
    layers = problem.trace(doubly_factored=sum(MAP), strict=True, verify=True)
    assert layers["wide"].block.kind == "doubly_factored"
    found = problem.evaluate(layers)[2]["wide"]
    x, y = problem.args
    own = {"params": problem.params["conv"]}
    maps = nn.softplus(nn.Conv(MAP[1], (3, 3)).apply(own, x)).reshape(8, *MAP)
    logits = Head(lift).apply({"params": problem.params}, x)
    copies = layers["wide"].tapped.copies
    assert copies == {"vmap": (2,), "scan": (2,)}.get(lift, ())
    signals = (jax.nn.softmax(logits) - jax.nn.one_hot(y, 3)) / max(copies, default=1)
    k, c, g = moments(np.asarray(maps, np.float64), np.asarray(signals, np.float64))
    for actual, moment in zip(found, (k, c, g, g), strict=True):
        assert error(actual, np.broadcast_to(moment, (*copies, *moment.shape))) < SINGLE
