"""Losses as people write them have the statistics of their terms, or are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from tests import oracles

xent = optax.softmax_cross_entropy_with_integer_labels
B, T, V = 6, 5, 5
X = jax.random.normal(jax.random.key(0), (B, T, 4))
Y = jax.random.randint(jax.random.key(1), (B, T), 0, V)
MASK = jnp.arange(T)[None] < jnp.array([5, 4, 3, 2, 1, 5])[:, None]
TARGETS = jax.random.normal(jax.random.key(2), (B, T))


class Heads(nn.Module):
    """Dense heads of the given widths on one hidden layer."""

    widths: tuple[int, ...] = (V,)

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="hidden")(x))
        heads = [nn.Dense(width)(x) for width in self.widths]
        return heads[0] if len(heads) == 1 else tuple(heads)


def mean(losses, weights):
    return jnp.sum(losses * weights) / jnp.sum(weights)


def logits(params, x):
    return Heads().apply({"params": params}, x)


def squares(params, x):
    return Heads((1,)).apply({"params": params}, x)[..., 0]


def two(params, x):
    return Heads((V, 3)).apply({"params": params}, x)


PARAMS, PARAMS_OF_ONE, PARAMS_OF_TWO = (
    Heads(widths).init(jax.random.key(3), X)["params"]
    for widths in ((V,), (1,), (V, 3))
)


def trained(loss_fn, params, *args, **trace):
    """The layers, and the statistics by path."""
    layers = lbopt.trace_layers(loss_fn, params, *args, **trace)
    evaluate = jax.jit(lbopt.value_grad_and_curvature(loss_fn, layers))
    value, grads, curvature = evaluate(params, *args)
    plain = jax.value_and_grad(loss_fn)(params, *args)
    assert oracles.error((value, grads)[0], plain[0]) < 1e-5
    assert max(jax.tree.leaves(jax.tree.map(oracles.error, grads, plain[1]))) < 1e-4
    return layers, curvature


def assert_statistics(found, params, x, signals, weights, n, head="Dense_0"):
    """Compares a head's factors with sums over terms, one signal for each."""
    hidden = nn.tanh(nn.Dense(4).apply({"params": params["hidden"]}, x))
    rows = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1)
    a = jnp.einsum("n,ni,nj->ij", weights, rows, rows) / jnp.sum(weights)
    g = jnp.einsum("n,ni,nj->ij", weights, signals, signals) / n
    assert oracles.error(found[head].a, a) < 1e-5
    assert oracles.error(found[head].g, g) < 1e-5


def softmax_signals(params, x, y, head=0, apply=logits):
    f = apply(params, x)
    f = f[head] if isinstance(f, tuple) else f
    return jax.nn.softmax(f) - jax.nn.one_hot(y, f.shape[-1])


def next_token(params, x, y, mask):
    return mean(xent(logits(params, x)[:, :-1], y[:, 1:]), mask[:, 1:])


@pytest.mark.parametrize("kind", [bool, float])
def test_the_next_token_with_the_shift_inside_the_loss(kind):
    mask = jnp.asarray(MASK, kind)
    layers, found = trained(next_token, PARAMS, X, Y, mask)
    assert layers.terms.text.startswith(f"{B} × {T - 1}, mean over axes 0, 1")
    x, y, w = X[:, :-1].reshape(-1, 4), Y[:, 1:].ravel(), MASK[:, 1:].ravel() * 1.0
    signals = softmax_signals(PARAMS, x, y)
    assert_statistics(found, PARAMS, x, signals, w, jnp.sum(w))


def every_negative(params, x, y):
    return mean(xent(logits(params, x), jnp.maximum(y, 0)), y >= 0)


def padding_is_true(params, x, y, padding):
    return mean(xent(logits(params, x), y), ~padding)


def of_a_last_axis(params, x, y, mask):
    return mean(xent(logits(params, x), y), mask[..., 0])


@pytest.mark.parametrize(
    ("loss_fn", "traced", "args", "text"),
    [
        # Traced without any padding, of another mark than the one that comes.
        (every_negative, (Y,), (jnp.where(MASK, Y, -100),), "argument 2 > -1"),
        (padding_is_true, (Y, ~MASK), (Y, ~MASK), "argument 3 != 1"),
        (of_a_last_axis, (Y, MASK[..., None]), (Y, MASK[..., None]), "argument 3"),
    ],
)
def test_padding_as_it_is_marked(loss_fn, traced, args, text):
    layers = lbopt.trace_layers(loss_fn, PARAMS, X, *traced)
    assert layers.terms.text.endswith(f"weighted by {text}")
    found = lbopt.value_grad_and_curvature(loss_fn, layers)(PARAMS, X, *args)[2]
    x, w = X.reshape(-1, 4), MASK.ravel() * 1.0
    signals = softmax_signals(PARAMS, x, Y.ravel())
    assert_statistics(found, PARAMS, x, signals, w, jnp.sum(w))


def test_outputs_without_an_axis_of_coordinates():
    def loss_fn(params, x, y, mask):
        return mean((squares(params, x) - y) ** 2, mask)

    layers, found = trained(loss_fn, PARAMS_OF_ONE, X, TARGETS, MASK)
    assert layers.terms.text.endswith("weighted by argument 3")
    x, w = X.reshape(-1, 4), MASK.ravel() * 1.0
    signals = 2 * (squares(PARAMS_OF_ONE, x) - TARGETS.ravel())[:, None]
    assert_statistics(found, PARAMS_OF_ONE, x, signals, w, jnp.sum(w))


@pytest.mark.parametrize("kind", [bool, float])
def test_every_output_of_several_has_the_weights(kind):
    def loss_fn(params, x, y, mask):
        first, second = two(params, x)
        return mean(xent(first, y) + xent(second, y % 3), mask)

    layers, found = trained(loss_fn, PARAMS_OF_TWO, X, Y, jnp.asarray(MASK, kind))
    assert "of each of 2 outputs" in layers.terms.text
    x, w = X.reshape(-1, 4), MASK.ravel() * 1.0
    for head, y in enumerate((Y.ravel(), Y.ravel() % 3)):
        signals = softmax_signals(PARAMS_OF_TWO, x, y, head, two)
        name = f"Dense_{head}"
        assert_statistics(found, PARAMS_OF_TWO, x, signals, w, jnp.sum(w), name)


def test_another_head_keeps_its_signals_beside_stated_weights():
    weights = jnp.linspace(0.5, 2.0, B * T).reshape(B, T)

    def loss_fn(params, x, y):
        first, second = two(params, x)
        first = lbopt.likelihood(first, "categorical", weights=weights)
        return mean(xent(first, y), weights) + jnp.mean(xent(second, y % 3))

    layers, found = trained(loss_fn, PARAMS_OF_TWO, X, Y)
    # The two means would have different shares of a device's part.
    with pytest.raises(ValueError, match="others without them reach the loss, too"):
        lbopt.value_grad_and_curvature(loss_fn, layers, axis_name="data")
    # Its signals are those of the loss; n is that of the stated head.
    x, y = X.reshape(-1, 4), Y.ravel() % 3
    signals = softmax_signals(PARAMS_OF_TWO, x, y, 1, two) / (B * T)
    g = jnp.sum(weights) * signals.T @ signals
    assert oracles.error(found["Dense_1"].g, g) < 1e-5


def test_rows_that_the_loss_adds_to_those_of_the_batch_count():
    def loss_fn(params, first, second, y):
        both = logits(params, jnp.concatenate([first, second]))
        return jnp.mean(xent(both, jnp.concatenate([y, y])))

    args = X[:, 0], X[:, 1], Y[:, 0]
    x, y = jnp.concatenate(args[:2]), jnp.concatenate([args[2]] * 2)
    signals = softmax_signals(PARAMS, x, y)
    for trace in ({}, {"batch_size": 2 * B}):
        _, found = trained(loss_fn, PARAMS, *args, **trace)
        assert_statistics(found, PARAMS, x, signals, jnp.ones(2 * B), 2 * B)


def test_the_value_of_one_action_is_one_term():
    def loss_fn(params, x, actions, targets):
        values = jnp.take_along_axis(logits(params, x), actions[:, None], 1)
        return jnp.mean((values[:, 0] - targets) ** 2)

    layers = lbopt.trace_layers(
        loss_fn, PARAMS, X[:, 0], Y[:, 0], 1 + TARGETS[:, 0] ** 2
    )
    assert layers.terms.text == f"{B}, mean over axis 0 of the outputs"


def test_outputs_that_are_compared_have_numbers_of_their_own():
    # If they were the same in an experiment, no gradient would reach them.
    weights = jnp.asarray(MASK[:, 2], float)

    def consistency(params, teacher, x, w):
        apart = logits(params, x) - logits(teacher, x)
        return mean(jnp.sum(apart**2, axis=-1), w)

    teacher = jax.tree.map(lambda p: 1.1 * p, PARAMS)
    x = X[:, 0]
    layers, found = trained(consistency, PARAMS, teacher, x, weights)
    assert layers.terms.text.endswith("2 outputs, weighted by argument 3")
    signals = 2 * (logits(PARAMS, x) - logits(teacher, x))
    assert_statistics(found, PARAMS, x, signals, weights, jnp.sum(weights))

    def distillation(params, teacher, x):
        return jnp.mean((logits(params, x) - logits(teacher, x)) ** 2)

    terms = lbopt.trace_layers(distillation, PARAMS, teacher, x).terms
    assert terms.text.startswith(f"{B} × {V}, mean over axes 0, 1")


def test_a_norm_over_the_coordinates_makes_them_one_event():
    def similarity(params, x, y):
        f, g = logits(params, x), jax.lax.stop_gradient(logits(params, y))
        cosines = optax.losses.cosine_similarity(f, g, epsilon=1e-6)
        return -jnp.mean(cosines)

    terms = lbopt.trace_layers(similarity, PARAMS, X[:, 0], X[:, 1]).terms
    assert terms.text == f"{B}, mean over axis 0 of the outputs"


def test_a_stated_number_keeps_the_weights_that_are_found():
    def loss_fn(params, x, y, mask):
        return mean(xent(logits(params, x), y), mask)

    args = X, Y, MASK
    n = int(jnp.sum(MASK))
    found = lbopt.trace_layers(loss_fn, PARAMS, *args)
    stated = lbopt.trace_layers(loss_fn, PARAMS, *args, batch_size=n)
    assert stated.terms == found.terms
    with pytest.raises(ValueError, match=rf"batch_size={B}, but .* divides by {n}"):
        lbopt.trace_layers(loss_fn, PARAMS, *args, batch_size=B)
    shifted = lbopt.trace_layers(
        next_token, PARAMS, *args, batch_size=int(jnp.sum(MASK[:, 1:]))
    )
    assert shifted.terms.text.endswith("weighted by argument 3")


def test_missing_targets_are_padding():
    def loss_fn(params, x, y):
        real = ~jnp.isnan(y)
        return mean((squares(params, x) - jnp.where(real, y, 0)) ** 2, real)

    layers = lbopt.trace_layers(loss_fn, PARAMS_OF_ONE, X, TARGETS)
    assert layers.terms.text.endswith("weighted by argument 2 != nan")
    y = jnp.where(MASK, TARGETS, jnp.nan)
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers)
    found = evaluate(PARAMS_OF_ONE, X, y)[2]
    x, w = X.reshape(-1, 4), MASK.ravel() * 1.0
    signals = 2 * (squares(PARAMS_OF_ONE, x) - TARGETS.ravel())[:, None]
    assert_statistics(found, PARAMS_OF_ONE, x, signals, w, jnp.sum(w))


def online_and_target(params, x, y):
    online, target = jnp.split(logits(params, jnp.concatenate([x, y])), 2)
    return jnp.mean((online - jax.lax.stop_gradient(target)) ** 2)


def binary(params, x, y):
    weights = jnp.where(y == 1, 3.0, 1.0)
    return mean(optax.sigmoid_binary_cross_entropy(squares(params, x), y), weights)


def over_all(params, x, y):
    weights = jnp.where(y == 1, 3.0, 1.0)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(squares(params, x), y) * weights)


@pytest.mark.parametrize(
    ("loss_fn", "params", "args", "reason"),
    [
        (
            lambda p, x, y, v, w: (
                mean(xent(two(p, x)[0], y), v) + mean(xent(two(p, x)[1], y % 3), w)
            ),
            PARAMS_OF_TWO,
            (X, Y, MASK, MASK[::-1]),
            "terms of different weights",
        ),
        (
            lambda p, x, y, w: (
                mean(xent(two(p, x)[0], y), w) + jnp.mean(xent(two(p, x)[1], y % 3))
            ),
            PARAMS_OF_TWO,
            (X, Y, MASK),
            "terms of different weights",
        ),
        (
            lambda p, x, y, w: (
                mean(xent(logits(p, x), y), w) + 1e-3 * jnp.mean(logits(p, x) ** 2)
            ),
            PARAMS,
            (X, Y, MASK),
            "terms of different weights",
        ),
        (
            lambda p, f, y, w: (
                mean(xent(f, y), w) + 1e-4 * jnp.mean(jax.nn.logsumexp(f, axis=-1) ** 2)
            ),
            PARAMS,
            (X, Y, MASK),
            "argument 3 takes part in it in a way that cannot be told",
        ),
        # Coordinates of one event, masked one by one.
        (
            lambda p, f, y, w: jnp.mean(jnp.sum((f - y[..., None]) ** 2 * w, axis=-1)),
            PARAMS,
            (X, TARGETS, jnp.ones((B, T, V), bool)),
            "argument 3 takes part",
        ),
        (
            lambda p, x, y, w: mean(xent(jax.jit(logits)(p, x), y), w),
            PARAMS,
            (X[:, 0], Y[:, 0], MASK[:, 1]),
            "whether argument 3 marks padding cannot be told",
        ),
        (
            lambda p, x, y, w: mean(
                xent(logits(p, x.reshape(-1, 4)), y.ravel()), w.ravel()
            ),
            PARAMS,
            (X, Y, MASK),
            "rows of this batch have no part in it",
        ),
        # Rows of a target, which no gradient reaches, in the call of the others.
        (online_and_target, PARAMS, (X[:, 0], X[:, 1]), "rows of this batch have no"),
        (
            lambda p, x, y, near: jnp.mean(
                jnp.where(near == 1, squares(p, x) ** 2, squares(p, y) ** 2)
            ),
            PARAMS_OF_ONE,
            (X[:, 0], X[:, 1], Y[:, 0] % 2),
            "an argument chooses which of its outputs count",
        ),
        (binary, PARAMS_OF_ONE, (X[:, 0], (Y[:, 0] > 2) * 1.0), "argument 2 takes"),
        (over_all, PARAMS_OF_ONE, (X[:, 0], (Y[:, 0] > 2) * 1.0), "different weights"),
    ],
)
def test_weights_that_cannot_be_told_are_refused(loss_fn, params, args, reason):
    def on_outputs(params, x, *args):
        return loss_fn(params, logits(params, x), *args)

    own = on_outputs if loss_fn.__code__.co_varnames[1] == "f" else loss_fn
    message = rf"{reason}.*State the weights .*likelihood\(outputs, ..., weights=\)"
    with pytest.raises(ValueError, match=message):
        lbopt.trace_layers(own, params, *args)


@pytest.mark.parametrize(
    ("loss_fn", "args"),
    [
        # Squared errors of integers are no classes of different weights.
        (lambda p, x, y: jnp.mean((squares(p, x) - y) ** 2), (X[:, 0], 1 + Y[:, 0])),
        (
            lambda p, x, y: jnp.mean(
                optax.sigmoid_binary_cross_entropy(squares(p, x), y)
            ),
            (X[:, 0], (Y[:, 0] > 2) * 1.0),
        ),
        # Of signs as labels, 0 would have no gradient.
        (
            lambda p, x, y: jnp.mean(jnp.logaddexp(0, -y * squares(p, x))),
            (X[:, 0], jnp.sign(TARGETS[:, 0])),
        ),
    ],
)
def test_labels_without_weights_of_classes_are_accepted(loss_fn, args):
    layers = lbopt.trace_layers(loss_fn, PARAMS_OF_ONE, *args)
    assert layers.terms.text == f"{B}, mean over axis 0 of the outputs"
