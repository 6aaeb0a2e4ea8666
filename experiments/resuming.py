"""Where a run goes on: its newest whole checkpoint, laid out for its present devices.

A checkpoint holds the state as the devices of its run had it. On as many devices with
the same placement it is read straight to them. Otherwise what belongs to the curvature
is read whole, and cut anew by `lbopt.reshard`.
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
    """Reads the newest whole checkpoint.

    Args:
        store: The checkpoints.
        program: The program of the run.
        state: The state before the first step, which tells where arrays shall lie.
        place: The present devices and placement.

    Returns:
        The checkpoint, its state laid out as `state` is; `None` if there is none.

    Raises:
        ValueError: If it holds a state of another structure or shape, or if there are
            checkpoints, but all of them are damaged.
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
    assert program.layers is not None  # else any layout is the same
    host = jax.tree.map(np.asarray, found.state.opt_state)
    opt_state: Any = lbopt.reshard(host, shapes, program.layers)
    if program.mesh is not None:
        opt_state = lbopt.sharding.place(opt_state, program.mesh, AXIS)
    # Buffers of their own, which steps may donate.
    opt_state = jax.tree.map(jnp.copy, opt_state)
    return found._replace(state=found.state._replace(opt_state=opt_state))


def _same_layout(
    program: Program, one: checkpoints.Place, other: checkpoints.Place
) -> bool:
    if program.layers is None or one.devices == other.devices == 1:
        return True
    return (one.devices, one.placement) == (other.devices, other.placement)


def _on_every_device(shapes: Any, program: Program) -> Any:
    """The same shapes, to be read whole by each device."""
    whole: Any = SingleDeviceSharding(jax.devices()[0])
    if program.mesh is not None:
        whole = NamedSharding(program.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )
