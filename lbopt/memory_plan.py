"""Memory per device for state and batch, from shapes alone, and XLA's own count.

State and batch are known before anything is compiled.  Only the compiler knows what a
step needs besides, above all for activations::

    state = jax.eval_shape(program.init)
    needed = memory_plan.plan(state, batch, devices=8)
    step = program.train_step.lower(*memory_plan.on_mesh(state, batch, mesh)).compile()
    print(memory_plan.with_xla(needed, step))
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lbopt import mesh_step, sharding, sizes, training
from lbopt.transforms.kfac_state import KfacState

__all__ = [
    "MemoryPlan",
    "on_mesh",
    "plan",
    "with_xla",
]


class MemoryPlan(NamedTuple):
    """Bytes on each device; ``str`` returns one line for the start of a run.

    Attributes:
      parameters: the model's parameters.
      model_state: the model's other collections, and the batch that mixup carries.
      factors: running averages of the curvature factors, and the earlier statistics
        that adaptive refreshing compares them with.
      inverses: inverses, including those still being computed, and corrected
        eigenvalues.
      optimizer: the rest of the optimizer's state, such as momentum.
      batch: the device's share of a batch.
      arguments: XLA's count of all of these; None before the step is compiled.
      temporaries: XLA's count of activations, gradients and statistics.
    """

    parameters: int
    model_state: int
    factors: int
    inverses: int
    optimizer: int
    batch: int
    arguments: int | None = None
    temporaries: int | None = None

    @property
    def total(self) -> int:
        """State and batch, from shapes alone."""
        return sum(self[:6])  # not XLA's two, which count the same bytes again

    def __str__(self) -> str:
        """Lists the parts that are not empty, and XLA's count if there is one."""
        parts = zip(self._fields[:6], self[:6], strict=True)
        named = [(name.replace("_", " "), size) for name, size in parts if size]
        line = f"memory per device: {_listed(named)}"
        if self.arguments is None or self.temporaries is None:
            return line
        by_xla = [("arguments", self.arguments), ("temporaries", self.temporaries)]
        return f"{line}; XLA: {_listed(by_xla)}"


def plan(
    state: training.TrainState,
    batch: Any,
    devices: int = 1,
    *,
    per_example: Sequence[str] = (),
) -> MemoryPlan:
    """Counts the bytes of a run's state and batch on each device.

    Args:
      state: the state, or its shapes from ``jax.eval_shape``.
      batch: the batch of all devices, or its shapes.
      devices: number of devices that share the batch.
      per_example: collections of the model state whose arrays lie along the batch.

    Returns:
      The plan, without XLA's count.

    Raises:
      ValueError: if the state was made for another number of devices.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lbopt import memory_plan, training
      >>> params, batch = {"w": jnp.ones((1000, 10))}, jnp.ones((64, 1000))
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> state = training.init_state(tx, params, {}, jax.random.key(0))
      >>> print(memory_plan.plan(state, batch, devices=8))
      memory per device: parameters 40 kB, optimizer 40 kB, batch 32 kB
    """
    _check_devices(state, devices)
    found = {"factors": 0, "inverses": 0}
    for node in jax.tree.leaves(state.opt_state, is_leaf=_is_curvature):
        if _is_curvature(node):
            found["factors"] += _own((node.factors, node.before, node.traces), devices)
            inverses = node.inverses, node.kept, node.pending, node.moments
            found["inverses"] += _own(inverses, devices)
    collections = dict(state.model_state)
    along = [collections.pop(name) for name in per_example]
    # Batches and what lies along them are cut like ``Sharded`` arrays, but not marked.
    return MemoryPlan(
        parameters=_own(state.params, devices),
        model_state=_own(collections, devices) + _own(along, devices, split=True),
        optimizer=_own(state.opt_state, devices) - sum(found.values()),
        batch=_own(batch, devices, split=True),
        **found,
    )


def with_xla(needed: MemoryPlan, step: jax.stages.Compiled) -> MemoryPlan:
    """Adds the compiler's count of a step to a plan.

    Args:
      needed: the plan.
      step: the compiled step.

    Returns:
      The plan; unchanged on platforms whose compiler does not count.
    """
    counted = step.memory_analysis()
    if counted is None:  # not every backend implements it
        return needed
    return needed._replace(
        arguments=counted.argument_size_in_bytes,
        temporaries=counted.temp_size_in_bytes,
    )


def on_mesh(
    state: training.TrainState,
    batch: Any,
    mesh: Mesh | None,
    *,
    per_example: Sequence[str] = (),
) -> tuple[training.TrainState, Any]:
    """Shapes of state and batch with their shardings, to lower a step for.

    Args:
      state: the state's shapes.
      batch: the shapes of the batch of all devices.
      mesh: the devices, with a single axis; None for one device.
      per_example: collections of the model state whose arrays lie along the batch.

    Returns:
      Both, with shardings.
    """
    if mesh is None:
        return state, batch
    (axis_name,) = mesh.axis_names  # on more axes it would be a guess which is split

    def placed(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return (
        jax.tree.map(
            placed, state, mesh_step.state_specs(state, axis_name, per_example)
        ),
        jax.tree.map(placed, batch, mesh_step.batch_specs(batch, axis_name)),
    )


def _own(tree: Any, devices: int, *, split: bool = False) -> int:
    """Bytes of a tree on each device; ``split`` if all arrays lie along the batch."""

    def size(node: Any) -> int:
        shared = devices if split or _is_sharded(node) else 1
        return sum(
            # Rounded up: shares are padded, and every device has all of a scalar.
            math.ceil(x.size / shared) * x.dtype.itemsize
            for x in jax.tree.leaves(node)
        )

    return sum(map(size, jax.tree.leaves(tree, is_leaf=_is_sharded)))


def _is_curvature(node: Any) -> bool:
    return isinstance(node, KfacState)


def _is_sharded(node: Any) -> bool:
    return isinstance(node, sharding.Sharded)


def _check_devices(state: training.TrainState, devices: int) -> None:
    for node in jax.tree.leaves(state.opt_state, is_leaf=_is_sharded):
        for x in jax.tree.leaves(node) if _is_sharded(node) else []:
            if x.shape[0] != devices:  # the first axis of a sharded array
                raise ValueError(
                    f"devices={devices} must be {x.shape[0]}, the number that the "
                    "optimizer's state was made for; pass it, or make another state"
                )


def _listed(named: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {sizes.text_of(size)}" for name, size in named)
