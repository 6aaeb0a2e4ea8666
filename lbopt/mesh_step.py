"""A step of one device on all devices of a mesh, by ``shard_map`` or ``pmap``."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from lbopt import explicit_axes, sharding
from lbopt._typing import AxisName, OptState
from lbopt.collectives import Axis
from lbopt.curvature.refresh import Due

Step = Callable[..., tuple[Any, dict[str, Any]]]
"""``(state, batch, statistics_batch, due) -> (state, metrics)``."""
Check = Callable[[Any, Any, Any], None]
"""Raises ValueError for a state and batches that the step cannot take."""


def state_specs(
    state: Any, axis_name: AxisName | None, per_example: Sequence[str] = ()
) -> Any:
    """Partition specs of a training state.

    Args:
      state: the state, or its shapes.
      axis_name: the axis of the optimizer and of the batch.
      per_example: collections of the model state whose arrays lie along the batch.

    Returns:
      A ``PartitionSpec`` for each array, in the structure of the state.
    """
    found = sharding.specs(state, axis_name)
    if not per_example:
        return found
    collections = {
        name: batch_specs(state.model_state[name], axis_name)
        if name in per_example
        else spec
        for name, spec in found.model_state.items()
    }
    return found._replace(model_state=collections)


def batch_specs(tree: Any, axis_name: AxisName | None) -> Any:
    """Partition specs of arrays that lie along the batch; scalars are replicated."""
    return jax.tree.map(
        lambda x: PartitionSpec(axis_name) if x.ndim else PartitionSpec(), tree
    )


def split_layers(opt_state: OptState) -> set[str]:
    """Paths of the layers whose gradients and statistics the optimizer combines.

    Args:
      opt_state: the state of any optax chain.

    Returns:
      The layers whose factors are split over devices.
    """
    # Found by their mark, wherever in a chain the curvature transform is.
    nodes = jax.tree.leaves(
        opt_state, is_leaf=lambda x: isinstance(x, sharding.Sharded)
    )
    split = [node.shards for node in nodes if isinstance(node, sharding.Sharded)]
    return {path for shards in split if isinstance(shards, dict) for path in shards}


def without_mesh(step: Step) -> Step:
    """The compiled step where ``jit`` alone places the work."""

    def placed(
        state: Any, batch: Any, statistics_batch: Any = None, due: Due = Due()
    ) -> Any:
        args = (state, batch, statistics_batch, due)
        specs = explicit_axes.specs_of(state), PartitionSpec()
        return explicit_axes.on_auto_axes(step, args, specs)

    # Donated: the old and the new state are never in memory together.
    return jax.jit(placed, donate_argnums=0)


def by_shard_map(
    step: Step, mesh: Mesh, axis: Axis, per_example: Sequence[str], check: Check
) -> Step:
    """The compiled step on a mesh.

    Args:
      step: the step of one device.
      mesh: the devices.
      axis: the axis over which the batch is distributed.
      per_example: collections of the model state whose arrays lie along the batch.
      check: called with all arguments, before anything is compiled.

    Returns:
      The step, which donates its state.
    """
    # Only its shape and its devices are of use: inside, every axis is Manual.
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def sharded(
        state: Any, batch: Any, statistics_batch: Any = None, due: Due = Due()
    ) -> Any:
        check(state, batch, statistics_batch)
        specs = state_specs(state, axis.name, per_example)
        along = PartitionSpec(axis.name)
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, along, along, PartitionSpec()),
            out_specs=(specs, PartitionSpec()),
            # Collectives are placed by hand; jax would add its own for what it takes
            # to vary over devices.
            check_vma=False,
        )
        args = (state, batch, statistics_batch, due)
        return explicit_axes.on_auto_axes(mapped, args, (specs, PartitionSpec()))

    return jax.jit(sharded, donate_argnums=0)


def by_pmap(step: Step, mesh: Mesh, axis: Axis, check: Check) -> Step:
    """The step under ``jax.pmap``, called like the one on a mesh.

    Args:
      step: the step of one device.
      mesh: the devices, along one axis.
      axis: this axis.
      check: called with all arguments, before anything is compiled.

    Returns:
      The step.
    """
    # pmap takes its in_axes as a tree, which is known once there is a state.
    compiled: dict[Any, Any] = {}

    def shares(batch: Any) -> Any:
        # [batch, ...] to [devices, batch / devices, ...]
        return jax.tree.map(lambda x: x.reshape(axis.size, -1, *x.shape[1:]), batch)

    def pmapped(state: Any, batch: Any, statistics_batch: Any, due: Due) -> Any:
        check(state, batch, statistics_batch)
        tree = jax.tree.structure(state)
        if tree not in compiled:
            axes = jax.tree.map(
                lambda spec: 0 if spec else None,  # an empty spec: replicated
                sharding.specs(state, axis.name),
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
            compiled[tree] = jax.pmap(
                step,
                axis.name,
                in_axes=(axes, 0, 0, None),
                out_axes=(axes, None),
                devices=list(mesh.devices.ravel()),
            )
        return compiled[tree](state, shares(batch), shares(statistics_batch), due)

    return pmapped
