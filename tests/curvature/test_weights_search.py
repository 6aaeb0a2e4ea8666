"""The argument that weights the terms of a loss is found, or refused."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lbopt.curvature import terms, weights_search
from lbopt.curvature.head_experiment import SMALL, Unproved
from tests.problems import TOKEN_MODEL, head_of

xent = optax.softmax_cross_entropy_with_integer_labels
B, T, V = 4, 9, 5
X = jnp.ones((B, T, 1))
Y = jnp.full((B, T), 3).at[:, -2:].set(1)
MASK = jnp.broadcast_to(jnp.arange(T) < 6, (B, T))
SMALL_SHAPE = (SMALL, SMALL, V)


def losses(params, x, y):
    return xent(TOKEN_MODEL.apply({"params": params}, x), y)


def plain(params, x, y):
    return jnp.mean(losses(params, x, y))


def masked(params, x, y, w):
    return jnp.sum(losses(params, x, y) * w) / jnp.sum(w)


def over_all(params, x, y, w):
    return jnp.mean(losses(params, x, y) * w)


def by_example(params, x, y, w):
    return jnp.sum(jnp.mean(losses(params, x, y), 1) * w) / jnp.sum(w)


def ignoring(value):
    def loss(params, x, y):
        real = y != value
        return masked(params, x, jnp.where(real, y, 0), real)

    return loss


def negative(params, x, y):
    return masked(params, x, jnp.maximum(y, 0), y >= 0)


def next_token(params, tokens):
    one_hot_free = jnp.ones((*tokens.shape, 1))
    f = TOKEN_MODEL.apply({"params": params}, one_hot_free)[:, :-1]
    real = tokens[:, 1:] != 0
    return jnp.sum(xent(f, tokens[:, 1:]) * real) / jnp.sum(real)


def found_in(loss, *args):
    experiment = head_of(loss, *args)
    gradient = experiment.gradient(SMALL_SHAPE)
    base = weights_search.Base(experiment, SMALL_SHAPE, gradient, events=True)
    return base, weights_search.find_weights(base)


@pytest.mark.parametrize(
    ("loss", "args", "expected"),
    [
        # argument, padding, values below it, shift, missing, divides by the sum
        (masked, (X, Y, MASK), ("argument 3", None, False, 0, 0, True)),
        (masked, (X, Y, MASK * 1.0), ("argument 3", None, False, 0, 0, True)),
        (masked, (X, Y, MASK * 1), ("argument 3", None, False, 0, 0, True)),
        (over_all, (X, Y, MASK * 1.0), ("argument 3", None, False, 0, 0, False)),
        (by_example, (X, Y, jnp.ones(B)), ("argument 3", None, False, 0, 0, True)),
        (ignoring(-100), (X, Y), ("argument 2", -100, False, 0, 0, True)),
        (negative, (X, Y), ("argument 2", -1, True, 0, 0, True)),
        # No common value: the last label of the batch at hand.
        (ignoring(4), (X, Y.at[:, -1].set(4)), ("argument 2", 4, False, 0, 0, True)),
        (next_token, (Y,), ("argument 1", 0, False, 1, 1, True)),
    ],
)
def test_weights_are_found(loss, args, expected):
    at = found_in(loss, *args)[1]
    assert (terms.path_text(at.path), *at[1:]) == expected


def test_arguments_that_weight_nothing_are_none():
    assert found_in(plain, X, Y)[1] is None
    # An argument along the positions that takes no part.
    assert found_in(lambda p, x, y, w: plain(p, x, y), X, Y, MASK)[1] is None


@pytest.mark.parametrize(
    ("loss", "args", "reason"),
    [
        (
            lambda p, x, y, a, b: masked(p, x, y, a * b),
            (X, Y, MASK, jnp.ones((B, T))),
            r"several of its arguments weight its terms \(argument 3, argument 4\)",
        ),
        (
            lambda p, x, y, w: masked(p, x, y, jnp.square(w)),
            (X, Y, jnp.ones((B, T))),
            "argument 3 takes part in it in a way that cannot be told",
        ),
        (
            # Divides by the root of the sum.
            lambda p, x, y, w: jnp.sum(losses(p, x, y) * w) / jnp.sqrt(jnp.sum(w)),
            (X, Y, MASK),
            "argument 3 takes part",
        ),
        (
            # The weight of a position is that of its neighbour, too.
            lambda p, x, y, w: masked(p, x, y, w * jnp.roll(w, 1, 1)),
            (X, Y, MASK),
            "argument 3 takes part",
        ),
    ],
)
def test_other_parts_of_arguments_in_a_loss_are_refused(loss, args, reason):
    with pytest.raises(Unproved, match=reason):
        found_in(loss, *args)


def checked(loss, *args):
    base, weights = found_in(loss, *args)
    own = terms.Terms(((0, 0),), (0, 1), (0, 0), weights, None, None, "")
    weights_search.check_batch(base, own)


CLASS_WEIGHTS = jnp.linspace(1.0, 2.0, V)
EACH = jnp.arange(B * T).reshape(B, T) % V


def test_the_batch_at_hand_agrees():
    checked(plain, X, EACH)
    checked(masked, X, EACH, MASK)
    checked(ignoring(-100), X, jnp.where(MASK, EACH, -100))


@pytest.mark.parametrize(
    ("loss", "labels", "reason"),
    [
        # 3 is no special value, and neither the least nor the greatest label.
        (
            ignoring(3),
            EACH,
            "rows of this batch have no part in it, like padding",
        ),
        (
            lambda p, x, y: masked(p, x, y, CLASS_WEIGHTS[y]),
            EACH,
            "different weights, such as those of classes",
        ),
    ],
)
def test_rows_without_a_reason_are_refused(loss, labels, reason):
    with pytest.raises(Unproved, match=reason):
        checked(loss, X, labels)


def test_shapes_have_no_rows_to_compare():
    shape = jax.ShapeDtypeStruct((B, T), jnp.int32)
    checked(lambda p, x, y: masked(p, x, y, CLASS_WEIGHTS[y]), X, shape)
