"""Functions that run once on each of several devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import lbopt
from lbopt import sharding
from tests.oracles import quick_jit

AXIS = "data"


def shares(rows, devices):
    """``[rows, size]`` cut over devices and padded, ``[devices, rows, share]``."""
    share = -(-rows.shape[1] // devices)
    rows = jnp.pad(rows, ((0, 0), (0, devices * share - rows.shape[1])))
    return jnp.moveaxis(rows.reshape(len(rows), devices, share), 1, 0)


def on_devices(devices, function, *args, parallel="shard_map"):
    """``function`` on each device; arguments and results lie along a first axis."""
    mesh = sharding.make_mesh(jax.devices()[:devices], axis_name=AXIS)
    if parallel == "pmap":
        return jax.pmap(function, AXIS, devices=list(mesh.devices))(*args)

    def own(*args):
        results = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], results)

    along = PartitionSpec(AXIS)
    return quick_jit(
        jax.shard_map(own, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    )(*args)


def mesh_of(devices):
    """A mesh of so many devices; None for none."""
    return None if devices is None else sharding.make_mesh(jax.devices()[:devices])


def spread(devices, inverses="comm"):
    """The placement of an optimizer on so many devices, as an argument."""
    if devices is None:
        return {}
    return {"placement": lbopt.Placement(AXIS, devices, inverses)}
