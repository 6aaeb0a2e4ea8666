"""The terms of a loss are found by experiments on its head, stated, or refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from tests import oracles

V, B, T = 11, 4, 9
xent = optax.softmax_cross_entropy_with_integer_labels


class Tied(nn.Module):
    """A model of tokens whose output weights are its embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, 6)
        return embed.attend(nn.tanh(nn.Dense(6)(embed(tokens))))


MODEL = Tied()
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 3, V)
LABELS = jax.random.randint(jax.random.key(1), (B, T), 3, V)
PARAMS = MODEL.init(jax.random.key(2), TOKENS)["params"]
MASK = jnp.broadcast_to(jnp.arange(T) < 6, (B, T))
LENGTHS = jnp.array([9, 5, 4, 3])
CLASS_WEIGHTS = jnp.linspace(1.0, 2.0, V)


def logits(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def token_losses(params, tokens, labels):
    return xent(logits(params, tokens), labels)


def masked(params, tokens, labels, mask):
    losses = token_losses(params, tokens, labels)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def mean(params, tokens, labels):
    return jnp.mean(token_losses(params, tokens, labels))


def sum_over_tokens(params, tokens, labels):
    return jnp.mean(jnp.sum(token_losses(params, tokens, labels), 1))


def next_token(params, tokens):
    return jnp.mean(token_losses(params, tokens[:, :-1], tokens[:, 1:]))


def without_the_last(params, tokens):
    return jnp.mean(xent(logits(params, tokens)[:, :-1], tokens[:, 1:]))


def flattened(params, tokens, labels):
    return jnp.mean(xent(logits(params, tokens).reshape(-1, V), labels.reshape(-1)))


def smoothed(params, tokens, labels):
    hot = optax.smooth_labels(jax.nn.one_hot(labels, V), 0.1)
    return jnp.mean(optax.softmax_cross_entropy(logits(params, tokens), hot))


def sequence_weights(params, tokens, labels, weights):
    losses = jnp.mean(token_losses(params, tokens, labels), 1)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def where(params, batch):
    losses = token_losses(params, batch["x"], batch["y"])
    return jnp.mean(losses, where=batch["mask"])


def sentinel(params, tokens, labels):
    real = labels != -100
    losses = token_losses(params, tokens, jnp.where(real, labels, 0))
    return jnp.sum(losses * real) / jnp.sum(real)


def padded_next_token(params, tokens):
    real = tokens[:, 1:] != 0
    losses = xent(logits(params, tokens)[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * real) / jnp.sum(real)


@pytest.mark.parametrize(
    ("loss_fn", "args", "text"),
    [
        (mean, (TOKENS, LABELS), "4 × 9, mean over axes 0, 1"),
        (sum_over_tokens, (TOKENS, LABELS), "4, mean over axis 0"),
        (next_token, (TOKENS,), "4 × 8, mean over axes 0, 1"),
        (without_the_last, (TOKENS,), "4 × 8, mean over axes 0, 1"),
        (flattened, (TOKENS, LABELS), "4 × 9, mean over axes 0, 1"),
        (smoothed, (TOKENS, LABELS), "4 × 9, mean over axes 0, 1"),
        (masked, (TOKENS, LABELS, MASK), "weighted by argument 3"),
        (masked, (TOKENS, LABELS, MASK * 1.0), "weighted by argument 3"),
        (masked, (TOKENS, LABELS, MASK * 1), "weighted by argument 3"),
        (
            sequence_weights,
            (TOKENS, LABELS, jnp.ones(B)),
            "4 × 9, mean over axes 0, 1 of the outputs, weighted by argument 3",
        ),
        (
            where,
            ({"x": TOKENS, "y": LABELS, "mask": MASK},),
            "weighted by argument 1['mask']",
        ),
        (
            sentinel,
            (TOKENS, jnp.where(MASK, LABELS, -100)),
            "weighted by argument 2 != -100",
        ),
        (padded_next_token, (TOKENS,), "weighted by argument 1 != 0"),
    ],
)
def test_terms_are_found(loss_fn, args, text):
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args)
    assert text in layers.terms.text
    assert f"terms: {layers.terms.text}" in str(layers)


def test_shapes_are_enough():
    shape = jax.ShapeDtypeStruct((B, T), jnp.int32)
    assert lbopt.trace_layers(mean, PARAMS, shape, shape).terms.size == B * T


@pytest.mark.parametrize(
    ("loss_fn", "args", "reason"),
    [
        (
            lambda p, x, y: jnp.sum(token_losses(p, x, y)),
            (TOKENS, LABELS),
            "it adds up the examples",
        ),
        (
            lambda p, x, y: jnp.sum(token_losses(p, x, y)) / 36,
            (TOKENS, LABELS),
            "it adds up the examples",
        ),
        (
            lambda p, x, y, n: masked(
                p, x, y, jnp.arange(y.shape[1])[None] < n[:, None]
            ),
            (TOKENS, LABELS, LENGTHS),
            "rows of this batch have no part",
        ),
        (
            lambda p, x, y: masked(p, x, y, CLASS_WEIGHTS[y]),
            (TOKENS, LABELS),
            "different weights, such as those of classes",
        ),
        (
            lambda p, x, y: jnp.mean(xent(jax.jit(logits)(p, x), y)),
            (TOKENS, LABELS),
            "more axes than one example's",
        ),
        (
            lambda p, x, y, a, b: masked(p, x, y, a * b),
            (TOKENS, LABELS, jnp.ones((B, T)), MASK),
            "several of its arguments",
        ),
        (
            lambda p, x, y, w: masked(p, x, y, jnp.square(w)),
            (TOKENS, LABELS, jnp.ones((B, T))),
            "in a way that cannot be told",
        ),
    ],
)
def test_unknown_terms_are_refused_with_the_ways_out(loss_fn, args, reason):
    with pytest.raises(ValueError, match=reason) as error:
        lbopt.trace_layers(loss_fn, PARAMS, *args)
    assert "batch_size=" in str(error.value)
    assert "lbopt.likelihood" in str(error.value)
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args, batch_size=B * T)
    assert layers.terms.size == B * T


def trace_of_g(loss_fn, *args, trace=(), **options):
    layers = lbopt.trace_layers(loss_fn, PARAMS, *args, **dict(trace))
    f = lbopt.value_grad_and_curvature(loss_fn, layers, **options)
    curvature = jax.jit(lambda *a: f(PARAMS, *a)[2])(*args)
    return float(jnp.trace(curvature["Dense_0"].g))


def test_statistics_are_means_over_tokens():
    def one(x, y):  # the sum over one token's own loss, of a causal-free model
        grads = jax.grad(lambda p: mean(p, x[None, None], y[None, None]))(PARAMS)
        return jnp.sum(grads["Dense_0"]["bias"] ** 2)

    expected = jnp.mean(jax.vmap(one)(TOKENS.reshape(-1), LABELS.reshape(-1)))
    assert oracles.error(trace_of_g(mean, TOKENS, LABELS), expected) < 1e-5
    stated = trace_of_g(
        mean, TOKENS, LABELS, trace={"batch_size": B * T}, batch_size=B * T
    )
    assert oracles.error(stated, expected) < 1e-5
    # A number that was stated for one batch is in proportion for another.
    layers = lbopt.trace_layers(mean, PARAMS, TOKENS, LABELS, batch_size=B * T)
    f = lbopt.value_grad_and_curvature(mean, layers)
    half = f(PARAMS, TOKENS[:2], LABELS[:2])[2]["Dense_0"].g
    found = trace_of_g(mean, TOKENS[:2], LABELS[:2])
    assert oracles.error(jnp.trace(half), found) < 1e-5


@pytest.mark.parametrize("sizes", [(8, 12, 12), (8, 12, 12, 1)])
def test_pixels_are_terms(sizes):
    class Pixels(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(1, (3, 3))(x).reshape(-1, *sizes[1:])

    x, y = jnp.ones((*sizes[:3], 2)), jnp.ones(sizes)
    params = Pixels().init(jax.random.key(0), x)["params"]

    def loss_fn(params, x, y):
        outputs = Pixels().apply({"params": params}, x)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, y))

    if len(sizes) == 3:  # the last axis has a size of its own in the model
        with pytest.raises(ValueError, match="cannot find the terms"):
            lbopt.trace_layers(
                lambda p, x, y: loss_fn(p, x, y.reshape(8, 12, 12)), params, x, y
            )
    assert lbopt.trace_layers(loss_fn, params, x, y).terms.size == 8 * 12 * 12


def test_a_mean_of_squares_is_over_all_its_coordinates():
    model, x = nn.Dense(5), jnp.ones((8, 3))
    params = {"top": model.init(jax.random.key(0), x)["params"]}

    def loss_fn(params, x, y, reduce):
        squares = (model.apply({"params": params["top"]}, x) - y) ** 2
        return jnp.mean(reduce(squares))

    y = jnp.ones((8, 5))
    over_all = lbopt.trace_layers(loss_fn, params, x, y, lambda s: s)
    assert over_all.terms.text.startswith("8 × 5, mean over axes 0, 1")
    summed = lbopt.trace_layers(loss_fn, params, x, y, lambda s: jnp.sum(s, 1))
    assert summed.terms.text.startswith("8, mean over axis 0")


def test_the_batch_is_that_of_the_outputs():
    # Nested arguments, and others that look like batches.
    model, x = nn.Dense(3), jnp.ones((8, 5))
    params = {"top": model.init(jax.random.key(0), x)["params"]}

    def loss_fn(params, prior, batch, *, scale):
        f = (
            model.apply({"params": params["top"]}, batch["obs"]["x"])
            + prior["log"][None]
        )
        return scale * jnp.mean(xent(f, batch["y"]))

    args = {"log": jnp.zeros(3)}, {"obs": {"x": x}, "y": jnp.arange(8) % 3}
    layers = lbopt.trace_layers(loss_fn, params, *args, scale=1.0)
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    value, grads, curvature = f(params, *args, scale=1.0)
    per_example = jax.vmap(
        lambda x, y: jax.grad(loss_fn)(
            params, args[0], {"obs": {"x": x[None]}, "y": y[None]}, scale=1.0
        )["top"]["bias"]
    )(x, args[1]["y"])
    expected = per_example.T @ per_example / 8
    assert oracles.error(curvature["top"].g, expected) < 1e-5
    assert value == loss_fn(params, *args, scale=1.0)
    del grads


def test_an_empty_batch_is_refused():
    args = TOKENS[:0], LABELS[:0]
    with pytest.raises(ValueError, match="holds no examples"):
        lbopt.trace_layers(mean, PARAMS, *args)
    layers = lbopt.trace_layers(mean, PARAMS, TOKENS, LABELS)
    with pytest.raises(ValueError, match="holds no examples"):
        lbopt.value_grad_and_curvature(mean, layers)(PARAMS, *args)


def test_experiments_leave_compiled_functions_of_the_loss_alone():
    apply = jax.jit(logits)

    def loss_fn(params, tokens, labels):
        return jnp.mean(xent(apply(params, tokens), labels))

    lbopt.trace_layers(loss_fn, PARAMS, TOKENS, LABELS, batch_size=B * T)
    for tokens in (TOKENS[:3, :3], TOKENS):
        assert oracles.error(apply(PARAMS, tokens), logits(PARAMS, tokens)) < 1e-6


@pytest.mark.parametrize("count", [2, 6])
def test_padding_by_a_count_of_rows_is_refused(count):
    model, x = nn.Dense(3), jnp.ones((8, 5))
    params = {"top": model.init(jax.random.key(0), x)["params"]}

    def loss_fn(params, x, y, n):
        w = jnp.asarray(jnp.arange(len(y)) < n, jnp.float32)
        losses = xent(model.apply({"params": params["top"]}, x), y)
        return jnp.sum(losses * w) / jnp.sum(w)

    with pytest.raises(ValueError, match="rows of this batch have no part"):
        lbopt.trace_layers(loss_fn, params, x, jnp.arange(8) % 3, count)


def test_a_checkpointed_model_is_traced_again_and_again():
    apply = jax.checkpoint(logits)

    def loss_fn(params, tokens, labels):
        outputs = lbopt.likelihood(apply(params, tokens), "categorical")
        return jnp.mean(xent(outputs, labels))

    for _ in range(2):
        terms = lbopt.trace_layers(loss_fn, PARAMS, TOKENS, LABELS).terms
        assert terms.size == B * T
    assert (
        oracles.error(apply(PARAMS, TOKENS[:3, :3]), logits(PARAMS, TOKENS[:3, :3]))
        == 0
    )


@pytest.mark.parametrize("signs", [[1, 1, 1, 1], [1, -1, 1, -1]])
def test_advantages_weight_by_their_size(signs):
    # Whatever the signs in the batch that is traced, those of others may be mixed.
    model, x = nn.Dense(3), jax.random.normal(jax.random.key(0), (4, 5))
    params = {"top": model.init(jax.random.key(0), x)["params"]}
    y, advantages = jnp.arange(4) % 3, jnp.array([1.0, 2.0, 0.5, 3.0])

    def loss_fn(params, x, y, advantages):
        return jnp.mean(xent(model.apply({"params": params["top"]}, x), y) * advantages)

    layers = lbopt.trace_layers(loss_fn, params, x, y, advantages * jnp.array(signs))
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    mixed = f(params, x, y, advantages * jnp.array([1, -1, -1, 1]))[2]["top"]
    signals = jax.nn.softmax(model.apply({"params": params["top"]}, x))
    signals -= jax.nn.one_hot(y, 3)
    g = jnp.einsum("n,ni,nj->ij", advantages, signals, signals) / 4
    assert oracles.error(mixed.g, g) < 1e-5
    ones = jnp.pad(x, ((0, 0), (0, 1)), constant_values=1)
    a = jnp.einsum("n,ni,nj->ij", advantages, ones, ones) / jnp.sum(advantages)
    assert oracles.error(mixed.a, a) < 1e-5


def test_a_second_mask_beside_the_weights_is_refused():
    def loss_fn(params, tokens, labels, mask):
        return masked(params, tokens, labels, mask & (labels != 4))

    with pytest.raises(ValueError, match="rows of this batch have no part"):
        lbopt.trace_layers(loss_fn, PARAMS, TOKENS, LABELS, jnp.ones((B, T), bool))


def test_a_mask_of_ones_is_still_a_mask():
    def loss_fn(params, tokens, labels, mask):
        return jnp.mean(token_losses(params, tokens, labels) * mask)

    mask = jnp.ones((B, T), int)
    layers = lbopt.trace_layers(loss_fn, PARAMS, TOKENS, LABELS, mask)
    assert layers.terms.text.endswith("weighted by argument 3")


def test_arguments_of_numpy_are_those_that_the_loss_sees():
    y = np.asarray(LABELS, np.int64)
    w = np.ones((B, T), np.float64)  # a type that JAX does not have here
    layers = lbopt.trace_layers(masked, PARAMS, np.asarray(TOKENS), y, w)
    assert layers.terms.text.endswith("weighted by argument 3")
