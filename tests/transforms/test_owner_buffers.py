"""Units one after the other on their owners' desks, against lists kept by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import factor
from lbopt.sharding import Owners, Unit
from lbopt.transforms import owner_buffers

KINDS = [
    factor.symmetric(3),
    factor.pairs(2),
    factor.eigen(factor.symmetric(2)),
    factor.diagonal((2, 2)),
    factor.symmetric(1),
]
# As they are kept: 9 numbers, 6, λ and 2 values and 4 of the vectors, 4, 1.
SIZES = [9, 6, 7, 4, 1]
OWNERS = Owners(
    units=tuple(Unit(f"layer{i}", i, i, "a", 0, f) for i, f in enumerate(KINDS)),
    owner=(1, 0, 1, 1, 0),
    phase=(0,) * 5,
    gathered=(False, False, False, True, False),
    devices=3,
    period=1,
)


def test_a_plan_puts_units_behind_one_another():
    plan = owner_buffers.layout_of(OWNERS, [4, 2, 0, 1], lambda f: f.order)
    assert plan.offsets.tolist() == [2, 1, 0, 0, 0]
    assert plan.length == 5  # orders 2 and 3 on device 1


def test_kept_inverses_leave_out_what_every_device_has():
    assert [owner_buffers.kept_size(kind) for kind in KINDS] == SIZES
    plan = owner_buffers.kept_layout(OWNERS)
    assert plan.offsets.tolist() == [0, 0, 9, 0, 6]
    assert plan.length == 16


def test_desks_start_with_identities():
    desks = np.asarray(owner_buffers.identities(OWNERS, jnp.float32))
    assert desks.shape == (3, 16)
    np.testing.assert_array_equal(desks[1, :9].reshape(3, 3), np.eye(3))
    np.testing.assert_array_equal(desks[1, 9:], [0, 1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(desks[0, :7], [1, 0, 1, 1, 0, 1, 1])
    assert not desks[0, 7:].any()
    assert not desks[2].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [(), (2, 3)])
def test_rows_of_numbers_are_the_inverses_again(kind, copies):
    rng = np.random.default_rng(0)
    wires = jnp.asarray(rng.normal(size=(*copies, kind.wire)), jnp.float32)
    whole = kind.expand(wires)
    rows = np.stack(
        [owner_buffers.flat(kind.expand(w)) for w in wires.reshape(-1, kind.wire)]
    )
    again = owner_buffers.restored(kind, jnp.asarray(rows.reshape(*copies, -1)))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
