"""The state's shapes and the report of a step, counted by hand for a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import sharding
from lbopt.collectives import Axis
from lbopt.sharding import Sharded
from lbopt.transforms import kfac_state
from lbopt.transforms.inversion import Inverted
from tests.devices import AXIS
from tests.problems import Mlp, assert_equal, classify

FLOAT = 4  # bytes
# ``Mlp``: A [5, 5] (4 features and the bias) and G [5, 5] of first; A [5, 5] and
# G [3, 3] of last.  As triangles 15, 15, 15 and 6 numbers.
TWO = Axis(AXIS, 2)


def prepared(axis):
    layers = classify(Mlp()).trace()
    own = {path: layers[path] for path in sorted(layers)}
    return own, sharding.owners_of(sharding.units_of(own), axis.size)


def reported(due, accepted, rounds, units, *, joint, axis=TWO):
    own, owners = prepared(axis)
    rounds = jnp.asarray(rounds)
    inverted = Inverted(jnp.asarray(accepted), rounds, rounds, jnp.asarray(units))
    found = kfac_state.report(own, owners, jnp.asarray(due), inverted, joint, axis, {})
    return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def test_one_device_sends_nothing():
    found = reported(
        [True] * 4, [True] * 4, [3, 1], [3, 1], joint=True, axis=Axis(None, 1)
    )
    assert found.statistics == [2, 2, 0]
    assert found.inversions == 4
    assert found.statistic_bytes == [0, 0, 0]
    assert found.inverse_bytes == 0


@pytest.mark.parametrize("joint", [True, False])
def test_everything_on_two_devices(joint):
    # Shares of 8, 8, 8 and 3 numbers, two of each.  Inverses: two rounds of the three
    # units of 5 rows, one of the unit of 3.
    found = reported([True] * 4, [True] * 4, [2, 1], [3, 1], joint=joint)
    assert found.statistics == [2, 2, 0]
    assert found.statistic_bytes == [(16 + 16) * FLOAT, (16 + 6) * FLOAT, 0]
    assert found.inversions == 4
    # To the owner; back as shares in as many rounds; and each unit's share to all.
    assert found.inverse_bytes == (2 * (16 + 16) + 3 * 8 + (6 + 6) + 3) * FLOAT


def test_what_is_delivered_later_is_sent_later():
    own, owners = prepared(TWO)
    due = jnp.zeros(4, bool)
    some, none = jnp.asarray([2, 1]), jnp.asarray([0, 0])
    units = jnp.asarray([3, 1])
    begun = Inverted(due, some, none, none)
    delivered = Inverted(due, none, some, units)
    bytes_of = [
        float(kfac_state.report(own, owners, due, found, True, TWO, {}).inverse_bytes)
        for found in (begun, delivered)
    ]
    assert bytes_of == [(2 * 16 + 6) * FLOAT, (2 * 16 + 3 * 8 + 6 + 3) * FLOAT]


def test_alone_only_what_is_due_travels():
    due, accepted = [False, True, False, True], [False, True, False, False]
    found = reported(due, accepted, [1, 0], [1, 0], joint=False)
    assert found.statistics == [0, 2, 0]
    assert found.statistic_bytes == [0, (16 + 6) * FLOAT, 0]
    assert found.inversions == 1
    assert found.inverse_bytes == (16 + 16 + 8) * FLOAT
    # Together all travel, though two are wanted.
    found = reported(due, accepted, [1, 0], [1, 0], joint=True)
    assert found.statistics == [0, 2, 0]
    assert found.statistic_bytes == [(16 + 16) * FLOAT, (16 + 6) * FLOAT, 0]


@pytest.mark.parametrize("joint", [True, False])
def test_nothing_due_nothing_sent(joint):
    found = reported([False] * 4, [False] * 4, [0, 0], [0, 0], joint=joint)
    assert found.statistics == found.statistic_bytes == [0, 0, 0]
    assert found.inversions == found.inverse_bytes == 0


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (Axis(None, 1), [(15,), (15,), (15,), (6,)]),
        (TWO, [(2, 8), (2, 8), (2, 8), (2, 3)]),
        (Axis(AXIS, 4), [(4, 4), (4, 4), (4, 4), (4, 2)]),
    ],
)
def test_the_state_before_the_first_step(axis, shapes, adaptive):
    own, owners = prepared(axis)
    state = kfac_state.init_state(own, owners, axis, adaptive)
    for tree in (state.factors, state.before) if adaptive else (state.factors,):
        assert isinstance(tree, Sharded) == (axis.name is not None)
        leaves = jax.tree.leaves(kfac_state.plain(tree))
        assert [x.shape for x in leaves] == shapes
        assert not any(x.any() for x in leaves)
    assert adaptive or state.before == ()
    assert [x.shape for x in jax.tree.leaves(state.traces)] == [(1,)] * 4
    inverses = jax.tree.leaves(state.inverses)
    for inverse, rows in zip(inverses, (5, 5, 5, 3), strict=True):
        np.testing.assert_array_equal(inverse, np.eye(rows))
    assert state.refresh.due.tolist() == [True] * 4
    assert state.refresh.inverse_step.tolist() == [-1] * 4
    assert state.boost.tolist() == [1.0, 1.0]
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # steps may donate it


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_one_state_in_a_chain(number):
    problem = classify(Mlp())
    core = lbopt.scale_by_kfac(problem.trace())
    chain = optax.chain(*[core] * number, optax.sgd(1.0))
    state = {"optimizer": chain.init(problem.params), "step": 0}
    if number == 1:
        assert_equal(lbopt.curvature_state(state), core.init(problem.params))
        return
    message = rf"opt_state=dict must hold one curvature transform, not {number}; pass"
    with pytest.raises(ValueError, match=message):
        lbopt.curvature_state(state)
