"""State that is changed only now and then: its values, its memory, its transforms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.in_place import update_if


def doubled(state):
    return {"x": 2 * state["x"], "n": state["n"] + 1}


@pytest.mark.parametrize("flag", [True, False])
def test_it_updates_if_the_flag_is_set(flag):
    state = {"x": jnp.arange(3.0), "n": jnp.int32(4)}
    new = jax.jit(lambda flag, state: update_if(flag, doubled, state))(flag, state)
    np.testing.assert_array_equal(new["x"], [0.0, 2.0, 4.0] if flag else [0, 1, 2])
    assert new["n"] == 4 + flag


def test_a_state_that_stays_is_not_copied():
    def step(outer, inner, state):
        def update(state):
            return [update_if(inner, lambda x: x @ x, x) for x in state]

        return update_if(outer, update, state)

    flag, state = jnp.asarray(False), [jnp.ones((256, 256)), jnp.ones((128, 128))]
    lowered = jax.jit(step, donate_argnums=2).lower(flag, flag, state)
    copies = re.findall(r"f32\[(\d+),\d+\]\S* copy\(", lowered.compile().as_text())
    # One each, of the product that replaces it: inside the inner loops.
    assert sorted(copies) == ["128", "256"]


def test_lanes_of_a_vmap_are_kept_apart():
    state = {"x": jnp.ones((2, 3)), "n": jnp.zeros(2, jnp.int32)}
    flags = jnp.asarray([True, False])
    new = jax.vmap(lambda flag, state: update_if(flag, doubled, state))(flags, state)
    np.testing.assert_array_equal(new["x"], [[2, 2, 2], [1, 1, 1]])
    np.testing.assert_array_equal(new["n"], [1, 0])


def test_an_update_that_changes_a_shape_is_refused():
    with pytest.raises(TypeError, match="carry input and carry output"):
        update_if(True, lambda x: x[:1], jnp.ones(3))
