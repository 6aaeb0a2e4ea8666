"""Inverses of the units that are due, on one device and on four, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import linalg
from lbopt.collectives import Axis
from lbopt.curvature import factor
from lbopt.sharding import Unit, owners_of
from lbopt.transforms import inversion, owner_buffers
from tests.devices import AXIS, on_devices, shares
from tests.oracles import quick_jit

# The damped matrices below have conditions of at most a hundred.
ROUNDING = 1e-4

# Kind and rows of each statistic; a row is a copy or a diagonal block.
STATISTICS = [
    (factor.symmetric(4), 3),
    (factor.diagonal((3,)), 1),
    (factor.symmetric(7, 2), 2),  # two blocks of 4, of the class of the first
    (factor.pairs(2), 1),
    (factor.symmetric(2), 2),
    (factor.diagonal((3,)), 2),
]
UNITS = [
    Unit(f"layer{i}", i, i, "a", row, kind)
    for i, (kind, rows) in enumerate(STATISTICS)
    for row in range(rows)
]
CLASSES = [[0, 1, 2, 4, 5], [3, 9, 10], [6], [7, 8]]
DAMPING = np.linspace(0.5, 1.5, len(UNITS))
EVERY = np.ones(len(UNITS), bool)
SOME = np.array([1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1], bool)


def is_diagonal(kind):
    """The packed triangle of ``symmetric(2)`` has the shape of a diagonal of 3."""
    return kind.shape == (3,) and kind.order == 3


def matrices(seed=0):
    """Each unit as a dense matrix, and packed."""
    rng = np.random.default_rng(seed)
    dense, packed = [], []
    for unit in UNITS:
        kind = unit.factor
        if is_diagonal(kind):
            values = rng.uniform(0.1, 3, 3)
            dense.append(np.diag(values))
            packed.append(values)
        elif kind.shape == (2, 3):
            m = np.zeros((4, 4))
            for c in range(2):
                x = rng.normal(size=(2, 3))
                m[2 * c : 2 * c + 2, 2 * c : 2 * c + 2] = x @ x.T
            dense.append(m)
            packed.append(
                [e for c in (0, 2) for e in (m[c, c], m[c, c + 1], m[c + 1, c + 1])]
            )
        else:
            n = 2 if kind.order == 2 else 4
            x = rng.normal(size=(n, n))
            dense.append(x @ x.T)
            packed.append(linalg.pack(jnp.asarray(x @ x.T, jnp.float32)))
    return dense, [np.asarray(p, np.float32) for p in packed]


def by_statistic(rows):
    """Rows of the units as arrays ``[rows, ...]`` of the statistics."""
    found = [[] for _ in STATISTICS]
    for unit, row in zip(UNITS, rows, strict=True):
        found[unit.statistic].append(row)
    return [np.stack(x) for x in found]


def identities():
    return [
        kind.expand(jnp.broadcast_to(kind.identity(jnp.float32), (rows, kind.wire)))
        for kind, rows in STATISTICS
    ]


def dense_of(kind, inverse):
    """One unit's inverse as a dense matrix."""
    one = np.asarray(inverse, np.float64)
    if is_diagonal(kind):
        return np.diag(one)
    if kind.shape == (2, 3):
        m = np.zeros((4, 4))
        for c, (a, b, d) in enumerate(one):
            m[2 * c : 2 * c + 2, 2 * c : 2 * c + 2] = [[a, b], [b, d]]
        return m
    return one


def dense_inverses(inverses):
    """Each unit's inverse as a dense matrix."""
    return [
        dense_of(kind, one)
        for (kind, _), inverse in zip(STATISTICS, inverses, strict=True)
        for one in inverse
    ]


def expected_inverse(i, dense, renewed):
    eye = np.eye(len(dense[i]))
    return np.linalg.inv(dense[i] + DAMPING[i] * eye) if renewed else eye


def shares_of(packed, devices):
    """Each statistic's rows cut over devices, ``[devices, rows, share]``."""
    return [shares(x, devices) for x in by_statistic(packed)]


def inverted(devices, packed, due):
    """The inverses of all units from the identity, and what was found out."""
    owners = owners_of(UNITS, devices or 1)
    due, damping = jnp.asarray(due), jnp.asarray(DAMPING, jnp.float32)

    def run(factors, axis):
        inverses, kept, found = inversion.invert(
            owners, factors, identities(), None, due, damping, axis
        )
        assert kept is None
        return inverses, found

    if devices is None:
        rows = [jnp.asarray(x) for x in by_statistic(packed)]
        return quick_jit(lambda x: run(x, Axis(None, 1)))(rows)
    axis = Axis(AXIS, devices)
    results = on_devices(devices, lambda x: run(x, axis), shares_of(packed, devices))

    def same(x):
        x = np.asarray(x)
        assert (x == x[:1]).all()  # every device has every inverse
        return x[0]

    return jax.tree.map(same, results)


def most_due(due, devices):
    """The largest number of due units that one device owns, by class."""
    owner = owners_of(UNITS, devices or 1).owner
    return [
        max(sum(due[i] for i in ids if owner[i] == d) for d in range(devices or 1))
        for ids in CLASSES
    ]


@pytest.mark.parametrize("devices", [None, 1, 4])
@pytest.mark.parametrize("due", [EVERY, SOME, ~SOME, ~EVERY])
def test_what_is_due_is_inverted_and_nothing_else(devices, due):
    dense, packed = matrices()
    packed = [x if d else x * np.nan for x, d in zip(packed, due, strict=True)]
    inverses, found = inverted(devices, packed, due)
    assert found.accepted.tolist() == due.tolist()
    assert found.rounds.tolist() == most_due(due, devices)
    assert found.delivered_rounds.tolist() == found.rounds.tolist()
    assert found.delivered.tolist() == [sum(due[i] for i in ids) for ids in CLASSES]
    for i, inverse in enumerate(dense_inverses(inverses)):
        expected = expected_inverse(i, dense, due[i])
        # What was not due is untouched.
        rounding = ROUNDING * due[i]
        np.testing.assert_allclose(inverse, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("devices", [None, 4])
def test_an_inverse_that_is_not_finite_is_refused(devices):
    dense, packed = matrices()
    packed[1] = packed[1] - 100  # not positive definite
    packed[5] = packed[5] * np.nan
    packed[9] = packed[9] * np.nan
    inverses, found = inverted(devices, packed, EVERY)
    refused = [1, 5, 9]
    assert np.flatnonzero(~np.asarray(found.accepted)).tolist() == refused
    for i, inverse in enumerate(dense_inverses(inverses)):
        expected = expected_inverse(i, dense, i not in refused)
        np.testing.assert_allclose(inverse, expected, rtol=ROUNDING, atol=ROUNDING)


def kept_by_owners(packed, due):
    """The owners, their desks after a step from the identity, what was found out."""
    devices = 4
    owners = owners_of(UNITS, devices, gathered=())
    axis, flags = Axis(AXIS, devices), jnp.asarray(due)
    damping = jnp.asarray(DAMPING, jnp.float32)
    nothing = [None] * len(STATISTICS)

    def run(factors, kept):
        return inversion.invert(owners, factors, nothing, kept, flags, damping, axis)[
            1:
        ]

    start = owner_buffers.identities(owners, jnp.float32)
    return owners, *on_devices(devices, run, shares_of(packed, devices), start)


def assert_kept(owners, kept, dense, renewed):
    plan = owner_buffers.kept_layout(owners)
    for i, unit in enumerate(UNITS):
        first = plan.offsets[i]
        numbers = kept[
            owners.owner[i], first : first + owner_buffers.kept_size(unit.factor)
        ]
        np.testing.assert_allclose(
            dense_of(unit.factor, owner_buffers.restored(unit.factor, numbers)),
            expected_inverse(i, dense, renewed[i]),
            rtol=ROUNDING,
            atol=ROUNDING,
        )


@pytest.mark.parametrize("due", [EVERY, SOME])
def test_inverses_that_stay_with_their_owners(due):
    dense, packed = matrices()
    owners, kept, found = kept_by_owners(packed, due)
    assert (np.asarray(found.accepted) == due).all()  # told to every device
    assert_kept(owners, kept, dense, due)


def test_a_kept_inverse_that_is_not_finite_is_refused():
    dense, packed = matrices()
    sound = np.ones(len(UNITS), bool)
    for i in (1, 5, 9):
        packed[i] = packed[i] * np.nan
        sound[i] = False
    owners, kept, found = kept_by_owners(packed, EVERY)
    assert (np.asarray(found.accepted) == sound).all()
    assert_kept(owners, kept, dense, sound)


# ---------------------------------------------------------------- what comes later


@pytest.mark.parametrize("devices", [None, 4])
def test_what_is_made_waits_until_it_is_delivered(devices):
    dense, packed = matrices()
    owners = owners_of(UNITS, devices or 1)
    axis = Axis(None if devices is None else AXIS, devices or 1)
    damping, none = jnp.asarray(DAMPING, jnp.float32), jnp.zeros(len(UNITS), bool)
    first = np.arange(len(UNITS)) < 3  # of which unit 1 is not due

    def course(factors):
        def step(inverses, waiting, *flags):
            inverses, _, waiting, found = inversion.invert_later(
                owners, factors, inverses, None, waiting, *flags, damping, axis
            )
            return (inverses, waiting), found

        room = inversion.layout_of_all(owners).length
        start = (identities(), jnp.zeros(room))
        due = jnp.asarray(SOME)
        begun, found = step(*start, due, none, due & first)
        still, nothing = step(*begun, none, none, none)
        # What is ready is delivered before all is made anew.
        done, later = step(*still, ~none, due & ~first, none)
        return begun[0], still[0], done[0], found, nothing, later

    if devices is None:
        rows = [jnp.asarray(x) for x in by_statistic(packed)]
        results = quick_jit(course)(rows)
    else:
        results = on_devices(devices, course, shares_of(packed, devices))
        results = jax.tree.map(lambda x: np.asarray(x)[0], results)
    begun, still, done, found, nothing, later = results
    for inverses, there in ((begun, SOME & first), (still, SOME & first), (done, SOME)):
        for i, inverse in enumerate(dense_inverses(inverses)):
            expected = expected_inverse(i, dense, there[i])
            np.testing.assert_allclose(inverse, expected, rtol=ROUNDING, atol=ROUNDING)
    assert np.asarray(found.accepted).tolist() == (SOME & first).tolist()
    assert not np.any(nothing.accepted)
    assert np.asarray(later.accepted).tolist() == (SOME & ~first).tolist()
    assert found.rounds.tolist() == most_due(SOME, devices)
    assert found.delivered_rounds.tolist() == most_due(SOME & first, devices)
    assert nothing.rounds.tolist() == nothing.delivered.tolist() == [0] * len(CLASSES)
    assert later.rounds.tolist() == most_due(EVERY, devices)
    assert later.delivered.tolist() == [
        sum((SOME & ~first)[i] for i in ids) for ids in CLASSES
    ]
