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
def test_each_device_gets_its_share_of_the_mean(devices, parallel):
    arrays = [rows(devices, *size) for size in SIZES]
    axis = Axis(AXIS, devices)
    found = on_devices(
        devices,
        lambda *x: collectives.scatter_mean(x, axis),
        *arrays,
        parallel=parallel,
    )
    for x, mine in zip(arrays, found, strict=True):
        expected = shares(x.mean(0), devices)
        np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-6)


@everywhere
@some_devices
def test_shares_are_gathered_again(devices, parallel):
    axis = Axis(AXIS, devices)

    def both(x):
        mine = collectives.own_share(x, axis)
        return mine, collectives.gather(mine, axis)

    for size in SIZES:
        x = rows(1, *size)[0]
        everyone = np.stack([x] * devices)
        mine, whole = on_devices(devices, both, everyone, parallel=parallel)
        np.testing.assert_array_equal(mine, shares(x, devices))
        for own in whole:
            np.testing.assert_array_equal(own[:, : x.shape[1]], x)
            assert not own[:, x.shape[1] :].any()


@everywhere
@some_devices
def test_an_exchange_is_a_transposition_and_undoes_itself(devices, parallel):
    axis = Axis(AXIS, devices)
    x = rows(devices, devices, 3)

    def both(x):
        once = collectives.exchange(x, axis)
        return once, collectives.exchange(once, axis)

    once, twice = on_devices(devices, both, x, parallel=parallel)
    np.testing.assert_array_equal(once, np.swapaxes(x, 0, 1))
    np.testing.assert_array_equal(twice, x)


@some_devices
def test_owners_get_their_whole_row(devices):
    axis = Axis(AXIS, devices)
    x = rows(1, devices, 10)[0]  # row i is device i's

    def receive(mine):
        return collectives.exchange(mine, axis).reshape(-1)[:10]

    found = on_devices(devices, receive, shares(x, devices))
    np.testing.assert_array_equal(found, x)


@everywhere
@some_devices
def test_sums_and_means_of_trees(devices, parallel):
    axis = Axis(AXIS, devices)
    tree = {"a": rows(devices, 2, 3), "b": rows(devices, 1, 1)}

    def both(x):
        return collectives.total(x, axis), collectives.mean(x, axis)

    total, mean = on_devices(devices, both, tree, parallel=parallel)
    for name, x in tree.items():
        for d in range(devices):
            np.testing.assert_allclose(total[name][d], x.sum(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(mean[name][d], x.mean(0), rtol=1e-5, atol=1e-6)


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
    def run(x):
        Axis(AXIS, 3).require()
        return x

    message = r"axis_size=3, but the axis 'data' has 2 devices; pass axis_size=mesh"
    with pytest.raises(ValueError, match=message):
        on_devices(2, run, jnp.zeros((2, 1)), parallel=parallel)


@everywhere
@some_devices
def test_positions_count_the_devices(devices, parallel):
    axis = Axis(AXIS, devices)

    def run(x):
        axis.require()
        return x + axis.position()

    zeros = jnp.zeros((devices, 1), jnp.int32)
    found = on_devices(devices, run, zeros, parallel=parallel)
    assert jax.device_get(found)[:, 0].tolist() == list(range(devices))
