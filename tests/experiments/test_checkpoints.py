"""Checkpoints: every bit, typed keys and the place in the data come back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def make_state(seed):
    key = jax.random.key(seed)
    return State(
        step=jnp.int32(seed),
        params={"dense": {"kernel": jax.random.normal(key, (5, 3))}},
        opt_state=((), {"half": jnp.bfloat16(seed + 0.1), "flag": jnp.array(True)}),
        rng=key,
    )


def assert_bits_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip(tmp_path):
    state = make_state(7)
    with checkpoints.Checkpoints(tmp_path / "c") as saved:
        assert saved.restore_latest(state) is None
        saved.save(7, state, batches_taken=9)
    with checkpoints.Checkpoints(tmp_path / "c") as saved:
        step, restored, batches_taken = saved.restore_latest(make_state(0))
    assert (step, batches_taken) == (7, 9)
    assert_bits_equal(restored, state)
    np.testing.assert_array_equal(
        jax.random.normal(restored.rng, (3,)), jax.random.normal(state.rng, (3,))
    )


def test_shapes_are_enough_to_restore(tmp_path):
    state = make_state(1)
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, state, batches_taken=1)
    with checkpoints.Checkpoints(tmp_path) as saved:
        like = jax.eval_shape(lambda: make_state(0))
        _, restored, _ = saved.restore_latest(like)
    assert_bits_equal(restored, state)


def test_the_newest_is_restored_and_the_oldest_are_dropped(tmp_path):
    with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 2, 3):
            saved.save(step, make_state(step), batches_taken=step)
    with checkpoints.Checkpoints(tmp_path) as saved:
        step, restored, _ = saved.restore_latest(make_state(0))
    assert step == 3
    assert_bits_equal(restored, make_state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    state = {"x": jnp.arange(1_000_000.0), "y": jnp.ones((700, 700))}
    expected = jax.tree.map(np.array, state)
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, state, batches_taken=1)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    with checkpoints.Checkpoints(tmp_path) as saved:
        _, restored, _ = saved.restore_latest(state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_another_shape_is_refused(tmp_path):
    with checkpoints.Checkpoints(tmp_path) as saved:
        saved.save(1, {"x": jnp.zeros(3)}, batches_taken=1)
        with pytest.raises(ValueError, match="shape"):
            saved.restore_latest({"x": jnp.zeros(4)})


def test_nothing_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        checkpoints.Checkpoints(tmp_path, keep=0)
