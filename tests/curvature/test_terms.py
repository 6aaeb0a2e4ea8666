"""The terms of a loss as a record: their number, and where their weights are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import terms
from lbopt.curvature.terms import Terms, WeightsAt

ARGS = (
    jnp.arange(8).reshape(2, 4),
    {"mask": jnp.array([True, False]), "w": [jnp.array([0.5, 2.0])]},
)


def path_to(leaf):
    paths = jax.tree_util.tree_leaves_with_path(ARGS)
    (found,) = [path for path, x in paths if x is leaf]
    return found


TOKENS, MASK, NUMBERS = (
    path_to(x) for x in (ARGS[0], ARGS[1]["mask"], ARGS[1]["w"][0])
)


@pytest.mark.parametrize(
    ("axes", "offsets", "expected"),
    [((0,), (0,), 4), ((0, 1), (0, 0), 36), ((0, 1), (0, 1), 32), ((0, 2), (0, 0), 44)],
)
def test_terms_are_counted_along_their_axes(axes, offsets, expected):
    found = Terms(((0, 0),), axes, offsets, None, None, None, "")
    assert found.count((4, 9, 11)) == expected


def test_leaves_are_named_as_users_count_them():
    assert terms.path_text(TOKENS) == "argument 1"
    assert terms.path_text(MASK) == "argument 2['mask']"
    assert terms.path_text(NUMBERS) == "argument 2['w'][0]"


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (WeightsAt(MASK, None, False, 0, 0, True), [True, False]),
        (WeightsAt(NUMBERS, None, False, 0, 0, True), [0.5, 2.0]),
        # Tokens other than 2 are real; 2 lies at [0, 2].
        (WeightsAt(TOKENS, 2, False, 0, 0, True), [[1, 1, 0, 1], [1, 1, 1, 1]]),
        # Each token is the target of the position before it.
        (WeightsAt(TOKENS, 2, False, 1, 0, True), [[1, 0, 1], [1, 1, 1]]),
        # The output has a last position, whose target there is not.
        (WeightsAt(TOKENS, 2, False, 1, 1, True), [[1, 0, 1, 0], [1, 1, 1, 0]]),
        (WeightsAt(NUMBERS, math.nan, False, 0, 0, True), [True, True]),
        # Smaller numbers than 2 mark padding, too.
        (WeightsAt(TOKENS, 2, True, 0, 0, True), [[0, 0, 0, 1], [1, 1, 1, 1]]),
        (WeightsAt(TOKENS, None, False, 1, 1, True), [[1, 2, 3, 0], [5, 6, 7, 0]]),
    ],
)
def test_weights_are_read_from_the_arguments(at, expected):
    np.testing.assert_array_equal(at.read(ARGS), expected)
    np.testing.assert_array_equal(at.read(list(ARGS)), expected)


def test_other_arguments_are_refused():
    at = WeightsAt(MASK, None, False, 0, 0, True)
    message = r"weighted by argument 2\['mask'\], which these arguments do not have"
    with pytest.raises(ValueError, match=message):
        at.read((ARGS[0], {"w": ARGS[1]["w"]}))
