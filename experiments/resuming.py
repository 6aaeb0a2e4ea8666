"""Restoring a run from its newest whole checkpoint, on the present devices.

A checkpoint holds the state as it was sharded over the devices of its run. With the
same number of devices and the same placement it is read onto them directly. Otherwise
the curvature state is read whole and resharded by ``lbopt.reshard``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import lbopt
from experiments import checkpoints
from experiments.classifier import AXIS, Program
from lbopt import training


def restore(
    store: checkpoints.Checkpoints,
    program: Program,
    state: training.TrainState,
    place: checkpoints.Place,
) -> checkpoints.Restored | None:
    """Restores the newest whole checkpoint.

    Args:
      store: the checkpoints.
      program: the program of the run.
      state: the state before the first step, with the shardings to restore to.
      place: the present devices and placement.

    Returns:
      The checkpoint, its state sharded as ``state`` is; None if there is none.

    Raises:
      ValueError: if it holds a state of another structure or shape, or if all
        checkpoints are damaged.
    """

    def like(then: checkpoints.Place) -> training.TrainState:
        if _same_layout(program, then, place):
            return state
        shapes = program.state_shapes(then.devices, then.placement).opt_state
        return state._replace(opt_state=_on_every_device(shapes, program))

    found = store.restore_latest(like)
    if found is None or _same_layout(program, found.place, place):
        return found
    shapes = program.state_shapes(place.devices, place.placement).opt_state
    assert program.layers is not None  # without curvature all layouts are the same
    host = jax.tree.map(np.asarray, found.state.opt_state)
    opt_state: Any = lbopt.reshard(host, shapes, program.layers)
    if program.mesh is not None:
        opt_state = lbopt.sharding.place(opt_state, program.mesh, AXIS)
    # Steps donate the state: it must not share buffers with the restored arrays.
    opt_state = jax.tree.map(jnp.copy, opt_state)
    return found._replace(state=found.state._replace(opt_state=opt_state))


def _same_layout(
    program: Program, one: checkpoints.Place, other: checkpoints.Place
) -> bool:
    if program.layers is None or one.devices == other.devices == 1:
        return True
    return (one.devices, one.placement) == (other.devices, other.placement)


def _on_every_device(shapes: Any, program: Program) -> Any:
    """Returns the same shapes, replicated on every device."""
    whole: Any = SingleDeviceSharding(jax.devices()[0])
    if program.mesh is not None:
        whole = NamedSharding(program.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )
