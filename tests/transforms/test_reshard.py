"""States between numbers of devices: nothing is lost, and nothing else may differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from tests.problems import Mlp, classify

ADAPTIVE = {"stale_threshold": 0.1, "factor_decay": 0.0}
PROBLEM = classify(Mlp())
LAYERS = PROBLEM.trace()


def transform(devices=None, placement="comm", **options):
    if devices is not None:
        options["placement"] = lbopt.Placement("data", devices, placement)
    return lbopt.scale_by_kfac(LAYERS, **options)


def random_state(tx, seed=0):
    """The optimizer's state with random numbers in every array of floats."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(fill, tx.init(PROBLEM.params))


@pytest.mark.parametrize("options", [{}, ADAPTIVE, {"block_size": 3}])
def test_there_and_back_is_the_same_to_the_bit(options):
    ways = [(None, "comm"), (4, "comm"), (2, "memory"), (8, 0.5), (3, "memory")]
    made = [transform(*way, **options) for way in ways]
    start = state = random_state(made[0])
    block_size = options.get("block_size")
    for tx in (*made[1:], made[0]):
        like = jax.eval_shape(tx.init, PROBLEM.params)
        state = lbopt.reshard(state, like, LAYERS, block_size=block_size)
        assert jax.tree.structure(state) == jax.tree.structure(like)
    jax.tree.map(np.testing.assert_array_equal, state, start)


def test_shares_are_cut_in_order():
    one, two = transform(), transform(2, "memory")
    state = random_state(one)
    moved = lbopt.reshard(state, two.init(PROBLEM.params), LAYERS)
    packed = np.asarray(state.factors["first"].a)  # a triangle of 15 numbers
    np.testing.assert_array_equal(
        moved.factors.shards["first"].a, np.append(packed, 0).reshape(2, 8)
    )
    assert moved.inverses == {}


def test_arrays_beside_the_optimizer_s_pass_unchanged():
    params = PROBLEM.params
    one, two = (
        lbopt.kfac(0.1, LAYERS),
        lbopt.kfac(0.1, LAYERS, placement=lbopt.Placement("data", 2)),
    )
    whole = (params, one.init(params))
    moved = lbopt.reshard(whole, (params, two.init(params)), LAYERS)
    jax.tree.map(np.testing.assert_array_equal, moved[0], params)


@pytest.mark.parametrize(
    "other", [ADAPTIVE, {"eigenvalues": "corrected"}, {"block_size": 3}]
)
def test_other_differences_are_refused(other):
    like = transform(2, **other).init(PROBLEM.params)
    message = r"like\..*only placement= may differ"
    with pytest.raises(ValueError, match=message):
        lbopt.reshard(transform().init(PROBLEM.params), like, LAYERS)
