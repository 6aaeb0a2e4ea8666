"""What leaves a state to be inverted elsewhere, and what comes back into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from lbopt.transforms import outside, owner_buffers, unit_classes
from lbopt.transforms.reshard import owners_in
from tests.problems import Mlp, assert_equal, classify
from tests.transforms.test_reshard import random_state

PROBLEM = classify(Mlp())
LAYERS = PROBLEM.trace()
OWN = {path: LAYERS[path] for path in sorted(LAYERS)}
# A of 5 rows and G of 5, A of 5 and G of 3, in the order of the layers.
ORDERS = (5, 5, 5, 3)


def states(devices, placement):
    """A state on one device, and the same on others."""
    one = lbopt.scale_by_kfac(LAYERS)
    state = random_state(one)
    renewals = jnp.asarray([1, 1, 1, 0])  # G of the last layer is not known
    state = state._replace(refresh=state.refresh._replace(renewals=renewals))
    many = lbopt.scale_by_kfac(
        LAYERS, placement=lbopt.Placement("data", devices, placement)
    )
    like = jax.eval_shape(many.init, PROBLEM.params)
    return state, lbopt.reshard(state, like, LAYERS)


@pytest.mark.parametrize("placement", ["comm", "memory", 0.5])
def test_the_order_holds_all_factors_whatever_the_devices(placement):
    state, spread = states(4, placement)
    packed = [np.asarray(x) for x in jax.tree.leaves(state.factors)]
    for given in (state, spread):
        order = outside.export_factors(OWN, given)
        owners = owners_in(OWN, given)
        for units, rows, damping in zip(
            unit_classes.classes_of(owners), order.factors, order.damping, strict=True
        ):
            for position, number in enumerate(units.numbers):
                np.testing.assert_array_equal(rows[position], packed[number])
            np.testing.assert_array_equal(damping, state.damping[units.numbers])
        assert order.known.tolist() == [True, True, False, False]
        assert int(order.made) == int(state.count) - 1


@pytest.mark.parametrize("placement", [None, "comm", "memory", 0.5])
def test_what_comes_back_has_its_place(placement):
    one, spread = states(4, placement or "comm")
    state = one if placement is None else spread
    owners = owners_in(OWN, state)
    rng = np.random.default_rng(1)
    wires = []
    for units in unit_classes.classes_of(owners):
        rows = rng.normal(size=(len(units.numbers), units.factor.wire))
        rows[units.numbers == 1] = np.nan
        wires.append(jnp.asarray(rows, jnp.float32))
    known = jnp.asarray([True, True, False, False])
    after = outside.import_inverses(OWN, state, wires, known, jnp.asarray(7))
    # The first is new; the second is refused; of the others nothing was known.
    assert after.refresh.inverse_step.tolist() == [7, -1, -1, -1]
    assert after.rejected.tolist() == [1, 0]
    tx = lbopt.scale_by_kfac(LAYERS)
    whole = lbopt.reshard(after, jax.eval_shape(tx.init, PROBLEM.params), LAYERS)
    found, before = (jax.tree.leaves(x.inverses) for x in (whole, one))
    for number, (inverse, old) in enumerate(zip(found, before, strict=True)):
        if number:
            assert_equal(inverse, old)
    position = [
        (rows[list(units.numbers).index(0)], units.factor)
        for units, rows in zip(unit_classes.classes_of(owners), wires, strict=True)
        if 0 in units.numbers
    ]
    (wire, factor) = position[0]
    np.testing.assert_array_equal(found[0], factor.expand(wire))
    assert owner_buffers.kept_size(factor) == found[0].size
