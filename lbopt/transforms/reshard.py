"""States that go on with another number of devices, by way of a form without any."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lbopt import collectives, sharding
from lbopt._typing import Array
from lbopt.collectives import Axis
from lbopt.curvature.factor import Factor
from lbopt.curvature.registry import Layer, Layers
from lbopt.sharding import Owners, Sharded
from lbopt.transforms import desk
from lbopt.transforms.kfac_state import AGAIN, KfacState, Pending, plain
from lbopt.transforms.placement import inverses_on_desk


def reshard(
    state: Any,
    like: Any,
    layers: Layers,
    *,
    block_size: int | None = None,
) -> Any:
    """A state as another number of devices, or another placement, would have it.

    Factors are put together and cut anew; inverses are taken from the desks of their
    owners and laid on others.  In between everything is keyed by its layer alone.
    Inverses under way (``Periods.delay``) are made anew at the next step, and have
    effect at once.

    Args:
      state: an optimizer's state or a whole training state, its arrays of the global
        shapes (as a checkpoint restores them).
      like: the state to be, of the same optimizer with another ``placement``:
        arrays or shapes, for example
        ``jax.eval_shape(optimizer.init, params)``.
      layers: what ``trace_layers`` found.
      block_size: what both optimizers were made with.

    Returns:
      The numbers of ``state`` in the shapes of ``like``; ``sharding.place`` puts them
      onto a mesh.

    Raises:
      ValueError: if the two differ in more than the devices, naming where.

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
    known = sharding.configured(layers.preconditioned, block_size=block_size)

    def one(new: Any, old: Any) -> Any:
        if not isinstance(new, KfacState):
            return old
        own = {path: known[path] for path in sorted(plain(old.factors))}
        old = jax.tree.map(jnp.asarray, old)  # a checkpoint's are NumPy's
        return _split(own, _whole(own, old), new)

    found = jax.tree.map(one, like, state, is_leaf=lambda x: isinstance(x, KfacState))
    _require_same_shapes(found, like)
    return found


def _whole(own: Mapping[str, Layer], state: KfacState) -> KfacState:
    """The state as one device has it."""
    inverses = dict(state.inverses)
    if isinstance(state.kept, Sharded):
        owners = owners_in(own, state)
        plan = desk.kept_desk(owners)
        owner = {u.path: o for u, o in zip(owners.units, owners.owner, strict=True)}
        for path in own.keys() - inverses.keys():
            numbers = state.kept.shards[owner[path]]
            inverses[path] = inverses_on_desk(own[path], owners, plan, numbers)
    return state._replace(
        factors=joined(own, state.factors),
        before=joined(own, state.before),
        inverses=inverses,
        kept=(),
    )


def _split(own: Mapping[str, Layer], whole: KfacState, like: KfacState) -> KfacState:
    """One device's state as the devices of another have it."""
    axis = Axis(None, 1)
    if isinstance(like.factors, Sharded):
        axis = Axis("data", _devices(like))
    kept: Any = ()
    if isinstance(like.kept, Sharded):
        kept = Sharded(_on_desks(own, owners_in(own, like), whole.inverses))
    return whole._replace(
        factors=_cut(own, whole.factors, axis),
        before=_cut(own, whole.before, axis),
        inverses={path: whole.inverses[path] for path in like.inverses},
        kept=kept,
        pending=_begun_anew(whole.pending, like.pending),
    )


def _begun_anew(pending: Any, like: Any) -> Any:
    """Empty desks; what was under way on the old ones is to be made again."""
    if pending == ():
        return pending
    step = jnp.where(pending.step >= 0, AGAIN, pending.step)
    desks = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.desks)
    return Pending(desks, step)


def _devices(state: KfacState) -> int:
    return jax.tree.leaves(state.factors)[0].shape[0]


def owners_in(own: Mapping[str, Layer], state: KfacState) -> Owners:
    """Who keeps which inverses; that does not depend on the period of inversion."""
    devices = _devices(state) if isinstance(state.factors, Sharded) else 1
    units = sharding.units_of(own)
    return sharding.owners_of(units, devices, gathered=list(state.inverses))


def joined(own: Mapping[str, Layer], factors: Any) -> Any:
    """Factors out of their shares."""
    if not isinstance(factors, Sharded):
        return factors

    def join(x: Array, shape: Any, factor: Factor) -> Array:
        rows = jnp.moveaxis(x.reshape(x.shape[0], -1, x.shape[-1]), 0, 1)
        return rows.reshape(rows.shape[0], -1)[:, : factor.size].reshape(shape.shape)

    return _each(own, factors.shards, join)


def _cut(own: Mapping[str, Layer], factors: Any, axis: Axis) -> Any:
    """Factors as shares."""
    if axis.name is None or factors == ():
        return factors

    def cut(x: Array, shape: Any, factor: Factor) -> Array:
        rows = collectives.cut(x.reshape(-1, factor.size), axis)
        copies = shape.shape[: len(shape.shape) - len(factor.shape)]
        return jnp.moveaxis(rows, 1, 0).reshape(axis.size, *copies, rows.shape[-1])

    return Sharded(_each(own, factors, cut))


def _each(own: Mapping[str, Layer], factors: Any, function: Any) -> dict[str, Any]:
    """``function(array, shape of the whole, kind)`` of every factor."""
    return {
        path: jax.tree.map(
            function, factors[path], layer.factor_shapes(), layer.block.factors
        )
        for path, layer in own.items()
    }


def _on_desks(
    own: Mapping[str, Layer], owners: Owners, inverses: Mapping[str, Any]
) -> Array:
    """Inverses as they lie with their owners."""
    numbers: list[Array] = []  # of each statistic, a row for each unit
    for path, layer in own.items():
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
    return desk.stacked(rows, numbers[0].dtype)


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
