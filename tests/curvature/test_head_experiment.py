"""A loss's head, evaluated at sizes and values of choice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbopt.curvature import head_experiment
from lbopt.curvature.head_experiment import LABEL, SMALL
from tests import oracles
from tests.problems import TOKEN_MODEL, head_of

xent = optax.softmax_cross_entropy_with_integer_labels
B, T, V = 4, 9, 5


def token_loss(params, batch, scale):
    f = TOKEN_MODEL.apply({"params": params}, batch["x"])
    return scale * jnp.mean(xent(f, batch["y"]))


def next_token(params, tokens):
    f = TOKEN_MODEL.apply({"params": params}, jnp.ones((*tokens[:, 1:].shape, 1)))
    return jnp.mean(xent(f, tokens[:, 1:]))


BATCH = {"x": jnp.ones((B, T, 1)), "y": jnp.zeros((B, T), jnp.int32)}
EXPERIMENT = head_of(token_loss, BATCH, 2.0)  # leaves: x, y, the scale


def test_the_gradient_is_that_of_the_loss_at_other_sizes():
    small = (SMALL, SMALL, V)
    hot = np.eye(V)[LABEL]
    # At equal outputs every class has the probability 1 / V.
    expected = 2 * np.broadcast_to(1 / V - hot, small) / SMALL**2
    assert oracles.error(EXPERIMENT.gradient(small, alike=0.0), expected) < 1e-5
    labels = jnp.full((SMALL, SMALL), LABEL).at[1, 2].set(4)
    changed = EXPERIMENT.gradient(small, {1: labels}, alike=0.0)
    expected = expected.copy()
    expected[1, 2] = 2 * (1 / V - np.eye(V)[4]) / SMALL**2
    assert oracles.error(changed, expected) < 1e-5


def test_a_larger_batch_continues_a_smaller_one():
    # A mean over twice the positions has half the gradient at each.
    small = EXPERIMENT.gradient((SMALL, SMALL, V))
    large = EXPERIMENT.gradient((SMALL, 2 * SMALL, V))
    assert oracles.error(2 * large[:, :SMALL], small) < 1e-5
    # Of outputs that differ between positions.
    assert len(np.unique(np.round(small, 6))) == small.size


def test_leaves_have_the_sizes_of_the_output():
    assert EXPERIMENT.shape == (B, T, V)
    assert EXPERIMENT.filled(0, (3, 6, V)).shape == (3, 6, 1)
    labels = EXPERIMENT.filled(1, (3, 6, V))
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, np.full((3, 6), LABEL))
    assert EXPERIMENT.filled(2, (3, 6, V)) == 2.0
    with_key = head_of(
        lambda p, key, x: jnp.mean(TOKEN_MODEL.apply({"params": p}, x)),
        jax.random.key(3),
        BATCH["x"],
    )
    assert jnp.array_equal(
        jax.random.key_data(with_key.filled(0, (3, 3, V))),
        jax.random.key_data(jax.random.key(3)),
    )


@pytest.mark.parametrize(
    ("shape", "along"),
    [((B, T), 2), ((B,), 1), ((B, T, V), 3), ((B, T + 1), 1), ((T,), 0), ((), 0)],
)
def test_leading_axes_shared_with_the_output(shape, along):
    assert EXPERIMENT.along(jnp.ones(shape)) == along
    assert EXPERIMENT.along(3.0) == 0


def test_tokens_may_be_one_more_than_the_outputs():
    experiment = head_of(next_token, jnp.zeros((B, T + 1), jnp.int32))
    assert experiment.shape == (B, T, V)
    assert experiment.shifted(experiment.leaves[0])
    assert experiment.filled(0, (3, 6, V)).shape == (3, 7)
    assert not experiment.shifted(BATCH["y"])
    assert not experiment.shifted(BATCH["x"])


def test_leaves_are_found_by_their_paths():
    path = EXPERIMENT.path(1)
    assert jax.tree_util.keystr(path) == "[0]['y']"
    assert EXPERIMENT.leaf(path) is EXPERIMENT.leaves[1]


def test_positions_with_a_gradient():
    gradient = np.zeros((2, 3, 4))
    gradient[0, 1, 3] = -1
    expected = np.array([[False, True, False], [False] * 3])
    np.testing.assert_array_equal(
        head_experiment.terms_in(gradient, events=True), expected
    )
    each = head_experiment.terms_in(gradient, events=False)
    np.testing.assert_array_equal(each, gradient != 0)
