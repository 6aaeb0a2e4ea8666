"""Moves between devices, under ``shard_map`` and ``pmap``, against NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

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


# 3 devices have no even grid, 2 have one column; rows of 900 numbers are too short.
@everywhere
@pytest.mark.parametrize(
    ("devices", "size"), [(1, 1100), (2, 1100), (3, 1100), (4, 900), (8, 1100)]
)
def test_stages_along_a_grid_are_one_collective(devices, size, parallel):
    axis = Axis(AXIS, devices)
    whole, shares = rows(devices, devices, size), rows(devices, 2, 70)

    def run(whole, shares):
        return (
            collectives.scatter_in_two_stages(whole, axis),
            collectives.gather_in_two_stages(shares, axis),
        )

    scattered, gathered = on_devices(devices, run, whole, shares, parallel=parallel)
    np.testing.assert_allclose(scattered, whole.sum(0), 1e-5, 1e-6)
    expected = np.concatenate(list(shares), 1)
    for one in gathered:
        np.testing.assert_array_equal(one, expected)


def test_stages_over_several_axes_of_a_mesh():
    axis, along = Axis(("slow", "fast"), 8), PartitionSpec(("slow", "fast"))
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("slow", "fast"), axis_types=auto)
    whole = rows(8, 8, 1100)

    def run(x):
        share = collectives.scatter_in_two_stages(x[0], axis)[None]
        return share, collectives.gather_in_two_stages(share, axis)

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=along, out_specs=along, check_vma=False
    )
    scattered, gathered = jax.jit(mapped)(whole)
    np.testing.assert_allclose(scattered, whole.sum(0), 1e-5, 1e-6)
    for one in gathered:
        np.testing.assert_array_equal(one, np.asarray(scattered).reshape(-1))


@pytest.mark.parametrize(("platform", "number"), [("cpu", 1), ("cuda", 1), ("tpu", 2)])
def test_only_a_tpu_sends_in_two_stages(platform, number):
    axis, along = Axis(AXIS, 4), PartitionSpec(AXIS)

    def run(x):
        return collectives.gather(collectives.scatter_mean([x], axis)[0], axis)

    mesh = jax.sharding.AbstractMesh((4,), (AXIS,))
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=along, out_specs=along, check_vma=False
    )
    traced = jax.jit(mapped).trace(jax.ShapeDtypeStruct((4, 9000), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for kind in ("reduce_scatter", "all_gather"):
        assert text.count(f'"stablehlo.{kind}"(') == number


def test_the_grid_is_nearly_square():
    sizes = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
    shapes = [collectives.grid(size).shape for size in sizes]
    assert shapes[:5] == [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)]
    # The tori of a TPU v5e.
    assert shapes[5:] == [(4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16)]


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


def test_devices_of_a_torus_are_ordered_by_place():
    class Chip(NamedTuple):
        id: int
        coords: tuple[int, ...]
        core_on_chip: int

    # Each host's four chips together, as JAX may list them, and two cores on a chip.
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    chips = [
        Chip(2 * i + core, (*place, 0), core)
        for i, place in enumerate(places)
        for core in (1, 0)
    ]
    found = [chip.id for chip in collectives.by_place(chips)]
    assert found == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    devices = jax.devices()[::-1]
    assert collectives.by_place(devices) == devices
