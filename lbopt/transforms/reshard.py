"""Conversion of optimizer states between numbers of devices and placements."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lbopt import collectives, sharding
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature import layer_table
from lbopt.curvature.factor import Factor
from lbopt.curvature.registry import Layer, Layers
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import owner_buffers
from lbopt.transforms.kfac_state import (
    AGAIN,
    KfacState,
    Pending,
    is_curvature_state,
    plain,
)
from lbopt.transforms.placement import inverses_in_buffer


def reshard(
    state: Any,
    like: Any,
    layers: Layers,
    *,
    block_size: int | None = None,
) -> Any:
    """Converts a state to another number of devices or another placement.

    Shares of factors are joined and cut anew, and inverses move from the buffers of
    their old owners to those of the new.  Pending inverses (``Periods.delay``) are
    recomputed at the next step, and take effect at once.

    Args:
      state: an optimizer's state or a whole training state, with arrays of the global
        shapes (as a checkpoint restores them).
      like: the wanted state, of the same optimizer with another ``placement``; arrays
        or shapes, for example ``jax.eval_shape(optimizer.init, params)``.
      layers: the result of ``trace_layers``.
      block_size: the ``block_size`` of both optimizers.

    Returns:
      The numbers of ``state`` in the shapes of ``like``; ``sharding.place`` puts them
      onto a mesh.

    Raises:
      ValueError: if the two differ in more than the placement, naming an array.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lbopt
      >>> model, x = nn.Sequential([nn.Dense(3)]), jnp.ones((8, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> layers = lbopt.trace_layers(loss_fn, params, x)
      >>> one = lbopt.scale_by_kfac(layers)
      >>> four = lbopt.scale_by_kfac(layers, placement=lbopt.Placement("data", 4))
      >>> like = jax.eval_shape(four.init, params)
      >>> state = lbopt.reshard(one.init(params), like, layers)
      >>> state.factors.shards["layers_0"].a.shape  # 21 numbers in 4 shares
      (4, 6)
    """
    known = layer_table.configured(layers.preconditioned, block_size=block_size)

    def one(new: Any, old: Any) -> Any:
        if not is_curvature_state(new):
            return old
        layers = {path: known[path] for path in sorted(plain(old.factors))}
        old = jax.tree.map(jnp.asarray, old)  # checkpoints restore NumPy arrays
        return _split(layers, _whole(layers, old), new)

    # Everything outside of the curvature's state passes as it is.
    found = jax.tree.map(one, like, state, is_leaf=is_curvature_state)
    _require_same_shapes(found, like)
    return found


def _whole(layers: Mapping[str, Layer], state: KfacState) -> KfacState:
    """Returns the state as one device would have it."""
    inverses = dict(state.inverses)
    if isinstance(state.kept, Sharded):
        owners = owners_in(layers, state)
        layout = owner_buffers.kept_layout(owners)
        # All units of a layer have one owner.
        owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
        for path in layers.keys() - inverses.keys():
            numbers = state.kept.shards[owner[path]]
            inverses[path] = inverses_in_buffer(layers[path], owners, layout, numbers)
    return state._replace(
        factors=joined(layers, state.factors),
        before=joined(layers, state.before),
        inverses=inverses,
        kept=(),
    )


def _split(layers: Mapping[str, Layer], whole: KfacState, like: KfacState) -> KfacState:
    """Returns one device's state with the shares and buffers of another's devices."""
    axis = Axis(None, 1)
    if isinstance(like.factors, Sharded):
        axis = Axis("data", _devices(like))  # of any name; only its size is read
    kept: Any = ()
    if isinstance(like.kept, Sharded):
        kept = Sharded(_in_buffers(layers, owners_in(layers, like), whole.inverses))
    return whole._replace(
        factors=_cut(layers, whole.factors, axis),
        before=_cut(layers, whole.before, axis),
        inverses={path: whole.inverses[path] for path in like.inverses},
        kept=kept,
        pending=_begun_anew(whole.pending, like.pending),
    )


def _begun_anew(pending: Any, like: Any) -> Any:
    """Returns empty buffers, and marks inverses that were pending for recomputation."""
    if pending == ():
        return pending
    step = jnp.where(pending.step >= 0, AGAIN, pending.step)
    buffers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.desks)
    return Pending(buffers, step)


def _devices(state: KfacState) -> int:
    return jax.tree.leaves(state.factors)[0].shape[0]


def owners_in(layers: Mapping[str, Layer], state: KfacState) -> Owners:
    """Returns the owner of each unit in a state."""
    # Owners do not depend on the period of inversion, which the state does not know.
    devices = _devices(state) if isinstance(state.factors, Sharded) else 1
    units = sharding.units_of(layers)
    return sharding.owners_of(units, devices, gathered=list(state.inverses))


def joined(layers: Mapping[str, Layer], factors: Any) -> Any:
    """Joins the shares of factors."""
    if not isinstance(factors, Sharded):
        return factors

    def join(x: Array, shape: Any, factor: Factor) -> Array:
        # [devices, copies, share] to [copies, devices, share]; the last are padded.
        rows = jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 0, 1)
        return rows.reshape(rows.shape[0], -1)[:, : factor.size].reshape(shape.shape)

    return _each(layers, factors.shards, join)


def _cut(layers: Mapping[str, Layer], factors: Any, axis: Axis) -> Any:
    """Cuts factors into shares."""
    if axis.name is None or factors == ():
        return factors

    def cut(x: Array, shape: Any, factor: Factor) -> Array:
        rows = collectives.cut(x.reshape(-1, factor.size), axis)
        # [devices, copies, share] with the copies' own axes, as ``init_state`` has it.
        copies = shape.shape[: len(shape.shape) - len(factor.shape)]
        return jnp.moveaxis(rows, 1, 0).reshape(axis.size, *copies, rows.shape[-1])

    return Sharded(_each(layers, factors, cut))


def _each(layers: Mapping[str, Layer], factors: Any, function: Any) -> dict[str, Any]:
    """Returns ``function(array, shape of the whole, kind)`` of every factor."""
    return {
        path: jax.tree.map(
            function, factors[path], layer.factor_shapes(), layer.block.factors
        )
        for path, layer in layers.items()
    }


def _in_buffers(
    layers: Mapping[str, Layer], owners: Owners, inverses: Mapping[str, Any]
) -> Array:
    """Returns the buffers of owners with the inverses that they keep."""
    numbers: list[Array] = []  # of each statistic, [units, numbers]
    for path, layer in layers.items():
        for inverse, shape, factor in zip(
            inverses[path], layer.factor_shapes(), layer.block.factors, strict=True
        ):
            count = shape.size // factor.size
            leaves = [x.reshape(count, -1) for x in jax.tree.leaves(inverse)]
            numbers.append(jnp.concatenate(leaves, 1))
    rows: list[list[Array]] = [[] for _ in range(owners.devices)]
    for unit, owner, gathered in zip(
        owners.units, owners.owner, owners.gathered, strict=True
    ):
        if not gathered:
            rows[owner].append(numbers[unit.statistic][unit.row])
    return owner_buffers.stacked(rows, numbers[0].dtype)


def _require_same_shapes(found: Any, like: Any) -> None:
    """Raises ValueError unless two states have one structure and shapes."""
    new, old = (jax.tree_util.tree_leaves_with_path(x) for x in (found, like))
    for (path, x), (at, y) in zip(new, old, strict=False):
        if path != at or x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(
                f"like{jax.tree_util.keystr(at)} is {y.dtype}{list(y.shape)}, and the "
                f"state has {x.dtype}{list(x.shape)} at {jax.tree_util.keystr(path)}; "
                "only placement= may differ between the two optimizers"
            )
