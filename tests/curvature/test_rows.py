"""Padding and weights: a padded batch has the statistics of the batch without."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from tests import oracles
from tests.problems import cross_entropy

xent = optax.softmax_cross_entropy_with_integer_labels
BATCH, REAL, LENGTH, REAL_LENGTH, WORDS = 8, 6, 6, 4, 7


class Sequence(nn.Module):
    """Dense layers on tokens, a tied embedding, a norm layer, and one over time."""

    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(WORDS, 5)
        x = embed(words)
        x = nn.LayerNorm()(nn.tanh(nn.Dense(4)(x)))
        x = nn.relu(nn.Conv(5, (3,), padding="CAUSAL")(x))
        x = nn.remat(nn.Dense)(5)(x)
        gain = self.param("gain", nn.initializers.ones, (5,))
        return embed.attend(x * gain[None, None])


class Picture(nn.Module):
    """Convolutions with and without groups, and a doubly factored layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=(2, 2))(x))
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2)(x))
        x = nn.tanh(nn.Dense(6, name="wide")(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


def weighted_mean(losses, w):
    return jnp.sum(losses * w) / jnp.sum(w)


def pad(x, *sizes):
    """Padding of numbers that would show if they counted."""
    edges = [(0, s - n) for s, n in zip(sizes, x.shape, strict=False)]
    edges += [(0, 0)] * (x.ndim - len(edges))
    return jnp.pad(x, edges, constant_values=5)


WORDS_IN = jax.random.randint(jax.random.key(0), (REAL, REAL_LENGTH), 0, WORDS)
LABELS = jax.random.randint(jax.random.key(1), (REAL, REAL_LENGTH), 0, WORDS)
REAL_TOKENS = pad(jnp.zeros((REAL, REAL_LENGTH)), BATCH, LENGTH) == 0


def sequence_loss(params, words, labels, w, stated):
    f = Sequence().apply({"params": params}, words)
    if stated:
        f = lbopt.likelihood(f, "categorical", weights=w)
    return weighted_mean(xent(f, labels), w)


SEQUENCE = Sequence().init(jax.random.key(2), WORDS_IN)["params"]


def statistics(loss_fn, params, args, *, trace=(), **options):
    layers = lbopt.trace_layers(loss_fn, params, *args, **dict(trace))
    f = lbopt.value_grad_and_curvature(loss_fn, layers, **options)
    return jax.jit(lambda p, *a: f(p, *a, rng=jax.random.key(3)))(params, *args)


def assert_same(padded, plain, bound=2e-5):
    (value, grads, curvature), (value0, grads0, curvature0) = padded, plain
    assert oracles.error(value, value0) < bound
    tree = jax.tree.map(oracles.error, (grads, curvature), (grads0, curvature0))
    worst = max(jax.tree_util.tree_leaves_with_path(tree), key=lambda pair: pair[1])
    assert worst[1] < bound, worst


@pytest.mark.parametrize(
    ("fisher", "sharing", "kind"),
    [
        *[("empirical", "expand", bool), ("empirical", "reduce", float)],
        *[("exact", "expand", float), ("exact", "reduce", bool)],
    ],
)
def test_padding_of_examples_and_tokens_changes_nothing(fisher, sharing, kind):
    # Reduced, locations are averaged: padding alone is left out of the mean.
    loss_fn = functools.partial(sequence_loss, stated=fisher == "exact")
    options = {"trace": {"weight_sharing": sharing}, "fisher": fisher}
    mask = jnp.asarray(REAL_TOKENS, kind)
    padded = pad(WORDS_IN, BATCH, LENGTH), pad(LABELS, BATCH, LENGTH), mask
    plain = WORDS_IN, LABELS, jnp.ones_like(WORDS_IN, kind)
    assert_same(
        statistics(loss_fn, SEQUENCE, padded, **options),
        statistics(loss_fn, SEQUENCE, plain, **options),
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_of_pictures_changes_nothing(sharing):
    x = jax.random.normal(jax.random.key(0), (REAL, 6, 6, 2))
    y = jnp.arange(REAL) % 3
    params = Picture().init(jax.random.key(1), x)["params"]

    def loss_fn(params, x, y, w):
        return weighted_mean(xent(Picture().apply({"params": params}, x), y), w)

    trace = {"weight_sharing": sharing, "doubly_factored": {"wide": (9, 4)}}
    evaluate = functools.partial(statistics, loss_fn, params, trace=trace)
    w = jnp.asarray(jnp.arange(BATCH) < REAL, float)
    padded = pad(x, BATCH).at[REAL:].set(jnp.nan), pad(y, BATCH) % 3, w
    with_nan = evaluate(padded)[2]["Conv_0"].a  # a row of weight 0 may hold anything
    assert bool(jnp.all(jnp.isfinite(with_nan)))
    padded = pad(x, BATCH), pad(y, BATCH) % 3, w
    assert_same(evaluate(padded), evaluate((x, y, jnp.ones(REAL))))


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_weights_are_those_of_repeated_examples(fisher):
    # An example of weight 3 is that example three times.
    model, repeats = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]), [1, 3, 2, 1]
    x = jax.random.normal(jax.random.key(0), (4, 5))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params, x, y, w):
        f = lbopt.likelihood(model.apply({"params": params}, x), "categorical")
        return weighted_mean(xent(f, y), w)

    y, w = jnp.array([0, 1, 2, 1]), jnp.asarray(repeats, float)
    again = jnp.repeat(jnp.arange(4), jnp.asarray(repeats), total_repeat_length=7)
    assert_same(
        statistics(loss_fn, params, (x, y, w), fisher=fisher),
        statistics(loss_fn, params, (x[again], y[again], jnp.ones(7)), fisher=fisher),
    )


def test_class_weights_with_another_divisor_are_stated():
    model, x = (
        nn.Sequential([nn.Dense(3)]),
        jax.random.normal(jax.random.key(0), (6, 4)),
    )
    params = model.init(jax.random.key(1), x)["params"]
    y, classes = jnp.arange(6) % 3, jnp.array([1.0, 2.0, 4.0])

    def loss_fn(params, x, y):
        w = classes[y]
        f = model.apply({"params": params}, x)
        f = lbopt.likelihood(f, "categorical", weights=w, terms=len(y))
        return jnp.sum(xent(f, y) * w) / len(y)

    g = statistics(loss_fn, params, (x, y))[2]["layers_0"].g
    p = jax.nn.softmax(model.apply({"params": params}, x))
    signals = p - jax.nn.one_hot(y, 3)
    expected = jnp.einsum("n,ni,nj->ij", classes[y], signals, signals) / 6
    assert oracles.error(g, expected) < 1e-5


def test_traced_terms_and_a_batch_of_padding_alone():
    model, x = (
        nn.Sequential([nn.Dense(3)]),
        jax.random.normal(jax.random.key(0), (6, 4)),
    )
    params, y = model.init(jax.random.key(1), x)["params"], jnp.arange(6) % 3

    def loss_fn(params, x, y, w):
        return weighted_mean(xent(model.apply({"params": params}, x), y), w)

    w = jnp.asarray(jnp.arange(6) < 2, float)
    layers = lbopt.trace_layers(loss_fn, params, x, y, w)

    def evaluate(w, **options):
        f = lbopt.value_grad_and_curvature(loss_fn, layers, **options)
        return f(params, x, y, w)[2]["layers_0"]

    stated = jax.jit(lambda w: evaluate(w, batch_size=jnp.sum(w)))(w)
    assert oracles.error(stated.g, evaluate(w).g) < 1e-6
    nothing = evaluate(jnp.zeros(6))
    assert not bool(jnp.any(nothing.a))
    assert not bool(jnp.any(nothing.g))


def test_weights_that_fit_no_axis_of_a_layer_are_refused():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.SimpleCell(4))(x))

    x = jnp.ones((4, 5, 2))
    params = Recurrent().init(jax.random.key(0), x)["params"]

    def loss_fn(params, x, y, w):
        return weighted_mean(xent(Recurrent().apply({"params": params}, x), y), w)

    args = x, jnp.zeros((4, 5), int), jnp.ones((4, 5))
    layers = lbopt.trace_layers(loss_fn, params, *args)
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    with pytest.raises(ValueError, match=r"layer 'SimpleCell_0/.*do not fit the axes"):
        f(params, *args)
    # Without statistics of the cell, whose layers the mask leaves out.
    shapes = layers["Dense_0"].block.factor_shapes(())
    due = {"Dense_0": jax.tree.map(lambda _: True, shapes)}
    assert bool(jnp.any(f(params, *args, due=due)[2]["Dense_0"].a))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_loss_scaling_does_not_scale_the_curvature(dtype):
    model = nn.Sequential([nn.Dense(4, dtype=dtype), nn.tanh, nn.Dense(3, dtype=dtype)])
    x, y = jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(6) % 3
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params, x, y):
        return cross_entropy(model.apply({"params": params}, x), y)

    layers = lbopt.trace_layers(loss_fn, params, x, y)
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    scaled, plain = f(params, x, y, loss_scale=2.0**10), f(params, x, y)
    assert_same(scaled, plain, 1e-6 if dtype == jnp.float32 else 1e-2)


def test_a_loss_without_a_mask_costs_the_products_of_its_statistics_alone():
    n, sizes = 64, (32, 48, 16)
    model = nn.Sequential([nn.Dense(sizes[1]), nn.relu, nn.Dense(sizes[2])])
    x, y = jnp.ones((n, sizes[0])), jnp.arange(n) % sizes[2]
    params = model.init(jax.random.key(0), x)["params"]

    def plain(params, x, y):
        return jnp.mean(xent(model.apply({"params": params}, x), y))

    def masked(params, x, y, w):
        return weighted_mean(xent(model.apply({"params": params}, x), y), w)

    def flops(function, *args):
        return jax.jit(function).lower(params, *args).compile().cost_analysis()["flops"]

    def added(loss_fn, *args):
        layers = lbopt.trace_layers(loss_fn, params, *args)
        evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
        return flops(evaluate, *args) - flops(jax.value_and_grad(loss_fn), *args)

    # 2 n d² for each factor; the last row of A, that of the bias, is a sum.
    widths = [*sizes[:2], *sizes[1:]]
    products = sum(2 * n * d * d for d in widths)
    assert products <= added(plain, x, y) < 1.05 * products
    w = jnp.ones(n)
    assert added(masked, x, y, w) > 1.2 * products  # a backward pass more
