"""Moves between devices, under ``shard_map`` and ``pmap``, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import collectives
from lbopt.collectives import Axis
from tests.devices import AXIS, on_devices

everywhere = pytest.mark.parametrize("parallel", ["shard_map", "pmap"])
some_devices = pytest.mark.parametrize("devices", [1, 2, 3, 8])

SIZES = [(2, 7), (1, 1), (3, 16)]  # [m, size]; few are multiples of the devices


def rows(devices, m, size):
    seed = [devices, m, size]
    return (
        np.random.default_rng(seed).normal(size=(devices, m, size)).astype(np.float32)
    )


def shares(x, devices):
    """``[m, size]`` as ``[devices, m, share]``, padded with zeros."""
    share = int(np.ceil(x.shape[1] / devices))
    found = np.zeros((devices, len(x), share), x.dtype)
    for device in range(devices):
        own = x[:, device * share : (device + 1) * share]
        found[device, :, : own.shape[1]] = own
    return found


@everywhere
@some_devices
def test_every_collective_is_what_numpy_says(devices, parallel):
    axis = Axis(AXIS, devices)
    arrays = [rows(devices, *size) for size in SIZES]  # each device's own
    common = [np.stack([x[0]] * devices) for x in arrays]  # the same everywhere
    x = rows(devices, devices, 10)

    def run(arrays, common, x):
        mine = [collectives.own_share(x, axis) for x in common]
        once = collectives.exchange(x, axis)
        return {
            "position": jnp.asarray(axis.position()),
            "scattered": collectives.scatter_mean(arrays, axis),
            "shares": mine,
            "whole": [collectives.gather(x, axis) for x in mine],
            "exchanged": once,
            "again": collectives.exchange(once, axis),
            "total": collectives.total(arrays, axis),
            "mean": collectives.mean(arrays, axis),
        }

    found = on_devices(devices, run, arrays, common, x, parallel=parallel)
    assert jax.device_get(found["position"]).tolist() == list(range(devices))
    for i, own in enumerate(arrays):
        mean, size = own.mean(0), own.shape[2]
        expected = shares(mean, devices)
        np.testing.assert_allclose(found["scattered"][i], expected, 1e-6, 1e-6)
        np.testing.assert_array_equal(found["shares"][i], shares(own[0], devices))
        for d in range(devices):
            whole = found["whole"][i][d]
            np.testing.assert_array_equal(whole[:, :size], own[0])
            assert not whole[:, size:].any()
            np.testing.assert_allclose(found["total"][i][d], own.sum(0), 1e-5, 1e-6)
            np.testing.assert_allclose(found["mean"][i][d], mean, 1e-5, 1e-6)
    np.testing.assert_array_equal(found["exchanged"], np.swapaxes(x, 0, 1))
    np.testing.assert_array_equal(found["again"], x)


def test_without_an_axis_nothing_moves():
    axis = Axis(None, 1)
    x = jnp.asarray(rows(1, 2, 7)[0])
    assert axis.position() == 0
    axis.require()
    for found in (
        *collectives.scatter_mean([x], axis),
        collectives.own_share(x, axis),
        collectives.exchange(x, axis),
        collectives.gather(x, axis),
        collectives.total(x, axis),
        collectives.mean(x, axis),
    ):
        np.testing.assert_array_equal(found, x)


def test_shares_are_rounded_up():
    found = [Axis(AXIS, 3).share(size) for size in (0, 1, 3, 4, 6, 7)]
    assert found == [0, 1, 1, 2, 2, 3]


def test_an_axis_that_is_not_there():
    message = (
        "axis_name='rows' is not a mapped axis here; call the update inside "
        "jax.shard_map or jax.pmap"
    )
    with pytest.raises(ValueError, match=message):
        Axis("rows", 2).require()


@everywhere
def test_an_axis_of_another_size(parallel):
    def run(size):
        def require(x):
            Axis(AXIS, size).require()
            return x

        return on_devices(2, require, jnp.zeros((2, 1)), parallel=parallel)

    assert not run(2).any()
    message = r"axis_size=3, but the axis 'data' has 2 devices; pass lbopt\.Placement"
    with pytest.raises(ValueError, match=message):
        run(3)
