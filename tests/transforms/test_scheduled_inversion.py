"""Inverses of all units at once, on one device and on several, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.collectives import Axis
from lbopt.sharding import owners_of
from lbopt.transforms import owner_buffers, scheduled_inversion
from tests.devices import AXIS, on_devices
from tests.oracles import quick_jit
from tests.transforms.test_inversion import (
    DAMPING,
    EVERY,
    ROUNDING,
    SOME,
    STATISTICS,
    UNITS,
    assert_kept,
    by_statistic,
    dense_inverses,
    expected_inverse,
    identities,
    matrices,
    most_due,
    shares_of,
)


def inverted(devices, packed, known, gathered=None):
    """The owners, the inverses and the buffers of all devices, what was found out."""
    owners = owners_of(UNITS, devices or 1, gathered=gathered)
    flags, damping = jnp.asarray(known), jnp.asarray(DAMPING, jnp.float32)
    old = [
        x if gathered is None or f"layer{i}" in gathered else None
        for i, x in enumerate(identities())
    ]

    def run(factors, kept, axis):
        return scheduled_inversion.invert_all(
            owners, factors, old, kept, flags, damping, axis
        )

    if devices is None:
        rows = [jnp.asarray(x) for x in by_statistic(packed)]
        return owners, *quick_jit(lambda x: run(x, None, Axis(None, 1)))(rows)
    axis = Axis(AXIS, devices)
    kept = owner_buffers.identities(owners, jnp.float32)
    return owners, *on_devices(
        devices,
        lambda x, kept: run(x, kept if gathered is not None else None, axis),
        shares_of(packed, devices),
        kept,
    )


def on_first(devices, inverses):
    """The first device's inverses, once all devices are known to have the same."""
    if devices is None:
        return inverses
    for x in inverses:
        x = np.asarray(x)
        assert (x == x[:1]).all()
    return [x[0] for x in inverses]


@pytest.mark.parametrize("devices", [None, 1, 3, 4])
@pytest.mark.parametrize("known", [EVERY, SOME])
def test_what_is_known_is_inverted_and_nothing_else(devices, known):
    dense, packed = matrices()
    _, inverses, _, found = inverted(devices, packed, known)
    inverses = on_first(devices, inverses)
    for i, inverse in enumerate(dense_inverses(inverses)):
        expected = expected_inverse(i, dense, known[i])
        rounding = ROUNDING * known[i]  # what was not known is untouched
        np.testing.assert_allclose(inverse, expected, rtol=rounding, atol=rounding)
    accepted, rounds = (np.asarray(x) for x in (found.accepted, found.rounds))
    if devices is not None:
        accepted, rounds = accepted[0], rounds[0]
    assert accepted.tolist() == known.tolist()
    assert rounds.tolist() == most_due(EVERY, devices)


@pytest.mark.parametrize("loop_from", [0, 512**3])
@pytest.mark.parametrize("devices", [None, 4])
def test_an_inverse_that_is_not_finite_is_refused(devices, loop_from, monkeypatch):
    monkeypatch.setattr(scheduled_inversion, "_LOOP_FROM", loop_from)
    dense, packed = matrices()
    packed[1] = packed[1] - 100  # not positive definite
    packed[5] = packed[5] * np.nan
    packed[9] = packed[9] * np.nan
    _, inverses, _, found = inverted(devices, packed, EVERY)
    refused = [1, 5, 9]
    accepted = np.asarray(found.accepted).reshape(-1, len(UNITS))[0]
    assert np.flatnonzero(~accepted).tolist() == refused
    for i, inverse in enumerate(dense_inverses(on_first(devices, inverses))):
        expected = expected_inverse(i, dense, i not in refused)
        np.testing.assert_allclose(inverse, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("known", [EVERY, SOME])
def test_inverses_that_stay_with_their_owners(known):
    dense, packed = matrices()
    packed[4] = packed[4] * np.nan
    sound = known & (np.arange(len(UNITS)) != 4)
    owners, _, kept, found = inverted(4, packed, known, gathered=())
    assert (np.asarray(found.accepted) == sound).all()  # told to every device
    assert_kept(owners, kept, dense, sound)


def test_some_layers_have_their_inverses_everywhere():
    dense, packed = matrices()
    everywhere = ("layer0", "layer3")
    _, inverses, kept, found = inverted(4, packed, EVERY, gathered=everywhere)
    assert np.all(found.accepted)
    assert [x is None for x in inverses] == [
        f"layer{i}" not in everywhere for i in range(len(STATISTICS))
    ]
    assert kept.shape[0] == 4
    for number in (0, 3):
        kind = STATISTICS[number][0]
        units = [i for i, unit in enumerate(UNITS) if unit.statistic == number]
        every = [None] * len(STATISTICS)
        every[number] = np.asarray(inverses[number])[0]
        filled = [identities()[i] if x is None else x for i, x in enumerate(every)]
        for i in units:
            np.testing.assert_allclose(
                dense_inverses(filled)[i],
                expected_inverse(i, dense, True),
                rtol=ROUNDING,
                atol=ROUNDING,
                err_msg=str(kind),
            )
